"""A saved checkpoint and a saved adapter load in a fresh process with transformers and vLLM, with equal logits."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loaded_elsewhere
from tutelage.trainer.config.student import LoraConfig, OptimizerConfig
from tutelage.trainer.model.student import Student


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Student, Path]]:
    """A full and a LoRA student after a few steps, and where they were saved."""
    students = {}
    for name, lora in (("full", None), ("adapter", LoraConfig(r=4, lora_dropout=0.1))):
        student = Student(tiny_model, dtype="bfloat16", optimizer=OptimizerConfig(), vocabulary_size=512, lora=lora)
        ids = torch.tensor([loaded_elsewhere.IDS])
        for _ in range(3):
            student.model(ids, labels=ids).loss.backward()
            student.collect_gradients()
            student.step(1e-2)
        folder = tmp_path_factory.mktemp(name)
        student.save(folder)
        student.model.eval()
        students[name] = student, folder
    return students


def own_logps(model: Any) -> torch.Tensor:
    """What the trainer itself has."""
    with torch.no_grad():
        return model(torch.tensor([loaded_elsewhere.IDS])).logits[0, :-1].float().log_softmax(-1)


def logps_of(engine: str, base: Path, trained: dict[str, tuple[Student, Path]], tmp_path: Path):
    output = tmp_path / "logps.safetensors"
    folders = [base, *(trained[name][1] for name in ("full", "adapter"))]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    subprocess.run(
        [sys.executable, loaded_elsewhere.__file__, engine, output, *folders], env=environment, check=True, timeout=400
    )
    return load_file(output)


def test_transformers_sees_the_same_logits_bit_for_bit(trained, tiny_model, tmp_path):
    found = logps_of("transformers", tiny_model, trained, tmp_path)
    for name, (student, _) in trained.items():
        assert torch.equal(found[name], own_logps(student.model)), name
    assert not torch.equal(found["full"], found["adapter"])


@pytest.mark.long
@pytest.mark.timeout(500)
def test_vllm_sees_the_same_logits(trained, tiny_model, tmp_path):
    found = logps_of("vllm", tiny_model, trained, tmp_path)
    for name, (student, _) in trained.items():
        difference = (found[name] - own_logps(copy.deepcopy(student.model).float())).abs().max().item()
        print(f"\n{name}: largest difference of a log-probability {difference:.2e}")
        assert difference < 1e-3
