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


def main() -> None:
    """Waits for the end of standard input, then kills."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the server; it goes first
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    import psutil  # after the long wait: until then this process is to take no memory

    for process in psutil.process_iter():
        try:
            if process.environ().get(_MARK) == sys.argv[1]:
                process.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue  # gone meanwhile, or another user's and so not ours


if __name__ == "__main__":
    main()
