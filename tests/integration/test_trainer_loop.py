"""Whole trainings in this process, with a tiny real model and a teacher without network."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trainer_cases import metric_rows, student_config, write_rows
from trainer_doubles import FaultyServicer, InProcessTeacher, serving
from tutelage.errors import CheckpointError, ConfigurationError, Conflict, DataError, IdentityMismatch
from tutelage.identity import tokenizer_digests
from tutelage.trainer.metrics.progress import Progress
from tutelage.trainer.model.layer_pruning import prune_layers
from tutelage.trainer.teacher.grpc_client import TeacherClient
from tutelage.trainer.training.control import Control
from tutelage.trainer.training.loop import train


@pytest.fixture(scope="module")
def teacher(tiny_model: Path) -> InProcessTeacher:
    return InProcessTeacher(tiny_model)


@pytest.fixture(scope="module")
def student(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    prune_layers(tiny_model, folder, layers=2)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


def stop_after(step: int, control: Control):
    """A reporter that asks for a stop once so many steps are done."""

    def report(progress: Progress) -> None:
        if progress.step >= step:
            control.stop()

    return report


def files_equal(left: Path, right: Path) -> None:
    for name in ("model.safetensors", "trainer_state.st"):
        one, other = load_file(left / name), load_file(right / name)
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            assert torch.equal(tensor, other[key]), f"{name}: {key}"


def test_a_checkpoint_holds_no_other_weights_than_the_models(student, data, tmp_path):
    """vLLM and the teacher server take every `*.safetensors` of a folder for weights."""
    done = train(student_config(student, data, objective={"name": "sft"}), folder=tmp_path, teacher=None)
    assert [path.name for path in done.checkpoint.glob("*.safetensors")] == ["model.safetensors"]


OBJECTIVES = [
    {"name": "sft"},
    {"name": "forward_kl", "signal": "topk", "k": 8, "temperature": 2.0},
    {"name": "reverse_kl", "temperature": 2.0, "noise": 0.5},
    {"name": "reverse_kl", "signal": "candidates", "k": 8},
    {"name": "gkd", "on_policy_fraction": 0.5},
    {"name": "policy_gradient_kl"},
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: "-".join(map(str, objective.values())))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_resumed_training_equals_an_undisturbed_one_bit_for_bit(objective, dtype, teacher, student, data, tmp_path):
    config = student_config(student, data, objective=objective, dtype=dtype)
    whole = train(config, folder=tmp_path / "whole", teacher=teacher)
    control = Control()
    stopped = train(config, folder=tmp_path / "parts", teacher=teacher, report=stop_after(3, control), control=control)
    assert not stopped.finished
    assert stopped.step == 3
    resumed = train(config, folder=tmp_path / "parts", teacher=teacher)
    assert resumed.finished
    assert metric_rows(tmp_path / "parts") == metric_rows(tmp_path / "whole")
    files_equal(whole.checkpoint, resumed.checkpoint)


def test_a_training_killed_between_checkpoints_repeats_its_steps(teacher, student, data, tmp_path):
    """Leaves metrics beyond the last checkpoint, as a killed process does."""
    config = student_config(student, data)
    whole = train(config, folder=tmp_path / "whole", teacher=teacher)

    class Killed(BaseException):
        pass

    def kill(progress: Progress) -> None:
        if progress.step == 5:
            raise Killed

    with pytest.raises(Killed):
        train(config, folder=tmp_path / "killed", teacher=teacher, report=kill)
    assert metric_rows(tmp_path / "killed")[-1]["step"] > 3
    resumed = train(config, folder=tmp_path / "killed", teacher=teacher)
    assert metric_rows(tmp_path / "killed") == metric_rows(tmp_path / "whole")
    files_equal(whole.checkpoint, resumed.checkpoint)


def test_the_student_comes_nearer_to_its_teacher(teacher, student, data, tmp_path):
    config = student_config(
        student,
        data,
        steps=30,
        save_every_steps=30,
        objective={"name": "forward_kl"},
        optimizer={"learning_rate": 3e-3},
        held_out={"sequences": 4, "every_steps": 30},
    )
    train(config, folder=tmp_path, teacher=teacher)
    first, *_, last = metric_rows(tmp_path)
    assert last["heldout/forward_kl"] < 0.6 * first["heldout/forward_kl"]
    assert last["heldout/top1_agreement"] > first["heldout/top1_agreement"]


def test_a_student_that_is_its_teacher_has_nothing_to_learn(teacher, tiny_model, data, tmp_path):
    config = student_config(tiny_model, data, steps=1, held_out={"every_steps": 1})
    train(config, folder=tmp_path, teacher=teacher)
    first, step = metric_rows(tmp_path)
    # bfloat16 against float32: what rounding costs, no more.
    assert first["heldout/forward_kl"] < 0.005
    assert step["train/loss"] < 0.005


@pytest.mark.parametrize("objective", [{"name": "sft"}, {"name": "gkd", "on_policy_fraction": 1.0}])
def test_micro_batches_do_not_change_the_step(objective, teacher, student, data, tmp_path):
    rows = []
    for size in (1, 2, 4):
        config = student_config(
            student, data, steps=1, dtype="float32", objective=objective, batch={"micro_batch_sequences": size}
        )
        train(config, folder=tmp_path / str(size), teacher=teacher)
        rows.append(metric_rows(tmp_path / str(size))[1])
    for row in rows[1:]:
        assert row["train/loss"] == pytest.approx(rows[0]["train/loss"], rel=1e-5)
        assert row["train/gradient_norm"] == pytest.approx(rows[0]["train/gradient_norm"], rel=1e-4)


def test_students_of_one_seed_differ_only_in_what_they_draw_themselves(teacher, student, data, tmp_path):
    for name in ("ann", "bob"):
        config = student_config(student, data, id=name, objective={"name": "forward_kl"}, steps=2)
        train(config, folder=tmp_path / name, teacher=teacher)
    files_equal(*(next((tmp_path / name / "checkpoints").iterdir()) for name in ("ann", "bob")))


def test_held_out_sequences_are_scored_once(teacher, student, data, tmp_path):
    config = student_config(student, data, objective={"name": "sft"}, held_out={"sequences": 4, "every_steps": 2})
    before = teacher.sequences_scored
    train(config, folder=tmp_path, teacher=teacher)
    assert teacher.sequences_scored - before == 4


@pytest.mark.parametrize("content", [b"", b"{", b"\x08" + bytes(20)])
def test_held_out_answers_that_cannot_be_read_are_refused_with_what_to_do(content, teacher, student, data, tmp_path):
    config = student_config(student, data, objective={"name": "sft"}, steps=1)
    (tmp_path / "held_out.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"held_out\.safetensors cannot be read: .*; remove it"):
        train(config, folder=tmp_path, teacher=teacher)


def test_without_teacher_the_data_alone_teaches(student, data, tmp_path):
    config = student_config(student, data, objective={"name": "sft"}, steps=3)
    assert train(config, folder=tmp_path, teacher=None).finished
    first, *_, last = metric_rows(tmp_path)
    assert last["heldout/cross_entropy"] < first["heldout/cross_entropy"]
    assert "heldout/forward_kl" not in last
    with pytest.raises(ConfigurationError, match="needs a teacher"):
        train(student_config(student, data), folder=tmp_path / "other", teacher=None)


def test_what_was_begun_differently_is_not_continued(teacher, student, data, tmp_path):
    folder = tmp_path / "student"
    train(student_config(student, data, steps=3), folder=folder, teacher=teacher)
    with pytest.raises(CheckpointError, match=r"other settings \(seed: 0, now 1\); go on with what it began with"):
        train(student_config(student, data, steps=3, seed=1), folder=folder, teacher=teacher)
    changed = {"objective": {"name": "gkd", "temperature": 2.0}, "lora": {"r": 4}, "keep_checkpoints": 9}
    named = r"\(lora\..*; lora\.r: none, now 4; .*objective\.temperature: 1\.0, now 2\.0\)"
    with pytest.raises(CheckpointError, match=named):
        train(student_config(student, data, steps=3, **changed), folder=folder, teacher=teacher)


def test_another_teacher_or_other_rows_are_not_continued_with(teacher, student, tmp_path, tiny_model):
    data = write_rows(tmp_path / "rows.jsonl")
    config = student_config(student, data, steps=3)
    train(config, folder=tmp_path / "student", teacher=teacher)
    other = InProcessTeacher(tiny_model)
    other.identity = replace(other.identity, weights_digest="f" * 64)
    with pytest.raises(IdentityMismatch, match="began with the teacher"):
        train(config, folder=tmp_path / "student", teacher=other)
    write_rows(data, 41)
    with pytest.raises(CheckpointError, match="other data"):
        train(config, folder=tmp_path / "student", teacher=teacher)


def test_rows_without_completion_need_a_student_that_writes(teacher, student, tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(f'{{"prompt": "Ann has {i} apples."}}\n' for i in range(10)), encoding="utf-8")
    own = student_config(
        student, data, steps=1, held_out={"sequences": 0}, objective={"name": "gkd", "on_policy_fraction": 1.0}
    )
    assert train(own, folder=tmp_path / "own", teacher=teacher).finished
    with pytest.raises(DataError, match="on_policy_fraction above 0"):
        train(
            student_config(student, data, held_out={"sequences": 0}, objective={"name": "forward_kl"}),
            folder=tmp_path / "data",
            teacher=teacher,
        )
    with pytest.raises(DataError, match=r"held_out\.sequences: 0"):
        train(student_config(student, data), folder=tmp_path / "held", teacher=teacher)


def test_two_trainings_of_one_student_exclude_each_other(teacher, student, data, tmp_path):
    def second(progress: Progress) -> None:
        if progress.step == 1:
            with pytest.raises(Conflict, match="being written by process"):
                train(config, folder=tmp_path, teacher=teacher)

    config = student_config(student, data, steps=2)
    assert train(config, folder=tmp_path, teacher=teacher, report=second).finished


def test_checkpoints_go_to_the_evaluator_before_between_and_after(teacher, student, data, tmp_path):
    class Recorder:
        every_steps = 2

        def __init__(self) -> None:
            self.submitted: list[tuple[int, Path]] = []

        def submit(self, step: int, checkpoint: Path, *, finished: bool = False) -> None:
            self.submitted.append((step, checkpoint))

    recorder = Recorder()
    config = student_config(student, data, save_every_steps=1, keep_checkpoints=1)
    train(config, folder=tmp_path, teacher=teacher, evaluations=recorder)
    assert [step for step, _ in recorder.submitted] == [0, 2, 4, 6]
    assert recorder.submitted[0][1] == student
    assert all((path / "MANIFEST.json").exists() for _, path in recorder.submitted[1:])
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


def test_what_a_process_that_ended_owed_the_evaluator_is_sent_by_the_next(teacher, student, data, tmp_path):
    class Recorder:
        every_steps = 2

        def __init__(self) -> None:
            self.submitted: list[int] = []
            self.again: list[tuple[int, Path]] = []

        def submit(self, step: int, checkpoint: Path, *, finished: bool = False) -> None:
            self.submitted.append(step)

        def submit_again(self, step: int, checkpoint: Path) -> None:
            self.again.append((step, checkpoint))

    def stop(progress: Progress) -> None:
        if progress.step == 5:
            control.stop()

    control, first, second = Control(), Recorder(), Recorder()
    config = student_config(student, data, save_every_steps=1, keep_checkpoints=1, objective={"name": "sft"})
    train(config, folder=tmp_path, teacher=None, evaluations=first, report=stop, control=control)
    assert (first.submitted, first.again) == ([0, 2, 4], [])
    train(config, folder=tmp_path, teacher=None, evaluations=second)
    assert second.submitted == [6]
    assert [step for step, _ in second.again] == [0, 2, 4]
    assert second.again[0][1] == student
    assert all((path / "MANIFEST.json").exists() for _, path in second.again[1:])
    third = Recorder()
    assert train(config, folder=tmp_path, teacher=None, evaluations=third).finished
    assert (third.submitted, [step for step, _ in third.again]) == ([6], [0, 2, 4])


def test_the_wire_changes_nothing(teacher, student, data, tmp_path, tiny_model):
    """The same training over gRPC, through streams that break, equals the one in this process bit for bit."""
    config = student_config(student, data)
    train(config, folder=tmp_path / "direct", teacher=teacher)
    servicer = FaultyServicer(teacher, tiny_model)
    with (
        serving(servicer) as address,
        TeacherClient(
            address, student_id="ann", wait_seconds=10, tokenizer_digests=tokenizer_digests(student)
        ) as client,
    ):
        servicer.abort_after_frames = [3, 0, 5, 40]
        train(config, folder=tmp_path / "wire", teacher=client)
    assert client.waited_seconds > 0
    assert metric_rows(tmp_path / "wire") == metric_rows(tmp_path / "direct")


def test_a_pause_holds_the_training_between_steps_until_it_is_resumed(teacher, student, data, tmp_path):
    control, paused = Control(), threading.Event()

    def pause_once(progress: Progress) -> None:
        if progress.step == 2 and not paused.is_set():
            control.pause()
            paused.set()

    config = student_config(student, data, steps=4, objective={"name": "sft"})
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(train, config, folder=tmp_path, teacher=teacher, report=pause_once, control=control)
        assert paused.wait(60)
        time.sleep(1.0)
        assert not future.done()
        assert metric_rows(tmp_path)[-1]["step"] == 3
        control.resume()
        assert future.result(60).finished
