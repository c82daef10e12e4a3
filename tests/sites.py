"""A site of several hosts: teachers, Ray's nodes and an evaluator, with mutual TLS and tokens between all of them.

What Ray 2.60 cannot encrypt is `PLAINTEXT`; each host's firewall closes it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from hosts import Host, hosts, why_not
from trainer_cases import write_rows
from trainer_cohorts import process_of, steps_done
from tutelage.certificates import Authority
from tutelage.runtime.programs import tutelage
from tutelage.trainer.model.layer_pruning import prune_layers

RAY = str(Path(sys.executable).with_name("ray"))
HELLO = str(Path(__file__).with_name("hosts.py"))
RAY_PORT, TEACHER_PORT, EVALUATOR_PORT, DASHBOARD_PORT = 6379, 50051, 50052, 8265
PLAINTEXT = {"dashboard agent": 52365, "metrics": 8090, "runtime environments": 8091}
HEAD_PLAINTEXT = {"autoscaler's metrics": 44217, "dashboard's metrics": 44227}


class Site:
    """What runs on the hosts, and the files by which it knows each other."""

    def __init__(self, net: dict[str, Host], folder: Path, temporary: Path, model: Path) -> None:
        self.net, self.folder, self._temporary, self._model = net, folder, temporary, model
        self._nodes: dict[str, tuple[list[str], subprocess.Popen[bytes]]] = {}
        authority = Authority(folder)
        for name, host in net.items():
            # Ray's processes reach those of their own host by loopback too.
            authority.issue(name, [host.address, "127.0.0.1", "localhost"], 1, asks=True)
            host.close(*PLAINTEXT.values(), *HEAD_PLAINTEXT.values())
        authority.issue("student", [], 1)
        for file, text in {
            "teacher.tokens": "teach-me score,info",
            "teacher.token": "teach-me",
            "evaluator.tokens": "mark-me submit,info",
            "evaluator.token": "mark-me",
            "ray.token": "0123456789abcdef" * 4,
        }.items():
            (folder / file).write_text(f"{text}\n")
            (folder / file).chmod(0o600)

    def start(self, name: str, what: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Starts a command on a host; its output goes to `<host>-<what>.log`."""
        environment = {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "ray.token"),
            "RAY_USE_TLS": "1",
            "RAY_TLS_SERVER_CERT": str(self.folder / f"{name}.pem"),
            "RAY_TLS_SERVER_KEY": str(self.folder / f"{name}.key"),
            "RAY_TLS_CA_CERT": str(self.folder / "ca.pem"),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        return self.net[name].start(command, self.folder / f"{name}-{what}.log", environment)

    def start_teacher(self, name: str) -> Callable[[], bool]:
        """Gives whether it serves."""
        options = ["--max-model-len", "256", "--kv-cache-memory-bytes", str(2**27), "--enforce-eager"]
        return self._serve(name, TEACHER_PORT, "teacher", ["teacher", "serve", str(self._model), *options])

    def start_evaluator(self, name: str) -> Callable[[], bool]:
        """Gives whether it serves."""
        options = ["--frames", str(self.folder / "frames"), "--queue", str(self.folder / "queue")]
        options += ["--engine", "transformers", "--dtype", "float32", "--max-new-tokens", "8", "--batch-size", "4"]
        return self._serve(name, EVALUATOR_PORT, "evaluator", ["evaluate", "serve", *options])

    def _serve(self, name: str, port: int, service: str, command: list[str]) -> Callable[[], bool]:
        folder, ready = self.folder, self.folder / f"{name}-{service}.address"
        options = ["--host", self.net[name].address, "--port", str(port), "--address-file", str(ready)]
        options += ["--token-file", str(folder / f"{service}.tokens"), "--tls.client-ca", str(folder / "ca.pem")]
        options += ["--tls.certificate", str(folder / f"{name}.pem"), "--tls.key", str(folder / f"{name}.key")]
        process = self.start(name, service, tutelage(*command, *options))

        def serves() -> bool:
            assert process.poll() is None, self.logs()
            return ready.exists()

        return serves

    def start_ray(self, name: str, cpus: int = 4) -> None:
        """A node, which is there afterwards; the head takes no student."""
        log = self.folder / f"{name}-ray.log"
        command = [RAY, "start", "--block", f"--node-ip-address={self.net[name].address}"]
        command += ["--object-store-memory=80000000", f"--dashboard-agent-listen-port={PLAINTEXT['dashboard agent']}"]
        command += [f"--metrics-export-port={PLAINTEXT['metrics']}"]
        command += [f"--runtime-env-agent-port={PLAINTEXT['runtime environments']}"]
        if name == "head":
            command += ["--head", f"--port={RAY_PORT}", "--num-cpus=0", "--dashboard-host=127.0.0.1"]
            command += [f"--dashboard-port={DASHBOARD_PORT}", f"--temp-dir={self._temporary}"]
        else:
            command += [f"--address={self.net['head'].address}:{RAY_PORT}", f"--num-cpus={cpus}"]
        self._nodes[name] = command, self.start(name, "ray", command)
        self.wait_until(f"Ray's node {name}", lambda: "Ray runtime started" in log.read_text(), 180)

    def destroy(self, name: str) -> None:
        """Its power is cut, for good; nobody is told."""
        self.net[name].cut_off()
        self._nodes.pop(name, None)
        self.net[name].kill_all()

    def _restart_nodes(self) -> None:
        """What a host's service manager does: Ray ends a node that it gave up, and one that takes 30 s to start."""
        for name, (command, node) in self._nodes.items():
            if node.poll() is not None:
                print(f"{time.strftime('%T')} Ray's node {name} ended and is started again", flush=True)
                self._nodes[name] = command, self.start(name, "ray", command)

    def cohort(self, students: Sequence[str], teachers: Sequence[str], steps: int, **more: Any) -> Path:
        """The file of a cohort whose students write, are scored by these teachers' hosts and save often."""
        prune_layers(self._model, self.folder / "init", layers=2)
        values: dict[str, Any] = {
            "run": "cut-off",
            "output": str(self.folder / "run"),
            "ray": {"address": f"{self.net['head'].address}:{RAY_PORT}"},
            "teacher": {
                "address": [f"{self.net[name].address}:{TEACHER_PORT}" for name in teachers],
                **self.access("teacher"),
            },
            "defaults": {
                "init": str(self.folder / "init"),
                "data": {"path": str(write_rows(self.folder / "rows.jsonl"))},
                "objective": {"name": "gkd", "on_policy_fraction": 1.0} if teachers else {"name": "sft"},
                "batch": {"sequences": 4, "max_tokens": 96},
                "sampling": {"max_new_tokens": 12},
                "held_out": {"sequences": 4, "every_steps": 40},
                "steps": steps,
                "save_every_steps": 5,
            },
            "students": [{"id": name} for name in students],
        }
        path = self.folder / "cohort.yaml"
        path.write_text(yaml.safe_dump(values | more))
        return path

    def access(self, service: str) -> dict[str, Any]:
        """How a student makes itself known to a service."""
        files = {"ca": "ca.pem", "certificate": "student.pem", "key": "student.key"}
        tls = {key: str(self.folder / file) for key, file in files.items()}
        return {"tls": tls, "token_file": str(self.folder / f"{service}.token")}

    def steps_done(self, students: Sequence[str]) -> list[int]:
        """By student, the newest step of its metrics; -1 of one that has none."""
        return [steps_done(self.folder / "run/students" / name) for name in students]

    def hosts_of(self, students: Sequence[str]) -> list[str]:
        """By student, where its process runs; empty if it has ended."""
        processes = [process_of(self.folder / "run/students" / name) for name in students]
        return [next((name for name, host in self.net.items() if each in host.process_ids()), "") for each in processes]

    def answers(self, name: str, other: str) -> dict[int, str]:
        """What the ports of a host say to a host, itself perhaps, that has no certificate (`hosts.hello`)."""
        host = self.net[name]
        command = [sys.executable, HELLO, str(self.folder / "ca.pem")]
        asks = self.start(other, "hello", [*command, *(f"{host.address}:{port}" for port in host.ports())])
        assert asks.wait(120) == 0, self.logs()
        said = json.loads((self.folder / f"{other}-hello.log").read_text().splitlines()[-1])
        answers = {int(address.rpartition(":")[2]): answer for address, answer in said.items()}
        there = host.ports()  # not those of processes that have ended meanwhile
        return {port: answer for port, answer in answers.items() if port in there}

    def logs(self) -> str:
        """The end of each."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)

    def wait_until(self, what: str, condition: Callable[[], bool], seconds: float) -> None:
        """Says how long it took."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < seconds, f"waited in vain for {what}\n{self.logs()}"
            self._restart_nodes()
            time.sleep(0.5)
        print(f"{time.strftime('%T')} {what}: after {time.monotonic() - began:.0f} s", flush=True)


@contextmanager
def site(folder: Path, model: Path, *names: str) -> Iterator[Site]:
    """Hosts of these names, among them `head`; skips the test where there can be none."""
    reason = why_not(firewall=True)
    if reason:
        pytest.skip(reason)
    # Ray's sockets lie in its folder, and their names may be 107 bytes long.
    with tempfile.TemporaryDirectory(prefix="tu", ignore_cleanup_errors=True) as temporary, hosts(*names) as net:
        yield Site(net, folder, Path(temporary), model)
