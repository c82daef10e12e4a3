"""The whole way once: a served teacher, two students on Ray, an evaluation, a report.

    make demo                                  # the packaged SmolLM2-135M-Instruct, and a student without eight layers
    make demo TEACHER=… STUDENT=…              # names on the hub, or folders

Writes everything below `runs/demo-<time>/`; models and data are made once, below `build/`. Ctrl-C at any
time ends every process; what was prepared stays.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

# ruff: noqa: E402
# Until `main` takes over nothing has been started: Ctrl-C just ends it, without the traceback of an import.
signal.signal(signal.SIGINT, signal.SIG_DFL)

import grpc
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tutelage.errors import TutelageError
from tutelage.files import make_directory_once
from tutelage.rpc.transport import CHANNEL_OPTIONS
from tutelage.rpc.v1 import evaluator_pb2 as epb
from tutelage.rpc.v1 import evaluator_pb2_grpc as erpc
from tutelage.runtime.processes import left_behind, start, stop
from tutelage.runtime.programs import shared_machine
from tutelage.studies.demo_inputs import write_inputs
from tutelage.studies.prepare_models import unpack_teacher
from tutelage.up.cli import waiting_shown
from tutelage.up.config import EvaluatorService, TeacherService, UpConfig
from tutelage.up.together import running

ROOT = Path(__file__).resolve().parents[1]
BUILD = Path(os.environ.get("TUTELAGE_BUILD_DIR", ROOT / "build"))
TUTELAGE = str(Path(sys.executable).with_name("tutelage"))
MARK = "TUTELAGE_DEMO"
READY_SECONDS = 300.0

# What is cut out of the middle: of the packaged teacher's 30 layers the eight from the 13th on.
FIRST_CUT, SHARE_CUT = 0.4, 8 / 30

console = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """One line of progress with the time of day."""
    console.print(f"[dim]{datetime.now():%H:%M:%S}[/dim] {text}", soft_wrap=True)


def resolve_model(name: str) -> Path:
    """A folder as it is; anything else is fetched from the hub by name, safetensors and JSON only."""
    if Path(name).is_dir():
        return Path(name).resolve()
    from huggingface_hub import snapshot_download

    say(f"fetching {name}")
    return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt"]))


def models(teacher: str | None, student: str | None) -> tuple[Path, Path]:
    """Teacher and student: the packaged one, or those named; without a name the student lacks layers of the middle."""
    if teacher is None:
        chosen = make_directory_once(BUILD / "models" / "teacher", unpack_teacher)
    else:
        chosen = resolve_model(teacher)
    if student:
        return chosen, resolve_model(student)
    from tutelage.trainer.model.layer_pruning import prune_layers

    total = json.loads((chosen / "config.json").read_text())["num_hidden_layers"]
    first, count = round(FIRST_CUT * total), max(1, round(SHARE_CUT * total))
    keep = [layer for layer in range(total) if not first <= layer < first + count]
    pruned = BUILD / "models" / f"{chosen.name.lower()}-without-{first}-to-{first + count - 1}"
    return chosen, make_directory_once(pruned, lambda out: prune_layers(chosen, out, layers=keep))


def services(run: Path, teacher: Path) -> UpConfig:
    """A teacher in the scoring role and an evaluator that writes `frames/`; students have a Ray of their own."""
    return UpConfig(
        output=run,
        teachers={
            "demo": TeacherService(model=str(teacher), serve={"roles": "score", "served_model_name": teacher.name})
        },
        # A start of vLLM for each checkpoint would take longer than its items.
        evaluator=EvaluatorService(serve={"prompt": "chat", "engine": "transformers"}),
        ray=None,
        prometheus=False,
        ready_seconds=READY_SECONDS,
    )


def submit_teacher(stub: erpc.EvaluatorServiceStub, teacher: Path, task: Path) -> None:
    """Queues the teacher's own evaluation; the students' are submitted by their trainers."""
    labels = epb.EvaluationLabels(run="demo", student="teacher")
    stub.SubmitEvaluation(
        epb.SubmitEvaluationRequest(
            evaluation_id="demo.teacher",
            checkpoint=str(teacher),
            labels=labels,
            tasks=[epb.TaskRequest(task=str(task), protocol="paper")],
            seed=0,
        )
    )


def train(run: Path, teacher: str, evaluator: str, student: Path, inputs: Path, seed: int) -> None:
    """Both students at once, in the foreground of the terminal.

    Raises:
        SystemExit: training ended with another exit code than 0.

    """
    options = {
        "output": run,
        "teacher.address": teacher,
        "evaluator.address": evaluator,
        "evaluator.tasks": json.dumps([{"task": str(inputs / "numbers.yaml")}]),
        "defaults.init": student,
        "defaults.data.path": inputs / "train.jsonl",
        "defaults.seed": seed,
    }
    command = [TUTELAGE, "train", "--config", str(ROOT / "deploy" / "demo.yaml")]
    command += [part for key, value in options.items() for part in (f"--{key}", str(value))]
    process = start(command, log=None, environment=shared_machine())
    try:
        code = process.wait()
    finally:
        stop(process)
    if code != 0:
        raise SystemExit(f"training ended with exit code {code}; see {run / 'logs'}")


def wait_for_evaluations(stub: erpc.EvaluatorServiceStub, expected: int) -> None:
    """Shows the evaluator's progress until all are done.

    Raises:
        SystemExit: one failed.

    """
    columns = [TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")]
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("", total=None)
        while True:
            known = list(stub.ListEvaluations(epb.ListEvaluationsRequest()).evaluations)
            failed = [status for status in known if status.state == epb.EVALUATION_STATE_FAILED]
            if failed:
                raise SystemExit(f"evaluation {failed[0].evaluation_id} failed: {failed[0].error}")
            done, total = sum(s.items_done for s in known), sum(s.items_total for s in known)
            left = max(0.0, sum(status.seconds_left for status in known if status.seconds_left > 0))
            progress.update(bar, completed=done, total=total, description=f"items, ends {_clock(left)}")
            if len(known) >= expected and all(s.state == epb.EVALUATION_STATE_DONE for s in known):
                return
            time.sleep(0.5)


def _clock(seconds: float) -> str:
    return f"{datetime.now() + timedelta(seconds=seconds):%H:%M:%S}"


def write_report(run: Path, teacher: str) -> Path:
    """The teacher's counters and the report beside the frames."""
    usage = subprocess.run(
        [TUTELAGE, "teacher", "usage", "--address", teacher, "--json"], check=True, stdout=subprocess.PIPE
    )
    (run / "teacher_usage.json").write_bytes(usage.stdout)
    report = run / "report.html"
    options = ["--frames", str(run / "frames"), "--run-dir", str(run), "--out", str(report)]
    subprocess.run([TUTELAGE, "report", *options], check=True, stdout=subprocess.DEVNULL)
    return report


def demonstrate(run: Path, teacher_name: str | None, student_name: str | None, seed: int) -> Path:
    """Every stage in turn; returns the report's path."""
    say("preparing models and data")
    teacher, student = models(teacher_name, student_name)
    inputs = make_directory_once(BUILD / "data" / "numbers", write_inputs)
    with running(services(run, teacher), shared_machine()) as served:
        say(f"starting the teacher {teacher.name} on vLLM (about a minute)")
        with waiting_shown(console) as watch:
            served.wait(watch)
        teacher_address, evaluator_address = served["teacher-demo"].address, served["evaluator"].address
        with grpc.insecure_channel(evaluator_address, options=CHANNEL_OPTIONS) as channel:
            stub = erpc.EvaluatorServiceStub(channel)
            submit_teacher(stub, teacher, inputs / "numbers.yaml")
            say("training two students of this teacher at the same time; the evaluator works beside them")
            train(run, teacher_address, evaluator_address, student, inputs, seed)
            wait_for_evaluations(stub, expected=5)
        say("writing the report")
        return write_report(run, teacher_address)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the block as an exception."""
    previous = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def main() -> int:
    """0 and a report, 130 after Ctrl-C; no process of ours is left either way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", metavar="NAME", help="a name on the hub or a folder")
    parser.add_argument("--student", metavar="NAME", help="the same; the teacher without some of its layers if absent")
    parser.add_argument("--seed", type=int, default=0, help="of data order and of what the students write")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where the run's folder is made")
    options = parser.parse_args()
    run = options.runs.resolve() / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    (run / "logs").mkdir(parents=True)
    started = time.monotonic()
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars of a second each
    os.environ[MARK] = str(run)  # of every process that is started
    code = 0
    try:
        with interruptible():
            report = demonstrate(run, options.teacher, options.student, options.seed)
    except KeyboardInterrupt:
        say("interrupted; everything is stopped")
        code = 130
    except TutelageError as error:
        say(f"[red]{error}[/red]")
        code = error.exit_code
    else:
        say(f"done in {(time.monotonic() - started) / 60:.1f} minutes")
        print(f"report  {report}\nframes  {run / 'frames'}\nrun     {run}")
    for process in left_behind(MARK, str(run)):
        say(f"[red]process {process.pid} was left behind and is ended: {' '.join(process.cmdline()[:4])}[/red]")
        process.kill()
        code = code or 1
    return code


if __name__ == "__main__":
    sys.exit(main())
