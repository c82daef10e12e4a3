"""`tutelage up --config up.yaml`, `tutelage down`, `tutelage logs`."""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.cli import output_console
from tutelage.config import load, user_path
from tutelage.errors import EXIT_DONE, ConfigurationError, NotFound, Terminated

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from tutelage.up.config import UpConfig
    from tutelage.up.together import Row, Services

_DEFAULT = Path("runs/up")
_LOOK_SECONDS, _DOWN_SECONDS = 1.0, 120.0


def up(arguments: list[str]) -> int:
    """Starts teachers, evaluator, Ray and Prometheus on this machine, and ends them at Ctrl-C."""
    from tutelage.up.config import UpConfig

    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--follow", action="store_true")
    options, rest = own.parse_known_args(arguments)
    config = load(UpConfig, rest, program="tutelage up", environment_prefix="TUTELAGE_UP_", check=_checked)
    from rich.console import Console

    from tutelage.up.together import running

    console = Console(stderr=True, highlight=False)
    with _saying_that_it_ends(console), running(config) as services:
        with waiting_shown(console) as watch:
            services.wait(watch)
        _print_services(config, services)
        if options.follow:
            logs = {service.name: service.log for service in services.all}
            threading.Thread(target=_follow, args=(logs,), daemon=True).start()
        while True:
            time.sleep(_LOOK_SECONDS)
            for text in services.revive():
                console.print(say_at(text), soft_wrap=True)


def down(arguments: list[str]) -> int:
    """Ends what `tutelage up` started."""
    from tutelage.runtime.owner import end_owner, owner
    from tutelage.up.together import OWNER

    parser = _parser("down", "Ends what `tutelage up` started.")
    folder: Path = parser.parse_args(arguments).output
    process = end_owner(folder, OWNER, seconds=_DOWN_SECONDS)
    if process is None:
        print(f"nothing is up in {folder}")
    elif owner(folder, OWNER) is not None:
        print(f"process {process} still ends its services; {folder / 'logs'} says what they do", file=sys.stderr)
    else:
        print(f"everything in {folder} has ended")
    return EXIT_DONE


def logs(arguments: list[str]) -> int:
    """Prints the logs of the services."""
    from tutelage.runtime.processes import last_lines
    from tutelage.up.together import read_state

    parser = _parser("logs", "Prints the logs of what `tutelage up` started.")
    parser.add_argument("services", nargs="*", metavar="SERVICE", help="only these; by default all")
    parser.add_argument("--lines", type=int, default=20, help="of each at most (%(default)s)")
    parser.add_argument("--follow", action="store_true", help="go on with what they write, until Ctrl-C")
    options = parser.parse_args(arguments)
    known = {row.name: Path(row.log) for row in read_state(options.output)}
    unknown = [name for name in options.services if name not in known]
    if not known or unknown:
        given = f"{unknown[0]!r} is none" if unknown else "nothing was up there"
        raise NotFound(f"{given}; services of {options.output} are {', '.join(known) or 'none'}", "services")
    chosen = {name: known[name] for name in options.services or known}
    for name, log in chosen.items():
        for line in last_lines(log, options.lines).splitlines():
            print(f"{name} | {line}")
    if options.follow:
        _follow(chosen)
    return EXIT_DONE


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"tutelage {command}", description=description, allow_abbrev=False)
    parser.add_argument(
        "--output", "--out", type=user_path, default=_DEFAULT, help="of the configuration (%(default)s)"
    )
    return parser


def _checked(config: UpConfig) -> UpConfig:
    """Lets each service look at its own settings, as its `--dry-run` does."""
    from tutelage.files import require_writable
    from tutelage.runtime.programs import flags, tutelage

    require_writable(config.output, "output")
    commands = {
        f"teachers.{name}": [*tutelage("teacher", "serve"), *flags({"model": teacher.model, **teacher.serve})]
        for name, teacher in config.teachers.items()
    }
    if config.evaluator:
        commands["evaluator"] = [*tutelage("evaluate", "serve"), *flags(config.evaluator.serve)]
    for field, command in commands.items():
        done = subprocess.run([*command, "--dry-run"], check=False, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"its check ended with {done.returncode}"]
            raise ConfigurationError(said[-1].partition(": ")[2] or said[-1], field)
    return config


@contextmanager
def _saying_that_it_ends(console: Console) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, Terminated) as end:
        raise type(end)("every service has ended") from end


@contextmanager
def waiting_shown(console: Console) -> Iterator[Callable[[list[Row]], None]]:
    """A function that shows what is not ready yet: a line when one is, and on a terminal a bar for each of the others.

    How long a service takes is known from its last start in the same folder.
    """
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    from tutelage.runtime.processes import last_lines

    columns = [TextColumn("{task.fields[service]}"), BarColumn(20), TimeElapsedColumn()]
    began, bars, ready = time.monotonic(), dict[str, TaskID](), set[str]()
    with Progress(*columns, TextColumn("{task.description}"), console=console, transient=True) as progress:
        progress.disable = not console.is_terminal

        def watch(rows: list[Row]) -> None:
            seconds = time.monotonic() - began
            for row in rows:
                left = max(0.0, row.seconds_to_ready - seconds)
                ends = f"ends {datetime.now() + timedelta(seconds=left):%H:%M:%S}" if row.seconds_to_ready else ""
                if row.name not in bars:
                    bars[row.name] = progress.add_task("", total=row.seconds_to_ready or None, service=row.name)
                    begins = f"{row.name} starts" + (f", {ends}" if ends else "")
                    console.print(say_at(f"{begins}; its log is {row.log}"), soft_wrap=True)
                if row.address and row.name not in ready:
                    ready.add(row.name)
                    progress.update(bars[row.name], visible=False)
                    console.print(say_at(f"{row.name} is ready at {row.address}"), soft_wrap=True)
                elif not row.address:
                    said = f"{ends} [dim]{last_lines(Path(row.log), 1)[-60:]}[/dim]"
                    progress.update(bars[row.name], completed=seconds, description=said)

        yield watch


def say_at(text: str) -> Text:
    """A line with the time of day, as it is."""
    from rich.text import Text

    return Text.assemble((f"{datetime.now():%H:%M:%S} ", "dim"), text)


def _print_services(config: UpConfig, services: Services) -> None:
    from rich.table import Table

    table = Table("service", "address", "pid", "log", "in a browser", box=None, pad_edge=False, header_style="dim")
    for row in services.rows():
        table.add_row(row.name, row.address, str(row.process_id), row.log, row.url)
    console = output_console()
    console.print(table)
    if services.ray:
        said = f"Ray's token: {services.ray.token_file}; a cohort as its job: tutelage train --config cohort.yaml "
        console.print(f"{said}--submit {services.ray.url} --submit-token {services.ray.token_file}", soft_wrap=True)
    console.print(f"Ctrl-C ends everything, and so does: tutelage down --output {config.output}", soft_wrap=True)
    sys.stdout.flush()


def _follow(logs: dict[str, Path]) -> None:
    """Prints what is written to logs from now on, for ever."""
    streams = {name: log.open(errors="replace") for name, log in logs.items()}
    for stream in streams.values():
        stream.seek(0, 2)
    while True:
        for name, stream in streams.items():
            for line in stream:
                print(f"{name} | {line}", end="", flush=True)
        time.sleep(_LOOK_SECONDS)
