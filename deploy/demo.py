"""The whole way once: a served teacher, two students on Ray, an evaluation, a report.

    make demo                                  # the packaged SmolLM2-135M-Instruct and a student of some of its layers
    make demo TEACHER=… STUDENT=…              # names on the hub, or folders

Writes everything below `runs/demo-<time>/`; models and data are made once, below `build/`. Ctrl-C at any
time ends every process; what was prepared stays.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from types import FrameType

import grpc
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tutelage.errors import TutelageError
from tutelage.files import make_directory_once
from tutelage.rpc.transport import CHANNEL_OPTIONS
from tutelage.rpc.v1 import evaluator_pb2 as epb
from tutelage.rpc.v1 import evaluator_pb2_grpc as erpc
from tutelage.runtime.processes import left_behind, running, start, stop, wait_for_file
from tutelage.studies.prepare_models import prepare

ROOT = Path(__file__).resolve().parents[1]
BUILD = Path(os.environ.get("TUTELAGE_BUILD_DIR", ROOT / "build"))
TUTELAGE = str(Path(sys.executable).with_name("tutelage"))
MARK = "TUTELAGE_DEMO"
READY_SECONDS = 300.0

# Task, protocol, items: what 2 cores score in about a minute a checkpoint. The first needs no data folder.
TASKS = [("arithmetic", "paper", 24), ("SVAMP", "paper", 12), ("ARC-Easy", "loglik", 32), ("piqa", "loglik", 24)]
ARITHMETIC_ITEMS, REAL_ITEMS = 400, 200

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
    """Teacher and student: the packaged ones, or those named; without a name the student has some of its layers."""
    if teacher is None:
        own_teacher, pruned = prepare(BUILD / "models")
        return own_teacher, resolve_model(student) if student else pruned
    from tutelage.trainer.model.layer_pruning import prune_layers

    chosen = resolve_model(teacher)
    if student:
        return chosen, resolve_model(student)
    layers = max(2, json.loads((chosen / "config.json").read_text())["num_hidden_layers"] // 4)
    pruned = BUILD / "models" / f"{chosen.name.lower()}-{layers}-layers"
    return chosen, make_directory_once(pruned, lambda out: prune_layers(chosen, out, layers=layers))


def training_data(data_dir: Path | None) -> Path:
    """Generated arithmetic, mixed with GSM8K's training questions where the research data is at hand."""
    with_real = data_dir is not None and (data_dir / "train" / "gsm8k_train.jsonl").exists()
    target = BUILD / "data" / f"train-{ARITHMETIC_ITEMS}-{REAL_ITEMS if with_real else 0}"
    return (
        make_directory_once(target, lambda out: _write_training_data(out, data_dir if with_real else None))
        / "train.jsonl"
    )


def _write_training_data(out: Path, data_dir: Path | None) -> None:
    generated = out / "arithmetic.json"
    options = ["--split", "train", "--count", str(ARITHMETIC_ITEMS), "--seed", "0", "--out", str(generated)]
    subprocess.run([TUTELAGE, "evaluate", "generate-arithmetic", *options], check=True, stdout=subprocess.DEVNULL)
    rows = [{"question": r["instruction"], "answer": r["output"]} for r in json.loads(generated.read_text())]
    if data_dir is not None:
        lines = (data_dir / "train" / "gsm8k_train.jsonl").read_text().splitlines()
        short = [json.loads(line) for line in lines if len(line) < 500]
        rows += random.Random(0).sample(short, REAL_ITEMS)
    random.Random(1).shuffle(rows)
    (out / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def serve_teacher(model: Path, run: Path) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """A teacher in the scoring role, on a free port."""
    options = ["--model", str(model), "--port", "0", "--address-file", str(run / "teacher.address")]
    command = [TUTELAGE, "teacher", "serve", *options, "--roles", "score"]
    return running(command, log=run / "logs" / "teacher.log", environment=_environment(run))


def serve_evaluator(run: Path, data_dir: Path | None) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """An evaluator that writes `frames/`, on a free port."""
    options = ["--port", "0", "--address-file", str(run / "evaluator.address")]
    options += ["--frames", str(run / "frames"), "--queue", str(run / "queue"), "--prompt", "chat"]
    options += ["--engine", "transformers"]  # a start of vLLM for each checkpoint would take longer than its items
    command = [TUTELAGE, "evaluate", "serve", *options]
    environment = _environment(run) | ({"TUTELAGE_DATA_DIR": str(data_dir)} if data_dir else {})
    return running(command, log=run / "logs" / "evaluator.log", environment=environment)


def _environment(run: Path) -> dict[str, str]:
    return {MARK: str(run), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def tasks_at_hand(stub: erpc.EvaluatorServiceStub) -> list[epb.TaskRequest]:
    """The demonstration's tasks whose data the evaluator has."""
    infos = stub.GetEvaluatorInfo(epb.GetEvaluatorInfoRequest()).tasks
    here = {info.name for info in infos if not info.missing}
    return [epb.TaskRequest(task=t, protocol=p, limit=n) for t, p, n in TASKS if t in here]


def submit_teacher(stub: erpc.EvaluatorServiceStub, teacher: Path, tasks: list[epb.TaskRequest]) -> None:
    """Queues the teacher's own evaluation; the students' are submitted by their trainers."""
    labels = epb.EvaluationLabels(run="demo", student="teacher")
    stub.SubmitEvaluation(
        epb.SubmitEvaluationRequest(
            evaluation_id="demo.teacher", checkpoint=str(teacher), labels=labels, tasks=tasks, seed=0
        )
    )


def train(run: Path, teacher: str, evaluator: str, student: Path, data: Path, tasks: list[epb.TaskRequest]) -> None:
    """Both students at once, in the foreground of the terminal.

    Raises:
        SystemExit: training ended with another exit code than 0.

    """
    chosen = [{"task": task.task, "protocol": task.protocol, "limit": task.limit} for task in tasks]
    options = {
        "output": run,
        "teacher.address": teacher,
        "evaluator.address": evaluator,
        "evaluator.tasks": json.dumps(chosen),
        "defaults.init": student,
        "defaults.data.path": data,
    }
    command = [TUTELAGE, "train", "--config", str(ROOT / "deploy" / "demo.yaml")]
    command += [part for key, value in options.items() for part in (f"--{key}", str(value))]
    process = start(command, log=None, environment=_environment(run))
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


def demonstrate(run: Path, teacher_name: str | None, student_name: str | None) -> Path:
    """Every stage in turn; returns the report's path."""
    data_dir = Path(os.environ.get("TUTELAGE_DATA_DIR", ROOT.parent / "shared" / "data"))
    data_dir = data_dir if data_dir.is_dir() else None
    say("preparing models and data" + ("" if data_dir else " (no research data here: generated arithmetic only)"))
    teacher, student = models(teacher_name, student_name)
    data = training_data(data_dir)
    with serve_teacher(teacher, run) as server, serve_evaluator(run, data_dir) as evaluator:
        say(f"starting the teacher {teacher.name} on vLLM (about a minute)")
        evaluator_address = wait_for_file(
            run / "evaluator.address", evaluator, log=run / "logs" / "evaluator.log", seconds=READY_SECONDS
        )
        teacher_address = wait_for_file(
            run / "teacher.address", server, log=run / "logs" / "teacher.log", seconds=READY_SECONDS
        )
        say(f"teacher at {teacher_address}, evaluator at {evaluator_address}")
        with grpc.insecure_channel(evaluator_address, options=CHANNEL_OPTIONS) as channel:
            stub = erpc.EvaluatorServiceStub(channel)
            tasks = tasks_at_hand(stub)
            submit_teacher(stub, teacher, tasks)
            say("training two students of this teacher at the same time; the evaluator works beside them")
            train(run, teacher_address, evaluator_address, student, data, tasks)
            wait_for_evaluations(stub, expected=5)
        say("writing the report")
        return write_report(run, teacher_address)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does."""

    def raise_interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, raise_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def main() -> int:
    """0 and a report, 130 after Ctrl-C; no process of ours is left either way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", metavar="NAME", help="a name on the hub or a folder")
    parser.add_argument("--student", metavar="NAME", help="the same; made of some of the teacher's layers if absent")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where the run's folder is made")
    options = parser.parse_args()
    run = options.runs.resolve() / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    (run / "logs").mkdir(parents=True)
    started = time.monotonic()
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars of a second each
    code = 0
    try:
        with interruptible():
            report = demonstrate(run, options.teacher, options.student)
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
