"""All services of one configuration: started together, ready together, ended together, and known by `up.json`."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tutelage.files import write_durably
from tutelage.runtime.owner import owning
from tutelage.runtime.processes import uninterrupted
from tutelage.up.config import UpConfig
from tutelage.up.services import RayHead, Service, free_port, serve_evaluator, serve_prometheus, serve_teacher

STATE, OWNER = "services.json", "up"
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Row:
    """What `services.json` says of one service."""

    name: str
    address: str
    """host:port; empty until it is ready."""
    url: str
    """For a browser, where there is one."""
    process_id: int | None
    log: str
    seconds_to_ready: float
    """Of its last start; before it is ready, of an earlier one in this folder, or 0."""


class Services:
    """The started services of one `up`; `running` makes and ends it.

    Args:
        config: what to start.
        environment: variables of all of them besides this process's own.

    """

    def __init__(self, config: UpConfig, environment: Mapping[str, str]) -> None:
        self._config, self._environment = config, environment
        self.all: list[Service] = []
        self.ray: RayHead | None = None
        self._urls: dict[str, str] = {}
        self._before = {row.name: row.seconds_to_ready for row in read_state(config.output)}

    def start(self) -> None:
        """Starts every service; none is waited for."""
        config, folder, logs = self._config, self._config.output, self._config.output / "logs"
        given: dict[str, Any] = {"environment": self._environment, "ready_seconds": config.ready_seconds}
        port = free_port() if config.with_prometheus else 0
        url = f"http://127.0.0.1:{port}" if port else ""
        scraped: dict[str, list[str]] = {}

        def measured(job: str, options: dict[str, Any]) -> dict[str, Any]:
            if not port:
                return options
            options = {"metrics_port": free_port(), **options}
            host = options.get("metrics_host", "127.0.0.1")
            scraped.setdefault(job, []).append(f"{host}:{options['metrics_port']}")
            return options

        for name, teacher in config.teachers.items():
            options: dict[str, Any] = {"model": teacher.model, "served_model_name": name, **teacher.serve}
            options = measured("tutelage-teacher", options)
            self.all.append(serve_teacher(f"teacher-{name}", logs, options, **given))
        if config.evaluator:
            options = {"frames": folder / "frames", "queue": folder / "queue", **config.evaluator.serve}
            self.all.append(serve_evaluator(logs, measured("tutelage-evaluator", options), **given))
        if config.ray:
            self.ray = RayHead(config.ray, folder, url, ready_seconds=config.ready_seconds)
            self.all.append(self.ray.service)
            self._urls["ray"] = self.ray.url
        if port:
            lists = [self.ray.scraped] if self.ray else []
            self.all.append(serve_prometheus(folder, port, scraped, lists, config.prometheus_rules))
            self._urls["prometheus"] = url

    def __getitem__(self, name: str) -> Service:
        return next(service for service in self.all if service.name == name)

    def rows(self) -> list[Row]:
        """Where everything is."""
        return [
            Row(
                service.name,
                service.address if service.seconds_to_ready else "",
                self._urls.get(service.name, ""),
                service.process_id,
                str(service.log),
                service.seconds_to_ready or self._before.get(service.name, 0.0),
            )
            for service in self.all
        ]

    def wait(self, watch: Callable[[list[Row]], None]) -> None:
        """Returns when all are ready.

        Args:
            watch: told twice a second where everything is.

        Raises:
            Unreachable: one ended or did not get ready; the end of its log is in the message.

        """
        while sum(service.is_ready() for service in self.all) < len(self.all):  # asks all, for the time of each
            watch(self.rows())
            time.sleep(_POLL_SECONDS)
        watch(self.rows())
        self._write()

    def _write(self) -> None:
        rows = [asdict(row) for row in self.rows()]
        write_durably(self._config.output / STATE, json.dumps(rows, indent=1) + "\n")

    def revive(self) -> list[str]:
        """Starts again those that ended after they had served; says which, and why.

        Raises:
            Unreachable: one ended before it was ready.

        """
        said = [text for service in self.all if (text := service.revive())]
        if said:
            self._write()
        return said

    def close(self) -> None:
        """Ends all of them, at the same time."""
        with contextlib.ExitStack() as stack:  # whatever ends the one, the next is ended, too
            for service in self.all:
                stack.callback(service.close)
            if self.ray:
                stack.callback(self.ray.close)
            for service in self.all:
                service.ask_to_end()


@contextlib.contextmanager
def running(config: UpConfig, environment: Mapping[str, str] | None = None) -> Iterator[Services]:
    """The services of a configuration, which are started, and ended with the block, whatever ends it.

    Raises:
        Conflict: another process has services in that folder.

    """
    config = config.model_copy(update={"output": config.output.resolve()})
    config.output.mkdir(parents=True, exist_ok=True)
    (config.output / "logs").mkdir(exist_ok=True)
    what = f"has its services in {config.output}; end it with `tutelage down --output {config.output}`"
    with owning(config.output, OWNER, what=what):
        services = Services(config, environment or {})
        try:
            with uninterrupted():
                services.start()
            yield services
        finally:
            services.close()


def read_state(folder: Path) -> list[Row]:
    """What the last `up` in a folder noted of its services; nothing if there was none."""
    path = folder / STATE
    return [Row(**row) for row in json.loads(path.read_text())] if path.exists() else []
