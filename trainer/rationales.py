"""What a teacher writes to the prompts of a data set, as a data set: what `seq_kd` learns from.

    tutelage train rationales --teacher.address 127.0.0.1:50051 --data.path train.jsonl --student DIR --out written.jsonl

The file appears when it is complete: the data's rows, with the teacher's completions. Prompts travel as token ids of
the student's tokenizer, which must be the teacher's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import grpc
from pydantic import Field
from tutelage import codec
from tutelage.configuration import Config
from tutelage.errors import NotServed
from tutelage.examples import TokenIds, prompt_encoder, read_exchanges
from tutelage.identity import require_same_tokenizer, tokenizer_digests
from tutelage.prompts import Exchange
from tutelage.teacher.v1 import teacher_pb2 as pb
from tutelage.teacher.v1 import teacher_pb2_grpc as rpc
from tutelage.transport import (
    STUDENT_METADATA_KEY,
    error_of_refusal,
    error_of_rpc,
    open_channel,
    token_metadata,
)

from trainer.checkpoints import write_durably
from trainer.config import DataConfig, Positive, TeacherConfig
from trainer.seeds import derived_seed

_IN_FLIGHT = 16
_NAME = "rationales"


class RationalesConfig(Config):
    """Lets a teacher write completions to the prompts of a data set."""

    teacher: TeacherConfig = TeacherConfig()
    """Where the teacher is; it needs the role write."""
    data: DataConfig
    """Whose prompts."""
    student: Path
    """Hugging Face directory whose tokenizer and chat template encode the prompts."""
    out: Path
    """File of rows to write, .jsonl; the data's own rows with another completion."""
    max_tokens: Positive = 512
    """Prompt and completion together; a prompt that fills them is left out."""
    max_new_tokens: Positive = 256
    """Completion at most."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """Sampling temperature; 0 is greedy."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of sampling."""


@dataclass(frozen=True)
class Written:
    """What came out."""

    rows: int
    tokens: int
    """Written tokens."""
    cut: int
    """Completions that reached the limit without an end."""


def write_rationales(config: RationalesConfig, report: Callable[[int, int], None]) -> Written:
    """Writes `config.out`.

    Args:
        config: what and where.
        report: told how many rows of how many are there.

    Raises:
        DataError: as `read_exchanges`.
        IdentityMismatch: the tokenizers differ.
        NotServed: the teacher does not write.
        Unreachable: there is no teacher.
        TutelageError: it refused a prompt.

    """
    from transformers import AutoTokenizer

    encode = prompt_encoder(AutoTokenizer.from_pretrained(config.student), config.data.template)
    pairs = [(exchange, encode(exchange)) for _, exchange in read_exchanges(config.data.path)]
    pairs = [(exchange, ids) for exchange, ids in pairs if len(ids) < config.max_tokens]
    rows, tokens, cut = [], 0, 0
    for (exchange, _), answer in zip(pairs, _answers(config, [ids for _, ids in pairs]), strict=True):
        if answer.text.strip():  # nothing can be learned from a completion that is empty
            rows.append(_row(exchange, answer.text))
        tokens, cut = tokens + answer.tokens, cut + answer.cut
        report(len(rows), len(pairs))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_durably(config.out, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return Written(len(rows), tokens, cut)


def _row(exchange: Exchange, text: str) -> dict[str, object]:
    """The exchange with another completion, in a form that `tutelage.prompts` reads."""
    if exchange.instruction_input:
        return {"instruction": exchange.messages[-1]["content"], "input": exchange.instruction_input, "output": text}
    return {"messages": [*exchange.messages, {"role": "assistant", "content": text}]}


@dataclass(frozen=True)
class _Answer:
    text: str
    tokens: int
    cut: bool


def _answers(config: RationalesConfig, prompts: Sequence[TokenIds]) -> Iterator[_Answer]:
    """One a prompt, in order; several are being written at a time."""
    metadata = ((STUDENT_METADATA_KEY, _NAME), *token_metadata(config.teacher.token_file))
    with open_channel(config.teacher.address, config.teacher.tls) as channel, ThreadPoolExecutor(_IN_FLIGHT) as pool:
        stub = rpc.TeacherServiceStub(channel)
        try:
            info = stub.GetTeacherInfo(
                pb.GetTeacherInfoRequest(), metadata=metadata, timeout=config.teacher.wait_seconds
            )
            _check(info, config)
            requests = [_request(index, prompt_ids, config) for index, prompt_ids in enumerate(prompts)]
            yield from pool.map(lambda request: _answer(stub, request, metadata), requests)
        except grpc.RpcError as error:
            raise error_of_rpc(error, config.teacher.address, "teacher") from error


def _check(info: pb.GetTeacherInfoResponse, config: RationalesConfig) -> None:
    require_same_tokenizer(info.tokenizer_digests, tokenizer_digests(config.student))
    if pb.TEACHER_ROLE_WRITE not in info.roles:
        raise NotServed(
            f"the teacher at {config.teacher.address} does not write; serve it with --roles score,write", "roles"
        )


def _request(index: int, prompt_ids: TokenIds, config: RationalesConfig) -> pb.WriteRationalesRequest:
    return pb.WriteRationalesRequest(
        request_id=str(index),
        prompt_token_ids=codec.encode(prompt_ids),
        max_new_tokens=min(config.max_new_tokens, config.max_tokens - len(prompt_ids)),
        temperature=config.temperature,
        seed=derived_seed(config.seed, "rationales", index),
    )


def _answer(
    stub: rpc.TeacherServiceStub, request: pb.WriteRationalesRequest, metadata: tuple[tuple[str, str], ...]
) -> _Answer:
    text, tokens, reason = [], 0, ""
    for response in stub.WriteRationales(request, metadata=metadata):
        if response.WhichOneof("outcome") == "refusal":
            raise error_of_refusal(response.refusal)
        text.append(response.written.text)
        tokens += len(codec.decode(response.written.token_ids, "token_ids"))
        reason = response.written.finish_reason or reason
    return _Answer("".join(text), tokens, reason == "length")


def print_written(config: RationalesConfig) -> None:
    """Writes and shows how far it is."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("the teacher writes"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("", total=None)
        written = write_rationales(config, lambda done, total: bar.update(task, completed=done, total=total))
        bar.console.print(
            f"{written.rows:,} completions of {written.tokens:,} tokens are in {config.out}"
            + (f"; {written.cut:,} reached max_new_tokens" if written.cut else ""),
            highlight=False,
            soft_wrap=True,
        )
