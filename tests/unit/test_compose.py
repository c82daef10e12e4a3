"""The compose file: closed, told what its commands take, secrets that are files, ports that stand on loopback."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tutelage.config import validate
from tutelage.evaluator.config import ServeConfig
from tutelage.teacher_server.config import TeacherConfig
from tutelage.trainer.config.run import CohortConfig

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "compose"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
RUNNING = sorted(set(SERVICES) - {"volumes"})
CONFIGS = {"teacher": TeacherConfig, "evaluator": ServeConfig, "cohort": CohortConfig}


def settings(name: str) -> dict:
    return yaml.safe_load((FOLDER / "settings" / f"{name}.yaml").read_text())


def named_secrets(value: object) -> set[str]:
    return set(re.findall(r"/run/secrets/(\w+)", str(value)))


@pytest.mark.parametrize("name", SERVICES)
def test_services_may_do_no_more_than_they_have_to(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    if name == "volumes":  # Gives new volumes to the services' user, and speaks to nobody.
        assert (service["cap_add"], service["network_mode"]) == (["CHOWN"], "none")
        assert "secrets" not in service
    else:
        assert service["user"] == "10001:10001"
        assert "cap_add" not in service


@pytest.mark.parametrize("name", RUNNING)
def test_health_is_asked_by_the_image_or_here(name):
    if "build" in SERVICES[name] and "healthcheck" not in SERVICES[name]:
        dockerfile = ROOT / SERVICES[name]["build"]["dockerfile"]
        port = settings(name.removeprefix("tutelage-"))["health_port"]
        assert re.search(rf'HEALTHCHECK .*\\\n .*"127\.0\.0\.1:{port}"', dockerfile.read_text())
    else:
        assert SERVICES[name]["healthcheck"]["test"][0] == "CMD"


@pytest.mark.parametrize("name", SERVICES)
def test_images_and_mounted_files_are_there(name):
    service = SERVICES[name]
    if build := service.get("build"):
        assert (FOLDER / build["context"]).resolve() == ROOT
        text = (ROOT / build["dockerfile"]).read_text()
        assert "target" not in build or re.search(rf"^FROM .* AS {build['target']}$", text, re.MULTILINE)
    else:
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
    for mount in service.get("volumes", []):
        source, target, *mode = mount.split(":")
        if source.startswith("."):
            assert (FOLDER / source).is_file()
            assert mode == ["ro"], target
        else:
            assert source in COMPOSE["volumes"]


def test_secrets_are_files_and_each_has_what_it_reads_and_no_more():
    assert all(set(secret) == {"file"} for secret in COMPOSE["secrets"].values())
    read = {
        "tutelage-teacher": settings("teacher"),
        "tutelage-evaluator": settings("evaluator"),
        "ray-head": settings("cohort"),
        "ray-worker": settings("cohort"),
        "prometheus": (FOLDER / "prometheus.yaml").read_text(),
        "grafana": {},
    }
    for name in RUNNING:
        variables = SERVICES[name].get("environment", {})
        assert set(SERVICES[name]["secrets"]) == named_secrets(read[name]) | named_secrets(variables), name
        for variable, value in variables.items():
            if re.search("TOKEN|PASSWORD|KEY|SECRET", variable):
                assert value == "token" or value.startswith("/run/secrets/"), variable
        assert "env_file" not in SERVICES[name]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for secret in COMPOSE["secrets"].values():
        assert f"**/*{Path(secret['file']).suffix}" in ignored, "it would be copied into an image's build"
    assert set(COMPOSE["secrets"]) == {secret for name in RUNNING for secret in SERVICES[name]["secrets"]}


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_are_what_the_commands_take_and_tls_is_mutual(name):
    config = validate(CONFIGS[name], settings(name))
    if isinstance(config, CohortConfig):
        for each in (config.teacher, config.evaluator):
            assert each.tls.ca
            assert each.tls.key
            assert each.token_file
            assert str(each.address).rpartition(":")[0] in SERVICES
    else:
        assert config.tls.client_ca is not None
        assert config.token_file is not None
        assert not config.insecure


def test_published_ports_stand_on_loopback_unless_told_and_plaintext_always():
    published = {name: port for name in RUNNING for port in SERVICES[name].get("ports", [])}
    for name, port in published.items():
        told = "${TUTELAGE_BIND:-127.0.0.1}:" if name.startswith("tutelage-") else "127.0.0.1:"
        assert port.startswith(told), name


def test_ray_and_grafana_speak_plaintext_in_networks_of_their_own():
    members = {network: {n for n in RUNNING if network in SERVICES[n]["networks"]} for network in COMPOSE["networks"]}
    assert members["ray"] == {"ray-head", "ray-worker", "prometheus"}
    assert members["seeing"] == {"prometheus", "grafana"}
    for name in ("ray-head", "ray-worker"):
        assert SERVICES[name]["environment"]["RAY_AUTH_MODE"] == "token"


@pytest.mark.parametrize("name", ["ray-head", "ray-worker"])
def test_rays_commands_parse(name):
    ray = pytest.importorskip("ray.scripts.scripts")
    program, subcommand, *arguments = SERVICES[name]["command"]
    assert (program, subcommand) == ("ray", "start")
    assert ray.start.make_context("start", list(arguments)).params["block"] is True


def test_prometheus_takes_its_settings():
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed")
    command = [promtool, "check", "config", "--syntax-only", str(FOLDER / "prometheus.yaml")]
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_the_jobs_have_the_names_that_rules_know():
    own, one_machine = (
        {job["job_name"] for job in yaml.safe_load(path.read_text())["scrape_configs"]}
        for path in (FOLDER / "prometheus.yaml", ROOT / "deploy" / "monitoring" / "prometheus.yaml")
    )
    assert own == one_machine


def test_compose_takes_the_file():
    program = shutil.which("docker-compose") or (["docker", "compose"] if shutil.which("docker") else None)
    words = [program] if isinstance(program, str) else program
    if words is None or subprocess.run([*words, "version"], capture_output=True).returncode != 0:
        pytest.skip("there is no docker compose")
    said = subprocess.run(
        [*words, "-f", str(FOLDER / "compose.yaml"), "config", "--quiet"], capture_output=True, text=True
    )
    assert said.returncode == 0, said.stderr
