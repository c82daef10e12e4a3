"""Every field of a request, inside and outside of what the contract allows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tutelage.errors import InvalidRequest, NotServed
from tutelage.rpc.codec import encode
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.teacher_server.admission.validation import Validator

VOCABULARY = 100
LIMITS = pb.Limits(max_sequence_tokens=20, max_k=10, max_temperatures=3, max_samples=4)
ALL_KINDS = [pb.SIGNAL_KIND_TOPK, pb.SIGNAL_KIND_CANDIDATES, pb.SIGNAL_KIND_HIDDEN]
ALL_ROLES = [pb.TEACHER_ROLE_SCORE, pb.TEACHER_ROLE_WRITE]
VALIDATOR = Validator(LIMITS, vocabulary_size=VOCABULARY, kinds=ALL_KINDS, roles=ALL_ROLES)


def ids(*values: int) -> pb.Tensor:
    return encode(np.array(values, dtype=np.int32))


def table(rows: int, columns: int, value: int = 0) -> pb.Tensor:
    return encode(np.full((rows, columns), value, dtype=np.int32))


def topk(**changes) -> pb.SignalSpec:
    return pb.SignalSpec(**({"kind": pb.SIGNAL_KIND_TOPK, "k": 5, "temperatures": [1.0, 2.0]} | changes))


def candidates(tensor: pb.Tensor, **changes) -> pb.SignalSpec:
    values = {"kind": pb.SIGNAL_KIND_CANDIDATES, "temperatures": [1.0], "candidate_ids": tensor}
    return pb.SignalSpec(**(values | changes))


def hidden(**changes) -> pb.SignalSpec:
    return pb.SignalSpec(**({"kind": pb.SIGNAL_KIND_HIDDEN} | changes))


def score(**changes) -> pb.ScoreSequencesRequest:
    values = {"request_id": "r", "token_ids": ids(5, 0, 99), "signal": topk()}
    return pb.ScoreSequencesRequest(**(values | changes))


def write(**changes) -> pb.WriteRationalesRequest:
    values = {"request_id": "r", "prompt_token_ids": ids(1, 2, 3), "max_new_tokens": 4}
    return pb.WriteRationalesRequest(**(values | changes))


@pytest.mark.parametrize(
    "request_",
    [
        score(),
        score(token_ids=ids(7)),
        score(token_ids=ids(*range(20))),
        score(request_id="x" * 128),
        score(score_start=2),
        score(score_start=1, score_end=2),
        score(signal=topk(k=1)),
        score(signal=topk(k=10, temperatures=[0.1, 1.0, 1e6])),
        score(signal=topk(min_mass=1.0, mass_temperature=2.0)),
        score(signal=topk(min_mass=0.5, mass_temperature=1.0)),
        score(signal=hidden()),
        score(signal=candidates(table(3, 10))),
        score(signal=candidates(table(3, 1, value=-1))),
        score(signal=candidates(table(1, 2)), score_start=1, score_end=2),
    ],
)
def test_scoring_that_is_allowed(request_):
    scoring = VALIDATOR.scoring(request_)
    assert 0 <= scoring.start < scoring.end <= len(scoring.token_ids)


def test_scoring_says_what_was_asked():
    scoring = VALIDATOR.scoring(score(score_start=1))
    assert scoring.token_ids.tolist() == [5, 0, 99]
    assert (scoring.start, scoring.end, scoring.signal.k) == (1, 3, 5)
    assert scoring.signal.temperatures == (1.0, 2.0)


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("request_id", score(request_id="")),
        ("request_id", score(request_id="x" * 129)),
        ("request_id", score(request_id="é" * 65)),
        ("token_ids", score(token_ids=ids())),
        ("token_ids", score(token_ids=ids(*range(21)))),
        ("token_ids", score(token_ids=ids(1, -1))),
        ("token_ids", score(token_ids=ids(1, VOCABULARY))),
        ("token_ids.dtype", score(token_ids=pb.Tensor())),
        ("token_ids.dtype", score(token_ids=pb.Tensor(dtype=77, shape=[1], data=b"1234"))),
        ("token_ids.dtype", score(token_ids=encode(np.array([1.0], dtype=np.float32)))),
        ("token_ids.shape", score(token_ids=table(1, 3))),
        ("token_ids.shape", score(token_ids=pb.Tensor(dtype=pb.DTYPE_INT32, data=b"1234"))),
        ("token_ids.data", score(token_ids=pb.Tensor(dtype=pb.DTYPE_INT32, shape=[2], data=b"1234"))),
        ("token_ids.data", score(token_ids=pb.Tensor(dtype=pb.DTYPE_INT32, shape=[2**32 - 1], data=b""))),
        ("score_start", score(score_start=3)),
        ("score_end", score(score_end=4)),
        ("score_end", score(score_start=1, score_end=1)),
        ("score_end", score(score_start=2, score_end=1)),
        ("signal.kind", score(signal=pb.SignalSpec())),
        ("signal.kind", score(signal=topk(kind=9))),
        ("signal.k", score(signal=topk(k=0))),
        ("signal.k", score(signal=topk(k=11))),
        ("signal.k", score(signal=hidden(k=1))),
        ("signal.k", score(signal=candidates(table(3, 2), k=1))),
        ("signal.temperatures", score(signal=topk(temperatures=[]))),
        ("signal.temperatures", score(signal=topk(temperatures=[1, 2, 3, 4]))),
        ("signal.temperatures", score(signal=topk(temperatures=[0.0]))),
        ("signal.temperatures", score(signal=topk(temperatures=[-1.0]))),
        ("signal.temperatures", score(signal=topk(temperatures=[math.inf]))),
        ("signal.temperatures", score(signal=topk(temperatures=[math.nan]))),
        ("signal.temperatures", score(signal=topk(temperatures=[1.0, 1.0]))),
        ("signal.temperatures", score(signal=hidden(temperatures=[1.0]))),
        ("signal.min_mass", score(signal=topk(min_mass=1.5, mass_temperature=1.0))),
        ("signal.min_mass", score(signal=topk(min_mass=-0.1, mass_temperature=1.0))),
        ("signal.min_mass", score(signal=topk(min_mass=math.nan, mass_temperature=1.0))),
        ("signal.min_mass", score(signal=hidden(min_mass=0.5))),
        ("signal.min_mass", score(signal=candidates(table(3, 2), min_mass=0.5))),
        ("signal.mass_temperature", score(signal=topk(min_mass=0.5))),
        ("signal.mass_temperature", score(signal=topk(min_mass=0.5, mass_temperature=3.0))),
        ("signal.mass_temperature", score(signal=topk(min_mass=0.5, mass_temperature=math.nan))),
        ("signal.mass_temperature", score(signal=topk(mass_temperature=1.0))),
        ("signal.candidate_ids", score(signal=topk(candidate_ids=table(3, 2)))),
        ("signal.candidate_ids", score(signal=hidden(candidate_ids=table(3, 2)))),
        ("signal.candidate_ids", score(signal=candidates(table(2, 2)))),
        ("signal.candidate_ids", score(signal=candidates(table(3, 0)))),
        ("signal.candidate_ids", score(signal=candidates(table(3, 11)))),
        ("signal.candidate_ids", score(signal=candidates(table(3, 2, value=-2)))),
        ("signal.candidate_ids", score(signal=candidates(table(3, 2, value=VOCABULARY)))),
        ("signal.candidate_ids.shape", score(signal=candidates(ids(1, 2, 3)))),
        ("signal.candidate_ids.dtype", score(signal=pb.SignalSpec(kind=2, temperatures=[1]))),
    ],
)
def test_scoring_that_is_refused(field, request_):
    with pytest.raises(InvalidRequest) as refusal:
        VALIDATOR.scoring(request_)
    assert refusal.value.field == field
    assert "allowed: " in refusal.value.message or "do not fill" in refusal.value.message


@pytest.mark.parametrize(
    "request_",
    [
        write(),
        write(temperature=2.0, samples=4, top_p=0.5, seed=2**64 - 1, stop=["\n"] * 8),
        write(max_new_tokens=17),
        write(signal=topk()),
        write(signal=hidden()),
    ],
)
def test_writing_that_is_allowed(request_):
    generation = VALIDATOR.generation(request_)
    assert generation.sampling.samples >= 1
    assert 0 < generation.sampling.top_p <= 1
    assert generation.sampling.seed < 2**63


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("request_id", write(request_id="")),
        ("max_new_tokens", write(max_new_tokens=0)),
        ("max_new_tokens", write(max_new_tokens=20)),
        ("prompt_token_ids", write(max_new_tokens=18)),
        ("prompt_token_ids", write(prompt_token_ids=ids())),
        ("prompt_token_ids", write(prompt_token_ids=ids(VOCABULARY))),
        ("samples", write(samples=5, temperature=1.0)),
        ("samples", write(samples=2)),
        ("temperature", write(temperature=-0.1)),
        ("temperature", write(temperature=2.1)),
        ("temperature", write(temperature=math.nan)),
        ("top_p", write(top_p=1.5)),
        ("top_p", write(top_p=-0.5)),
        ("top_p", write(top_p=math.nan)),
        ("stop", write(stop=["x"] * 9)),
        ("stop[1]", write(stop=["x", ""])),
        ("stop[0]", write(stop=["x" * 65])),
        ("signal.kind", write(signal=candidates(table(1, 1)))),
        ("signal.k", write(signal=topk(k=0))),
    ],
)
def test_writing_that_is_refused(field, request_):
    with pytest.raises(InvalidRequest) as refusal:
        VALIDATOR.generation(request_)
    assert refusal.value.field == field


def test_what_this_server_does_not_do():
    scorer = Validator(LIMITS, vocabulary_size=VOCABULARY, kinds=ALL_KINDS[:1], roles=[pb.TEACHER_ROLE_SCORE])
    writer = Validator(LIMITS, vocabulary_size=VOCABULARY, kinds=[], roles=[pb.TEACHER_ROLE_WRITE])
    with pytest.raises(NotServed, match="without the role 'write'"):
        scorer.generation(write())
    with pytest.raises(NotServed, match="SIGNAL_KIND_HIDDEN"):
        scorer.scoring(score(signal=hidden()))
    with pytest.raises(NotServed, match="without the role 'score'"):
        writer.scoring(score())
    with pytest.raises(NotServed, match="without the role 'score'"):
        writer.generation(write(signal=topk()))
    with pytest.raises(NotServed, match="without the role 'score'"):
        writer.unembedding_row(pb.GetUnembeddingRequest())


def test_rows_of_the_unembedding():
    assert VALIDATOR.unembedding_row(pb.GetUnembeddingRequest(row_start=VOCABULARY - 1)) == VOCABULARY - 1
    with pytest.raises(InvalidRequest, match="row_start"):
        VALIDATOR.unembedding_row(pb.GetUnembeddingRequest(row_start=VOCABULARY))
