"""vLLM writes with the weights of the very step: the refresh reaches every tensor, and what it writes ends in time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vllm_written


@pytest.fixture(scope="module")
def written(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory):
    """As `vllm_written` describes it."""
    output = tmp_path_factory.mktemp("vllm") / "written.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, vllm_written.__file__, tiny_model, output]
    subprocess.run(command, env=environment, check=True, timeout=250)
    return json.loads(output.read_text(encoding="utf-8"))


@pytest.mark.long
def test_after_each_optimizer_step_vllm_writes_with_the_weights_of_that_step(written):
    for state in written:
        # At a temperature of 0.01 a token that is 0.3 nats less likely is drawn once in 10¹³ times.
        assert max(state["gaps"].values()) < 0.3
    assert min(state["stale_gap"] for state in written[1:]) > 1
    firsts = [[ids[0] for ids in state[name]] for name in ("vllm", "transformers") for state in written]
    assert firsts[:3] == firsts[3:]


@pytest.mark.long
def test_a_sequence_ends_with_its_end_token_or_where_its_room_ends(written):
    for state in written:
        for whole, cut in zip(state["vllm"], state["ended"], strict=True):
            hits = [place for place, token in enumerate(whole) if token in state["end"]]
            assert cut == whole[: hits[0] + 1 if hits else None]
            assert len(whole) == 24
    assert any(len(cut) == 3 for cut in written[0]["ended"])


@pytest.mark.long
def test_padded_rows_of_the_head_are_never_written(written):
    assert max(token for state in written for ids in state["vllm"] for token in ids) < vllm_written.VOCABULARY_SIZE


@pytest.mark.long
def test_what_vllm_drew_comes_with_the_probability_that_it_drew_it_with(written):
    """After its temperature; padded rows of the head have none."""
    assert max(state["logp_gap"] for state in written) < 0.02
