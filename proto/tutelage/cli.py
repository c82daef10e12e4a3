"""The `tutelage` command, and how every command of it that has subcommands finds them.

The umbrella finds its subcommands through the entry-point group `tutelage.commands`. Each service registers its own, so
this imports none of them, and an environment with only one service has only that service's. A command is a function of
the remaining arguments that returns an exit code. What ends it otherwise, an error of a known kind or a signal, becomes
one line and its exit code here.
"""

from __future__ import annotations

import difflib
import os
import re
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from tutelage import __version__
from tutelage.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_PIPE_CLOSED,
    EXIT_TERMINATED,
    EXIT_USAGE,
    Terminated,
    as_known,
)

if TYPE_CHECKING:
    from rich.console import Console

# One line each, so that --help imports no service.
_SUMMARIES = {
    "teacher": "serve a teacher, or ask one who it is and what it has done",
    "train": "train students of a served teacher",
    "data": "show what students are trained on",
    "students": "list, pause, resume, stop and scale the students of a run that is on",
    "evaluate": "score checkpoints on tasks, with or without a server",
    "report": "turn frames into an HTML report",
    "study": "plan, run and report a whole study from one file",
    "up": "start teachers, evaluator, Ray and Prometheus on this machine; Ctrl-C ends them",
    "down": "end what `tutelage up` started",
    "logs": "print, and follow, the logs of what `tutelage up` started",
    "certificates": "make an authority and certificates, by which servers and clients know each other",
    "doctor": "say what is installed, which ports are free, whether a teacher answers",
}
_WIDTH = 80
_FLAG = re.compile(r"--[A-Za-z][^=]*")


@dataclass(frozen=True)
class Command:
    """One subcommand."""

    summary: str
    """One line for the list of commands."""
    run: Callable[[list[str]], int]
    """Takes the arguments that follow its name, and returns an exit code."""


def dispatch(
    program: str,
    commands: Mapping[str, Command],
    arguments: list[str],
    default: Callable[[list[str]], int] | None = None,
) -> int:
    """Runs the subcommand that the first argument names; lists them if it is `--help`, missing, or none of them.

    Args:
        program: the command as people type it, e.g. `tutelage teacher`.
        commands: by name, in the order of the list.
        arguments: the command line after `program`.
        default: what flags without a subcommand mean; none means that a subcommand has to be named.

    """
    # pydantic-settings has subcommands (CliSubCommand) as fields of one settings class. That needs every subcommand's
    # configuration, and so every import, to answer the help of one (`tutelage` is to answer without importing a
    # service); all of them share one environment prefix and one YAML file; and none can be the default.
    first = arguments[0] if arguments else ""
    if first in commands:
        return commands[first].run(arguments[1:])
    usage = _usage(program, commands, has_default=default is not None)
    if first in ("-h", "--help", "--help-all"):
        print(usage, flush=True)
        return default(arguments) if default else EXIT_DONE
    if default and (not first or first.startswith("-")):
        return default(arguments)
    if first:
        nearest = difflib.get_close_matches(first, commands, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        print(f"{program}: {first!r} is not a command{hint}\n", file=sys.stderr)
    print(usage, file=sys.stderr)
    return EXIT_USAGE


def _usage(program: str, commands: Mapping[str, Command], *, has_default: bool) -> str:
    width = max(map(len, commands)) + 4
    options = "[COMMAND] [OPTIONS]" if has_default else "COMMAND [OPTIONS]"
    lines = [
        textwrap.fill(command.summary, _WIDTH, initial_indent=f"  {name}".ljust(width), subsequent_indent=" " * width)
        for name, command in commands.items()
    ]
    more = f"`{program} COMMAND --help` says more."
    return "\n".join([f"usage: {program} {options}", "", "commands:", *lines, "", more, *[""] * has_default])


def output_console() -> Console:
    """Where commands print tables: as wide as the terminal, and in a pipe or a file as wide as the table is."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=1000)


def main(arguments: list[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code, one of those that `tutelage.errors` lists."""
    arguments = [_with_dashes(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    if arguments[:1] == ["--version"]:
        print(f"tutelage {__version__}")
        return EXIT_DONE
    found = sorted(entry_points(group="tutelage.commands"), key=lambda entry: entry.name)
    commands = {entry.name: Command(_SUMMARIES.get(entry.name, ""), partial(_run, entry)) for entry in found}
    named = arguments[:1] if arguments[:1] and arguments[0] in commands else []
    with _terminated_as_an_exception():
        return _ended(" ".join(["tutelage", *named]), lambda: dispatch("tutelage", commands, arguments))


def _with_dashes(argument: str) -> str:
    """A flag's name with dashes, however it was written; its value as it is."""
    return _FLAG.sub(lambda name: name[0].replace("_", "-"), argument, count=1) if _FLAG.match(argument) else argument


def _run(entry: EntryPoint, arguments: list[str]) -> int:
    return int(entry.load()(arguments))


def _ended(program: str, run: Callable[[], int]) -> int:
    """Runs a command to its end, whichever that is; only a fault of ours is shown with its traceback."""
    try:
        code = run()
        sys.stdout.flush()  # here, where a reader that is gone still becomes an exit code
        return code
    except BrokenPipeError:
        # What is still buffered would be written at exit, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE_CLOSED
    except (KeyboardInterrupt, Terminated) as end:
        by_term = isinstance(end, Terminated)
        advice = f"; {end}" if str(end) else ""
        print(f"{program}: {'terminated' if by_term else 'interrupted'}{advice}", file=sys.stderr)
        return EXIT_TERMINATED if by_term else EXIT_INTERRUPTED
    except Exception as error:
        known = as_known(error)
        if known is None or os.environ.get("TUTELAGE_TRACEBACK"):
            raise
        print(f"{program}: {known}", file=sys.stderr)
        return known.exit_code


@contextmanager
def _terminated_as_an_exception() -> Iterator[None]:
    """SIGTERM, which schedulers send, unwinds the command as Ctrl-C does: what is open is saved and closed."""

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets no other thread handle signals
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
