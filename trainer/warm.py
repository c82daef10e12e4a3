"""Processes with everything imported: a student that comes back is forked from one, not started anew.

Ray starts the process of an actor by the command that its runtime environment gives as `py_executable`. Given
`COMMAND`, the first one on a node starts as always, and leaves a server behind, which imports what students import;
later ones are forked from that, take over the streams, environment and arguments that Ray meant for them, and are ready
at once. Ray knows the process of `COMMAND`: it waits for the one that was forked, which dies with it. The server ends
with Ray's node. Where it does not answer, a student starts as always.

For processes without a GPU: what CUDA knows of a device does not survive a fork.
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import importlib
import json
import os
import random
import runpy
import select
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

COMMAND = f"{shlex.quote(sys.executable)} -m trainer.warm"
_MODULES = ("trainer.actor", "trainer.loop", "trainer.services", "transformers.models.auto.modeling_auto")
_SETTLE_SECONDS = 20.0
"""The server leaves the processor to the first students until then."""
_PATIENCE_SECONDS = 5.0
"""For somebody who connects and does not ask."""
_LARGEST_MESSAGE = 2**18


@dataclass(frozen=True)
class Request:
    """A process that Ray wants."""

    arguments: list[str]
    """A script and its arguments."""
    environment: dict[str, str]
    folder: str
    parent: int
    """The process that Ray knows."""


def main(arguments: list[str]) -> None:
    """Runs a script in a forked process, or in this one."""
    if arguments[0] == "--serve":
        run_forked(Path(arguments[1]), int(arguments[2]))
        return
    path = _socket_path(arguments)
    try:
        forked = _ask(path, Request(arguments, dict(os.environ), os.getcwd(), os.getpid()))
    except OSError:
        _start_server(path)
        os.execv(sys.executable, [sys.executable, *arguments])  # noqa: S606  as Ray would have
    signal.signal(signal.SIGTERM, lambda *_: os.kill(forked, signal.SIGTERM))
    with suppress(ProcessLookupError):  # It has ended already.
        _wait_for(forked)


def _socket_path(arguments: Sequence[str]) -> Path:
    """In the folder of the sockets of Ray's node, by what the imports depend on."""
    [raylet] = [value.removeprefix("--raylet-name=") for value in arguments if value.startswith("--raylet-name=")]
    key = json.dumps([sys.executable, os.environ.get("PYTHONPATH"), os.getuid()])
    return Path(raylet).with_name(f"warm-{hashlib.sha256(key.encode()).hexdigest()[:8]}")


def _ask(path: Path, request: Request) -> int:
    """The id of a process that was forked for a request."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(str(path))
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        if struct.unpack("3i", credentials)[1] != os.getuid():
            raise PermissionError(f"{path} is somebody else's")
        socket.send_fds(connection, [json.dumps(vars(request)).encode()], [0, 1, 2])
        answer = connection.recv(_LARGEST_MESSAGE)
    if not answer:
        raise ConnectionResetError("the server has ended")
    return int(answer)


def _start_server(path: Path) -> None:
    """By a child that ends at once, so that the server is nobody's child: what this becomes would not reap it."""
    node = os.getppid()
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    command = [sys.executable, "-m", "trainer.warm", "--serve", str(path), str(node)]
    # No thread but one and no GPU: what a library starts or opens on import would not be there in a fork.
    alone = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = os.environ | alone
    nowhere = subprocess.DEVNULL
    subprocess.Popen(command, env=environment, stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True)
    os._exit(0)


def _wait_for(process: int, seconds: float | None = None) -> bool:
    """Whether a process, not necessarily a child, has ended within a time."""
    descriptor = os.pidfd_open(process)
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)


def run_forked(path: Path, node: int) -> None:
    """Forks a process for each request until Ray's node ends; each of them runs its script and returns, too."""
    with path.with_name(path.name + ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # Another one serves, or is about to.
            return
        if _wait_for(node, _SETTLE_SECONDS):
            return
        for name in _MODULES:
            importlib.import_module(name)
        if len(os.listdir("/proc/self/task")) > 1:  # A fork would not have the other threads.
            return
        gc.freeze()  # Or a collection in a fork would copy the memory that they share.
        path.unlink(missing_ok=True)
        request = _serve(path, node)
    if request is not None:
        _run(request)


def _serve(path: Path, node: int) -> Request | None:
    """In a forked process its request; in the server None, at the end."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Nobody asks how they ended.
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        mask = os.umask(0o177)  # For nobody else.
        listener.bind(str(path))
        os.umask(mask)
        listener.listen()
        ended = os.pidfd_open(node)
        while ended not in select.select([listener.fileno(), ended], [], [])[0]:
            with listener.accept()[0] as connection, suppress(OSError):  # It has ended, or says nothing.
                connection.settimeout(_PATIENCE_SECONDS)
                request = _fork_for(connection)
                if request is not None:
                    return request
    return None


def _fork_for(connection: socket.socket) -> Request | None:
    """In the forked process what was asked for, with its streams in place; in the server None."""
    message, streams, _, _ = socket.recv_fds(connection, _LARGEST_MESSAGE, 3)
    if not message:
        return None
    forked = os.fork()
    for target, stream in enumerate(streams):
        if not forked:
            os.dup2(stream, target)
        os.close(stream)
    if not forked:
        return Request(**json.loads(message))
    connection.sendall(str(forked).encode())
    return None


def _run(request: Request) -> None:
    """Becomes what Ray wants."""
    os.setpgrp()  # Ray ends a worker with its process group.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.folder)
    random.seed()
    threading.Thread(target=_end_with, args=(request.parent,), daemon=True).start()
    sys.argv = request.arguments
    runpy.run_path(request.arguments[0], run_name="__main__")


def _end_with(process: int) -> None:
    with suppress(ProcessLookupError):
        _wait_for(process)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
