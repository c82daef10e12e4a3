"""A real teacher through gRPC against transformers in float32: the same numbers, in the right places."""

from __future__ import annotations

import json
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from teacher_process import TeacherProcess, assert_it_ends_with_its_engine
from tutelage import identity
from tutelage.rpc.codec import decode, encode, frame_checksum
from tutelage.rpc.transport import CHANNEL_OPTIONS
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.rpc.v1 import teacher_pb2_grpc as pb_grpc

K = 64
HIDDEN = pb.SignalSpec(kind=pb.SIGNAL_KIND_HIDDEN)
TEMPERATURES = (0.5, 1.0, 2.0, 5.0)
TEXTS = (
    "Yes",
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "Tom has 5 boxes with 12 pencils each. He gives 17 pencils to his sister. How many are left? Tom had 5 * 12 = 60 "
    "pencils. After giving away 17 he has 60 - 17 = 43 pencils left. The answer is 43.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    return total / "
    "len(values)\n\nprint(mean([1, 2, 3]))\n",
    "Water that evaporates from the sea rises, cools, and condenses into clouds. When the drops have grown heavy "
    "enough they fall as rain or snow. Part of it seeps into the ground and feeds springs; the rest flows "
    "through streams and rivers back to the sea, where the cycle begins again. Without this cycle there would be no "
    "fresh water on land, no forests and no fields, and the soil would be dust that the wind carries away.",
)


@pytest.fixture(scope="module")
def stub(teacher_server: TeacherProcess):
    with grpc.insecure_channel(teacher_server.address, options=CHANNEL_OPTIONS) as channel:
        yield pb_grpc.TeacherServiceStub(channel)


@pytest.fixture(scope="module")
def sequences(packaged_models: tuple[Path, Path]) -> list[np.ndarray]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(packaged_models[0])
    return [np.array(tokenizer(text).input_ids, dtype=np.int32) for text in TEXTS]


@pytest.fixture(scope="module")
def references(packaged_models: tuple[Path, Path], sequences: list[np.ndarray]) -> list[torch.Tensor]:
    return reference_logits(packaged_models[0], sequences, torch.float32)


def reference_logits(model: Path, sequences: list[np.ndarray], dtype: torch.dtype) -> list[torch.Tensor]:
    """float64 [T, V] logits of transformers, its layers computed in a dtype, its head in float32."""
    from transformers import AutoModelForCausalLM

    own = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    head_VD = own.lm_head.weight.float()
    with torch.inference_mode():
        return [
            (own.model(torch.from_numpy(ids).long()[None]).last_hidden_state[0].float() @ head_VD.T).double()
            for ids in sequences
        ]


def ask(stub, sequences, spec: pb.SignalSpec, **fields) -> list[pb.SignalFrame]:
    """One frame a sequence, in their order, all asked at once."""
    answers = ask_all(stub, sequences, spec, **fields)
    assert [len(frames) for frames in answers] == [1] * len(sequences)
    return [frames[0] for frames in answers]


def ask_all(stub, sequences, spec: pb.SignalSpec, **fields) -> list[list[pb.SignalFrame]]:
    """The frames of each sequence, of which a long one has several."""
    requests = (
        pb.ScoreSequencesRequest(request_id=str(index), token_ids=encode(ids), signal=spec, **fields)
        for index, ids in enumerate(sequences)
    )
    frames: dict[str, list[pb.SignalFrame]] = {str(index): [] for index in range(len(sequences))}
    for response in stub.ScoreSequences(requests, timeout=120):
        assert response.WhichOneof("outcome") == "frame", response
        assert response.frame.checksum == frame_checksum(response.frame)
        frames[response.request_id].append(response.frame)
    return list(frames.values())


def topk_spec(k: int = K) -> pb.SignalSpec:
    return pb.SignalSpec(kind=pb.SIGNAL_KIND_TOPK, k=k, temperatures=TEMPERATURES)


def kl(p_logp: torch.Tensor, q_logp: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) of each position, nats."""
    return (p_logp.exp() * (p_logp - q_logp)).sum(dim=-1)


def with_tail(kept_logp: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the kept ids and of all others together, which float32 can round to below 0."""
    kept = kept_logp.exp().sum(1, keepdim=True).clamp(max=1 - 1e-6)
    return torch.cat([kept_logp, torch.log1p(-kept)], dim=1)


def test_topk_is_the_reference_within_what_bfloat16_costs(stub, sequences, references):
    divergences, errors = [], []
    for ids, reference, frame in zip(sequences, references, ask(stub, sequences, topk_spec()), strict=True):
        assert (frame.position_start, frame.position_count, frame.last) == (0, len(ids), True)
        kept_ids = torch.from_numpy(decode(frame.ids).astype(np.int64))
        kept = torch.from_numpy(decode(frame.logits).copy()).double()
        logsumexp = torch.from_numpy(decode(frame.logsumexp).copy()).double()
        assert (kept.diff(dim=1) <= 0).all()
        for column, temperature in enumerate(TEMPERATURES):
            own_logp = kept / temperature - logsumexp[:, column, None]
            reference_logp = (reference / temperature).log_softmax(1).gather(1, kept_ids)
            divergences.append(kl(with_tail(reference_logp), with_tail(own_logp)))
        errors.append((kept - reference.gather(1, kept_ids)).abs().flatten())
    divergence, error = torch.cat(divergences), torch.cat(errors)
    print(f"\ntopk: KL {divergence.mean():.5f} mean, {divergence.max():.5f} max at T of {TEMPERATURES}; "
          f"logits differ by {error.mean():.4f} mean, {error.max():.3f} max")  # fmt: skip
    assert divergence.mean() < 0.004
    assert error.mean() < 0.15


def test_rows_and_target_tokens_are_in_their_places(stub, sequences, references):
    """Shifted by one position, errors would be of several nats: one row's distribution is not its neighbour's."""
    column = TEMPERATURES.index(1.0)
    for ids, reference, frame in zip(sequences, references, ask(stub, sequences, topk_spec()), strict=True):
        reference_logp = reference.log_softmax(1)
        logsumexp = decode(frame.logsumexp)[:, column]
        target_logp = decode(frame.target_logits) - logsumexp[:-1]
        expected = reference_logp[:-1].gather(1, torch.from_numpy(ids[1:]).long()[:, None])[:, 0].numpy()
        np.testing.assert_allclose(target_logp, expected, atol=0.8)
        assert np.abs(target_logp - expected).sum() < 0.1 * len(ids)
        for row in {0, len(ids) - 1}:
            first = decode(frame.ids)[row, 0]
            assert abs(decode(frame.logits)[row, 0] - logsumexp[row] - reference_logp[row, first]) < 0.3
            assert reference_logp[row].max() - reference_logp[row, first] < 0.3


@pytest.fixture(scope="module")
def matrix(stub) -> torch.Tensor:
    """The unembedding [V, D] as a student gets it."""
    info = stub.GetTeacherInfo(pb.GetTeacherInfoRequest())
    chunks = [decode(chunk.rows) for chunk in stub.GetUnembedding(pb.GetUnembeddingRequest())]
    rows = torch.from_numpy(np.concatenate(chunks)).view(torch.bfloat16)
    assert rows.shape == (info.unembedding.rows, info.unembedding.columns)
    return rows.double()


def logits_of(frame: pb.SignalFrame, matrix: torch.Tensor) -> torch.Tensor:
    """float64 [T, V] logits of a frame of hidden states."""
    return torch.from_numpy(decode(frame.hidden).copy()).view(torch.bfloat16).double() @ matrix.T


def test_hidden_states_give_the_whole_distribution(stub, sequences, references, matrix):
    frames = ask(stub, sequences, HIDDEN)
    divergence = torch.cat(
        [
            kl(reference.log_softmax(1), logits_of(frame, matrix).log_softmax(1))
            for reference, frame in zip(references, frames, strict=True)
        ]
    )
    print(f"\nhidden: KL {divergence.mean():.5f} mean, {divergence.max():.5f} max over {len(divergence)} tokens")
    assert divergence.mean() < 0.004


def test_topk_and_hidden_are_one_source(stub, sequences, matrix):
    """The head in the server and the matrix that it hands out make the same logits of the same states."""
    (states,) = ask(stub, [sequences[2]], HIDDEN)
    (top,) = ask(stub, [sequences[2]], topk_spec())
    logits = logits_of(states, matrix)
    at_ids = logits.gather(1, torch.from_numpy(decode(top.ids).astype(np.int64)))
    np.testing.assert_allclose(decode(top.logits), at_ids.numpy(), atol=1e-3)
    for column, temperature in enumerate(TEMPERATURES):
        expected = (logits / temperature).logsumexp(1).numpy()
        np.testing.assert_allclose(decode(top.logsumexp)[:, column], expected, atol=1e-3)


def test_company_changes_little(stub, sequences, matrix):
    """The same tokens alone, and among twenty other sequences of other lengths."""
    (alone,) = ask(stub, [sequences[4]], HIDDEN)
    company = ask(stub, [*sequences * 2, sequences[4], *sequences * 2], HIDDEN)[len(sequences) * 2]
    divergence = kl(logits_of(alone, matrix).log_softmax(1), logits_of(company, matrix).log_softmax(1))
    print(f"\ncompany: KL {divergence.mean():.6f} mean, {divergence.max():.6f} max")
    assert divergence.mean() < 0.001


def test_part_of_a_sequence_is_the_same_rows(stub, sequences, references, packaged_models):
    """Tokens after the part are not computed: another product, another rounding, as far from float32 as any other."""
    ids, start, end = sequences[2], 10, 40
    (whole,) = ask(stub, [ids], topk_spec())
    (part,) = ask(stub, [ids], topk_spec(), score_start=start, score_end=end)
    assert (part.position_start, part.position_count) == (start, end - start)
    (rounded,) = reference_logits(packaged_models[0], [ids], torch.bfloat16)
    targets, column = torch.from_numpy(ids[1:]).long()[:, None], TEMPERATURES.index(1.0)
    own, cost = (
        logits[:-1].log_softmax(1).gather(1, targets).squeeze(1).numpy() for logits in (references[2], rounded)
    )
    of_part, of_whole = (
        decode(frame.target_logits) - decode(frame.logsumexp)[: len(decode(frame.target_logits)), column]
        for frame in (part, whole)
    )
    errors = {
        "part": np.abs(of_part - own[start:end]),
        "whole": np.abs(of_whole - own)[start:end],
        "transformers in bfloat16": np.abs(cost - own)[start:end],
    }
    for name, each in errors.items():
        print(f"\n{name}: log-probabilities are {each.mean():.3f} from float32 in the mean, {each.max():.3f} at most")
    assert errors["part"].mean() < 1.5 * errors["transformers in bfloat16"].mean()
    assert errors["part"].max() < 2 * errors["transformers in bfloat16"].max()


def test_edges(stub):
    """One token; the longest sequence; the first and the last id; the same token again and again."""
    info = stub.GetTeacherInfo(pb.GetTeacherInfoRequest())
    longest, last = info.limits.max_sequence_tokens, info.vocabulary_size - 1
    edges = [[0], [last], [0, last] * 3, [5] * 200, list(range(100, 100 + longest))]
    answers = ask_all(stub, [np.array(ids, dtype=np.int32) for ids in edges], topk_spec(k=2))
    for ids, frames in zip(edges, answers, strict=True):
        assert sum(frame.position_count for frame in frames) == len(ids)
        assert all(np.isfinite(decode(frame.logits)).all() for frame in frames)
        assert all(np.isfinite(decode(frame.logsumexp)).all() for frame in frames)
        assert sum(len(decode(frame.target_logits)) for frame in frames) == len(ids) - 1


def write(stub, prompt: np.ndarray, **fields) -> tuple[list[int], str, str, list[pb.SignalFrame]]:
    request = pb.WriteRationalesRequest(request_id="w", prompt_token_ids=encode(prompt), **fields)
    token_ids, text, reason, frames = [], "", "", []
    for response in stub.WriteRationales(request, timeout=120):
        assert not response.HasField("refusal"), response
        if response.HasField("frame"):
            frames.append(response.frame)
            continue
        token_ids += decode(response.generated.token_ids).tolist()
        text += response.generated.text
        reason = response.generated.finish_reason
    return token_ids, text, reason, frames


@pytest.fixture(scope="module")
def prompt(sequences: list[np.ndarray]) -> np.ndarray:
    """The capital of France is"""
    return sequences[1][:5]


def test_it_writes_greedily_and_then_scores_what_it_wrote(stub, prompt):
    spec = pb.SignalSpec(kind=pb.SIGNAL_KIND_TOPK, k=8, temperatures=[1.0])
    token_ids, text, reason, frames = write(stub, prompt, max_new_tokens=24, signal=spec)
    assert text.startswith(" Paris")
    assert reason in ("stop", "length")
    assert write(stub, prompt, max_new_tokens=24)[0] == token_ids
    (frame,) = frames
    assert (frame.position_start, frame.position_count) == (len(prompt) - 1, len(token_ids) + 1)
    # Two engines with one set of weights: greedy writing takes what scoring finds most likely, but for ties.
    gap = decode(frame.logits)[:-1, 0] - decode(frame.target_logits)
    assert gap.max() < 0.5
    assert (decode(frame.ids)[:-1, 0] == token_ids).mean() > 0.8


def test_sampling_follows_its_seed(stub, prompt):
    first, again, other = (write(stub, prompt, max_new_tokens=12, temperature=1.5, seed=seed)[0] for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_stop_strings_and_lengths(stub, prompt):
    _, text, reason, _ = write(stub, prompt, max_new_tokens=24, stop=["Paris"])
    assert reason == "stop"
    assert "Paris" not in text
    token_ids, _, reason, _ = write(stub, prompt, max_new_tokens=3)
    assert (len(token_ids), reason) == (3, "length")


def test_it_says_who_it_is(stub, packaged_models, teacher_server, capsys):
    info = stub.GetTeacherInfo(pb.GetTeacherInfoRequest())
    assert info.weights_digest == identity.weights_digest(packaged_models[0])
    assert dict(info.tokenizer_digests) == identity.tokenizer_digests(packaged_models[1])
    assert info.engine.startswith("vllm ")
    assert info.noise_floor.positions > 100
    assert 0 <= info.noise_floor.mean_kl < 0.002
    print(f"noise floor: KL {info.noise_floor.mean_kl:.6f} mean")
    with grpc.insecure_channel(teacher_server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=""))
    assert health.status == health_pb2.HealthCheckResponse.SERVING


def test_the_command_prints_it(teacher_server, capsys):
    from tutelage.cli import main

    assert main(["teacher", "info", "--address", teacher_server.address, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["roles"] == ["TEACHER_ROLE_SCORE", "TEACHER_ROLE_WRITE"]


@pytest.mark.last
def test_it_ends_with_an_engine_that_is_killed(teacher_server):
    assert_it_ends_with_its_engine(teacher_server)
