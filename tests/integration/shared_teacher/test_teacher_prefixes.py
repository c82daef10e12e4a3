"""A real engine's prefix cache: however a sequence is split, and whatever was evicted, its rows are its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import data, integers, lists

from teacher_process import TeacherProcess, running
from tutelage.identity import tokenizer_digests, vocabulary_size
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.rpc.v1 import teacher_pb2_grpc as pb_grpc
from tutelage.trainer.data.sequences import TokenSequence
from tutelage.trainer.teacher.base import SignalSpec
from tutelage.trainer.teacher.grpc_client import TeacherClient

HIDDEN = SignalSpec("hidden")
RNG = np.random.default_rng(0)


def client_of(teacher: TeacherProcess, model: Path, student: str = "prefixes") -> TeacherClient:
    digests = tokenizer_digests(model)
    return TeacherClient(teacher.address, student_id=student, wait_seconds=120, tokenizer_digests=digests)


def cache_of(teacher: TeacherProcess) -> pb.PrefixCache:
    with grpc.insecure_channel(teacher.address) as channel:
        return pb_grpc.TeacherServiceStub(channel).GetTeacherInfo(pb.GetTeacherInfoRequest()).prefix_cache


def rows(client: TeacherClient, *asked: tuple[list[int], int, int]) -> list[torch.Tensor]:
    """float64 states of positions [start, end) of each sequence, all asked at once."""
    sequences = [TokenSequence(np.array(ids, dtype=np.int32), start, end) for ids, start, end in asked]
    answers = client.score(sequences, HIDDEN)
    return [torch.from_numpy(answer["hidden_RD"].copy()).view(torch.bfloat16).double() for answer in answers]


@pytest.fixture(scope="module")
def client(teacher_server: TeacherProcess, packaged_models: tuple[Path, Path]):
    with client_of(teacher_server, packaged_models[0]) as client:
        yield client


@pytest.fixture(scope="module")
def logp(client: TeacherClient):
    """From states to the teacher's log-probabilities [R, V]."""
    matrix_VD = torch.from_numpy(client.unembedding().rows_VD).view(torch.bfloat16).double()
    return lambda states_RD: (states_RD @ matrix_VD.T).log_softmax(1)


def kl(p_logp: torch.Tensor, q_logp: torch.Tensor) -> torch.Tensor:
    return (p_logp.exp() * (p_logp - q_logp)).sum(dim=1)


def own_states(model: Path, sequences: list[list[int]], dtype: torch.dtype) -> list[torch.Tensor]:
    """float64 states of all positions, by transformers."""
    from transformers import AutoModelForCausalLM

    layers = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval().model
    with torch.inference_mode():
        return [layers(torch.tensor([ids]), use_cache=False).last_hidden_state[0].double() for ids in sequences]


def errors(own: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Of each row, relative to its length."""
    return (own - states).norm(dim=1) / own.norm(dim=1)


def assert_as_exact_as(served: torch.Tensor, rounded: torch.Tensor) -> None:
    """No row is further from float32 than bfloat16 puts the model's own rows, but for luck; another row is off by 1."""
    for name, each in (("served", served), ("transformers in bfloat16", rounded)):
        print(f"relative error of a row, {name}: {each.mean():.4f} mean, {each.quantile(0.999):.4f} of 999 in 1000, "
              f"{each.max():.4f} largest")  # fmt: skip
    assert served.mean() < 1.3 * rounded.mean()
    assert served.max() < 2 * rounded.max()


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data())
def test_a_sequence_in_parts_has_the_signals_of_the_whole(client, logp, data):
    """Each part is asked for as the sequence grows to its end, and so reads what was computed of those before it."""
    seed, length = data.draw(integers(0, 2**32 - 1)), data.draw(integers(2, 700))
    ids = np.random.default_rng(seed).integers(3, 49152, length).tolist()
    cuts = sorted({*data.draw(lists(integers(1, length - 1), max_size=6)), length})
    parts = [rows(client, (ids[:end], start, end))[0] for start, end in zip([0, *cuts], cuts, strict=False)]
    (whole,) = rows(client, (ids, 0, length))
    assert [len(part) for part in parts] == np.diff([0, *cuts]).tolist()
    divergence = kl(logp(whole), logp(torch.cat(parts)))
    # Random tokens are no text: two batches differ by 0.0013 nats there, and by 0.0006 for text (docs/teacher.md).
    assert divergence.mean() < 0.004, (length, cuts)


def test_completions_of_one_prompt_cost_what_comes_after_it(client, teacher_server):
    prompt = RNG.integers(3, 49152, 300).tolist()
    asked = [([*prompt, *RNG.integers(3, 49152, 20).tolist()], 299, 319) for _ in range(6)]
    rows(client, asked[0])
    before = cache_of(teacher_server)
    rows(client, *asked[1:])
    after = cache_of(teacher_server)
    assert after.block_tokens == 32
    assert (after.hits - before.hits, after.saved_tokens - before.saved_tokens) == (5, 5 * 288)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_sequence_of_32768_tokens_is_scored_whole(tiny_model, tmp_path):
    """In 64 pieces; each of its rows is what the model computes of the whole at once."""
    longest, model = 32_768, tmp_path / "model"
    shutil.copytree(tiny_model, model)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": longest}))
    ids = RNG.integers(3, vocabulary_size(model), longest).tolist()
    with (
        running(tmp_path / "server", model, "--max-model-len", str(longest)) as teacher,
        client_of(teacher, model) as client,
    ):
        (states,) = rows(client, (ids, 0, longest))
    own, rounded = (own_states(model, [ids], dtype)[0] for dtype in (torch.float32, torch.bfloat16))
    assert_as_exact_as(errors(own, states), errors(own, rounded))


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_no_row_of_a_thousand_requests_is_anothers_under_a_tiny_cache(tiny_model, tmp_path):
    """The cache holds a sixth of what is asked, so that it evicts all the time; all rows are compared."""
    vocabulary = vocabulary_size(tiny_model)
    beginnings = [RNG.integers(3, vocabulary, 400).tolist() for _ in range(8)]
    requests = []
    for _ in range(1000):
        shared, own = RNG.integers(1, 400), RNG.integers(1, 100)
        ids = [*beginnings[RNG.integers(8)][:shared], *RNG.integers(3, vocabulary, own).tolist()]
        start = int(RNG.integers(0, len(ids)))
        requests.append((ids, start, int(RNG.integers(start + 1, len(ids) + 1))))
    # 2 KiB a token: 1,024 tokens, of which vLLM needs 512 for one sequence.
    options = ("--kv-cache-memory-bytes", str(2**21), "--max-num-batched-tokens", "128", "--max-model-len", "512")
    with running(tmp_path, tiny_model, *options) as teacher, client_of(teacher, tiny_model) as client:
        answers = rows(client, *requests)
        cache = cache_of(teacher)
        wholes = [whole[start:end] for whole, (_, start, end) in zip(
            rows(client, *((ids, 0, len(ids)) for ids, _, _ in requests)), requests, strict=True)]  # fmt: skip
    sequences = [ids for ids, _, _ in requests]
    exact, rounded = (own_states(tiny_model, sequences, dtype) for dtype in (torch.float32, torch.bfloat16))
    kept = [slice(start, end) for _, start, end in requests]
    exact, rounded = ([states[part] for states, part in zip(each, kept, strict=True)] for each in (exact, rounded))
    print(f"\n{cache.capacity_tokens} tokens cached; {cache.hits} hits saved {cache.saved_tokens} tokens")
    assert cache.hits > 100
    own = torch.cat(exact)
    cost = errors(own, torch.cat(rounded))
    assert_as_exact_as(errors(own, torch.cat(answers)), cost)
    assert_as_exact_as(errors(own, torch.cat(wholes)), cost)
