"""One service as a process: started, waited for until it answers, started again where it was, ended.

For `tutelage up`, studies and the demonstration alike.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from subprocess import Popen
from typing import Any

import yaml

from tutelage.files import write_durably
from tutelage.runtime.processes import last_lines, require_starting, start, stop
from tutelage.runtime.programs import flags, tutelage
from tutelage.up.config import RayService

Command = Callable[[int], list[str]]
"""The command line by the port: 0 at first, and then the one that the service has."""
Probe = Callable[[], str]
"""Gives host:port once the service answers, and the empty string until then."""
READY_SECONDS = 600.0
_POLL_SECONDS, _PROBE_SECONDS = 0.2, 2.0


class Service:
    """A server that is started here, or one that is there already.

    Args:
        name: for people and for its log.
        logs: folder of the log.
        command: what to start; None attaches to `address`.
        address: host:port of what is there.
        probe: tells when it answers; without it the server is told an address file.
        environment: variables besides this process's own.
        ready_seconds: how long it may take.

    """

    def __init__(
        self,
        name: str,
        logs: Path,
        command: Command | None,
        *,
        address: str = "",
        probe: Probe | None = None,
        environment: Mapping[str, str] | None = None,
        ready_seconds: float = READY_SECONDS,
    ) -> None:
        self.name, self.log, self._address = name, logs / f"{name}.log", address
        self._command, self._environment = command, dict(environment or {})
        self._address_file, self._probe, self._ready_seconds = logs / f"{name}.address", probe, ready_seconds
        self._process: Popen[bytes] | None = None
        self._start()

    def _start(self) -> None:
        self.started_seconds, self.seconds_to_ready = time.monotonic(), 0.0
        if self._command is None:
            return
        self._address_file.unlink(missing_ok=True)  # an earlier one's would be taken for the new server's
        port = int(self._address.rpartition(":")[2] or 0)
        options = [] if self._probe else ["--address-file", str(self._address_file)]
        command = [*self._command(port), *options]
        self._process = start(command, log=self.log, environment=self._environment)

    @property
    def process_id(self) -> int | None:
        """Of what was started."""
        return self._process.pid if self._process else None

    def is_ready(self) -> bool:
        """Whether it answers, or has since it was started last.

        Raises:
            Unreachable: it ended before, or did not get ready; the end of its log is in the message.

        """
        if self._process is None or self.seconds_to_ready:
            return True
        found = self._probe() if self._probe else self._read_address()
        # It may have been ready long before anybody looked.
        if not found or self._process.poll() is not None:
            require_starting(self._process, log=self.log, deadline=self.started_seconds + self._ready_seconds)
        if found:
            self._address, self.seconds_to_ready = found, time.monotonic() - self.started_seconds
        return bool(found)

    def _read_address(self) -> str:
        return self._address_file.read_text().strip() if self._address_file.exists() else ""

    @property
    def address(self) -> str:
        """host:port, for which it is waited.

        Raises:
            Unreachable: as `is_ready`.

        """
        while not self.is_ready():
            time.sleep(_POLL_SECONDS)
        return self._address

    def revive(self) -> str:
        """Starts it again, at the address that it had, if it has ended since it was ready; says why, or nothing.

        Raises:
            Unreachable: it ended, or is too late, before it was ready: it would do so again.

        """
        if self._process is None or not self.is_ready() or self._process.poll() is None:
            return ""
        code = stop(self._process)  # what is left of its group
        said = f"{self.name} ended with {code} and is started again; the end of {self.log}:\n{last_lines(self.log)}"
        self._start()
        return said

    def ask_to_end(self) -> None:
        """Tells it to end, and does not wait."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def close(self) -> None:
        """Ends what was started."""
        if self._process is not None:
            stop(self._process)


def serve_teacher(name: str, logs: Path, options: Mapping[str, object], **given: Any) -> Service:
    """Starts `tutelage teacher serve` with these flags, on a free port unless they name one."""
    return Service(name, logs, _served("teacher", options), **given)


def serve_evaluator(logs: Path, options: Mapping[str, object], **given: Any) -> Service:
    """Starts `tutelage evaluate serve`, likewise."""
    return Service("evaluator", logs, _served("evaluate", options), **given)


def _served(service: str, options: Mapping[str, object]) -> Command:
    return lambda port: [*tutelage(service, "serve"), *flags({"port": 0, **options} | ({"port": port} if port else {}))]


class RayHead:
    """Ray's head node with its dashboard: it listens on loopback and asks for a token.

    Args:
        config: its size.
        folder: the token and the log go there.

    """

    def __init__(self, config: RayService, folder: Path, prometheus_url: str = "", *, ready_seconds: float) -> None:
        self.token_file = write_token(folder / "ray.token")
        # In a place of its own, with a short name: sockets lie below it, whose names have at most 107 characters.
        digest = sha256(str(folder).encode()).hexdigest()[:8]
        self.temporary = Path(tempfile.gettempdir()) / f"tutelage-ray-{digest}"
        shutil.rmtree(self.temporary, ignore_errors=True)  # of one that was killed
        self.temporary.mkdir(mode=0o700)
        self.gcs, dashboard, agent = free_port(), config.dashboard_port or free_port(), free_port()
        self.url = f"http://127.0.0.1:{dashboard}"
        # The agent answers some seconds after the dashboard; until then no job can be submitted.
        asked = (f"{self.url}/api/version", f"http://127.0.0.1:{agent}/api/local_raylet_healthz")
        options: dict[str, object] = {
            "port": self.gcs,
            "node_ip_address": "127.0.0.1",
            "ray_client_server_port": free_port(),
            "dashboard_port": dashboard,
            "dashboard_agent_listen_port": agent,
            "object_store_memory": config.object_store_bytes,
            "temp_dir": self.temporary,
        }
        options |= {} if config.cpus is None else {"num_cpus": config.cpus}
        options |= {} if config.gpus is None else {"num_gpus": config.gpus}
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += ["--include-dashboard=true", *flags(options)]
        environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Else Ray makes of 127.0.0.1 an address that other machines reach (`resolve_ip_for_localhost`), and
            # binds to all addresses; the variable's name says where that is the default.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_TMPDIR": str(self.temporary),
            # Else numbers that another Ray on this machine has already.
            "DASHBOARD_METRIC_PORT": str(free_port()),
            "AUTOSCALER_METRIC_PORT": str(free_port()),
        }
        environment |= {"RAY_PROMETHEUS_HOST": prometheus_url} if prometheus_url else {}
        self.service = Service(
            "ray",
            folder / "logs",
            lambda _: command,
            probe=lambda: f"127.0.0.1:{self.gcs}" if all(answers(url, self.token_file) for url in asked) else "",
            environment=environment,
            ready_seconds=ready_seconds,
        )

    @property
    def scraped(self) -> Path:
        """Where Ray lists its nodes' metrics for Prometheus."""
        return self.temporary / "prom_metrics_service_discovery.json"

    def close(self) -> None:
        """Ends it, and removes what it leaves in the temporary folder."""
        self.service.close()
        shutil.rmtree(self.temporary, ignore_errors=True)


def serve_prometheus(
    folder: Path, port: int, scraped: Mapping[str, list[str]], lists: list[Path], rules: Path | None
) -> Service:
    """Starts Prometheus on a port of loopback; its configuration and data are in the folder.

    Args:
        folder: the run's.
        port: a free one.
        scraped: host:port of metrics, by the names of jobs that rules and dashboards know.
        lists: files of more of them, Ray's nodes, which Prometheus reads again when they change.
        rules: a file of rules.

    """
    jobs: list[dict[str, Any]] = [
        {"job_name": name, "static_configs": [{"targets": targets}]} for name, targets in scraped.items()
    ]
    if lists:
        jobs.append({"job_name": "ray", "file_sd_configs": [{"files": [str(each) for each in lists]}]})
    content: dict[str, Any] = {"global": {"scrape_interval": "5s"}, "scrape_configs": jobs}
    content |= {"rule_files": [str(rules.absolute())]} if rules else {}
    write_durably(folder / "prometheus.yml", yaml.safe_dump(content, sort_keys=False))
    address = f"127.0.0.1:{port}"
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--web.listen-address={address}"]
    command += [f"--storage.tsdb.path={folder / 'prometheus'}"]
    return Service(
        "prometheus",
        folder / "logs",
        lambda _: command,
        probe=lambda: address if answers(f"http://{address}/-/ready") else "",
    )


def write_token(path: Path) -> Path:
    """A new secret in a file that its owner alone may read; one that is there stays."""
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_hex(32))
    return path


def answers(url: str, token_file: Path | None = None) -> bool:
    """Whether a GET is answered with success."""
    headers = {"Authorization": f"Bearer {token_file.read_text().strip()}"} if token_file else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_PROBE_SECONDS) as response:  # noqa: S310
            return bool(response.status == 200)
    except OSError:
        return False


def free_port() -> int:
    """A port of loopback that nobody listens on, for servers that cannot choose one and say which."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
