"""One step with the served teacher is one step with the same teacher in this process, in transformers and bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from teacher_process import TeacherProcess
from trainer_cases import student_config
from trainer_doubles import InProcessTeacher
from tutelage.identity import tokenizer_digests, vocabulary_size
from tutelage.trainer.config.student import StudentConfig
from tutelage.trainer.data.dataset import TokenizedExample, read_dataset
from tutelage.trainer.model.student import Student
from tutelage.trainer.teacher.base import Teacher
from tutelage.trainer.teacher.grpc_client import TeacherClient
from tutelage.trainer.teacher.to_tensors import unembedding_of
from tutelage.trainer.training.batch_builder import BatchBuilder
from tutelage.trainer.training.step import TrainStep

pytestmark = pytest.mark.long

ROWS = (
    '{"question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How '
    'many did she sell altogether?", "answer": "She sold 48 / 2 = 24 clips in May, and 48 + 24 = 72 in all."}',
    '{"question": "Why does the moon look different every night?", "answer": "Because the sun lights another part of '
    'the half that we see as the moon goes around the earth."}',
    '{"question": "What is the capital of France?", "answer": "The capital of France is Paris."}',
    '{"question": "Write one sentence about rain.", "answer": "Rain fell on the roof all night long."}',
)


@pytest.fixture(scope="module")
def served(teacher_server: TeacherProcess, packaged_models: tuple[Path, Path]):
    digests = tokenizer_digests(packaged_models[0])
    with TeacherClient(teacher_server.address, student_id="wire", wait_seconds=60, tokenizer_digests=digests) as client:
        yield client


@pytest.fixture(scope="module")
def in_process(packaged_models: tuple[Path, Path]) -> InProcessTeacher:
    return InProcessTeacher(packaged_models[0], dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wire") / "rows.jsonl"
    path.write_text("\n".join(ROWS), encoding="utf-8")
    return path


def configured(init: Path, data: Path, **objective) -> StudentConfig:
    batch = {"sequences": len(ROWS), "micro_batch_sequences": 2}
    return student_config(init, data, objective=objective, batch=batch, sampling={"max_new_tokens": 16})


def loss_and_gradient(config: StudentConfig, teacher: Teacher) -> tuple[float, torch.Tensor]:
    """Of one step of a fresh student."""
    size = vocabulary_size(config.init)
    student = Student(config.init, dtype="bfloat16", optimizer=config.optimizer, vocabulary_size=size)
    examples: tuple[TokenizedExample, ...] = read_dataset(
        config.data.path, student.tokenizer, template="chat", max_tokens=512
    ).examples
    gradients: list[torch.Tensor] = []
    take_step = student.step

    def step(learning_rate: float) -> float:
        masters = student._optimizer.param_groups
        gradients.extend(master.grad.flatten().clone() for group in masters for master in group["params"])
        return take_step(learning_rate)

    student.step = step
    batches = BatchBuilder(config, student, teacher, {None: unembedding_of(teacher.unembedding(), student.device)})
    train_step = TrainStep(config, student, batches)
    return train_step.train_step(0, lambda _step: examples, lambda phase: None)["train/loss"], torch.cat(gradients)


@pytest.mark.parametrize(
    "objective",
    [
        {"name": "gkd", "on_policy_fraction": 0.5},
        {"name": "reverse_kl", "temperature": 2.0, "noise": 1.0},
        {"name": "forward_kl"},
        {"name": "gkd", "beta": 0.1, "on_policy_fraction": 1.0},
    ],
    ids=lambda objective: objective["name"],
)
def test_loss_and_gradient_do_not_depend_on_the_wire(objective, served, in_process, packaged_models, data):
    config = configured(packaged_models[1], data, **objective)
    loss, gradient = loss_and_gradient(config, served)
    expected, direct = loss_and_gradient(config, in_process)
    cosine = torch.nn.functional.cosine_similarity(gradient, direct, dim=0).item()
    print(f"\n{objective}: loss {loss:.6f} served, {expected:.6f} in process; gradient cosine {cosine:.6f}")
    assert loss == pytest.approx(expected, rel=0.005)
    assert cosine > 0.999


def test_a_student_that_is_the_served_teacher_is_at_the_noise_floor(served, packaged_models, data):
    """No further from it than from its own float32 form: what bfloat16 costs."""
    config = configured(packaged_models[0], data, name="forward_kl")
    loss, _ = loss_and_gradient(config, served)
    rounding, _ = loss_and_gradient(config, InProcessTeacher(packaged_models[0]))
    print(f"\nteacher = student: forward KL {loss:.6f} served, {rounding:.6f} from its float32 form")
    assert 0 <= loss < 2 * rounding < 0.01
