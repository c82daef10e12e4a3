"""Rows of a served teacher that is asked while a sequence grows are as exact as those of the whole."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from trainer_cases import metric_rows, student_config, write_rows
from tutelage.identity import tokenizer_digests
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.rpc.v1 import teacher_pb2_grpc as rpc
from tutelage.trainer.data.sequences import TokenSequence
from tutelage.trainer.teacher.base import SignalSpec
from tutelage.trainer.teacher.grpc_client import TeacherClient
from tutelage.trainer.teacher.streamed import StreamedScoring
from tutelage.trainer.teacher.to_tensors import unembedding_of
from tutelage.trainer.training.loop import train


def computed_tokens(address: str) -> int:
    """What the server's engine has computed so far, for all students."""
    with grpc.insecure_channel(address) as channel:
        usage = rpc.TeacherServiceStub(channel).GetTeacherUsage(pb.GetTeacherUsageRequest())
    return sum(student.computed_tokens for student in usage.students)


def test_a_served_teachers_rows_in_pieces_are_as_exact_as_those_of_the_whole(teacher_server, packaged_models):
    """And no token but the last of a prompt's last block is computed twice."""
    digests = tokenizer_digests(packaged_models[0])
    generator = np.random.default_rng(time.time_ns())  # Tokens that nobody has asked about before.
    prompt = generator.integers(1000, 40_000, 50).astype(np.int32)
    ids = [np.concatenate([prompt, generator.integers(1000, 40_000, 90)]).astype(np.int32) for _ in range(2)]
    sequences = {index: TokenSequence(each, 49, 139, prompt_tokens=50) for index, each in enumerate(ids)}
    spec = SignalSpec("hidden")
    with TeacherClient(teacher_server.address, student_id="ann", wait_seconds=60, tokenizer_digests=digests) as client:
        block = client.identity.block_tokens
        before = computed_tokens(teacher_server.address)
        with ThreadPoolExecutor(1) as background:
            scoring = StreamedScoring(client, spec, background)
            scoring.begin({index: replace(each, ids=prompt, end=50) for index, each in sequences.items()})
            for tokens in range(10, 91, 10):
                time.sleep(0.1)
                for index, each in sequences.items():
                    scoring.piece(index, each.ids[50:][:tokens], over=tokens == 90)
            pieces = scoring.finish(sequences).result()
        computed = computed_tokens(teacher_server.address) - before
        whole = client.score(list(sequences.values()), spec)
        head = unembedding_of(client.unembedding(), torch.device("cpu"))
    assert 0 < block <= 50
    # The beginning of the prompt once, and of each sequence what comes after it.
    first = 49 // block * block
    assert computed <= first + 2 * (139 - first) + 2

    model = AutoModelForCausalLM.from_pretrained(packaged_models[0], dtype=torch.float32).eval()
    for index, sequence in sequences.items():
        with torch.inference_mode():
            exact = model(torch.from_numpy(sequence.ids)[None].long()).logits[0, 49:139].log_softmax(-1)

        in_pieces, at_once = (
            float((exact.exp() * (exact - logp_of(head, rows[index]))).sum(-1).mean()) for rows in (pieces, whole)
        )
        # In pieces or at once, a row is off by what bfloat16 costs, and the two by as much from each other.
        assert in_pieces == pytest.approx(at_once, rel=0.3)


def logp_of(head, rows):
    hidden_RD = torch.from_numpy(rows["hidden_RD"].copy()).view(torch.bfloat16)
    return head.logits(hidden_RD).log_softmax(-1)


@pytest.mark.long
def test_with_a_served_teacher_losses_agree_within_its_noise(teacher_server, packaged_models, tmp_path):
    """The same weights write the same sequences, whose rows differ as two scorings do; the rate is next to nothing."""
    data = write_rows(tmp_path / "rows.jsonl")
    digests = tokenizer_digests(packaged_models[0])
    losses = {}
    with TeacherClient(teacher_server.address, student_id="ann", wait_seconds=60, tokenizer_digests=digests) as client:
        for stream in (True, False):
            config = student_config(
                packaged_models[1],
                data,
                objective={"name": "gkd", "on_policy_fraction": 1.0},
                batch={"sequences": 2, "max_tokens": 256},
                sampling={"max_new_tokens": 80, "stream": stream},
                optimizer={"learning_rate": 1e-9},
                held_out={"sequences": 0},
                steps=3,
            )
            train(config, folder=tmp_path / str(stream), teacher=client)
            losses[stream] = [row["train/loss"] for row in metric_rows(tmp_path / str(stream))[1:]]
        floor = client.identity.noise_floor_kl
    print(losses, floor)
    assert losses[True] == pytest.approx(losses[False], abs=3 * floor)
