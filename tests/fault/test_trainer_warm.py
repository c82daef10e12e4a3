"""Forked processes: they are what Ray asked for, end with the process that Ray knows, and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from ray_cluster import wait_until

from trainer.warm import Request, _ask, _socket_path

# What the server does, with a module that costs nothing and no time for others to settle.
SERVER = """
import sys
import trainer.warm as warm
warm._MODULES, warm._SETTLE_SECONDS = ("colorsys",), 0.0
warm.main(["--serve", *sys.argv[1:]])
"""
SCRIPT = """
import json, os, sys, time
umask = os.umask(0)
print(json.dumps({
    "arguments": sys.argv[1:], "folder": os.getcwd(), "mark": os.environ.get("MARK"), "umask": umask,
    "imported": "colorsys" in sys.modules, "id": os.getpid(), "parent": os.getppid(), "group": os.getpgid(0),
    "name": __name__,
}), flush=True)
time.sleep(float(sys.argv[2]))
"""


def left_behind(node: Node) -> list[psutil.Process]:
    """Servers of this node."""
    folder = str(node.raylet.parent)
    return [each for each in psutil.process_iter(["cmdline"]) if folder in " ".join(each.info["cmdline"] or [])]


class Node:
    """Stands for Ray's node: a process with a folder of sockets, as whose child a worker's command is started."""

    def __init__(self, folder: Path) -> None:
        self.raylet = folder / "raylet"
        self.process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
        (folder / "script.py").write_text(SCRIPT)
        self._script = folder / "script.py"

    def start(self, seconds: float = 0.0, mark: str = "here") -> subprocess.Popen[bytes]:
        arguments = [str(self._script), f"--raylet-name={self.raylet}", str(seconds)]
        command = [sys.executable, "-m", "trainer.warm", *arguments]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, env=os.environ | {"MARK": mark}, cwd=self.raylet.parent
        )


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


@pytest.fixture
def node(tmp_path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    node.process.kill()
    node.process.wait()


@contextmanager
def serving(node: Node) -> Iterator[subprocess.Popen[bytes]]:
    path = _socket_path([f"--raylet-name={node.raylet}"])
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(path), str(node.process.pid)])
    try:
        wait_until(path.exists, 10)
        yield server
    finally:
        server.kill()
        server.wait()


def said(worker: subprocess.Popen[bytes]) -> dict:
    assert worker.stdout
    return json.loads(worker.stdout.readline())


def test_a_forked_process_is_what_was_asked_for(node):
    with serving(node) as server:
        for mark in ("one", "two"):
            worker = node.start(mark=mark)
            answer = said(worker)
            assert worker.wait(10) == 0
            mask = os.umask(0)
            os.umask(mask)
            assert answer | {"id": 0, "group": 0} == {
                "arguments": [f"--raylet-name={node.raylet}", "0.0"],
                "folder": str(node.raylet.parent),
                "mark": mark,
                "umask": mask,
                "imported": True,
                "id": 0,
                "parent": server.pid,
                "group": 0,
                "name": "__main__",
            }
            assert answer["group"] == answer["id"] != worker.pid


def test_it_ends_with_the_process_that_ray_knows_and_the_other_way_round(node):
    with serving(node) as server:
        for end in (signal.SIGKILL, signal.SIGTERM):
            worker = node.start(seconds=60)
            forked = psutil.Process(said(worker)["id"])
            worker.send_signal(end)
            assert worker.wait(10) is not None
            wait_until(lambda forked=forked: not forked.is_running(), 10)
        worker = node.start(seconds=60)
        os.kill(said(worker)["id"], signal.SIGKILL)
        assert worker.wait(10) == 0
        assert server.poll() is None
        assert said(node.start())["parent"] == server.pid


def test_the_server_ends_with_rays_node(node):
    with serving(node) as server:
        node.process.kill()
        assert server.wait(10) == 0


def test_two_servers_do_not_fight(node):
    with serving(node) as server:
        path = _socket_path([f"--raylet-name={node.raylet}"])
        second = subprocess.Popen([sys.executable, "-c", SERVER, str(path), str(node.process.pid)])
        assert second.wait(10) == 0
        assert said(node.start())["parent"] == server.pid


def test_without_a_server_the_process_runs_the_script_itself_and_leaves_one(node):
    # Of a shell, which stands for the node and ends at once, and so does the server that was left.
    command = f"{sys.executable} -m trainer.warm {node._script} --raylet-name={node.raylet} 0; echo $$"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    answer, shell = done.stdout.splitlines()
    assert json.loads(answer)["parent"] == int(shell)
    assert not json.loads(answer)["imported"]
    wait_until(lambda: list(node.raylet.parent.glob("warm-*.lock")), 10)
    wait_until(lambda: not left_behind(node), 10)


def test_a_dead_servers_socket_is_replaced(node):
    with serving(node):
        pass
    with serving(node) as server:
        wait_until(lambda: said(node.start())["parent"] == server.pid, 10)


def test_who_connects_and_does_not_ask_is_passed_over(node):
    with serving(node) as server:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
            silent.connect(str(_socket_path([f"--raylet-name={node.raylet}"])))
        assert said(node.start())["parent"] == server.pid


def test_nothing_is_forked_from_a_process_with_threads_which_a_fork_would_not_have(node):
    threaded = "import threading, time\nthreading.Thread(target=time.sleep, args=(1,)).start()\n" + SERVER
    path = _socket_path([f"--raylet-name={node.raylet}"])
    server = subprocess.run([sys.executable, "-c", threaded, str(path), str(node.process.pid)], check=False, timeout=10)
    assert server.returncode == 0
    assert not path.exists()


def test_a_server_of_somebody_else_is_told_nothing(tmp_path, monkeypatch):
    request = Request(["script"], {"SECRET": "mine"}, "/", os.getpid())
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as theirs:
        theirs.bind(str(tmp_path / "warm"))
        theirs.listen()
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        with pytest.raises(PermissionError, match="somebody else's"):
            _ask(tmp_path / "warm", request)
        assert theirs.accept()[0].recv(1000) == b""


def test_nobody_else_may_ask(node):
    with serving(node):
        [path] = [path for path in node.raylet.parent.glob("warm-*") if path.suffix != ".lock"]
        assert path.stat().st_mode & 0o077 == 0
