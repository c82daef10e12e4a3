"""Students of several teachers: each row is asked of the one that it names, all at once, each with its own head."""

from __future__ import annotations

import json
import threading
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer_cases import metric_rows, student_config
from trainer_doubles import FaultyServicer, InProcessTeacher, serving
from trainer_several import narrow_model
from tutelage.config import validate
from tutelage.errors import ConfigurationError, DataError, IdentityMismatch
from tutelage.trainer.cluster.connections import open_teacher
from tutelage.trainer.config.run import CohortConfig
from tutelage.trainer.data.sequences import TokenSequence
from tutelage.trainer.model.layer_pruning import prune_layers
from tutelage.trainer.teacher.base import SignalSpec
from tutelage.trainer.teacher.several import SeveralTeachers
from tutelage.trainer.training.control import Control
from tutelage.trainer.training.loop import train

OBJECTIVES = [
    {"name": "forward_kl", "signal": "topk", "k": 8},
    pytest.param({"name": "gkd", "on_policy_fraction": 0.5, "noise": 0.5}, marks=pytest.mark.long),
    pytest.param({"name": "reverse_kl", "signal": "candidates", "k": 8}, marks=pytest.mark.long),
    {"name": "gkd", "on_policy_fraction": 0.5},
]


@pytest.fixture(scope="module")
def math(tiny_model: Path) -> InProcessTeacher:
    return InProcessTeacher(tiny_model)


@pytest.fixture(scope="module")
def code(tiny_model: Path, tmp_path_factory) -> InProcessTeacher:
    """Half as wide, so that neither its states nor its head fit the other's."""
    return InProcessTeacher(narrow_model(tiny_model, tmp_path_factory.mktemp("narrow")))


@pytest.fixture(scope="module")
def student(tiny_model: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    prune_layers(tiny_model, folder, layers=2)
    return folder


def write_rows(path: Path, names=("math", "code"), count: int = 40) -> Path:
    rows = [
        {"prompt": f"Ann has {i} apples and buys {i % 7} more.", "completion": f" She has {i + i % 7}."}
        | ({} if names[i % len(names)] is None else {"teacher": names[i % len(names)]})
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


def sequences(names) -> list[TokenSequence]:
    generator = np.random.default_rng(0)
    return [TokenSequence(generator.integers(3, 500, 9).astype(np.int32), 1, 9, teacher=name) for name in names]


def test_each_sequence_is_asked_of_the_teacher_that_it_names(math, code):
    teacher = SeveralTeachers({"math": math, "code": code, None: math})
    asked = sequences(["code", "math", None, "code"])
    for given, sequence, own in zip(
        teacher.score(asked, SignalSpec("hidden")), asked, (code, math, math, code), strict=True
    ):
        assert np.array_equal(given["hidden_RD"], own.signals(sequence, SignalSpec("hidden"))["hidden_RD"])
    one, other = math.identity.weights_digest, code.identity.weights_digest
    assert teacher.identity.weights_digest == f"code={other} math={one} teacher={one}"


def test_all_are_asked_at_once(math, code):
    both = threading.Barrier(2, timeout=20)

    class Meeting:
        def __init__(self, teacher: InProcessTeacher) -> None:
            self.identity, self.waited_seconds, self._teacher = teacher.identity, 0.0, teacher

        def score(self, asked, spec):
            both.wait()  # broken, if the other is asked only when this one has answered
            return self._teacher.score(asked, spec)

    teacher = SeveralTeachers({"math": Meeting(math), "code": Meeting(code)})
    assert len(teacher.score(sequences(["math", "code"]), SignalSpec("hidden"))) == 2


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda each: "-".join(map(str, each.values())))
def test_a_resumed_training_equals_an_undisturbed_one_bit_for_bit(objective, math, code, student, data, tmp_path):
    teacher, control = SeveralTeachers({"math": math, "code": code}), Control()
    config = student_config(student, data, objective=objective, dtype="float32")
    whole = train(config, folder=tmp_path / "whole", teacher=teacher)

    def stop(progress) -> None:
        if progress.step >= 3:
            control.stop()

    assert train(config, folder=tmp_path / "parts", teacher=teacher, report=stop, control=control).step == 3
    resumed = train(config, folder=tmp_path / "parts", teacher=teacher)
    assert metric_rows(tmp_path / "parts") == metric_rows(tmp_path / "whole")
    one, other = (outcome.checkpoint / "model.safetensors" for outcome in (whole, resumed))
    assert one.read_bytes() == other.read_bytes()


def test_metrics_of_each_teacher_add_up_to_those_of_all(math, code, student, data, tmp_path):
    config = student_config(student, data, batch={"sequences": 8}, held_out={"sequences": 6})
    train(config, folder=tmp_path, teacher=SeveralTeachers({"math": math, "code": code}))
    last = metric_rows(tmp_path)[-1]
    for name in ("heldout/forward_kl", "train/forward_kl"):
        where, measure = name.split("/")
        low, high = sorted(last[f"{where}/{each}/{measure}"] for each in ("math", "code"))
        assert low < last[name] < high


def test_two_names_of_one_teacher_train_what_the_teacher_alone_trains(math, student, data, tmp_path):
    plain = write_rows(tmp_path / "plain.jsonl", names=(None,))
    outcomes = {}
    for name, path, teacher in (("one", plain, math), ("two", data, SeveralTeachers({"math": math, "code": math}))):
        config = student_config(student, path, dtype="float32", objective={"name": "forward_kl"})
        train(config, folder=tmp_path / name, teacher=teacher)
        outcomes[name] = metric_rows(tmp_path / name)
    for one, two in zip(*outcomes.values(), strict=True):
        for key in ("train/loss", "heldout/forward_kl", "train/gradient_norm"):
            # The same sums in another order: micro-batches are of one teacher.
            assert one.get(key) == (None if key not in one else pytest.approx(two[key], rel=2e-4))


def test_rows_that_no_teacher_is_there_for_are_refused(math, code, student, data, tmp_path):
    several = SeveralTeachers({"math": math, "code": code})
    with pytest.raises(DataError, match=r"names the teacher 'law', which is not there; choose from code, math"):
        train(
            student_config(student, write_rows(tmp_path / "law.jsonl", ("math", "law"))),
            folder=tmp_path / "a",
            teacher=several,
        )
    with pytest.raises(DataError, match="names no teacher, and there are code, math"):
        train(
            student_config(student, write_rows(tmp_path / "none.jsonl", ("math", None))),
            folder=tmp_path / "b",
            teacher=several,
        )
    with pytest.raises(DataError, match="name it under `teachers`"):
        train(student_config(student, data), folder=tmp_path / "c", teacher=math)
    with pytest.raises(ConfigurationError, match="whose micro-batches are apart"):
        train(student_config(student, data, reduction="micro_batch_token_mean"), folder=tmp_path / "d", teacher=several)


def test_each_teacher_is_pinned(math, code, student, data, tmp_path):
    config, control = student_config(student, data), Control()
    control.stop()
    train(config, folder=tmp_path, teacher=SeveralTeachers({"math": math, "code": code}), control=control)
    with pytest.raises(IdentityMismatch) as refused:
        train(config, folder=tmp_path, teacher=SeveralTeachers({"math": math, "code": math}))
    before, after = (each.identity.weights_digest[:12] for each in (code, math))
    assert f"began with the teacher code={before}…, but code={after}… answers" in refused.value.message
    assert "math=" not in refused.value.message


def test_a_configuration_names_them_beside_each_other(math, code, student, data, tiny_model, tmp_path):
    config = student_config(student, data).model_dump(mode="json")
    with ExitStack() as stack:
        addresses = {
            name: stack.enter_context(serving(FaultyServicer(teacher, tiny_model)))
            for name, teacher in (("math", math), ("code", code))
        }
        teachers = {name: {"address": address} for name, address in addresses.items()}
        cohort = validate(CohortConfig, {"teachers": teachers, "students": [config], "output": tmp_path})
        assert cohort.teacher is None, "rows without a name are asked of nobody, not of the default address"
        teacher = open_teacher(cohort, cohort.students[0], lambda *_: None, stack)
        assert isinstance(teacher, SeveralTeachers)
        asked = sequences(["math", "code"])
        hidden = teacher.score(asked, SignalSpec("hidden"))
        assert [rows["hidden_RD"].shape[1] for rows in hidden] == [128, 64]
        both = validate(CohortConfig, {"teacher": teachers["math"], "teachers": teachers, "students": [config]})
        assert set(open_teacher(both, both.students[0], lambda *_: None, stack).members) == {"math", "code", None}
    with pytest.raises(ConfigurationError, match="a store has the states of one teacher"):
        validate(CohortConfig, {"teachers": teachers, "students": [config], "signals_from": "/tmp/x"})
    with pytest.raises(ConfigurationError, match="is not a name"):
        validate(CohortConfig, {"teachers": {"../x": {}}, "students": [config]})


def test_validation_keeps_what_each_said(math, code, student, data, tmp_path):
    config = student_config(student, data)
    train(config, folder=tmp_path, teacher=SeveralTeachers({"math": math, "code": code}))
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "held_out.safetensors")
    assert {name: tensor.shape[1] for name, tensor in kept.items()} == {"hidden_ND/math": 128, "hidden_ND/code": 64}
    assert all(tensor.dtype == torch.bfloat16 for tensor in kept.values())
