"""`tutelage train --config cohort.yaml`: trains the students of a cohort and shows how they do.

`--steps`, `--lr` and `--students` are short ways for what everybody sets: of every student, whatever the file says.
`--submit` hands the command to a Ray cluster, as one job of its dashboard.

`tutelage students list | pause | resume | stop | scale` steers them while they train; `tutelage data show` prints what
they are trained on.
"""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.cli import Command as Subcommand
from tutelage.cli import dispatch, output_console
from tutelage.config import user_path
from tutelage.errors import EXIT_DONE, ConfigurationError, Terminated
from tutelage.runtime.ray_jobs import add_submit_flags, submit
from tutelage.trainer.cluster.run_control import (
    Command,
    RunStatus,
    is_running,
    read_run_status,
    send_command,
)

if TYPE_CHECKING:
    from tutelage.trainer.config.run import CohortConfig
    from tutelage.trainer.config.student import StudentConfig

_HELP = {
    "list": "every student with its state, step and newest loss",
    "pause": "a student stands still after its present step",
    "resume": "a paused one goes on; a stopped one is queued again and goes on from its checkpoint",
    "stop": "a student saves and ends after its present step",
    "scale": "how many students may run at once; those beyond it save, end, and wait for their turn",
}


def main(arguments: list[str]) -> int:
    """Trains students of a served teacher."""
    from tutelage.config import load
    from tutelage.trainer.config.run import CohortConfig

    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_submit_flags(own)
    options, given = own.parse_known_args(arguments)
    short, rest = _short_ways(given)

    def check(config: CohortConfig) -> CohortConfig:
        from tutelage.trainer.config.inputs import checked

        if not config.students:
            raise ConfigurationError("there are none; list at least one, with id, init and data", "students")
        return checked(config.for_every_student(**short))

    looks = "--preflight" in rest
    rest = [each for each in rest if each != "--preflight"]
    config = load(CohortConfig, rest, program="tutelage train", environment_prefix="TUTELAGE_TRAIN_", check=check)
    if looks:
        return _preflight(config)
    if options.submit:
        entry = ["train", *given, "--ray.address", "auto"]
        job = submit(options.submit, options.submit_token, f"train-{config.run}", entry)
        print(f"job {job}; watch it at {options.submit}, or with `tutelage students list --output {config.output}`")
        return EXIT_DONE
    try:
        return _train(config)
    except (KeyboardInterrupt, Terminated) as end:
        again = shlex.join(["tutelage", "train", *arguments])
        raise type(end)(f"students are saved after their last whole step; to go on: {again}") from end


def _short_ways(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """What the short flags say, by the arguments of `CohortConfig.for_every_student`; and the other flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--lr", type=float, dest="learning_rate")
    parser.add_argument("--students", type=_names, dest="only")
    try:
        known, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigurationError(str(error)) from error
    return {name: value for name, value in vars(known).items() if value is not None}, rest


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _train(config: CohortConfig) -> int:
    from rich.console import Console

    from tutelage.config import to_yaml
    from tutelage.files import write_durably
    from tutelage.trainer.checkpoint.run_lock import folder_lock
    from tutelage.trainer.checkpoint.trainer_state import refuse_other_settings
    from tutelage.trainer.cluster.console import Display
    from tutelage.trainer.cluster.supervisor import local_or_connected_ray, supervise
    from tutelage.trainer.cluster.task_items import FILE, findings_of_cohort, keep

    console = Console()

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    say(f"run {config.run}: {len(config.students)} students, results in {config.output}")
    # Before anything is written: what an earlier run left stays as it is when this one is refused.
    for student in config.students:
        refuse_other_settings(config.started(student), config.folder(student.id))
    of_tasks = findings_of_cohort(config)
    for finding in {each: None for found in of_tasks.values() for each in found if each.state == "note"}:
        say(str(finding))
    kept = [config.output / "cohort.yaml", config.output / FILE]
    with folder_lock(config.output / "commands", advice="stop that run, or give this one another", field="output"):
        before = {path: path.read_bytes() for path in kept if path.exists()}
        write_durably(kept[0], to_yaml(config))
        keep(of_tasks, config.output)
        with local_or_connected_ray(config) as dashboard:
            say(_about_dashboard(dashboard))
            with Display(console) as display:
                students = supervise(config, display.update)
        if all(ended.was_refused for ended in students):
            for path, content in before.items():
                write_durably(path, content)
    for ended in students:
        if ended.outcome and ended.outcome.checkpoint:
            say(f"{ended.config.id}: {ended.outcome.checkpoint}")
    failed = [ended.error for ended in students if ended.error]
    if failed:
        raise failed[0]
    return EXIT_DONE


def _preflight(config: CohortConfig) -> int:
    """What `tutelage doctor --config` shows: each student's findings, and a row with what is scored in colour."""
    from tutelage.trainer.cluster.preflight import look_at
    from tutelage.trainer.cluster.task_items import findings_of_cohort

    console, code, of_tasks = output_console(), EXIT_DONE, findings_of_cohort(config)
    for student in config.students:
        console.print(f"student {student.id}", highlight=False)
        found, row = look_at(config, student)
        found += of_tasks.get(student.id, [])
        for finding in found:
            console.print(str(finding), highlight=False, markup=False, soft_wrap=True)
        if row is not None and console.is_terminal:
            console.print(row, soft_wrap=True)
        code = max(code, *(finding.exit_code for finding in found))
    return code


def _about_dashboard(address: str) -> str:
    if not address:
        return "Ray's dashboard is not served; --ray.dashboard true serves it"
    return f"Ray's dashboard: http://{address} (if it asks for a token: ray get-auth-token)"


def data(arguments: list[str]) -> int:
    """Shows what students are trained on."""
    show = Subcommand("print rows as a student is trained on them, scored tokens in colour", _show_data)
    return dispatch("tutelage data", {"show": show}, arguments)


def _show_data(arguments: list[str]) -> int:
    """`tutelage data show --config cohort.yaml [--student ID] [--rows N]`, and any setting of `tutelage train`."""
    from tutelage.config import load
    from tutelage.trainer.config.run import CohortConfig

    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--student")
    own.add_argument("--rows", type=int, default=3)
    options, rest = own.parse_known_args(arguments)
    config = load(CohortConfig, rest, program="tutelage data show", environment_prefix="TUTELAGE_TRAIN_")
    if not config.students:
        raise ConfigurationError("there are none; list at least one, with id, init and data", "students")
    student = config.student(options.student) if options.student else config.students[0]
    _print_data(student, config.root(student), options.rows)
    return EXIT_DONE


def _print_data(student: StudentConfig, model: Path, rows: int) -> None:
    from rich.text import Text
    from transformers import AutoTokenizer

    from tutelage.data.hub import local_model
    from tutelage.trainer.data.sequences import token_sequence
    from tutelage.trainer.data.shown import shown
    from tutelage.trainer.training.sources import read_data

    tokenizer, console = AutoTokenizer.from_pretrained(local_model(model, "init")), output_console()
    read = read_data(student, tokenizer)
    for number, example in enumerate(read.mixture.take(0, rows), start=1):
        if len(example.completion_ids):
            sequence = token_sequence(
                example.prompt_ids, example.completion_ids, loss_on_prompt=student.loss_on_prompt, mask=example.mask
            )
            text = shown(sequence, tokenizer, colour=console.is_terminal)
            counts = f"{len(sequence.ids)} tokens, {sequence.rows} scored"
        else:
            text = Text(tokenizer.decode(example.prompt_ids))
            counts = f"{len(example.prompt_ids)} tokens of a prompt, which {student.id} answers itself"
        teacher = f", asked of {example.teacher}" if example.teacher else ""
        console.rule(f"row {number}: {counts}{teacher}")
        console.print(text, soft_wrap=True)
        if example.teacher_prompt_ids is not None:
            console.print("in place of the prompt, the teacher reads:", highlight=False)
            console.print(Text(tokenizer.decode(example.teacher_prompt_ids)), soft_wrap=True)
    console.rule("what was read")
    for source, dataset in read.read:
        if dataset is None:
            console.print(f"{source.path}: a stream, read while it is trained on", highlight=False, soft_wrap=True)
            continue
        console.print(
            f"{source.path}: {len(dataset.examples)} rows to train on; left out because their prompt fills "
            f"batch.max_tokens: {dataset.dropped_prompts}; completions cut: {dataset.truncated_completions} "
            f"({dataset.tokens_cut} tokens); past thoughts that the chat template leaves out: {dataset.left_out}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"held out: {len(read.held_out)} rows", highlight=False)


def students(arguments: list[str]) -> int:
    """Lists and steers the students of a run."""
    options = _parser().parse_args(arguments)
    status = (
        read_run_status(options.output) if options.action == "list" else send_command(options.output, _command(options))
    )
    if options.json:
        print(json.dumps(asdict(status)))
    else:
        _show(status)
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tutelage students", description="Lists and steers the students of a run.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in _HELP.items():
        action = actions.add_parser(name, help=text, description=text)
        if name == "scale":
            action.add_argument("concurrency", type=int, help="students at once, at least 1")
        elif name != "list":
            action.add_argument("student", help="its id")
        action.add_argument(
            "--output", type=user_path, default=Path("runs/run"), help="the run's folder (default runs/run)"
        )
        action.add_argument("--json", action="store_true", help="print the run's status as JSON")
    return parser


def _command(options: argparse.Namespace) -> Command:
    if options.action != "scale":
        return Command(options.action, student=options.student)
    if options.concurrency < 1:
        raise ConfigurationError(f"{options.concurrency} students at once is none; give at least 1", "concurrency")
    return Command("scale", concurrency=options.concurrency)


def _show(status: RunStatus) -> None:
    from tutelage.trainer.cluster.console import students_table
    from tutelage.trainer.metrics.progress import metric_texts

    on = "on" if is_running(status) else "not on"
    console = output_console()
    texts = {student.student: metric_texts(student.metrics) for student in status.students}
    table = students_table(status, texts, console.width)
    console.print(f"run {status.run} ({on}), {status.concurrency} at once", highlight=False)
    console.print(table)
    for student in status.students:
        for note in student.notes:
            console.print(f"{student.student}: {note}", highlight=False, soft_wrap=True)
