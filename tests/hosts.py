"""Hosts of a network on this machine: network namespaces with addresses of their own behind one bridge.

`with hosts("teacher", "head") as net:` gives each an address; what is left in them is ended with the block.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Host:
    """One network namespace; its processes see its interfaces and no others."""

    name: str
    address: str
    namespace: str
    bridge: str
    """Namespace of the bridge."""
    interface: str
    """The bridge's end of its cable."""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Starts a command on this host, in a process group of its own."""
        with log.open("ab") as stream:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *command],
                stdout=stream,
                stderr=stream,
                env=os.environ | environment,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def cut_off(self) -> None:
        """Its cable is pulled."""
        _ip("-n", self.bridge, "link", "set", self.interface, "down")

    def connect(self) -> None:
        """Its cable is put back."""
        _ip("-n", self.bridge, "link", "set", self.interface, "up")

    def listening(self) -> list[str]:
        """What its processes listen on where other hosts reach it: address:port and the process."""
        lines = subprocess.run(
            ["ip", "netns", "exec", self.namespace, "ss", "-Hltnp"], check=True, timeout=10, capture_output=True
        ).stdout.decode()
        sockets = [line.split(maxsplit=5) for line in lines.splitlines()]
        # A socket for both kinds of addresses shows one of the fourth as one of the sixth.
        found = [f"{each[3].replace('[::ffff:', '').replace(']', '')} {each[-1]}" for each in sockets]
        return [each for each in found if not each.startswith(("127.", "[::1"))]

    def kill_all(self) -> None:
        """Ends every process that runs here, as a machine does whose power is cut."""
        while pids := subprocess.run(
            ["ip", "netns", "pids", self.namespace], timeout=10, capture_output=True, check=False
        ).stdout.split():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            for process in self.processes:
                process.poll()
            time.sleep(0.1)
        for process in self.processes:
            process.wait(10)


def why_not() -> str:
    """Why this machine has no such hosts; empty if it has."""
    try:
        with hosts("probe"):
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"") or b""
        return f"network namespaces are not allowed here: {said.decode().strip() or error}"


@contextmanager
def hosts(*names: str) -> Iterator[dict[str, Host]]:
    """So many hosts on one network, by name; no other process of this machine is on it.

    Names and addresses hold this process's id, so that two runs do not meet.
    """
    tag, made = f"tu{os.getpid()}", {}
    bridge = f"{tag}b"
    try:
        # The bridge has a namespace of its own: this machine gets no address, no route and no rule.
        _ip("netns", "add", bridge)
        _ip("-n", bridge, "link", "add", bridge, "type", "bridge")
        _ip("-n", bridge, "link", "set", bridge, "up")
        for number, name in enumerate(names, 1):
            host = Host(name, f"10.77.0.{number}", f"{tag}-{name}", bridge, f"{tag}v{number}")
            made[name] = host
            _ip("netns", "add", host.namespace)
            _ip(*("link", "add", "eth0", "netns", host.namespace, "type", "veth"), "peer", host.interface)
            _ip("link", "set", host.interface, "netns", bridge)
            _ip("-n", bridge, "link", "set", host.interface, "master", bridge, "up")
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.namespace, "link", "set", "eth0", "up")
        yield made
    finally:
        for host in made.values():
            host.kill_all()
        for namespace in [*(host.namespace for host in made.values()), bridge]:
            subprocess.run(["ip", "netns", "del", namespace], check=False, timeout=10, capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=10, capture_output=True)
