"""Has a served teacher generate for a file of prompts, and makes a data set of it.

All that is generated goes to `<out>.part` first, a line for each prompt, so that an interrupted run goes on where it
was. At the end the continuations that came to an end by themselves, and whose answer is right if that is asked,
become `<out>`, in the order of the prompts; `<out>.settings.json` says what it was made with and what became of all.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
from tenacity import RetryCallState, Retrying, retry_if_exception_type

from tutelage.data.conversations import Conversation, format_of, with_completion
from tutelage.data.dataset_files import TokenIds, as_told_to_the_teacher, prompt_encoder, read_conversations
from tutelage.data.hub import local_file
from tutelage.data.rows import encode_rows
from tutelage.errors import ConfigurationError, DataError, Overloaded
from tutelage.files import write_durably
from tutelage.identity import require_same_tokenizer, require_tokenizer_as_its_file, tokenizer_digests
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
from tutelage.teacher_server.jobs.progress import Progressed

_INFO_TIMEOUT_SECONDS = 10.0
_SHORTEST_WAIT_SECONDS = 0.1
_SAMPLING_SETTINGS = ("template", "samples", "max_new_tokens", "temperature", "top_p", "seed", "stop")
_SELECTION_SETTINGS = ("answer_pattern", "answer_column")


@dataclass(frozen=True)
class Continuation:
    """What the teacher generated once."""

    text: str
    finish_reason: str
    """"stop" or "length"."""


@dataclass
class Counts:
    """What became of the prompts."""

    prompts: int = 0
    no_room: int = 0
    """Prompts that leave no room for `max_new_tokens`; nothing is generated for them."""
    generated: int = 0
    """Continuations."""
    cut_off: int = 0
    """Of those, left out because they reached `max_new_tokens`, or are empty."""
    wrong: int = 0
    """Left out because their answer is another than the data's."""
    kept: int = 0


def generate_rationales(config: GenerateConfig, progressed: Progressed) -> Counts:
    """Generates for all prompts that nothing has been generated for, then makes the data set.

    A data set that is finished with the same settings is left as it is.

    Args:
        config: of the command.
        progressed: told after each prompt.

    Raises:
        ConfigurationError: `<out>` or `<out>.part` was made with other settings, prompts or another teacher, what
            lies beside them is damaged, or `answer_pattern` is no pattern.
        DataError: the prompts are not as they must be, a row has no answer, or `out` has no place for a column.
        IdentityMismatch: `tokenizer` is not the teacher's.
        Unreachable: the teacher went away; the next run goes on.
        TutelageError: the teacher refused; the message says why.

    """
    rows = read_conversations(config.data)
    row_format = format_of(rows[0][0])  # of all rows, as `read_conversations` has it
    has_right_answer = _answer_check(config, [row for row, _ in rows])
    # Tried before anything is generated: a column that the form of `out` has no place for would be found at the end.
    encode_rows([with_completion(row, row_format, "") for row, _ in rows], config.out)
    prompts = encode_prompts([conversation for _, conversation in rows], config)
    with open_channel(config.address, config.tls) as channel:
        client = _GenerationClient(pb_grpc.TeacherServiceStub(channel), config)
        room = client.longest - config.max_new_tokens
        answerable = {row: prompt_ids for row, prompt_ids in enumerate(prompts) if len(prompt_ids) <= room}
        settings = config.model_dump(mode="json", include=set(_SAMPLING_SETTINGS)) | {
            "chat_template": config.chat.template,
            "chat_template_kwargs": config.chat_template_kwargs or None,
            "teacher_system": config.teacher_system,
            "prompts": hashlib.sha256(local_file(config.data).read_bytes()).hexdigest(),
            "teacher": client.weights_digest,
        }
        finished = _Finished(config.out, settings | config.model_dump(mode="json", include=set(_SELECTION_SETTINGS)))
        if finished.counts is not None:
            progressed(len(answerable), len(answerable))
            return finished.counts
        with _Journal(Path(f"{config.out}.part"), settings) as journal:
            waiting = {row: prompt_ids for row, prompt_ids in answerable.items() if row not in journal.done}
            progressed(len(answerable) - len(waiting), len(answerable))
            for row, continuations in client.generate(waiting):
                journal.add(row, continuations)
                progressed(len(journal.done), len(answerable))
    counts = Counts(prompts=len(rows), no_room=len(rows) - len(answerable))
    kept = []
    for row, continuations in sorted(journal.done.items()):
        for sample, continuation in enumerate(continuations):
            counts.generated += 1
            if continuation.finish_reason != "stop" or not continuation.text.strip():
                counts.cut_off += 1
            elif not has_right_answer(row, continuation.text):
                counts.wrong += 1
            else:
                counts.kept += 1
                kept.append(with_completion(rows[row][0], row_format, continuation.text) | {"sample": sample})
    finished.write(kept, counts)
    journal.remove()
    return counts


def encode_prompts(conversations: Sequence[Conversation], config: GenerateConfig) -> list[TokenIds]:
    """Token ids of what the teacher reads, as a trainer makes them with the same tokenizer and settings.

    Where a row or `teacher_system` tells the teacher more than the student, the teacher is asked with that; what it
    generates stands after the student's prompt.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    require_tokenizer_as_its_file(tokenizer, config.tokenizer)
    template, chat = config.template, config.chat
    encode_prompt = prompt_encoder(tokenizer, template, chat)
    return [encode_prompt(as_told_to_the_teacher(each, template, chat) or each) for each in conversations]


class _GenerationClient:
    """A served teacher that generates.

    Raises:
        IdentityMismatch: the configuration's tokenizer is not the teacher's.
        Unreachable: it does not answer.

    """

    def __init__(self, stub: pb_grpc.TeacherServiceStub, config: GenerateConfig) -> None:
        self._stub, self._config = stub, config
        try:
            request = pb.GetTeacherInfoRequest()
            info = stub.GetTeacherInfo(request, timeout=_INFO_TIMEOUT_SECONDS, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of_rpc(error, config.address, "teacher") from error
        require_same_tokenizer(info.tokenizer_digests, tokenizer_digests(config.tokenizer))
        self.longest, self.weights_digest = info.limits.max_sequence_tokens, info.weights_digest

    def generate(self, prompts: dict[int, TokenIds]) -> Iterator[tuple[int, list[Continuation]]]:
        """Continuations by row, as they are finished; several prompts are in flight at once."""
        threads = ThreadPoolExecutor(self._config.prompts_at_once, thread_name_prefix="generate")
        # A full teacher says when to come back; none of the waits of tenacity reads that from the error.
        with_retry = Retrying(retry=retry_if_exception_type(Overloaded), wait=_seconds_until_retry, reraise=True)
        rows = {threads.submit(with_retry, self._generate_once, row, ids): row for row, ids in prompts.items()}
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

    def _generate_once(self, row: int, prompt: TokenIds) -> list[Continuation]:
        config = self._config
        # Of the row and not of the order of requests, so that a run that was interrupted samples the same.
        seed = hashlib.sha256(f"{config.seed} {row}".encode()).digest()[:8]
        request = pb.WriteRationalesRequest(
            request_id=str(row),
            prompt_token_ids=encode(prompt),
            samples=config.samples,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=int.from_bytes(seed, "little"),
            stop=config.stop,
        )
        texts, reasons = [""] * config.samples, [""] * config.samples
        try:
            for response in self._stub.WriteRationales(request, metadata=self._metadata):
                if response.HasField("refusal"):
                    raise error_of_refusal(response.refusal)
                texts[response.sample_index] += response.generated.text
                reasons[response.sample_index] = response.generated.finish_reason
        except grpc.RpcError as error:
            raise error_of_rpc(error, config.address, "teacher") from error
        return [Continuation(text, reason) for text, reason in zip(texts, reasons, strict=True)]


def _seconds_until_retry(state: RetryCallState) -> float:
    assert state.outcome is not None
    error = state.outcome.exception()
    assert isinstance(error, Overloaded)
    return max(_SHORTEST_WAIT_SECONDS, error.retry_after_milliseconds / 1000)


class _Finished:
    """The data set and, beside it, what it was made with.

    Args:
        path: of the data set.
        settings: all that its rows depend on.

    Raises:
        ConfigurationError: it is there and was made otherwise, or nothing readable says how.

    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path, self._settings_path, self._settings = path, Path(f"{path}.settings.json"), settings
        self.counts: Counts | None = None
        """What became of the prompts, if the data set is there."""
        if not path.exists():
            return
        if not self._settings_path.exists():
            raise ConfigurationError(
                f"{path} is there and nothing says how it was made; remove it, or choose another out", "out"
            )
        with _refusing_damage(self._settings_path, f"remove it and {path}"):
            made = json.loads(self._settings_path.read_bytes())
            before, self.counts = dict(made["settings"]), Counts(**made["counts"])
        _require_same_settings(f"{path} was made", before, settings)

    def write(self, rows: Sequence[dict[str, Any]], counts: Counts) -> None:
        """Makes the data set; a kill between the two files leaves the journal, from which the next run makes both."""
        made = {"settings": self._settings, "counts": asdict(counts)}
        write_durably(self._settings_path, json.dumps(made, indent=1) + "\n")
        write_durably(self._path, encode_rows(rows, self._path))


class _Journal:
    """What was generated so far, one line a prompt; the first line is what it was generated with.

    Raises:
        ConfigurationError: it is there and was begun otherwise, or is damaged.

    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        self.done: dict[int, list[Continuation]] = {}
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # a last line without its end was cut off
        if lines:
            with _refusing_damage(path, "remove it"):
                begun = dict(json.loads(lines[0]))
            _require_same_settings(f"{path} was begun", begun, settings)
        for number, line in enumerate(lines[1:], start=2):
            with _refusing_damage(path, f"remove its line {number}, whose prompt will be answered again"):
                row, continuations = json.loads(line)
                self.done[row] = [Continuation(**each) for each in continuations]
        whole = b"".join(line + b"\n" for line in lines) or (json.dumps(settings) + "\n").encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, whole)
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> _Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, row: int, continuations: list[Continuation]) -> None:
        """Keeps what was generated for a prompt."""
        self.done[row] = continuations
        self._file.write(json.dumps([row, [asdict(each) for each in continuations]]) + "\n")
        self._file.flush()

    def remove(self) -> None:
        """Removes the file, once the data set is there."""
        self._path.unlink()


@contextmanager
def _refusing_damage(path: Path, advice: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{path} is damaged ({type(error).__name__}: {error}); {advice}, or choose another out"
        raise ConfigurationError(message, "out") from error


def _require_same_settings(what: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    differing = [name for name in now if before.get(name) != now[name]]
    if differing:
        changes = ", ".join(f"{name} {before.get(name)!r:.40}, now {now[name]!r:.40}" for name in differing)
        raise ConfigurationError(
            f"{what} with other prompts, settings or another teacher ({changes}); remove it, or choose another out",
            "out",
        )


def _answer_check(config: GenerateConfig, rows: list[dict[str, Any]]) -> Callable[[int, str], bool]:
    """Whether a text has the answer that the data has for a row, by `answer_pattern`.

    Answers are equal as numbers (1,000 and 1000.0) where both are, else as text, whatever the case.

    Raises:
        ConfigurationError: it is no pattern.
        DataError: a row has no answer.

    """
    if config.answer_pattern is None:
        return lambda _row, _text: True
    try:
        pattern = re.compile(config.answer_pattern)
    except re.error as error:
        raise ConfigurationError(f"{config.answer_pattern!r} is no pattern: {error}", "answer_pattern") from error
    for number, row in enumerate(rows, 1):
        if row.get(config.answer_column) is None:
            message = f"row {number} of {config.data} has no {config.answer_column!r} to compare with"
            raise DataError(message, "answer_column")

    def extracted(text: str) -> str | None:
        """The last match: its first group if the pattern has one."""
        matches = list(pattern.finditer(text))
        return matches[-1].group(1 if pattern.groups else 0) if matches else None

    def has_right_answer(row: int, text: str) -> bool:
        expected = str(rows[row][config.answer_column])
        given, wanted = extracted(text), extracted(expected) or expected
        if given is None:
            return False
        one, other = (answer.replace(",", "").strip().casefold() for answer in (given, wanted))
        try:
            return float(one) == float(other)
        except ValueError:
            return one == other

    return has_right_answer
