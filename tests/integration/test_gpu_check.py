"""The check for a GPU runs on a CPU with tiny sizes, and imports neither vLLM nor Ray."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_it_prints_losses_phases_and_an_exact_resume():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--tiny", "--steps", "4"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    losses = re.findall(r"^\| \w+ \| (float32|bfloat16) \| [\d.]+ \| (\S+) \| (\S+) \|", done.stdout, re.MULTILINE)
    assert len(losses) == 6
    for dtype, loss, gradients in losses:
        assert float(loss) < 1e-5
        assert float(gradients) < (1e-5 if dtype == "float32" else 1e-2)
    assert re.findall(r"^\| (sampling|scoring|stepping|step) \| [\d.]+ \|", done.stdout, re.MULTILINE)
    gauge = re.search(r"KL between the sampler and the learner: (\S+)", done.stdout)
    assert gauge
    assert float(gauge[1]) < 1e-4
    assert "resumed at step 2: weights and optimizer are those of the undisturbed training, bit for bit" in done.stdout
    assert "imported of vLLM and Ray: neither" in done.stdout
