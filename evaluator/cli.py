"""`tutelage evaluate` and `tutelage report`.

tutelage evaluate --checkpoint DIR --tasks arithmetic:paper,arc_easy --limit 100 --out frames
tutelage evaluate watch --run-dir runs/demo --tasks arithmetic:paper --out frames
tutelage evaluate serve --frames frames --queue evaluations
tutelage evaluate submit --checkpoint DIR --tasks gsm8k --run demo --student teacher
tutelage evaluate list
tutelage evaluate wait ID
tutelage evaluate cancel ID
tutelage evaluate export --frames frames --format lm-eval --out exported
tutelage evaluate tasks
tutelage evaluate items --tasks gsm8k,arc_easy
tutelage evaluate generate-arithmetic --split train --count 400 --seed 0 --out train.json
tutelage report --frames frames --run-dir runs/demo --out report.html
tutelage report --frames runs/micro/frames --study runs/micro --out report.html
"""

from __future__ import annotations

import contextlib
import json
import sys
import textwrap
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.cli import Command, dispatch
from tutelage.config import load
from tutelage.errors import EXIT_DATA, EXIT_DONE, Terminated
from tutelage.evaluator.config import (
    ArithmeticConfig,
    CancelConfig,
    EvaluateConfig,
    EvaluationSettings,
    ExportConfig,
    ItemsConfig,
    ListConfig,
    ReportConfig,
    ServeConfig,
    ServiceConfig,
    SubmitConfig,
    TasksConfig,
    WaitConfig,
    WatchConfig,
)

if TYPE_CHECKING:
    from tutelage.evaluator.runner.evaluation import Progress
    from tutelage.evaluator.runner.requests import Evaluation, TaskRequest
    from tutelage.rpc.v1.evaluator_pb2 import EvaluationStatus

_PREFIX = "TUTELAGE_EVALUATE_"


def main(arguments: list[str]) -> int:
    """Score checkpoints on tasks, with or without a server."""
    commands = {
        "serve": Command("serve evaluations over gRPC from a queue on disk", _serve),
        "submit": Command("queue an evaluation at a served evaluator", _submit),
        "list": Command("the evaluations of a served evaluator", _list),
        "wait": Command("wait for evaluations of a served evaluator and print their scores", _wait),
        "cancel": Command("end an evaluation of a served evaluator", _cancel),
        "watch": Command("score every checkpoint of a run as its students write them", _watch),
        "export": Command("write what the rows say in a form that other tools read", _export),
        "tasks": Command("list the tasks, what is known against them, and whether their data is here", _tasks),
        "items": Command("print what the items of tasks ask, one JSON object a line", _items),
        "generate-arithmetic": Command("write arithmetic word problems to train on", _generate_arithmetic),
    }
    return dispatch("tutelage evaluate", commands, arguments, default=_evaluate)


def _evaluate(arguments: list[str]) -> int:
    config = load(
        EvaluateConfig, arguments, program="tutelage evaluate", environment_prefix=_PREFIX, check=_check_evaluation
    )
    from rich import progress as rich_progress

    from tutelage.evaluator.runner.evaluation import evaluate

    evaluation = _evaluation_of(config)
    _guard(config)
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[rate]}"),
    )
    with rich_progress.Progress(*columns) as bar, _resumable(config.out):
        shown = bar.add_task(f"evaluating {evaluation.labels.student}", total=None, rate="loading")

        def show(progress: Progress) -> None:
            bar.update(shown, total=progress.total, completed=progress.done, rate=_rate(progress))

        files = evaluate(evaluation, config, config.out, on_progress=show)
    _print_scores(files)
    print(f"rows are in {config.out}")
    if config.output_path is not None:
        from tutelage.evaluator.results import lm_eval
        from tutelage.evaluator.tasks import task_of_name
        from tutelage.evaluator.tasks.base import default_data_dir

        tasks = {task.name: task for task in (task_of_name(request.task) for request in evaluation.tasks)}
        results, *_ = lm_eval.write(files, config.output_path, tasks, config.data_dir or default_data_dir())
        print(f"lm-evaluation-harness' results are in {results}")
    return _exit_code(files)


def _check_evaluation(config: EvaluateConfig) -> None:
    from tutelage.evaluator.runner.preflight import require_checkpoint
    from tutelage.files import require_writable

    _check_tasks(_evaluation_of(config).tasks, config)
    require_writable(config.out, "out")
    if config.output_path is not None:
        require_writable(config.output_path, "output_path")
    require_checkpoint(config.checkpoint)  # last: it imports transformers


def _check_tasks(tasks: Sequence[TaskRequest], settings: EvaluationSettings) -> None:
    from tutelage.evaluator.runner.preflight import require_items
    from tutelage.evaluator.tasks.base import default_data_dir

    require_items(tasks, settings.data_dir or default_data_dir())
    if settings.engine == "vllm":
        from tutelage.runtime.vllm_api import require_vllm

        require_vllm("engine", "give --engine transformers")


@contextlib.contextmanager
def _resumable(frames: Path) -> Iterator[None]:
    """Says how to go on after an interruption; leaves no empty folder of what is unfinished."""
    from tutelage.evaluator.runner.evaluation import unfinished_of

    try:
        yield
    except (KeyboardInterrupt, Terminated) as end:
        raise type(end)("finished batches are kept, and the same command goes on with them") from None
    finally:
        with contextlib.suppress(OSError):  # something is unfinished, or there never was such a folder
            unfinished_of(frames).rmdir()


def _guard(settings: EvaluationSettings) -> None:
    """Lets no process of vLLM outlive this one."""
    from tutelage.runtime import orphan_reaper

    if settings.engine == "vllm":
        orphan_reaper.start(uuid.uuid4().hex)


def _print_scores(files: Sequence[Path]) -> None:
    from tutelage.evaluator.results.frames import read_files, summarize

    for row in summarize(read_files(files)).collect().to_dicts():
        print(_summary_line(row))


def _exit_code(files: Sequence[Path]) -> int:
    """Says what could not be scored at all; without any such task the evaluation is done."""
    from tutelage.evaluator.results.frames import read_files, without_scores

    unscored = without_scores(read_files(files))
    for reason in unscored:
        print(f"tutelage evaluate: {reason}", file=sys.stderr)
    return EXIT_DATA if unscored else EXIT_DONE


def _evaluation_of(config: EvaluateConfig | SubmitConfig) -> Evaluation:
    """The evaluation that the flags describe; the same flags give the same id, so a redo replaces its rows."""
    import hashlib
    import re

    from tutelage.evaluator.runner.labels import labels_of_checkpoint
    from tutelage.evaluator.runner.requests import Evaluation, Labels, check, parse_tasks
    from tutelage.evaluator.tasks.base import default_data_dir

    data_dir = (config.data_dir if isinstance(config, EvaluateConfig) else None) or default_data_dir()
    given = {name: getattr(config, name) for name in Labels.__dataclass_fields__ if name != "temperature"}
    labels = labels_of_checkpoint(config.checkpoint, given | {"temperature": config.training_temperature})
    # Not the tasks of a command: a further one joins the rows that are there. To a service they are another evaluation.
    of_command = {"out", "output_path", "data_dir", "tasks"}
    aside = of_command if isinstance(config, EvaluateConfig) else set(ServiceConfig.model_fields)
    digest = hashlib.sha256(config.model_dump_json(exclude=aside).encode()).hexdigest()[:8]
    slug = re.sub(r"[^a-z0-9._-]+", "-", labels.student.lower()).strip("-._")[:64]
    name = None if isinstance(config, EvaluateConfig) else config.evaluation_id
    return check(
        Evaluation(
            evaluation_id=name or f"{slug or 'model'}-step{labels.step}-{digest}",
            checkpoint=config.checkpoint,
            labels=labels,
            tasks=parse_tasks(config.tasks, config.limit, data_dir),
            seed=config.seed,
        )
    )


def _rate(progress: Progress) -> str:
    failed = f", {progress.failed} failed" if progress.failed else ""
    return f"{progress.items_per_second:.1f} items/s{failed}"


def _summary_line(row: dict[str, Any]) -> str:
    error = row["standard_error"]
    score = "–" if row["score"] is None else f"{row['score']:.4f}"
    scores = score if error is None else f"{score} ± {error:.4f}"
    besides = [
        f"{name} {row[column]:.4f}"
        for name, column in (("corrected extraction", "score_corrected"), ("acc_norm", "score_normalized"))
        if row[column] is not None
    ]
    counts = ("failed", "cut_off", "too_long", "join_spanned")
    failed = "".join(f", {row[name]} {name.replace('_', ' ')}" for name in counts if row[name])
    further = f"; {', '.join(besides)}" if besides else ""
    return f"{row['task']:<14}{row['protocol']:<8}{row['metric']} {scores} (n = {row['n']}{failed}{further})"


def _serve(arguments: list[str]) -> int:
    config = load(
        ServeConfig, arguments, program="tutelage evaluate serve", environment_prefix=_PREFIX, check=_check_serve
    )
    import asyncio
    import logging

    from tutelage.evaluator.service.server import serve

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    _guard(config)
    asyncio.run(serve(config))
    return EXIT_DONE


def _check_serve(config: ServeConfig) -> None:
    from tutelage.files import require_writable
    from tutelage.rpc.transport import check_server

    _check_tasks((), config)
    require_writable(config.frames, "frames")
    require_writable(config.queue, "queue")
    check_server(
        config.host,
        insecure=config.insecure,
        tls=config.tls,
        token_file=config.token_file,
        address_file=config.address_file,
    )


def _submit(arguments: list[str]) -> int:
    config = load(SubmitConfig, arguments, program="tutelage evaluate submit", environment_prefix=_PREFIX)
    from tutelage.evaluator.service.client import submit

    evaluation = _evaluation_of(config)
    print(f"{evaluation.evaluation_id} is {submit(evaluation, config)}")
    return EXIT_DONE


def _list(arguments: list[str]) -> int:
    config = load(ListConfig, arguments, program="tutelage evaluate list", environment_prefix=_PREFIX)
    from tutelage.evaluator.service.client import known

    for status in known(config, config.run):
        print(_status_line(status))
    return EXIT_DONE


def _wait(arguments: list[str]) -> int:
    config = load(WaitConfig, _named(arguments), program="tutelage evaluate wait", environment_prefix=_PREFIX)
    from tutelage.evaluator.service.client import ended, state_of

    code = EXIT_DONE
    for status in ended(config):
        print(_status_line(status), flush=True)
        for score in status.scores:
            print(
                f"  {score.task:<14}{score.protocol:<8}{score.metric} {score.score:.4f} ± {score.standard_error:.4f} "
                f"(n = {score.items})",
                flush=True,
            )
        code = code if state_of(status) == "done" else EXIT_DATA
    return code


def _cancel(arguments: list[str]) -> int:
    config = load(CancelConfig, _named(arguments), program="tutelage evaluate cancel", environment_prefix=_PREFIX)
    from tutelage.evaluator.service.client import cancel

    print(f"{config.evaluation_id} is {cancel(config.evaluation_id, config)}")
    return EXIT_DONE


def _named(arguments: list[str]) -> list[str]:
    """The same with an evaluation that is named without its flag, as `wait ID`, under it."""
    return ["--evaluation-id", *arguments] if arguments and not arguments[0].startswith("-") else arguments


def _status_line(status: EvaluationStatus) -> str:
    from tutelage.evaluator.service.client import state_of

    done = f"{status.items_done} of {status.items_total or '?'} items"
    failed = f", {status.items_failed} failed" if status.items_failed else ""
    reason = f": {status.error}" if status.error else ""
    return f"{status.evaluation_id}  {state_of(status)}  {done}{failed}{reason}"


def _watch(arguments: list[str]) -> int:
    config = load(
        WatchConfig, arguments, program="tutelage evaluate watch", environment_prefix=_PREFIX, check=_check_watch
    )
    from tutelage.evaluator.runner.watch import watch

    _guard(config)
    codes = [EXIT_DONE]
    with _resumable(config.out):
        for evaluation, files in watch(config):
            print(f"{evaluation.labels.student} after {evaluation.labels.step} steps:", flush=True)
            _print_scores(files)
            codes.append(_exit_code(files))
    return max(codes)


def _check_watch(config: WatchConfig) -> None:
    from tutelage.evaluator.runner.requests import parse_tasks
    from tutelage.evaluator.runner.watch import committed
    from tutelage.evaluator.tasks.base import default_data_dir
    from tutelage.files import require_writable

    committed(config.run_dir)
    _check_tasks(parse_tasks(config.tasks, config.limit, config.data_dir or default_data_dir()), config)
    require_writable(config.out, "out")


def _export(arguments: list[str]) -> int:
    config = load(ExportConfig, arguments, program="tutelage evaluate export", environment_prefix=_PREFIX)
    from tutelage.evaluator.results.export import export

    for path in export(config):
        print(path)
    return EXIT_DONE


def _tasks(arguments: list[str]) -> int:
    config = load(TasksConfig, arguments, program="tutelage evaluate tasks", environment_prefix=_PREFIX)
    from tutelage.evaluator.tasks import TASKS
    from tutelage.evaluator.tasks.base import default_data_dir

    data_dir = config.data_dir or default_data_dir()
    missing = {name: task.missing(data_dir) for name, task in TASKS.items()}
    for name, task in TASKS.items():
        facts = f"{task.count:>6} items, chance {task.chance_level:.0%}, {', '.join(task.protocols)}"
        print(f"{name:<14}{facts}{' (data missing)' if missing[name] else ''}")
        theirs = [f"{task.harness_name} in lm-evaluation-harness"] * bool(task.harness_name)
        for problem in (*theirs, *task.known_problems):
            print(textwrap.fill(problem, 80, initial_indent=f"{'':<16}- ", subsequent_indent=f"{'':<18}"))
    if any(missing.values()):
        print(
            "",
            textwrap.fill(next(filter(None, missing.values())), 80, break_long_words=False, break_on_hyphens=False),
            sep="\n",
        )
    return EXIT_DONE


def _items(arguments: list[str]) -> int:
    config = load(ItemsConfig, arguments, program="tutelage evaluate items", environment_prefix=_PREFIX)
    from tutelage.evaluator.tasks import task_of_name
    from tutelage.evaluator.tasks.base import default_data_dir

    for name in config.tasks.split(","):
        for item in task_of_name(name).items(config.data_dir or default_data_dir()):
            text = "\n".join(filter(None, (item.instruction, item.input)))
            print(json.dumps({"task": name, "item": item.item_id, "text": text}))
    return EXIT_DONE


def _generate_arithmetic(arguments: list[str]) -> int:
    config = load(
        ArithmeticConfig, arguments, program="tutelage evaluate generate-arithmetic", environment_prefix=_PREFIX
    )
    from tutelage.data.rows import encode_rows
    from tutelage.evaluator.tasks.arithmetic_generator import generate
    from tutelage.files import write_durably

    records = generate(config.split, config.count, config.seed)
    content = encode_rows(records, config.out)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_durably(config.out, content)
    print(f"{len(records)} problems are in {config.out}")
    return EXIT_DONE


def report(arguments: list[str]) -> int:
    """Turn frames into an HTML report."""
    config = load(ReportConfig, arguments, program="tutelage report", environment_prefix="TUTELAGE_REPORT_")
    if config.from_paper:
        from tutelage.evaluator.paper_audit.audit import from_paper

        print(from_paper(config.from_paper, config.out.parent).page.markdown())
        return EXIT_DONE
    from tutelage.evaluator.report import write_report, write_study_report

    if config.study:
        write_study_report(frames=config.frames, study=config.study, out=config.out)
        print(f"the report is in {config.out}")
        return EXIT_DONE
    write_report(frames=config.frames, run_dir=config.run_dir, run=config.run, out=config.out)
    print(f"the report is in {config.out}")
    return EXIT_DONE
