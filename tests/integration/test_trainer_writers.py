"""Writers write what the student would, with the weights that they are asked for, whoever of them dies."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from local_ray import local_ray
from trainer_cases import metric_rows, student_config, write_rows
from trainer_doubles import InProcessTeacher
from tutelage.errors import ConfigurationError, IdentityMismatch
from tutelage.trainer.config.student import StudentConfig
from tutelage.trainer.data.sequences import Completion
from tutelage.trainer.model.layer_pruning import prune_layers
from tutelage.trainer.model.student import Student
from tutelage.trainer.rollout import writers
from tutelage.trainer.rollout.base import open_sampler, sampler_in_process
from tutelage.trainer.rollout.student_copy import StudentCopy, StudentWeights
from tutelage.trainer.training.loop import train
from unlucky_writers import unlucky_writer

OWN = {"name": "gkd", "on_policy_fraction": 1.0}
PROMPTS = [np.arange(start, start + 5 + start % 7, dtype=np.int32) for start in (30, 64, 101, 250)]


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A student and its data."""
    base = tmp_path_factory.mktemp("writers")
    prune_layers(tiny_model, base / "init", layers=2)
    return base / "init", write_rows(base / "rows.jsonl")


@pytest.fixture(scope="module")
def ray_of_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with local_ray(tmp_path_factory.mktemp("ray")):
        yield


@pytest.fixture
def with_ray(ray_of_module: None) -> Iterator[None]:
    yield
    assert threads_of_writers() == []


def threads_of_writers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("writer-")]


def student_of(config: StudentConfig) -> Student:
    torch.set_num_threads(1)
    return Student(config.init, dtype=config.dtype, optimizer=config.optimizer, vocabulary_size=512, lora=config.lora)


def take_a_large_step(student: Student) -> None:
    ids = torch.tensor(np.concatenate(PROMPTS).astype(np.int64))[None]
    student.model(ids, labels=ids).loss.backward()
    student.collect_gradients()
    student.step(1e-2)


def same(left: list[Completion], right: list[Completion]) -> bool:
    pairs = list(zip(left, right, strict=True))
    return all(np.array_equal(a.ids, b.ids) and np.array_equal(a.logp, b.logp) for a, b in pairs)


@pytest.mark.parametrize("lora", [None, {"r": 4}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_copy_writes_what_its_student_does_bit_for_bit(lora, dtype, folders):
    config = student_config(*folders, objective=OWN, sampling={"writers": {}}, lora=lora, dtype=dtype)
    student = student_of(config)
    own = sampler_in_process(config, student)
    copy = StudentCopy(config, end_ids=student.end_ids, vocabulary_size=512)
    copy.take(StudentWeights.of(student, 0))
    copied = sampler_in_process(config, copy)
    before = None
    for version in range(2):
        weights = StudentWeights.of(student, version)
        copy.take(weights)
        copy.require_same(weights.canary_V)
        written = own.write(version, range(4), PROMPTS).result()
        assert same(written, copied.write(version, range(4), PROMPTS).result())
        assert before is None or not same(written, before)
        before = written
        take_a_large_step(student)


def test_a_copy_that_says_otherwise_than_its_student_is_refused(folders):
    config = student_config(*folders, objective=OWN, sampling={"writers": {}}, dtype="float32")
    student = student_of(config)
    copy = StudentCopy(config, end_ids=student.end_ids, vocabulary_size=512)
    take_a_large_step(student)
    weights = StudentWeights.of(student, 1)
    with pytest.raises(IdentityMismatch, match=r"nats from the student's, allowed is 0\.001"):
        copy.require_same(weights.canary_V)
    others = {f"other.{name}": tensor for name, tensor in weights.tensors.items()}
    with pytest.raises(IdentityMismatch, match="of another model"):
        copy.take(replace(weights, tensors=others))


def test_writers_outside_of_ray_are_refused(folders, tmp_path, tiny_model):
    config = student_config(*folders, objective=OWN, sampling={"writers": {}})
    with pytest.raises(ConfigurationError, match="train with `tutelage train`"):
        train(config, folder=tmp_path, teacher=InProcessTeacher(tiny_model))


@pytest.mark.long
def test_closed_while_it_writes_nobody_asks_ray_any_more(with_ray, folders):
    """Ray may be gone the next moment: whoever then still waits for an answer of it is ended by `SystemExit`."""
    own = {"writers": {"count": 2}, "max_new_tokens": 80}
    config = student_config(*folders, objective=OWN, sampling=own)
    pool = open_sampler(config, student_of(config))
    pool.take_weights(0)
    begun = threading.Event()
    written = pool.write(0, range(4), PROMPTS, on_piece=lambda *_: begun.set())
    assert begun.wait(60)
    pool.close()
    assert threads_of_writers() == []
    assert written.cancelled()


@pytest.mark.long
def test_what_a_killed_writer_had_begun_is_written_again_as_it_was(with_ray, folders, tmp_path, monkeypatch, caplog):
    """Two writers take their time, and each dies at its first piece."""
    caplog.set_level(logging.WARNING)
    own = {"writers": {"count": 2}, "max_staleness": 1, "max_new_tokens": 40}
    config = student_config(*folders, objective=OWN, sampling=own, lora={"r": 4})
    student = student_of(config)
    alone = sampler_in_process(config, student)
    monkeypatch.setattr(writers, "WriterActor", unlucky_writer(tmp_path, deaths=2, probability=1.0, delay_seconds=0.2))
    pool = open_sampler(config, student)
    pieces: dict[tuple[int, int], list[list[int]]] = {}

    def take_pieces(step):
        def take(index, ids):
            pieces.setdefault((step, index), []).append(ids.tolist())

        return take

    expected, futures = [], []
    for version in range(3):
        pool.take_weights(version)
        step = version + 1
        # A batch is always shared in the same way, whoever writes a share.
        shares = [alone.write(step, part, [PROMPTS[at] for at in part]).result() for part in ((0, 1), (2, 3))]
        expected.append([*shares[0], *shares[1]])
        futures.append(pool.write(step, range(4), PROMPTS, on_piece=take_pieces(step)))
        take_a_large_step(student)
    for version, (future, completions) in enumerate(zip(futures, expected, strict=True)):
        written = future.result(120)
        assert same(written, completions)
        assert [each.versions.tolist() for each in written] == [[version] * len(each.ids) for each in written]
        for index, each in enumerate(written):
            told = pieces[version + 1, index]
            assert [len(ids) for ids in told] == sorted({len(ids) for ids in told})
            assert all(ids == each.ids[: len(ids)].tolist() for ids in told)
            assert len(told[-1]) == len(each.ids)
    pool.close()
    assert caplog.text.count("what it had begun is written again") == 2


def trained(config: StudentConfig, folder: Path, tiny_model: Path) -> list[dict[str, float]]:
    """The metrics of a training; each of its sequences was scored once, and so were those held out."""
    teacher = InProcessTeacher(tiny_model)
    assert train(config, folder=folder, teacher=teacher).finished
    rows = [row for row in metric_rows(folder) if "train/loss" in row]
    assert teacher.sequences_scored == len(rows) * config.batch.sequences + config.held_out.sequences
    assert [row["step"] for row in rows] == list(range(1, config.steps + 1))
    assert all(row["train/own_sequences"] == config.batch.sequences for row in rows)
    return rows


def test_a_training_whose_writer_dies_is_the_one_without_writers_bit_for_bit(
    with_ray, folders, tiny_model, tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.WARNING)
    own = {"max_staleness": 2, "max_new_tokens": 24}
    alone = student_config(*folders, objective=OWN, sampling=own, steps=12)
    config = student_config(*folders, objective=OWN, sampling=own | {"writers": {}}, steps=12)
    monkeypatch.setattr(writers, "WriterActor", unlucky_writer(tmp_path, deaths=1, probability=0.1, delay_seconds=0.1))
    rows = trained(config, tmp_path / "writer", tiny_model)
    assert rows == trained(alone, tmp_path / "alone", tiny_model)
    assert [row["train/staleness"] for row in rows] == [min(row["step"] - 1, 2) for row in rows]
    assert caplog.text.count("what it had begun is written again") == len(list(tmp_path.glob("death-*")))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_however_late_and_unlucky_writers_are_no_sequence_is_lost_or_too_old(
    with_ray, folders, tiny_model, tmp_path, monkeypatch, caplog
):
    """What is learned is what was learned with writers that were neither."""
    caplog.set_level(logging.WARNING)
    own = {"writers": {"count": 2}, "max_staleness": 2, "max_new_tokens": 24}
    config = student_config(
        *folders, objective=OWN, sampling=own, steps=500, save_every_steps=50, held_out={"every_steps": 100}
    )
    with monkeypatch.context() as patch:
        unlucky = unlucky_writer(tmp_path, deaths=10, probability=0.005, delay_seconds=0.1)
        patch.setattr(writers, "WriterActor", unlucky)
        rows = trained(config, tmp_path / "unlucky", tiny_model)
    # As the writers recorded it, of each token that they wrote.
    assert [row["train/staleness"] for row in rows] == [min(row["step"] - 1, 2) for row in rows]
    deaths = len(list(tmp_path.glob("death-*")))
    print(f"{deaths} deaths")
    assert caplog.text.count("what it had begun is written again") == deaths >= 3
    assert rows == trained(config, tmp_path / "lucky", tiny_model)


@pytest.mark.long
def test_a_writer_that_computes_other_weights_is_named_and_after_three_tries_ends_the_training(
    with_ray, folders, tiny_model, tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.WARNING)

    class LyingWriter(writers.WriterActor):
        """Takes every version after the first one wrongly."""

        def _take(self, weights: StudentWeights) -> None:
            if weights.version and weights.version != self._version:
                name, (dtype, shape, array) = next(iter(weights.tensors.items()))
                other = np.roll(array, 64)
                weights = replace(weights, tensors={**weights.tensors, name: (dtype, shape, other)})
            super()._take(weights)

    kill = writers.ray.kill

    def kill_late(actor, *, no_restart=True):
        """As on a busy machine, where what is to be killed answers on for a while."""
        if no_restart:
            kill(actor)
        else:
            threading.Timer(0.5, kill, (actor,), {"no_restart": False}).start()

    monkeypatch.setattr(writers.ray, "kill", kill_late)
    monkeypatch.setattr(writers, "WriterActor", LyingWriter)
    config = student_config(*folders, objective=OWN, sampling={"writers": {}})
    with pytest.raises(IdentityMismatch, match=r"student-ann-writer-0: its log-probabilities of a fixed text are"):
        train(config, folder=tmp_path, teacher=InProcessTeacher(tiny_model))
    assert caplog.text.count("what it had begun is written again") == 2
