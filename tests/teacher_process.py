"""`tutelage teacher serve` as a process of its own, in its own process group, with nothing left at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 240  # most of it is imports, on cores that other tests share


@dataclass
class TeacherProcess:
    process: subprocess.Popen[bytes]
    address: str
    log: Path

    @property
    def engines(self) -> list[psutil.Process]:
        """vLLM's processes, found while they are children of the server."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "VLLM" in " ".join(child.cmdline())]


def start(folder: Path, model: Path, *options: str, port: int = 0) -> TeacherProcess:
    """Starts a server and waits until it serves."""
    folder.mkdir(parents=True, exist_ok=True)
    address_file, log = folder / "address", folder / "log"
    command = [
        *(sys.executable, "-c", "import sys; from tutelage.cli import main; sys.exit(main())"),
        *("teacher", "serve", str(model), "--port", str(port)),
        *("--address-file", str(address_file), *options),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "proto"), "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    deadline = time.monotonic() + START_SECONDS
    while not address_file.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            end(process)
            raise AssertionError(f"the teacher does not serve:\n{log.read_text(errors='replace')[-4000:]}")
        time.sleep(0.2)
    return TeacherProcess(process, address_file.read_text(), log)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kills the process group; the orphan reaper, being one of it, has then nothing to do."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


@contextmanager
def running(folder: Path, model: Path, *options: str) -> Iterator[TeacherProcess]:
    """A server for the time of a `with` block; it must then end in order, with nothing left."""
    teacher = start(folder, model, *options)
    try:
        engines = teacher.engines
        yield teacher
        teacher.process.send_signal(signal.SIGTERM)
        assert teacher.process.wait(60) == 0, teacher.log.read_text(errors="replace")[-4000:]
        assert gone(engines, seconds=10)
    finally:
        end(teacher.process)


def assert_it_ends_with_its_engine(teacher: TeacherProcess) -> None:
    """Kills an engine: health is red within two seconds, and the server ends with an error and the cause in its log."""
    with grpc.insecure_channel(teacher.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service=""), timeout=60)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        engines = teacher.engines
        engines[0].kill()
        killed = time.monotonic()
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert time.monotonic() - killed < 2
        assert teacher.process.wait(30) not in (0, None)
    assert gone(engines, seconds=10)
    assert "an engine died" in teacher.log.read_text(errors="replace")


def gone(processes: list[psutil.Process], *, seconds: float) -> bool:
    """Whether all have ended within a time; a zombie that nobody has reaped yet has ended."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive if process.is_running())
