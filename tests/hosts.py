"""Hosts of a network on this machine: network namespaces with addresses of their own behind one bridge.

`with hosts("teacher", "head") as net:` gives each an address; what is left in them is ended with the block. Run as a
program on one of them it says what others' ports answer: CA ADDRESS….
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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

    def close(self, *ports: int) -> None:
        """Its firewall lets no other host in at these ports."""
        numbers = ", ".join(map(str, ports))
        _filter(self.namespace, "inet", "input", f'iifname "eth0" tcp dport {{ {numbers} }} drop')

    def slow_down(self, kilobits: int) -> None:
        """It sends no more than so much a second."""
        shaper = ("tbf", "rate", f"{kilobits}kbit", "burst", "16kb", "latency", "2s")
        subprocess.run(
            ["tc", "-n", self.namespace, "qdisc", "add", "dev", "eth0", "root", *shaper],
            check=True, timeout=10, capture_output=True,
        )  # fmt: skip

    def lose(self, percent: int) -> None:
        """From now on so many of a hundred packets to it and from it get lost."""
        loss = f"numgen random mod 100 < {percent} counter drop"
        # On the bridge: what its own rules dropped, its kernel would send again at once.
        _filter(
            self.bridge, "bridge", "forward", *(f'{way} "{self.interface}" {loss}' for way in ("iifname", "oifname"))
        )

    def lose_no_more(self) -> int:
        """Ends `lose`; how many packets were lost by it."""
        rules = _nft(self.bridge, "list table bridge forward")
        _nft(self.bridge, "delete table bridge forward")
        return sum(map(int, re.findall(r"counter packets (\d+)", rules)))

    def listening(self) -> list[str]:
        """What its processes listen on where other hosts reach it: address:port and the process."""
        lines = subprocess.run(
            ["ip", "netns", "exec", self.namespace, "ss", "-Hltnp"], check=True, timeout=10, capture_output=True
        ).stdout.decode()
        sockets = [line.split(maxsplit=5) for line in lines.splitlines()]
        # A socket for both kinds of addresses shows one of the fourth as one of the sixth.
        found = [f"{each[3].replace('[::ffff:', '').replace(']', '')} {each[-1]}" for each in sockets]
        return [each for each in found if not each.startswith(("127.", "[::1"))]

    def ports(self) -> set[int]:
        """Of `listening`."""
        return {int(each.split()[0].rpartition(":")[2]) for each in self.listening()}

    def process_ids(self) -> list[int]:
        """Of every process that runs here."""
        command = ["ip", "netns", "pids", self.namespace]
        return [
            int(each) for each in subprocess.run(command, timeout=10, capture_output=True, check=False).stdout.split()
        ]

    def kill_all(self) -> None:
        """Ends every process that runs here, as a machine does whose power is cut."""
        while process_ids := self.process_ids():
            for process_id in process_ids:
                with suppress(ProcessLookupError):
                    os.kill(process_id, signal.SIGKILL)
            for process in self.processes:
                process.poll()
            time.sleep(0.1)
        for process in self.processes:
            process.wait(10)


def why_not(*, firewall: bool = False) -> str:
    """Why this machine has no such hosts, or none that `close` and `lose`; empty if it has."""
    if firewall and shutil.which("nft") is None:
        return "there is no nft (Debian's package nftables)"
    try:
        with hosts("probe") as net:
            if firewall:
                net["probe"].lose(5)
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


def _filter(namespace: str, family: str, hook: str, *rules: str) -> None:
    lines = "\n".join(rules)
    chain = f"chain {hook} {{ type filter hook {hook} priority 0;\n{lines}\n}}"
    _nft(namespace, f"table {family} {hook} {{\n{chain}\n}}")


def _nft(namespace: str, rules: str) -> str:
    command = ["ip", "netns", "exec", namespace, "nft", "-f", "-"]
    return subprocess.run(command, check=True, timeout=10, capture_output=True, input=rules.encode()).stdout.decode()


def hello(address: str, ca: str) -> str:
    """What a port is to somebody without a certificate: closed, mutual TLS, TLS for anybody, or plaintext."""
    host, _, port = address.rpartition(":")
    try:
        connection = socket.create_connection((host, int(port)), timeout=3)
    except OSError:
        return "closed"
    context = ssl.create_default_context(cafile=ca)
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(connection, server_hostname=host) as channel:
            # In TLS 1.3 a server refuses when the client believes that it is through, by an end instead of a greeting.
            return "TLS for anybody" if channel.recv(1) else "mutual TLS"
    except ssl.SSLError as error:
        return "mutual TLS" if "CERTIFICATE_REQUIRED" in str(error) else f"plaintext ({error.reason})"
    except OSError as error:
        return f"plaintext ({error})"


if __name__ == "__main__":
    with ThreadPoolExecutor() as pool:
        answers = pool.map(lambda address: hello(address, sys.argv[1]), sys.argv[2:])
    print(json.dumps(dict(zip(sys.argv[2:], answers, strict=True))))
