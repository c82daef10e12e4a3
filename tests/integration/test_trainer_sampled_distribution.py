"""What is sampled is distributed as the trained model says, in full and with adapters, in its process and elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import sampled_distribution
from sampled_distribution import config_of, drawn, exact, judged, student_of, take_large_steps
from tutelage.trainer.rollout.base import sampler_in_process
from tutelage.trainer.rollout.student_copy import StudentCopy, StudentWeights

# Of so few tests on fixed seeds none is expected below it; what was drawn by other weights is far below.
_LEAST_P, _OTHER_P = 1e-3, 1e-9


@pytest.mark.parametrize(("lora", "dtype"), [(None, "bfloat16"), ({"r": 4}, "bfloat16"), ({"r": 4}, "float32")])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_what_transformers_draws_is_the_present_student_s(elsewhere, lora, dtype, tiny_model):
    config = config_of(tiny_model, lora=lora, dtype=dtype, sampling={"writers": {}} if elsewhere else {})
    student = student_of(config)
    before = exact(student)
    take_large_steps(student)
    writes = student
    if elsewhere:
        writes = StudentCopy(config, end_ids=student.end_ids, vocabulary_size=student.vocabulary_size)
        writes.take(StudentWeights.of(student, 1))
    found = judged(drawn(sampler_in_process(config, writes), 20), student, before)
    assert found["p"] > _LEAST_P
    assert found["p_before"] < _OTHER_P


@pytest.mark.long
@pytest.mark.timeout(900)
def test_what_vllm_draws_is_the_present_student_s(tiny_model, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    output = tmp_path / "found.json"
    command = [sys.executable, sampled_distribution.__file__, tiny_model, output]
    subprocess.run(command, env=environment, check=True, timeout=850)
    found = json.loads(output.read_text(encoding="utf-8"))
    print(found)
    assert len(found) == 6
    assert min(each["p"] for each in found.values()) > _LEAST_P
    assert max(each["p_before"] for each in found.values()) < _OTHER_P
