"""One store, two readers: what a trainer reads from the folder is what it would get from the server."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fake_teacher import VOCABULARY_SIZE, FakeScoringEngine, fake_teacher, serving
from stored_signals import store_signals
from trainer_cases import metric_rows, student_config, write_rows
from trainer_doubles import InProcessTeacher
from tutelage.config import validate
from tutelage.data.signal_store import SUFFIX, sequence_key
from tutelage.errors import ConfigurationError, CorruptFrame, DataError, IdentityMismatch, Unreachable
from tutelage.identity import tokenizer_digests
from tutelage.rpc import codec
from tutelage.teacher_server.config import PrecomputeConfig
from tutelage.teacher_server.jobs import precompute as module
from tutelage.teacher_server.jobs.precompute import precompute, read_sequences
from tutelage.trainer.config.run import CohortConfig
from tutelage.trainer.data.sequences import TokenSequence
from tutelage.trainer.teacher.base import SignalSpec
from tutelage.trainer.teacher.grpc_client import TeacherClient
from tutelage.trainer.teacher.stored import StoredTeacher
from tutelage.trainer.training.loop import train

RNG = np.random.default_rng(5)
SEQUENCES = [RNG.integers(0, VOCABULARY_SIZE, length).astype(np.int32) for length in (1, 2, 30, 1200)]
REQUESTS = [
    *(TokenSequence(ids, 0, len(ids)) for ids in SEQUENCES),
    TokenSequence(SEQUENCES[2], 7, 29),
    TokenSequence(SEQUENCES[3], 1000, 1200),
]
SPECS = {
    "topk": SignalSpec("topk", 5, (0.5, 1.0, 2.0)),
    "mass": SignalSpec("topk", 40, (2.0, 1.0), 0.6),
    "candidates": SignalSpec("candidates", 0, (1.0,)),
    "hidden": SignalSpec("hidden"),
}


def with_candidates(request: TokenSequence) -> TokenSequence:
    rows = request.rows
    ids = np.arange(rows * 3, dtype=np.int32).reshape(rows, 3) % VOCABULARY_SIZE
    ids[::2, 2] = -1
    return replace(request, candidate_ids_RC=ids)


@pytest.fixture
def filled(tmp_path) -> tuple[Path, dict]:
    """A store that a server has filled, and what it answered."""

    def ask(address: str) -> dict:
        with TeacherClient(address, student_id="ann", wait_seconds=5, tokenizer_digests={}) as client:
            return {
                kind: client.score([with_candidates(r) for r in REQUESTS] if kind == "candidates" else REQUESTS, spec)
                for kind, spec in SPECS.items()
            }

    async def serve() -> dict:
        teacher = fake_teacher(FakeScoringEngine(), config={"store": {"path": str(tmp_path)}})
        async with serving(teacher) as server:
            answers = await asyncio.to_thread(ask, server.address)
        teacher.shutdown()
        return answers

    return tmp_path, asyncio.run(serve())


@pytest.mark.parametrize("kind", SPECS)
def test_a_trainer_without_a_teacher_gets_what_the_server_answered(kind, filled):
    folder, answers = filled
    asked = [with_candidates(request) for request in REQUESTS] if kind == "candidates" else REQUESTS
    stored = StoredTeacher(folder, tokenizer_digests={}).score(asked, SPECS[kind])
    for own, served in zip(stored, answers[kind], strict=True):
        assert own.keys() == served.keys()
        for name, array in served.items():
            if array.dtype == np.float32:
                np.testing.assert_allclose(own[name], array, rtol=1e-5, atol=1e-5)
            else:
                np.testing.assert_array_equal(own[name], array)


def test_what_is_not_stored_is_refused_by_name(filled):
    folder, _ = filled
    teacher = StoredTeacher(folder, tokenizer_digests={})
    with pytest.raises(DataError, match="a sequence of 3 tokens is not stored"):
        teacher.score([TokenSequence(np.array([1, 2, 3], np.int32), 0, 3)], SPECS["hidden"])
    with pytest.raises(IdentityMismatch, match="merges"):
        StoredTeacher(folder, tokenizer_digests={"merges": "other"})


def test_a_damaged_file_is_not_learnt_from(filled):
    folder, _ = filled
    (path,) = folder.glob(f"*/{sequence_key(SEQUENCES[2])}{SUFFIX}")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptFrame, match="checksum"):
        StoredTeacher(folder, tokenizer_digests={}).score([REQUESTS[2]], SPECS["hidden"])
    unembedding = next(folder.glob(f"*/teacher/unembedding{SUFFIX}"))
    unembedding.write_bytes(unembedding.read_bytes()[:-1] + b"\1")
    with pytest.raises(CorruptFrame, match="unembedding"):
        StoredTeacher(folder, tokenizer_digests={})


def test_a_folder_of_several_teachers_or_none_is_refused(filled, tmp_path):
    folder, _ = filled
    (own,) = folder.iterdir()
    assert StoredTeacher(own, tokenizer_digests={}).identity.model_name == "fake"
    shutil.copytree(own, folder / "another")
    with pytest.raises(DataError, match="of 2 teachers"):
        StoredTeacher(folder, tokenizer_digests={})
    with pytest.raises(DataError, match="of 0 teachers"):
        StoredTeacher(tmp_path / "nothing", tokenizer_digests={})


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", 12)


def config(data: Path, folder: Path, model: Path, **values) -> PrecomputeConfig:
    given = {"model": str(model), "store": {"path": str(folder)}, "data": str(data), "max_tokens": 96} | values
    return validate(PrecomputeConfig, given)


@pytest.mark.parametrize(
    "objective",
    [
        {"name": "reverse_kl", "temperature": 2.0, "noise": 0.5},
        {"name": "forward_kl", "signal": "topk", "k": 8},
        {"name": "reverse_kl", "signal": "candidates", "k": 8},
    ],
    ids=["hidden", "topk", "candidates"],
)
def test_training_on_stored_signals_is_training_with_the_teacher(objective, tiny_model, data, tmp_path):
    store_signals(tmp_path / "store", tiny_model, read_sequences(config(data, tmp_path, tiny_model), tiny_model))
    settings = student_config(tiny_model, data, objective=objective, steps=2, save_every_steps=2, dtype="float32")
    train(settings, folder=tmp_path / "with", teacher=InProcessTeacher(tiny_model))
    stored = StoredTeacher(tmp_path / "store", tokenizer_digests=tokenizer_digests(tiny_model))
    train(settings, folder=tmp_path / "without", teacher=stored)
    for one, other in zip(metric_rows(tmp_path / "with"), metric_rows(tmp_path / "without"), strict=True):
        assert one.keys() == other.keys()
        numbers = [key for key, value in one.items() if isinstance(value, float)]
        assert [one[key] for key in numbers] == pytest.approx([other[key] for key in numbers], rel=1e-5, abs=1e-6)


def test_students_that_write_need_a_teacher(tmp_path):
    student = {"id": "ann", "init": "student", "data": {"path": "rows.jsonl"}}
    values = {"signals_from": str(tmp_path), "students": [student | {"objective": {"name": "gkd"}}]}
    with pytest.raises(ConfigurationError, match="ann writes sequences of its own"):
        validate(CohortConfig, values)
    values["students"] = [student | {"objective": {"name": "gkd", "on_policy_fraction": 0}}]
    assert validate(CohortConfig, values | {"teacher": None}).signals_from == tmp_path


@pytest.fixture
def unchecked(monkeypatch):
    """The engine is a double, whose distributions are nobody's own."""

    async def check(_teacher):
        return None

    monkeypatch.setattr(module, "check", check)


def fill(settings: PrecomputeConfig, sequences, engine: FakeScoringEngine):
    told = []
    values = {"store": {"path": str(settings.store.path), "bytes": settings.store.bytes}}
    made = asyncio.run(
        precompute(settings, sequences, lambda *_: fake_teacher(engine, config=values), lambda *done: told.append(done))
    )
    return made, told


class Dying(FakeScoringEngine):
    async def hidden_states(self, token_ids, first=0, salt=""):
        self.dead = self.dead or self.started >= 5
        return await super().hidden_states(token_ids, first, salt)


def test_precomputing_goes_on_where_it_was(unchecked, data, tiny_model, tmp_path):
    settings = config(data, tmp_path / "store", tiny_model, max_num_seqs=1)
    sequences = [[number, 1, 2] for number in range(20)]
    with pytest.raises(Unreachable, match="dead"):
        fill(settings, sequences, Dying())
    stored = len(list((tmp_path / "store").glob(f"*/*{SUFFIX}")))
    assert 0 < stored < 20
    made, told = fill(settings, sequences, FakeScoringEngine())
    assert (made.sequences, made.tokens, made.computed) == (20, 60, 20 - stored)
    assert told == [(done, 20) for done in range(1, 21)]
    assert fill(settings, sequences, FakeScoringEngine())[0].computed == 0
    assert StoredTeacher(tmp_path / "store", tokenizer_digests={}).score(
        [TokenSequence(np.array(sequences[7], np.int32), 0, 3)], SPECS["hidden"]
    )


def test_what_cannot_be_filled_is_said_before_it_is_begun(unchecked, data, tiny_model, tmp_path):
    engine = FakeScoringEngine()
    small = config(data, tmp_path / "small", tiny_model, store={"path": str(tmp_path / "small"), "bytes": 1000})
    with pytest.raises(ConfigurationError, match="may have 1,000 bytes and these sequences need 3,832"):
        fill(small, [[1], [2], [3] * 76], engine)
    with pytest.raises(ConfigurationError, match="a sequence has 2001 tokens, the teacher takes 2000"):
        fill(config(data, tmp_path / "long", tiny_model), [[1] * 2001], engine)
    assert engine.started == 0


def test_a_full_store_is_not_emptied_by_a_smaller_limit(unchecked, data, tiny_model, tmp_path):
    full = config(data, tmp_path / "store", tiny_model)
    sequences = [[number // 20, number % 20] for number in range(400)]
    fill(full, sequences, FakeScoringEngine())
    small = config(data, tmp_path / "store", tiny_model, store={"path": str(tmp_path / "store"), "bytes": 1000})
    with pytest.raises(ConfigurationError, match=r"store\.bytes"):
        fill(small, sequences, FakeScoringEngine())
    engine = FakeScoringEngine()
    assert fill(full, sequences, engine)[0].sequences == 400
    assert engine.started == 0


def test_a_disk_that_does_not_take_all_is_an_error(unchecked, data, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("tutelage.teacher_server.signals.store.write_durably", lambda path, _content: full(path))

    def full(path: Path) -> None:
        if path.stem == sequence_key([2]):
            raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match="1 of 2 sequences could not be stored"):
        fill(config(data, tmp_path / "store", tiny_model), [[1], [2]], FakeScoringEngine())


def test_the_sequences_of_a_data_set_are_those_that_a_trainer_asks_about(data, tiny_model, tmp_path):
    from transformers import AutoTokenizer

    from tutelage.trainer.data.dataset import read_dataset

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    dataset = read_dataset(data, tokenizer, template="chat", max_tokens=30)
    asked = {codec.sequence_digest(np.concatenate([e.prompt_ids, e.completion_ids])) for e in dataset.examples}
    sequences = read_sequences(config(data, tmp_path, tiny_model, max_tokens=30), tiny_model)
    assert {codec.sequence_digest(np.array(ids, np.int32)) for ids in sequences} == asked
    assert max(map(len, sequences)) <= 30
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Ann"}\n')
    with pytest.raises(DataError, match="no completion to score"):
        read_sequences(config(prompts, tmp_path, tiny_model), tiny_model)


def test_a_store_has_to_be_named():
    with pytest.raises(ConfigurationError, match=r"--store\.path"):
        validate(PrecomputeConfig, {"model": "m", "data": "rows.jsonl"})
