"""Has a served teacher write for a file of prompts, and makes a data set of it.

Everything written goes to `<out>.part` first, a line for each prompt, so that an interrupted run goes on where it
was. At the end the continuations that came to an end by themselves, and whose answer is right if that is asked,
become `<out>`, in the order of the prompts.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from tutelage.data.conversations import format_of, with_completion
from tutelage.data.dataset_files import TokenIds, prompt_encoder, read_conversations
from tutelage.errors import ConfigurationError, DataError, Overloaded
from tutelage.files import write_durably
from tutelage.identity import require_same_tokenizer, tokenizer_digests
from tutelage.rpc.codec import encode
from tutelage.rpc.transport import (
    ADAPTER_METADATA_KEY,
    STUDENT_METADATA_KEY,
    error_of_refusal,
    error_of_rpc,
    open_channel,
    token_metadata,
)
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.rpc.v1 import teacher_pb2_grpc as pb_grpc
from tutelage.teacher_server.config import GenerateConfig

_INFO_TIMEOUT_SECONDS = 10.0
_SHORTEST_WAIT_SECONDS = 0.1

Progress = Callable[[int, int], None]
"""Called with the prompts done and their number."""


@dataclass(frozen=True)
class Continuation:
    """What the teacher wrote once."""

    text: str
    finish_reason: str
    """"stop" or "length"."""


@dataclass
class Counts:
    """What became of the prompts."""

    prompts: int = 0
    no_room: int = 0
    """Prompts that leave no room for `max_new_tokens`; nothing is written for them."""
    written: int = 0
    """Continuations."""
    cut_off: int = 0
    """Of those, left out because they reached `max_new_tokens`, or are empty."""
    wrong: int = 0
    """Left out because their answer is another than the data's."""
    kept: int = 0


def generate_rationales(config: GenerateConfig, watch: Progress) -> Counts:
    """Writes for all prompts that have not been written for, then the data set.

    Args:
        config: of the command.
        watch: told after each prompt.

    Raises:
        ConfigurationError: `<out>.part` was written with other settings, or `answer_pattern` is no pattern.
        DataError: the prompts are not as they must be, or a row has no answer.
        IdentityMismatch: `tokenizer` is not the teacher's.
        Unreachable: the teacher went away; the next run goes on.
        TutelageError: the teacher refused; the message says why.

    """
    rows = read_conversations(config.data)
    accept = _judge(config)
    expected = [_answer_of(row, number, config) for number, (row, _) in enumerate(rows, 1)]
    prompts = _encoded(rows, config)
    with open_channel(config.address, config.tls) as channel:
        writer = _Writer(pb_grpc.TeacherServiceStub(channel), config)
        writable = {row: ids for row, ids in enumerate(prompts) if len(ids) + config.max_new_tokens <= writer.longest}
        with _Journal(Path(f"{config.out}.part"), _settings(config, writer.weights_digest)) as journal:
            waiting = [row for row in writable if row not in journal.written]
            watch(len(writable) - len(waiting), len(writable))
            for row, continuations in writer.write({row: writable[row] for row in waiting}):
                journal.add(row, continuations)
                watch(len(journal.written), len(writable))
    counts = Counts(prompts=len(rows), no_room=len(rows) - len(writable))
    lines = []
    for row, continuations in sorted(journal.written.items()):
        right = partial(accept, expected[row])
        lines += [json.dumps(made, ensure_ascii=False) for made in _kept(rows[row][0], continuations, right, counts)]
    write_durably(config.out, "".join(f"{line}\n" for line in lines))
    journal.remove()
    return counts


def _encoded(rows: Iterable[tuple[dict[str, Any], Any]], config: GenerateConfig) -> list[TokenIds]:
    from transformers import AutoTokenizer

    encode_prompt = prompt_encoder(AutoTokenizer.from_pretrained(config.tokenizer), config.template)
    return [encode_prompt(conversation) for _, conversation in rows]


class _Writer:
    """A served teacher that writes."""

    def __init__(self, stub: pb_grpc.TeacherServiceStub, config: GenerateConfig) -> None:
        self._stub, self._config = stub, config
        try:
            request = pb.GetTeacherInfoRequest()
            info = stub.GetTeacherInfo(request, timeout=_INFO_TIMEOUT_SECONDS, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of_rpc(error, config.address, "teacher") from error
        require_same_tokenizer(info.tokenizer_digests, tokenizer_digests(config.tokenizer))
        self.longest, self.weights_digest = info.limits.max_sequence_tokens, info.weights_digest

    def write(self, prompts: dict[int, TokenIds]) -> Iterator[tuple[int, list[Continuation]]]:
        """Continuations by row, as they are finished; several prompts are in flight at once."""
        threads = ThreadPoolExecutor(self._config.prompts_at_once, thread_name_prefix="write")
        rows = {threads.submit(self._write_patiently, row, ids): row for row, ids in prompts.items()}
        try:
            for done in as_completed(rows):
                yield rows[done], done.result()
        finally:  # what is in flight after an error or Ctrl-C ends with the channel
            threads.shutdown(wait=False, cancel_futures=True)

    @property
    def _metadata(self) -> tuple[tuple[str, str], ...]:
        config = self._config
        adapter = () if config.adapter is None else ((ADAPTER_METADATA_KEY, config.adapter),)
        return ((STUDENT_METADATA_KEY, config.student_id), *adapter, *token_metadata(config.token_file))

    def _write_patiently(self, row: int, prompt: TokenIds) -> list[Continuation]:
        while True:
            try:
                return self._write(row, prompt)
            except Overloaded as error:
                time.sleep(max(_SHORTEST_WAIT_SECONDS, error.retry_after_milliseconds / 1000))
            except grpc.RpcError as error:
                raise error_of_rpc(error, self._config.address, "teacher") from error

    def _write(self, row: int, prompt: TokenIds) -> list[Continuation]:
        config = self._config
        request = pb.WriteRationalesRequest(
            request_id=str(row),
            prompt_token_ids=encode(prompt),
            samples=config.samples,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=_seed(config.seed, row),
            stop=config.stop,
        )
        texts, reasons = [""] * config.samples, [""] * config.samples
        for response in self._stub.WriteRationales(request, metadata=self._metadata):
            if response.HasField("refusal"):
                raise error_of_refusal(response.refusal)
            texts[response.sample_index] += response.generated.text
            reasons[response.sample_index] = response.generated.finish_reason
        return [Continuation(text, reason) for text, reason in zip(texts, reasons, strict=True)]


class _Journal:
    """What was written so far, one line a prompt; the first line is what it was written with."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        self.written: dict[int, list[Continuation]] = {}
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # a last line without its end was cut off
        if lines and json.loads(lines[0]) != settings:
            raise ConfigurationError(
                f"{path} was begun with other prompts, settings or another teacher; remove it, or choose another out",
                "out",
            )
        for line in lines[1:]:
            row, continuations = json.loads(line)
            self.written[row] = [Continuation(**each) for each in continuations]
        whole = b"".join(line + b"\n" for line in lines) or (json.dumps(settings) + "\n").encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, whole)
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> _Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, row: int, continuations: list[Continuation]) -> None:
        """Keeps what was written for a prompt."""
        self.written[row] = continuations
        self._file.write(json.dumps([row, [asdict(each) for each in continuations]]) + "\n")
        self._file.flush()

    def remove(self) -> None:
        """Removes the file, once the data set is there."""
        self._path.unlink()


def _settings(config: GenerateConfig, weights_digest: str) -> dict[str, Any]:
    """All that what is written depends on."""
    names = ("template", "samples", "max_new_tokens", "temperature", "top_p", "seed", "stop")
    chosen = config.model_dump(mode="json", include=set(names))
    return chosen | {"prompts": hashlib.sha256(config.data.read_bytes()).hexdigest(), "teacher": weights_digest}


def _seed(seed: int, row: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {row}".encode()).digest()[:8], "little")


def _kept(
    row: dict[str, Any], continuations: Iterable[Continuation], accept: Callable[[str], bool], counts: Counts
) -> Iterator[dict[str, Any]]:
    for sample, continuation in enumerate(continuations):
        counts.written += 1
        if continuation.finish_reason != "stop" or not continuation.text.strip():
            counts.cut_off += 1
        elif not accept(continuation.text):
            counts.wrong += 1
        else:
            counts.kept += 1
            yield with_completion(row, format_of(row), continuation.text) | {"sample": sample}


def _judge(config: GenerateConfig) -> Callable[[str, str], bool]:
    """Whether the answer that is expected (first) is that of a text (second)."""
    if config.answer_pattern is None:
        return lambda _expected, _text: True
    try:
        pattern = re.compile(config.answer_pattern)
    except re.error as error:
        raise ConfigurationError(f"{config.answer_pattern!r} is no pattern: {error}", "answer_pattern") from error
    return lambda expected, text: _same(_extracted(pattern, text), _extracted(pattern, expected) or expected)


def _extracted(pattern: re.Pattern[str], text: str) -> str | None:
    """The last match: its first group if the pattern has one."""
    found = None
    for match in pattern.finditer(text):
        found = match.group(1 if pattern.groups else 0)
    return found


def _same(given: str | None, expected: str) -> bool:
    """Whether two answers are equal as numbers (1,000 and 1000.0), or else as text, whatever the case."""
    if given is None:
        return False
    one, other = (answer.replace(",", "").strip().casefold() for answer in (given, expected))
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other


def _answer_of(row: dict[str, Any], number: int, config: GenerateConfig) -> str:
    if config.answer_pattern is None:
        return ""
    if row.get(config.answer_column) is None:
        raise DataError(
            f"row {number} of {config.data} has no {config.answer_column!r} to compare with", "answer_column"
        )
    return str(row[config.answer_column])
