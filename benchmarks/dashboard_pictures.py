"""The walk-through of docs/ray.md, command by command, and its pictures of Ray's dashboard.

    python benchmarks/dashboard_pictures.py [--out build/pictures]

Four hosts, each a network namespace (which needs root): a teacher with mutual TLS and tokens, Ray's head, two nodes
for students; all models are tiny. Types what the page says, from its text, and takes the pictures with Chromium
(`chromium` on the PATH). Also prints what one student's gauges look like to Prometheus.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "proto"), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from browser import Browser  # noqa: E402
from guides import script_of, section  # noqa: E402
from hosts import Host, hosts, why_not  # noqa: E402
from ray_cluster import wait_until  # noqa: E402
from tiny import write_tiny_model  # noqa: E402
from tutelage.errors import NotFound  # noqa: E402
from tutelage.files import make_directory_once  # noqa: E402
from tutelage.trainer.cluster.run_control import read_run_status  # noqa: E402
from tutelage.trainer.model.layer_pruning import prune_layers  # noqa: E402

BUILD = Path(os.environ.get("TUTELAGE_BUILD_DIR", ROOT / "build"))
RAY, DEPLOY = ((ROOT / "docs" / name).read_text() for name in ("ray.md", "deploy.md"))
DASHBOARD, RUN = "http://127.0.0.1:8265", Path("runs/word-problems")
MEASURED_STEP, GIVEN_JOB = 40, "train-word-problems-20260101-120000"
HOSTS = ("head", "one", "two", "teacher")
ADDRESSES = {"10.0.0.1": "head", "10.0.0.4": "teacher"}
"""Of the page."""


def write_data(path: Path) -> None:
    """Subtractions in words, with answers."""
    names, things = ("Ann", "Bob", "Mona", "Samir"), ("apples", "stones", "marbles")
    rows = [
        {
            "question": f"{names[i % 4]} has {40 + i} {things[i % 3]} and {names[(i + 1) % 4]} has {3 + i % 30}. "
            f"How many more {things[i % 3]} does {names[i % 4]} have?",
            "answer": f"{40 + i} - {3 + i % 30} = {37 + i - i % 30}. The answer is {37 + i - i % 30}.",
        }
        for i in range(200)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Network:
    """The hosts, on which sections of the page are typed in one folder that all see.

    Args:
        hosts: by name.
        folder: that one.

    """

    def __init__(self, hosts: dict[str, Host], folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = {"PYTHONPATH": str(ROOT / "proto"), "PATH": path, "OMP_NUM_THREADS": "1"}
        self.environment |= {"RAY_TMPDIR": str(folder / "ray"), "RAY_USAGE_STATS_ENABLED": "0"}

    def script(self, page: str, title: str, **instead: str) -> str:
        """The commands of a section, with these hosts' addresses."""
        text = section(page, title)
        for given, name in ADDRESSES.items():
            text = text.replace(given, self.hosts[name].address)
        return f"cd '{self.folder}'\n{script_of(text, instead)}"

    def types(self, host: str, title: str, page: str = RAY, **instead: str) -> str:
        """Types a section on a host; gives what was printed."""
        command = ["ip", "netns", "exec", self.hosts[host].namespace, "bash", "-c", self.script(page, title, **instead)]
        done = subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True, check=False, timeout=120
        )
        print(f"[{host}] {title}: exit code {done.returncode}\n{done.stdout}{done.stderr}", flush=True)
        if done.returncode:
            raise SystemExit(f"{title} fails")
        return done.stdout


def tiny_models(folder: Path) -> None:
    """Teacher and student, under the names of the page."""
    models = folder / "build" / "models"
    models.mkdir(parents=True)
    (models / "teacher").symlink_to(make_directory_once(BUILD / "models" / "tiny", write_tiny_model))
    prune_layers(models / "teacher", models / "student-8-layers", layers=2)


def students(folder: Path) -> dict[str, str]:
    """The state of each; those that run have come some steps far, or there are none yet."""
    try:
        rows = read_run_status(folder / RUN).students
    except NotFound:
        return {}
    early = any(row.state == "running" and row.step < MEASURED_STEP for row in rows)
    return {} if early else {row.student: row.state for row in rows}


def running(folder: Path, count: int) -> Callable[[], bool]:
    """Whether so many students train."""
    return lambda: list(students(folder).values()).count("running") == count


def fetch(network: Network, url: str) -> str:
    """What is behind an address of the head's."""
    token = (network.folder / "ray.token").read_text().strip()
    command = ["ip", "netns", "exec", network.hosts["head"].namespace, "curl", "-sS", "--oauth2-bearer", token, url]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout


def actors(network: Network) -> dict[str, str]:
    """The living actors that the dashboard knows, by name; it hears of them some time after they are there."""
    known = json.loads(fetch(network, f"{DASHBOARD}/logical/actors"))["data"]["actors"]
    return {actor["name"]: key for key, actor in known.items() if actor["state"] == "ALIVE"}


def gauges_of(network: Network, student: str) -> str:
    """A student's gauges, as every node offers them to Prometheus."""
    discovery = network.folder / "ray" / "ray" / "prom_metrics_service_discovery.json"
    targets = [target for entry in json.loads(discovery.read_text()) for target in entry["targets"]]
    lines = "".join(fetch(network, f"http://{target}/metrics") for target in targets).splitlines()
    return "\n".join(line for line in lines if line.startswith("ray_tutelage_student") and f'"{student}"' in line)


def submit(network: Network) -> str:
    """Types that section until the head takes jobs, which it does some seconds after its dashboard answers."""
    for _ in range(10):
        with suppress(SystemExit):
            return network.types("head", "Submit", **{"steps: 2000": "steps: 200000"})
        time.sleep(5)
    raise SystemExit("no job is taken")


def walk_through(network: Network, out: Path) -> None:
    """All of the page's sections in order, and the pictures between them."""
    folder, head = network.folder, network.hosts["head"]
    network.types("head", "Certificates and tokens", DEPLOY, **{"tutelage-teacher": network.hosts["teacher"].address})
    address = folder / "teacher.address"
    serve = network.script(RAY, "The teacher", **{"--port 50051": f"--port 50051 --address-file {address}"})
    teacher = network.hosts["teacher"].start(["bash", "-c", serve], folder / "teacher.log", network.environment)
    network.types("head", "On the head")
    for host in ("one", "two"):
        network.types(host, "On every other node")
    wait_until(lambda: address.exists() or teacher.poll() is not None, 240)
    job = submit(network).split()[1].rstrip(";")
    wait_until(running(folder, 2), 240)
    network.types("head", "Watch")
    browser = Browser(DASHBOARD, (folder / "ray.token").read_text().strip(), ["ip", "netns", "exec", head.namespace])
    try:
        wait_until(lambda: {"student-gkd", "student-forward-kl"} <= actors(network).keys(), 60)
        browser.take(f"{DASHBOARD}/#/jobs/{job}", out / "ray-job.png", 1160)
        browser.take(f"{DASHBOARD}/#/cluster", out / "ray-cluster.png", 760)
        browser.take(f"{DASHBOARD}/#/actors", out / "ray-actors.png", 860)
        browser.take(f"{DASHBOARD}/#/actors/{actors(network)['student-gkd']}", out / "ray-actor.png", 1120)
        print(gauges_of(network, "gkd"))
        network.types("head", "Scale")
        wait_until(running(folder, 3), 120)
        wait_until(lambda: "student-reverse-kl" in actors(network), 60)
        browser.take(f"{DASHBOARD}/#/actors", out / "ray-scaled.png", 860)
    finally:
        browser.close()
    network.types("head", "Pause, stop, resume one")
    again = network.types("head", "Stop all, and go on", **{GIVEN_JOB: job})
    wait_until(running(folder, 2), 240)
    second = re.findall(r"^job (\S+);", again, re.MULTILINE)[0]
    network.types("head", "Stop all, and go on", **{GIVEN_JOB: second, "tutelage train": ": tutelage train"})
    print(network.hosts["head"].listening())


def main() -> None:
    """Walks through, and takes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=BUILD / "pictures")
    out: Path = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if reason := why_not():
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory(prefix="tutelage-") as name, hosts(*HOSTS) as made:
        folder = Path(name)
        tiny_models(folder)
        write_data(folder / "rows.jsonl")
        try:
            walk_through(Network(made, folder), out)
        except BaseException:
            print((folder / "teacher.log").read_text()[-3000:] if (folder / "teacher.log").exists() else "no teacher")
            raise


if __name__ == "__main__":
    main()
