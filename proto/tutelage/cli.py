"""The `tutelage` command, and how every command of it that has subcommands finds them.

The umbrella finds its subcommands through the entry-point group `tutelage.commands`. Each service registers its own, so
this imports none of them, and an environment with only one service has only that service's. A command is a function of
the remaining arguments that returns an exit code.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, entry_points

from tutelage import __version__
from tutelage.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_USAGE, TutelageError

# One line each, so that --help imports no service.
_SUMMARIES = {
    "teacher": "serve a teacher, or ask one who it is and what it has done",
    "train": "train students of a served teacher",
    "students": "list, pause, resume, stop and scale the students of a run that is on",
    "evaluate": "score checkpoints on tasks, with or without a server",
    "report": "turn frames into an HTML report",
    "study": "plan, run and report a whole study from one file",
    "doctor": "say what is installed, which ports are free, whether a teacher answers and a student fits it",
}


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
    width = max(map(len, commands)) + 2
    options = "[COMMAND] [OPTIONS]" if default else "COMMAND [OPTIONS]"
    lines = [f"  {name:<{width}}{command.summary}" for name, command in commands.items()]
    usage = "\n".join(
        [f"usage: {program} {options}", "", "commands:", *lines, "", f"`{program} COMMAND --help` says more."]
    )
    if first in ("-h", "--help"):
        print(usage)
        return default(arguments) if default else EXIT_DONE
    if default and (not first or first.startswith("-")):
        return default(arguments)
    if first:
        nearest = difflib.get_close_matches(first, commands, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        print(f"{program}: {first!r} is not a command{hint}\n", file=sys.stderr)
    print(usage, file=sys.stderr)
    return EXIT_USAGE


def main(arguments: list[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code: 0 done, 2 usage, 3 unreachable, 4 data, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--version"]:
        print(f"tutelage {__version__}")
        return EXIT_DONE
    found = sorted(entry_points(group="tutelage.commands"), key=lambda entry: entry.name)
    commands = {entry.name: Command(_SUMMARIES.get(entry.name, ""), partial(_run, entry)) for entry in found}
    return dispatch("tutelage", commands, arguments)


def _run(entry: EntryPoint, arguments: list[str]) -> int:
    try:
        return int(entry.load()(arguments))
    except TutelageError as error:
        if os.environ.get("TUTELAGE_TRACEBACK"):
            raise
        print(f"tutelage {entry.name}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"tutelage {entry.name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
