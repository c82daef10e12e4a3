"""The `tutelage` command: finds its subcommands through the entry-point group `tutelage.commands`.

Each service registers its own, so this imports none of them, and an environment with only one service
has only that service's subcommands. A subcommand is a function of the remaining arguments that returns
an exit code; the first line of its docstring is its help.
"""

from __future__ import annotations

import os
import sys
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


def _usage(commands: dict[str, EntryPoint]) -> str:
    lines = [f"  {name:<10}{_SUMMARIES.get(name, '')}" for name in sorted(commands)]
    return "\n".join(
        ["usage: tutelage COMMAND [OPTIONS]", "", "commands:", *lines, "", "`tutelage COMMAND --help` says more."]
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code: 0 done, 2 usage, 3 unreachable, 4 data, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {entry.name: entry for entry in entry_points(group="tutelage.commands")}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage(commands))
        return EXIT_DONE if arguments else EXIT_USAGE
    if arguments[0] == "--version":
        print(f"tutelage {__version__}")
        return EXIT_DONE
    entry = commands.get(arguments[0])
    if entry is None:
        print(
            f"tutelage: {arguments[0]!r} is not a command of this installation\n\n{_usage(commands)}", file=sys.stderr
        )
        return EXIT_USAGE
    return _run(entry, arguments[1:])


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
