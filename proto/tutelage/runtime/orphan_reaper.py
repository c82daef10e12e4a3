"""Kills what a dead process leaves behind: vLLM's engine processes outlive a server that is killed.

The server marks its environment, which its descendants inherit, and starts this module as a process that
reads from a pipe. The pipe ends when the server does, however it ended; then whatever still carries the
mark is killed. This needs nothing from vLLM, and works while engines are still being started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

_MARK = "TUTELAGE_SERVER_PROCESS"


def start(mark: str) -> subprocess.Popen[bytes]:
    """Marks this process and its descendants from now on, and starts their reaper.

    Args:
        mark: unique to this server.

    """
    # Without the mark, the orphan reaper does not count among those that it kills.
    reaper = subprocess.Popen([sys.executable, "-m", "tutelage.runtime.orphan_reaper", mark], stdin=subprocess.PIPE)
    os.environ[_MARK] = mark
    # vLLM's processes rename themselves, over the place where their environment is read from, unless:
    os.environ["SPT_NOENV"] = "1"
    return reaper


def _kill_marked(mark: str) -> None:
    import psutil

    for process in psutil.process_iter():
        try:
            if process.environ().get(_MARK) == mark:
                process.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue  # gone meanwhile, or another user's and so not ours


def main() -> None:
    """Waits for the end of standard input, then kills."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the server; it goes first
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    _kill_marked(sys.argv[1])


if __name__ == "__main__":
    main()
