"""LoRA students: only adapters are trained, and what is saved is a standard adapter that others load."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trainer_cases import metric_rows, student_config, write_rows
from tutelage.errors import ConfigurationError
from tutelage.evaluator.models.base import ScoringGroup
from tutelage.evaluator.models.registry import open_engine
from tutelage.identity import weights_digest
from tutelage.trainer.config.student import LoraConfig, OptimizerConfig
from tutelage.trainer.data.sequences import token_sequence
from tutelage.trainer.model.student import Student
from tutelage.trainer.training.loop import train

IDS = torch.arange(30, 50)[None]


def open_student(folder: Path, dtype: str = "float32", **changes) -> Student:
    lora = LoraConfig(r=4, **changes.pop("lora", {}))
    return Student(folder, dtype=dtype, optimizer=OptimizerConfig(), vocabulary_size=512, lora=lora, **changes)


def step(student: Student) -> None:
    student.model(IDS, labels=IDS).loss.backward()
    student.collect_gradients()
    student.step(1e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_adapters_are_trained_and_the_saved_one_gives_equal_logits_elsewhere(dtype, tiny_model, tmp_path):
    student = open_student(tiny_model, dtype)
    frozen = {name: value.clone() for name, value in student.model.named_parameters() if "lora" not in name}
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=getattr(torch, dtype)).eval()
    student.model.eval()
    with torch.no_grad():
        assert torch.equal(student.model(IDS).logits, base(IDS).logits)
    for _ in range(3):
        step(student)
    assert student.parameters_count == 4 * 4 * (3 * 256 + 2 * 384)  # rank · layers · (in + out) of five targets
    assert all(torch.equal(value, frozen[name]) for name, value in student.model.named_parameters() if name in frozen)
    student.save(tmp_path)
    saved = load_file(tmp_path / "trainer_state.st")
    assert {name.split(".", 1)[0] for name in saved} == {"master", "exp_avg", "exp_avg_sq", "step"}
    assert all("lora_" in name for name in saved)
    with torch.no_grad():
        expected = student.model(IDS).logits
        assert not torch.equal(expected, base(IDS).logits)
        elsewhere = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False).eval()
        assert torch.equal(elsewhere(IDS).logits, expected)
        whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype)).eval()
        assert torch.equal(whole(IDS).logits, expected)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_model)
    assert weights_digest(tmp_path) != weights_digest(tiny_model)


def test_the_evaluator_scores_an_adapter(tiny_model, tmp_path):
    student = open_student(tiny_model)
    for _ in range(3):
        step(student)
    student.save(tmp_path)
    student.model.eval()
    context, answer = tuple(IDS[0, :12].tolist()), tuple(IDS[0, 12:].tolist())
    engine = open_engine("transformers", tmp_path, dtype="float32", batch_size=1)
    with torch.no_grad():
        logp = student.model(IDS).logits[0, 11:-1].log_softmax(-1).gather(-1, IDS[0, 12:, None]).sum().item()
    ((score,),) = engine.loglikelihood([ScoringGroup(context, (answer,))])
    assert score == pytest.approx(logp, rel=1e-4)


def test_adapters_step_as_plain_adamw_does(tiny_model):
    student = open_student(tiny_model)
    reference = open_student(tiny_model)
    parameters = [parameter for parameter in reference.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(3):
        step(student)
        optimizer.zero_grad()
        reference.model(IDS, labels=IDS).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        for left, right in zip(student.model.parameters(), reference.model.parameters(), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
            # Else the next gradients would be those of other weights, and AdamW makes a whole step of what is near 0.
            right.data.copy_(left.data)


def test_a_target_that_is_no_layer_is_refused_with_those_that_are(tiny_model):
    with pytest.raises(ConfigurationError, match=r"'w_proj' is no linear layer of LlamaForCausalLM; it has down_proj"):
        open_student(tiny_model, lora={"target_modules": ("q_proj", "w_proj")})


def test_dropout_acts_on_training_and_on_nothing_else(tiny_model):
    student = open_student(tiny_model, lora={"lora_dropout": 0.5})
    sequence = token_sequence(
        np.arange(30, 40, dtype=np.int32), np.arange(40, 50, dtype=np.int32), loss_on_prompt=False
    )
    step(student)
    with torch.no_grad():
        assert not torch.equal(student.hidden([sequence]), student.hidden([sequence]))
    assert np.array_equal(student.likeliest_ids(sequence, 8), student.likeliest_ids(sequence, 8))
    assert student.model.training


def test_recomputed_layers_change_no_bit_of_the_gradients(tiny_model):
    """Dropout included: the second forward pass draws what the first drew."""
    gradients = []
    for again in (False, True):
        student = open_student(tiny_model, lora={"lora_dropout": 0.1}, gradient_checkpointing=again)
        sequence = token_sequence(
            IDS[0, :8].numpy().astype(np.int32), IDS[0, 8:].numpy().astype(np.int32), loss_on_prompt=True
        )
        for seed in (0, 1):  # The second has B other than 0.
            torch.manual_seed(seed)
            student.hidden([sequence]).square().sum().backward()
            if seed == 0:
                student.collect_gradients()
                student.step(1e-2)
        gradients.append([p.grad.clone() for p in student.model.parameters() if p.grad is not None])
        assert student.model.is_gradient_checkpointing == again
    assert len(gradients[0]) == 40
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_sft_with_adapters_fine_tunes_without_a_teacher(tiny_model, tmp_path):
    config = student_config(
        tiny_model,
        write_rows(tmp_path / "rows.jsonl"),
        objective={"name": "sft"},
        lora={"r": 8, "lora_dropout": 0.05},
        optimizer={"learning_rate": 1e-2},
        held_out={"every_steps": 6},
        save_every_steps=6,
    )
    outcome = train(config, folder=tmp_path / "student", teacher=None)
    first, *_, last = metric_rows(tmp_path / "student")
    assert last["heldout/cross_entropy"] < 0.8 * first["heldout/cross_entropy"]
    assert (outcome.checkpoint / "adapter_model.safetensors").stat().st_size < 200_000
    assert not (outcome.checkpoint / "model.safetensors").exists()
