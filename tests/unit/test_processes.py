"""Children of the demonstration end with it: as a group, on time-out, and when the parent is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest

from tutelage.errors import Unreachable
from tutelage.runtime.processes import (
    left_behind,
    running,
    sparing_children_interrupts,
    start,
    stop,
    uninterrupted,
    wait_for_file,
)

PROTO = Path(__file__).resolve().parents[2] / "proto"
# A program that ignores SIGTERM and has a child of its own that does, too.
STUBBORN = """
import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) > 1:
    subprocess.Popen([sys.executable, __file__])
    pathlib.Path(sys.argv[1]).write_text("ready")
time.sleep(60)
"""


@pytest.fixture
def stubborn(tmp_path) -> Path:
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    return script


def test_stopping_ends_the_whole_group_even_if_it_refuses(stubborn, tmp_path):
    mark = {"TUTELAGE_TEST": str(tmp_path)}
    log, ready = tmp_path / "log", tmp_path / "ready"
    process = start([sys.executable, str(stubborn), str(ready)], log=log, environment=mark)
    assert wait_for_file(ready, process, log=log, seconds=20) == "ready"
    assert len(left_behind("TUTELAGE_TEST", str(tmp_path))) == 2
    assert stop(process, seconds=0.2) == -signal.SIGKILL
    _wait_until(lambda: not left_behind("TUTELAGE_TEST", str(tmp_path)))


def test_ctrl_c_waits_until_what_is_being_started_is_known():
    known = []

    def start_something() -> None:
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            known.append("started")

    with pytest.raises(KeyboardInterrupt):
        start_something()
    assert known == ["started"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_killed_parent_takes_its_children_along(tmp_path):
    script = (
        f"import sys; sys.path.insert(0, {str(PROTO)!r})\n"
        "from pathlib import Path\nfrom tutelage.runtime.processes import start\nimport time\n"
        f"child = start(['sleep', '60'], log=Path({str(tmp_path / 'log')!r}), environment={{}})\n"
        "print(child.pid, flush=True)\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    _wait_until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)


def test_a_program_that_ends_before_it_is_ready_is_reported_with_its_log(tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-c", "print('no such model'); raise SystemExit(4)"]
    with (
        pytest.raises(Unreachable, match=r"(?s)ended with 4.*no such model"),
        running(command, log=log, environment={}) as process,
    ):
        wait_for_file(tmp_path / "never", process, log=log, seconds=20)


def _wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_programs_start_while_grpc_is_at_work(tmp_path):
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        grpc.channel_ready_future(channel).result(timeout=10)
        programs = [start(["true"], log=tmp_path / "log", environment={}) for _ in range(8)]
        assert [program.wait(20) for program in programs] == [0] * 8
    server.stop(None)
    assert (tmp_path / "log").read_text() == ""


def test_a_child_does_not_see_ctrl_c_whatever_it_does_about_it():
    program = "import signal, time\nsignal.signal(2, lambda *_: exit(3))\nprint('up', flush=True)\ntime.sleep(60)"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with sparing_children_interrupts():
        child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    with child:
        child.stdout.readline()
        child.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.5)
        child.kill()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
