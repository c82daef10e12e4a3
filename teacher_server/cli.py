"""`tutelage teacher serve | precompute | write | info | usage | top`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.cli import Command, dispatch
from tutelage.errors import EXIT_DONE, DataError, TutelageError
from tutelage.teacher_server.server import logging as logs

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from tutelage.teacher_server.config import GenerateConfig, PrecomputeConfig, TeacherConfig

_DEFAULT_ADDRESS = "127.0.0.1:50051"
_TIMEOUT_SECONDS = 10.0


def main(arguments: list[str]) -> int:
    """Serves a teacher, or asks one who it is and what it has done."""
    commands = {
        "serve": Command("load a teacher and serve it over gRPC until SIGTERM", serve),
        "precompute": Command("fill a signal store for a data set, without a server", precompute),
        "write": Command("have a served teacher generate for a file of prompts, as a data set", write),
        "info": Command("who a served teacher is, what it serves and how exactly", info),
        "usage": Command("what it has done since it started, by student", usage),
        "top": Command("the same, live", top),
    }
    return dispatch("tutelage teacher", commands, arguments)


def serve(arguments: list[str]) -> int:
    """Serves a teacher until it is told to stop."""
    from tutelage.config import load
    from tutelage.teacher_server.config import TeacherConfig

    program, prefix = "tutelage teacher serve", "TUTELAGE_TEACHER_"
    flags = with_model_flag(arguments)
    config = load(TeacherConfig, flags, program=program, environment_prefix=prefix, check=_check_serve)
    logs.to_stderr(config.log_format)
    import asyncio
    import uuid

    from tutelage.runtime import orphan_reaper
    from tutelage.teacher_server.model.loading import load_teacher
    from tutelage.teacher_server.server.server import serve as serve_teacher

    # vLLM's processes outlive a server that is killed with -9: nothing of it runs any more that could end them.
    orphan_reaper.start(uuid.uuid4().hex)
    if not asyncio.run(serve_teacher(config, lambda *identity: load_teacher(config, *identity))):
        # An ordinary end would wait for the threads that load, and then for ever for vLLM's processes, which nobody
        # ends who does not have them yet. The reaper does when this process is gone.
        sys.stderr.flush()
        os._exit(EXIT_DONE)
    return EXIT_DONE


def _check_serve(config: TeacherConfig) -> None:
    from tutelage.rpc.transport import check_server

    check_server(
        config.host,
        insecure=config.insecure,
        tls=config.tls,
        token_file=config.token_file,
        address_file=config.address_file,
    )
    _check_model(config)


def _check_model(config: TeacherConfig) -> None:
    """Looks whether the model can be loaded and its signals stored; before vLLM is, and in a dry run."""
    from tutelage.data.hub import local_model
    from tutelage.data.models import check_model
    from tutelage.files import require_writable

    if config.store is not None:
        require_writable(config.store.path, "store.path")
    folder = Path(config.model)
    named = folder if config.revision is None or folder.is_dir() else Path(f"{config.model}@{config.revision}")
    check_model(local_model(named, "model"), "model")


def _check_rows(config: PrecomputeConfig | GenerateConfig) -> None:
    """Looks whether there are rows, and the chat template by which they are rendered."""
    from tutelage.data.rows import read_rows

    if next(read_rows(config.data), None) is None:
        raise DataError(f"{config.data} holds no rows", "data")
    _ = config.chat  # raises if its file cannot be read


def with_model_flag(arguments: list[str]) -> list[str]:
    """`MODEL …`, as `vllm serve` takes it, as `--model MODEL …`."""
    return ["--model", *arguments] if arguments and not arguments[0].startswith("-") else arguments


def precompute(arguments: list[str]) -> int:
    """Fills a signal store for a data set."""
    from tutelage.config import load
    from tutelage.teacher_server.config import PrecomputeConfig

    def check(config: PrecomputeConfig) -> None:
        _check_model(config)
        _check_rows(config)

    program, prefix = "tutelage teacher precompute", "TUTELAGE_TEACHER_"
    flags = with_model_flag(arguments)
    config = load(PrecomputeConfig, flags, program=program, environment_prefix=prefix, check=check)
    config = config.model_copy(update={"roles": ("score",)})
    logs.to_stderr(config.log_format)
    import asyncio
    import uuid

    from rich.console import Console

    from tutelage.runtime import orphan_reaper
    from tutelage.teacher_server.jobs.precompute import precompute as fill
    from tutelage.teacher_server.jobs.precompute import read_sequences
    from tutelage.teacher_server.jobs.progress import progress
    from tutelage.teacher_server.model.loading import find_checkpoint, load_teacher

    sequences = read_sequences(config, find_checkpoint(config.model, config.revision))
    orphan_reaper.start(uuid.uuid4().hex)
    with progress(Console(stderr=True), "sequences") as watch:
        filled = asyncio.run(fill(config, sequences, lambda *identity: load_teacher(config, *identity), watch))
    print(
        f"{filled.sequences:,} sequences ({filled.tokens:,} tokens) are stored, {filled.computed:,} of them new; the "
        f"store has {filled.stored_bytes / 2**20:,.1f} MiB"
    )
    return EXIT_DONE


def write(arguments: list[str]) -> int:
    """Has a served teacher generate a data set."""
    from tutelage.config import load
    from tutelage.teacher_server.config import GenerateConfig

    def check(config: GenerateConfig) -> GenerateConfig:
        from tutelage.data.hub import local_model
        from tutelage.data.rows import require_form
        from tutelage.files import require_writable

        require_form(config.out, "out")
        require_writable(config.out.parent, "out")
        _check_rows(config)
        return config.model_copy(update={"tokenizer": local_model(config.tokenizer, "tokenizer")})

    program, prefix = "tutelage teacher write", "TUTELAGE_TEACHER_WRITE_"
    config = load(GenerateConfig, arguments, program=program, environment_prefix=prefix, check=check)
    from rich.console import Console

    from tutelage.teacher_server.jobs.generate import generate_rationales
    from tutelage.teacher_server.jobs.progress import progress

    with progress(Console(stderr=True), "prompts") as watch:
        counts = generate_rationales(config, watch)
    print(
        f"{counts.kept:,} of {counts.generated:,} continuations of {counts.prompts - counts.no_room:,} prompts are in "
        f"{config.out}; left out: {counts.cut_off:,} without an end, {counts.wrong:,} with another answer, "
        f"{counts.no_room:,} prompts too long"
    )
    return EXIT_DONE


def info(arguments: list[str]) -> int:
    """Prints who a served teacher is."""
    from tutelage.rpc.v1 import teacher_pb2 as pb

    return _ask("info", "GetTeacherInfo", pb.GetTeacherInfoRequest(), arguments, _print_info)


def usage(arguments: list[str]) -> int:
    """Prints what a served teacher has done."""
    from tutelage.rpc.v1 import teacher_pb2 as pb

    return _ask("usage", "GetTeacherUsage", pb.GetTeacherUsageRequest(), arguments, _print_usage)


def top(arguments: list[str]) -> int:
    """Shows the students of a served teacher until Ctrl-C."""
    from rich.console import Group
    from rich.live import Live

    from tutelage.rpc.v1 import teacher_pb2 as pb

    parser = _client_parser("top")
    parser.add_argument("--seconds", type=float, default=2.0, help="between two looks (%(default)s)")
    parser.add_argument("--looks", type=int, default=sys.maxsize, help="end after so many looks")
    options = parser.parse_args(arguments)
    before: dict[str, Any] = {}
    with Live(auto_refresh=False) as live:
        for look in range(options.looks):
            time.sleep(options.seconds if look else 0)
            answers = _call(options, "GetTeacherUsage", pb.GetTeacherUsageRequest())
            shown = []
            for address, answer in answers.items():
                shown += [address] if len(answers) > 1 else []
                away = isinstance(answer, TutelageError)
                shown.append(str(answer) if away else _rates(answer, before.get(address), options.seconds))
            live.update(Group(*shown), refresh=True)
            before = {address: each for address, each in answers.items() if not isinstance(each, TutelageError)}
    return EXIT_DONE


def _rates(answer: Any, before: Any, seconds: float) -> Any:
    """A table of what was done since the look before, a second; `before` is None at the first look."""
    from rich.table import Table

    title = f"{answer.waiting_sequences:,} sequences wait, {answer.engine_passes:,} engine passes so far"
    if before is not None:
        engine, head = (
            (getattr(answer, field) - getattr(before, field)) / seconds
            for field in ("engine_busy_seconds", "head_busy_seconds")
        )
        title += f"; busy: engine {engine:.0%}, head {head:.0%}"
    table = Table(
        *("student", "streams", "sequences/s", "tokens/s", "computed/s", "rows/s", "MiB/s", "hits/s", "refused/s"),
        title=title,
    )
    earlier = {student.student_id: student for student in before.students} if before else {}
    for student in answer.students:
        last = earlier.get(student.student_id, student)
        fields = ("sequences", "tokens", "computed_tokens", "rows", "bytes", "store_hits", "refusals")
        rates = {field: (getattr(student, field) - getattr(last, field)) / seconds for field in fields}
        rates["bytes"] /= 2**20
        table.add_row(student.student_id, str(student.open_streams), *(f"{rates[field]:,.1f}" for field in fields))
    return table


def _client_parser(command: str) -> argparse.ArgumentParser:
    from tutelage.rpc.tls import add_client_flags

    parser = argparse.ArgumentParser(prog=f"tutelage teacher {command}", allow_abbrev=False)
    parser.add_argument(
        "--address",
        "--teacher.address",
        nargs="+",
        default=[_DEFAULT_ADDRESS],
        help=f"host:port of the teacher's servers, or dns:///name:port ({_DEFAULT_ADDRESS})",
    )
    parser.add_argument("--adapter", help="ask the teacher that has this LoRA adapter")
    add_client_flags(parser, "info")
    return parser


def _call(options: argparse.Namespace, method: str, request: Message) -> dict[str, Any]:
    """By address, what each server that the options name answers, or the error; one that is the only one raises it."""
    from tutelage.rpc.tls import client_access
    from tutelage.rpc.transport import ADAPTER_METADATA_KEY, ask, endpoints
    from tutelage.rpc.v1 import teacher_pb2_grpc as pb_grpc

    answers: dict[str, Any] = {}
    servers = endpoints(options.address)
    for server in servers:
        try:
            answers[server.address] = ask(
                pb_grpc.TeacherServiceStub,
                method,
                request,
                server.address,
                server="teacher",
                timeout_seconds=_TIMEOUT_SECONDS,
                access=client_access(options),
                metadata=() if options.adapter is None else ((ADAPTER_METADATA_KEY, options.adapter),),
                certified_name=server.name,
            )
        except TutelageError as error:
            if len(servers) == 1:
                raise
            answers[server.address] = error
    return answers


def _ask(command: str, method: str, request: Message, arguments: list[str], show: Callable[[Any], None]) -> int:
    parser = _client_parser(command)
    parser.add_argument("--json", action="store_true", help="print the answer as JSON; of several servers a line each")
    options = parser.parse_args(arguments)
    answers = _call(options, method, request)
    for address, answer in answers.items():
        if options.json:
            print(_json(address, answer, alone=len(answers) == 1))
            continue
        if len(answers) > 1:
            print(address)
        if isinstance(answer, TutelageError):
            print(answer)
        else:
            show(answer)
    failed = [answer for answer in answers.values() if isinstance(answer, TutelageError)]
    return failed[0].exit_code if failed else EXIT_DONE


def _json(address: str, answer: Any, *, alone: bool) -> str:
    from google.protobuf.json_format import MessageToDict

    if isinstance(answer, TutelageError):
        return json.dumps({"address": address, "error": str(answer)})
    fields = MessageToDict(answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return json.dumps(fields, indent=2) if alone else json.dumps({"address": address, **fields})


def _print_info(answer: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from tutelage.rpc.v1 import teacher_pb2 as pb

    limits, floor = answer.limits, answer.noise_floor
    rows = {
        "model": answer.model_name,
        "roles": ", ".join(pb.TeacherRole.Name(role).removeprefix("TEACHER_ROLE_").lower() for role in answer.roles),
        "signals": ", ".join(pb.SignalKind.Name(kind).removeprefix("SIGNAL_KIND_").lower() for kind in answer.kinds),
        "vocabulary": f"{answer.vocabulary_size:,} ids",
        "hidden size": str(answer.hidden_size),
        "computes in": f"{answer.dtype} ({answer.engine})",
        "limits": f"{limits.max_sequence_tokens:,} tokens, k ≤ {limits.max_k:,}, "
        f"{limits.max_requests_in_flight} requests in flight a stream",
        "noise floor": f"KL {floor.mean_kl:.2g} nats mean, {floor.max_kl:.2g} max ({floor.positions} positions)",
        "prefix cache": _prefix_cache(answer.prefix_cache) if answer.HasField("prefix_cache") else "none",
        "weights": _short(answer.weights_digest),
        **{f"tokenizer {field}": _short(digest) for field, digest in sorted(answer.tokenizer_digests.items())},
        "chat template": _short(answer.chat_template_digest) or "none",
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(answer.started_at_seconds)),
    }
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)


def _prefix_cache(cache: Any) -> str:
    """What the engine reuses, and what that has saved."""
    text = f"{cache.capacity_tokens:,} tokens in blocks of {cache.block_tokens}"
    text += ", a token's apart from the others'" if cache.isolated else ""
    return f"{text}; {cache.hits:,} passes found {cache.saved_tokens:,} tokens there"


def _short(digest: str) -> str:
    """Enough of a digest for the eye; --json has all of it."""
    return digest[:16]


def _print_usage(answer: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        *("student", "streams", "sequences", "tokens", "computed", "rows", "MiB", "store hits", "refused", "generated"),
        "last seen",
    )
    for student in answer.students:
        numbers = (student.open_streams, student.sequences, student.tokens, student.computed_tokens, student.rows)
        table.add_row(
            student.student_id,
            *(f"{number:,}" for number in numbers),
            f"{student.bytes / 2**20:,.1f}",
            f"{student.store_hits:,}",
            f"{student.refusals:,}",
            f"{student.generated_tokens:,}",
            time.strftime("%H:%M:%S", time.localtime(student.last_seen_seconds)),
        )
    Console().print(table)
