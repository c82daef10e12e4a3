"""Child processes that never outlive their parent: each in a session of its own, ended as a group."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from pathlib import Path

import psutil

from tutelage.errors import Unreachable

# Run in the child before the program itself: SIGTERM as soon as the parent is gone, even by SIGKILL. Not as a
# `preexec_fn`, which needs a real fork, and gRPC does not survive one.
_ENDS_WITH_PARENT = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n"  # PR_SET_PDEATHSIG
    "os.getppid() == int(sys.argv[1]) or sys.exit(1)\n"
    "os.execvp(sys.argv[2], sys.argv[2:])"
)
STOP_SECONDS = 30.0
_KILLED_SECONDS = 5.0


def start(command: Sequence[str], *, log: Path | None, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Starts a program in a session of its own; its output goes to `log`, or to ours if that is None."""
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("ab")) if log else None
        return subprocess.Popen(
            [sys.executable, "-c", _ENDS_WITH_PARENT, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            env={**os.environ, **environment},
            start_new_session=True,
        )


@contextlib.contextmanager
def sparing_children_interrupts() -> Iterator[None]:
    """Processes that are started in this block never see Ctrl-C, which a terminal sends to all of a command's.

    For vLLM's, which die of it: their command ends them, after what is in flight or at once. What is blocked here stays
    blocked in a child, whatever handlers it installs; in this thread it waits until the block has ended.
    """
    resource_tracker.ensure_running()  # multiprocessing would start it in between, and unblock the signal then
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block has ended: what it starts is known then to whoever has to end it."""
    waiting: list[int] = []
    # Not the thread's mask, which other threads do not have and every child keeps.
    before = {
        number: signal.signal(number, lambda number, _: waiting.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
        if threading.current_thread() is threading.main_thread()
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if waiting:
            signal.raise_signal(waiting[0])


def stop(process: subprocess.Popen[bytes], seconds: float = STOP_SECONDS) -> int:
    """Asks a program to end, insists after `seconds`, and returns its exit code; its group is gone then."""
    try:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
    finally:  # also of a second Ctrl-C, which comes while the first is obeyed
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    code = process.wait()
    deadline = time.monotonic() + _KILLED_SECONDS
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:  # what was killed takes a moment to go, longer with much memory
            os.killpg(process.pid, 0)
            time.sleep(0.02)
    return code


@contextlib.contextmanager
def running(command: Sequence[str], *, log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A program that is stopped at the end of the block, whatever ends the block."""
    process = start(command, log=log, environment=environment)
    try:
        yield process
    finally:
        stop(process)


def wait_for_file(path: Path, process: subprocess.Popen[bytes], *, log: Path, seconds: float) -> str:
    """The text of a file that `process` writes when it is ready.

    Raises:
        Unreachable: the process ended first, or `seconds` went by; the end of its log is in the message.

    """
    deadline = time.monotonic() + seconds
    while not path.exists():
        require_starting(process, log=log, deadline=deadline)
        time.sleep(0.2)
    return path.read_text().strip()


def require_starting(process: subprocess.Popen[bytes], *, log: Path, deadline: float) -> None:
    """Looks whether a program that is not ready yet may still become so.

    Args:
        process: the program.
        log: where its output goes.
        deadline: when it has to be ready, by the monotonic clock.

    Raises:
        Unreachable: it ended, or it is too late; the end of its log is in the message.

    """
    if process.poll() is not None or time.monotonic() > deadline:
        state = "did not get ready" if process.poll() is None else f"ended with {process.returncode}"
        raise Unreachable(f"{log.stem} {state}; the end of {log}:\n{last_lines(log)}")


def last_lines(log: Path, count: int = 15) -> str:
    """The end of a log, of which a program that fails says why at its end."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 200 * count))
        return "\n".join(stream.read().decode(errors="replace").splitlines()[-count:])


def left_behind(mark: str, value: str) -> list[psutil.Process]:
    """Processes other than this one whose environment has `mark=value`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(mark) == value:
                found.append(process)
    return found
