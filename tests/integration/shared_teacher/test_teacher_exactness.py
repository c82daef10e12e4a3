"""How exact a real teacher's signals are: no worse than the same model in bfloat16 in transformers.

Ordinary, random and adversarial tokens, every kind, T of 0.5 to 5; of one engine and of two. Both sides are compared
with transformers in float32, and summed in float64. And whoever asks, in whatever company and in whatever parts, gets
the same.
"""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch

from teacher_process import running
from tutelage.rpc.codec import decode, encode
from tutelage.rpc.transport import CHANNEL_OPTIONS, STUDENT_METADATA_KEY
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.rpc.v1 import teacher_pb2_grpc as pb_grpc

K, CANDIDATES = 64, 8
TEMPERATURES = (0.5, 1.0, 2.0, 5.0)
VOCABULARY_SIZE, LONGEST = 49152, 1024
SCORED = 128  # positions of a sequence that are compared at most, its last ones
TEXT = "A farmer has 14 hens. Each lays 5 eggs a week, so in 3 weeks she gets 14 * 5 * 3 = 210 eggs, and sells 180."
RNG = np.random.default_rng(0)
# How much worse than transformers' own bfloat16 we may be, on the mean over a sequence; the two round differently.
FACTOR, SLACK = 1.5, 5e-4
# Shorter sequences are judged together: two roundings of one position are two draws, of which either can be the worse.
SHORT = 8
# A token again and again is one rounding a hundred times, so there are several of them, judged together as well.
REPEATED = (5, 17, 260, 1000, 5000, 12345, 20000, 28000, 33333, 40000, 45000, 49000)


def adversarial() -> dict[str, list[int]]:
    return {
        "one token, the first id": [0],
        "one token, the last id": [VOCABULARY_SIZE - 1],
        "two tokens": [VOCABULARY_SIZE - 1, 0],
        "three tokens": [7, 7, 8],
        "four tokens": [1, 2, 3, 4],
        "both ends of the vocabulary": [0, VOCABULARY_SIZE - 1] * 20,
        **{f"{token} again and again": [token] * 100 for token in REPEATED},
        "random": RNG.integers(0, VOCABULARY_SIZE, 60).tolist(),
        "the longest": RNG.integers(0, VOCABULARY_SIZE, LONGEST).tolist(),
    }


@pytest.fixture(scope="module")
def two_engines(packaged_models: tuple[Path, Path], tmp_path_factory):
    options = ("--score-engines", "2", "--max-model-len", str(LONGEST), "--kv-cache-memory-bytes", str(2**28))
    with running(tmp_path_factory.mktemp("teacher"), packaged_models[0], *options) as teacher:
        yield teacher
        spent = [sum(engine.cpu_times()[:2]) for engine in teacher.engines]
        assert len(spent) == 2
        assert min(spent) > max(spent) / 2, "both score"


@pytest.fixture(scope="module", params=["teacher_server", pytest.param("two_engines", marks=pytest.mark.long)])
def stub(request: pytest.FixtureRequest):
    with grpc.insecure_channel(request.getfixturevalue(request.param).address, options=CHANNEL_OPTIONS) as channel:
        yield pb_grpc.TeacherServiceStub(channel)


@pytest.fixture(scope="module")
def sequences(packaged_models: tuple[Path, Path]) -> dict[str, np.ndarray]:
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(packaged_models[0])(TEXT).input_ids
    return {name: np.array(ids, dtype=np.int32) for name, ids in ({"text": text} | adversarial()).items()}


@pytest.fixture(scope="module")
def logits(packaged_models, sequences) -> dict[str, dict[str, torch.Tensor]]:
    """[scored, V] by sequence, of transformers in float32 and in bfloat16 (with logits summed in float32)."""
    from transformers import AutoModelForCausalLM

    result = {}
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            model = AutoModelForCausalLM.from_pretrained(packaged_models[0], dtype=dtype).eval()
            head = model.lm_head.weight.float()
            result[str(dtype).removeprefix("torch.")] = {
                name: model.model(torch.from_numpy(ids).long()[None]).last_hidden_state[0, -SCORED:].float() @ head.T
                for name, ids in sequences.items()
            }
    return result


def ask(stub, requests: list[pb.ScoreSequencesRequest], student: str = "ann") -> dict[str, list[pb.SignalFrame]]:
    """Frames by request id; all requests are in flight at once."""
    frames: dict[str, list[pb.SignalFrame]] = {}
    call = stub.ScoreSequences(iter(requests), timeout=120, metadata=[(STUDENT_METADATA_KEY, student)])
    for response in call:
        assert response.WhichOneof("outcome") == "frame", response
        frames.setdefault(response.request_id, []).append(response.frame)
    return frames


def request(name: str, ids: np.ndarray, kind: str, **fields) -> pb.ScoreSequencesRequest:
    specs = {
        "topk": {"kind": pb.SIGNAL_KIND_TOPK, "k": K, "temperatures": TEMPERATURES},
        "candidates": {"kind": pb.SIGNAL_KIND_CANDIDATES, "temperatures": TEMPERATURES},
        "hidden": {"kind": pb.SIGNAL_KIND_HIDDEN},
    }
    spec = pb.SignalSpec(**specs[kind])
    if kind == "candidates":
        spec.candidate_ids.CopyFrom(encode(candidates_of(ids)))
    fields = {"score_start": max(0, len(ids) - SCORED)} | fields
    return pb.ScoreSequencesRequest(request_id=name, token_ids=encode(ids), signal=spec, **fields)


def candidates_of(ids: np.ndarray) -> np.ndarray:
    """int32 [scored, C]: the ends of the vocabulary, the token itself, random ids, and one -1."""
    shape = (min(len(ids), SCORED), CANDIDATES)
    rows = np.random.default_rng(len(ids)).integers(0, VOCABULARY_SIZE, shape).astype(np.int32)
    rows[:, 0], rows[:, 1], rows[:, 2], rows[:, -1] = 0, VOCABULARY_SIZE - 1, ids[-SCORED:], -1
    return rows


def column(frames: list[pb.SignalFrame], part: str) -> torch.Tensor:
    """A part of all frames of an answer, float64 or int64."""
    array = np.concatenate([decode(getattr(frame, part)) for frame in frames])
    return torch.from_numpy(array.astype(np.float64 if array.dtype == np.float32 else np.int64))


def lse(logits_TV: torch.Tensor, temperature: float) -> torch.Tensor:
    return (logits_TV.double() / temperature).logsumexp(1)


def group_of(name: str, ids: np.ndarray) -> str:
    if name.endswith("again and again"):
        return "one token again and again"
    return "short" if len(ids) < SHORT else name


@pytest.mark.parametrize("kind", ["topk", "candidates"])
def test_logits_and_log_sum_exp_are_as_exact_as_bfloat16_allows(kind, stub, sequences, logits):
    answers = ask(stub, [request(name, ids, kind) for name, ids in sequences.items()])
    errors: dict[tuple[str, str], list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
    for name, ids in sequences.items():
        exact, plain, frames = logits["float32"][name].double(), logits["bfloat16"][name].double(), answers[name]
        assert sum(frame.position_count for frame in frames) == min(len(ids), SCORED)
        kept_ids = torch.from_numpy(candidates_of(ids)).long() if kind == "candidates" else column(frames, "ids")
        there, at, given = kept_ids >= 0, kept_ids.clamp(min=0), column(frames, "logits")
        assert bool(given[~there].isneginf().all())
        true, group = exact.gather(1, at)[there], group_of(name, ids)
        errors[group, "logits"].append(((given[there] - true).abs(), (plain.gather(1, at)[there] - true).abs()))
        for place, temperature in enumerate(TEMPERATURES):
            own, true = column(frames, "logsumexp")[:, place], lse(exact, temperature)
            errors[group, f"lse at T={temperature}"].append(
                ((own - true).abs(), (lse(plain, temperature) - true).abs())
            )
    for what, pairs in errors.items():
        own_error, plain_error = (float(torch.cat(side).mean()) for side in zip(*pairs, strict=True))
        print(f"\n{kind}, {what}: mean error {own_error:.4f}, transformers in bfloat16 {plain_error:.4f}", end="")
        assert own_error <= FACTOR * plain_error + 0.02, (what, own_error, plain_error)


def test_the_kept_ids_are_the_largest(stub, sequences, logits):
    """As sets, but for ids whose exact logits lie within rounding of the smallest kept one."""
    answers = ask(stub, [request(name, ids, "topk") for name, ids in sequences.items()])
    for name in sequences:
        exact, ids = logits["float32"][name].double(), column(answers[name], "ids")
        missing = exact.scatter(1, ids, -torch.inf).amax(1)
        kept = exact.gather(1, ids).amin(1)
        allowed = 4 * (logits["bfloat16"][name].double() - exact).abs().amax(1) + 0.05
        assert bool((missing - kept <= allowed).all()), (name, (missing - kept - allowed).max())
        assert bool((ids.sort(1).values.diff(dim=1) > 0).all())


@pytest.fixture(scope="module")
def matrix(stub) -> torch.Tensor:
    """float32 [V, D], as a student gets it."""
    chunks = [decode(chunk.rows) for chunk in stub.GetUnembedding(pb.GetUnembeddingRequest())]
    return torch.from_numpy(np.concatenate(chunks)).view(torch.bfloat16).float()


def states(frames: list[pb.SignalFrame]) -> torch.Tensor:
    hidden = np.concatenate([decode(frame.hidden) for frame in frames])
    return torch.from_numpy(hidden).view(torch.bfloat16).float()


def kl(logits_TV: torch.Tensor, other_TV: torch.Tensor) -> torch.Tensor:
    """KL of two distributions given as logits, each position, nats."""
    p_logp, q_logp = logits_TV.double().log_softmax(1), other_TV.double().log_softmax(1)
    return (p_logp.exp() * (p_logp - q_logp)).sum(1)


@pytest.fixture(scope="module")
def noise(sequences, logits) -> dict[str, torch.Tensor]:
    """KL of transformers in float32 and in bfloat16, each position: what this precision costs for these tokens."""
    return {name: kl(logits["float32"][name], logits["bfloat16"][name]) for name in sequences}


def test_hidden_states_are_as_exact_as_bfloat16_allows(stub, sequences, logits, matrix, noise):
    answers = ask(stub, [request(name, ids, "hidden") for name, ids in sequences.items()])
    groups: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
    for name, ids in sequences.items():
        own = kl(logits["float32"][name], states(answers[name]) @ matrix.T)
        groups[group_of(name, ids)].append((own, noise[name]))
    for group, pairs in groups.items():
        own, plain = (torch.cat(side) for side in zip(*pairs, strict=True))
        print(
            f"\nhidden, {group}: KL {own.mean():.5f} mean, {own.max():.5f} max; transformers {plain.mean():.5f}", end=""
        )
        assert own.mean() <= FACTOR * plain.mean() + SLACK, group


def in_parts(name: str, ids: np.ndarray, parts: int) -> list[pb.ScoreSequencesRequest]:
    """Requests for consecutive ranges of a sequence's positions."""
    cuts = np.linspace(0, len(ids), min(parts, len(ids)) + 1).astype(int)
    return [
        request(f"{name}/{start}", ids, "hidden", score_start=start, score_end=end) for start, end in pairwise(cuts)
    ]


def test_company_parts_and_clients_change_nothing_beyond_the_noise_floor(stub, sequences, matrix, noise):
    """Alone; among all the others; in three parts; and asked for by four clients at once.

    The floor is that of these tokens: four control tokens in a row move by 0.2 nats in transformers, too.
    """
    more = {f"{token} again and again" for token in REPEATED[1:]}
    chosen = {name: ids for name, ids in sequences.items() if len(ids) < LONGEST and name not in more}
    alone = {name: states(ask(stub, [request(name, ids, "hidden")])[name]) for name, ids in chosen.items()}
    company = ask(stub, [request(name, ids, "hidden") for name, ids in reversed(chosen.items())])
    pieces = ask(stub, [part for name, ids in chosen.items() for part in in_parts(name, ids, 3)])
    with ThreadPoolExecutor(4) as clients:
        together = clients.map(
            lambda number: ask(stub, [request(n, ids, "hidden") for n, ids in chosen.items()], f"student-{number}"),
            range(4),
        )
        answers = [company, *together]
    for name, ids in chosen.items():
        starts = sorted((key for key in pieces if key.startswith(f"{name}/")), key=lambda key: int(key.split("/")[1]))
        others = [states(answer[name]) for answer in answers]
        others.append(torch.cat([states(pieces[key]) for key in starts]))
        assert all(other.shape == (len(ids), matrix.shape[1]) for other in others)
        mean = max(float(kl(alone[name] @ matrix.T, other @ matrix.T).mean()) for other in others)
        print(f"\n{name}: KL to itself alone, at most {mean:.6f} mean", end="")
        assert mean < 0.004 + float(noise[name].mean()), name
