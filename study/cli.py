"""`tutelage study plan | run | status | stop | resume | report FILE`."""

from __future__ import annotations

import argparse
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.cli import Command, dispatch
from tutelage.config import user_path
from tutelage.errors import EXIT_DONE, ConfigurationError, Terminated
from tutelage.runtime.owner import end_owner
from tutelage.runtime.ray_jobs import add_submit_flags, submit

if TYPE_CHECKING:
    from tutelage.study.folder import Folder
    from tutelage.study.resolution import Study

_STOP_SECONDS = 60.0


def main(arguments: list[str]) -> int:
    """Plans, runs and reports a whole study from one file."""
    commands = {
        "plan": Command("the cells, what they share, and what is missing of them will cost", plan),
        "run": Command("do what is missing, and only that; with --submit as one Ray job", run),
        "status": Command("how far it is, and when it will end", status),
        "stop": Command("end the run; what is done stays", stop),
        "resume": Command("the same as run", run),
        "report": Command("tables, figures and the verdict on each claim", report),
    }
    return dispatch("tutelage study", commands, arguments)


def plan(arguments: list[str]) -> int:
    """Prints the cells and their cost; trains nothing."""
    parser = _parser("plan")
    parser.add_argument("--cells", action="store_true", help="list every cell")
    study, folder = planned(parser.parse_args(arguments).file)
    from tutelage.study.plan import cost_of
    from tutelage.study.printing import print_cells, print_plan

    if parser.parse_args(arguments).cells:
        print_cells(study, folder)
    print_plan(study, cost_of(study, folder))
    return EXIT_DONE


def run(arguments: list[str]) -> int:
    """Does what is missing of the study."""
    parser = _parser("run")
    add_submit_flags(parser)
    options = parser.parse_args(arguments)
    study, folder = planned(options.file)
    if options.submit:
        entry = ["study", "run", str(find_file(options.file).resolve())]
        job = submit(options.submit, options.submit_token, f"study-{options.file.stem}", entry)
        print(f"job {job}; watch it at {options.submit}, or with `tutelage study status {options.file}`")
        return EXIT_DONE
    from tutelage.study.driver import Driver
    from tutelage.study.printing import progress

    folder.make()
    try:
        with folder.driven(), progress(study) as (say, watch):
            started = time.monotonic()
            Driver(study, folder, say, watch).run()
            say(f"all {len(study.cells)} cells are done, {(time.monotonic() - started) / 60:.1f} minutes")
    except (KeyboardInterrupt, Terminated) as end:
        raise type(end)(f"what is done stays; to go on: tutelage study resume {options.file}") from end
    print(f"frames are in {study.config.frames}; next: tutelage study report {options.file}")
    return EXIT_DONE


def status(arguments: list[str]) -> int:
    """Prints how far the study is."""
    study, folder = planned_or_last_run(_parser("status").parse_args(arguments).file)
    from tutelage.study.printing import print_status

    print_status(study, folder)
    return EXIT_DONE


def stop(arguments: list[str]) -> int:
    """Ends the run of the study."""
    options = _parser("stop").parse_args(arguments)
    folder = folder_of(options.file)
    process = end_owner(folder.root, "driver", seconds=_STOP_SECONDS)
    if process is None:
        print(f"nothing runs the study in {folder.root}")
        return EXIT_DONE
    print(f"process {process} was told to stop; `tutelage study resume {options.file}` goes on")
    return EXIT_DONE


def report(arguments: list[str]) -> int:
    """Writes the study's report through `tutelage report`."""
    parser = _parser("report")
    parser.add_argument(
        "--output", "--out", type=user_path, help="folder to write to; by default report/ in the study's own"
    )
    options = parser.parse_args(arguments)
    study, folder = planned_or_last_run(options.file)
    import subprocess

    from tutelage.runtime.programs import flags, tutelage
    from tutelage.study.driver import write_description

    write_description(study, folder)
    out = (options.output or folder.path("report")).resolve()
    chosen = {"frames": study.config.frames.resolve(), "study": folder.root, "out": out / "report.html"}
    return subprocess.run([*tutelage("report"), *flags(chosen)], check=False).returncode


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"tutelage study {command}", allow_abbrev=False)
    parser.add_argument(
        "file",
        type=user_path,
        help="the study file (YAML), the name of a ready study, or the folder that a study was run in",
    )
    return parser


def find_file(name: Path) -> Path:
    """The study file of that path, or else the ready study of that name.

    Raises:
        ConfigurationError: there is neither.

    """
    if name.is_file():
        return name
    ready = {
        Path(entry.name).stem: entry for entry in files("tutelage.studies").iterdir() if entry.name.endswith(".yaml")
    }
    found = ready.get(str(name))
    if found is None:
        raise ConfigurationError(
            f"there is no file {name}, and the ready studies are {', '.join(sorted(ready))}", "file"
        )
    return Path(str(found))


def planned(name: Path) -> tuple[Study, Folder]:
    """The study of a file as its trainer resolves it, or the one that was last run in a folder; and its folder.

    Raises:
        ConfigurationError: the file is not a study's, or the trainer refuses a setting; nothing has run in the folder.

    """
    from tutelage.config import validate
    from tutelage.study.config import StudyConfig
    from tutelage.study.resolution import last_run, resolve

    folder = folder_of(name)
    if name.is_dir():
        return last_run(folder), folder
    return resolve(validate(StudyConfig, _content_of(name))), folder


def planned_or_last_run(name: Path) -> tuple[Study, Folder]:
    """As `planned`; of a file that cannot be planned any more, the study as it was last run, and a line that says so.

    Raises:
        ConfigurationError: as `planned`, where nothing has run.

    """
    from tutelage.study.resolution import last_run

    try:
        return planned(name)
    except ConfigurationError as error:
        folder = folder_of(name)
        if name.is_dir() or not folder.path("plan.json").exists():
            raise
        told = f"{name} cannot be planned as it stands, so this is the study as it was last run; {error}"
        print(told, file=sys.stderr)
        return last_run(folder), folder


def folder_of(name: Path) -> Folder:
    """The folder of a study: itself, or where its file says that it is, whatever else the file says.

    Raises:
        ConfigurationError: the file cannot be read, or says nothing of it.

    """
    from tutelage.study.folder import Folder

    if name.is_dir():
        return Folder(name)
    output = _content_of(name).get("output")
    if not isinstance(output, str):
        raise ConfigurationError(
            f"{name} names no folder (given: {output!r}); say where the study is to write", "output"
        )
    return Folder(Path(output))


def _content_of(name: Path) -> dict[str, Any]:
    from tutelage.config import read_mapping

    file = find_file(name)
    try:
        return read_mapping(file, "file")
    except ConfigurationError as error:
        raise ConfigurationError(
            f"{error.message}; mend it, or give the study's own folder in its place", "file"
        ) from error
