"""What one student can tell of another by what the engine had cached, and that the server says what it saved."""

from __future__ import annotations

import grpc.aio
import numpy as np
import pytest

from fake_teacher import FakeScoringEngine, fake_teacher, serving
from tutelage.config import validate
from tutelage.errors import ConfigurationError
from tutelage.rpc.codec import encode
from tutelage.rpc.transport import STUDENT_METADATA_KEY, TOKEN_METADATA_KEY
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.rpc.v1 import teacher_pb2_grpc as pb_grpc
from tutelage.teacher_server.config import TeacherConfig

IDS = np.arange(50, dtype=np.int32)
HIDDEN = pb.SignalSpec(kind=pb.SIGNAL_KIND_HIDDEN)


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "tokens"
    path.write_text("one-token score,info\nother-token score,info\n")
    return path


async def ask(address: str, token: str, student: str) -> pb.GetTeacherInfoResponse:
    """Scores the end of a sequence, and then asks who the teacher is."""
    metadata = [(TOKEN_METADATA_KEY, f"Bearer {token}"), (STUDENT_METADATA_KEY, student)]
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.TeacherServiceStub(channel)
        request = pb.ScoreSequencesRequest(request_id="1", token_ids=encode(IDS), signal=HIDDEN, score_start=48)
        async for response in stub.ScoreSequences(iter([request]), metadata=metadata):
            assert response.frame.position_count == 2
        return await stub.GetTeacherInfo(pb.GetTeacherInfoRequest(), metadata=metadata)


@pytest.mark.parametrize(("isolated", "found"), [(False, [0, 48, 48]), (True, [0, 48, 0])])
async def test_what_is_cached_is_shared_by_all_or_by_one_token(tokens, isolated, found):
    teacher = fake_teacher(FakeScoringEngine(block_tokens=8))
    teacher.info.prefix_cache.block_tokens = 8
    async with serving(teacher, token_file=str(tokens), isolate_students=isolated) as server:
        infos = [
            await ask(server.address, token, student)
            for token, student in (("one-token", "ann"), ("one-token", "ben"), ("other-token", "cat"))
        ]
        students = server.servicer.usage().students
    assert [student.cached_tokens for student in students] == found
    assert [student.prefix_hits for student in students] == [tokens // 48 for tokens in found]
    assert [student.computed_tokens for student in students] == [50 - tokens for tokens in found]
    assert [info.prefix_cache.saved_tokens for info in infos] == [sum(found[:1]), sum(found[:2]), sum(found)]
    assert infos[-1].prefix_cache.hits == sum(tokens > 0 for tokens in found)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "isolate_students keeps bearer tokens apart, and there are none; name their file with token_file"),
        ({"token_file": "tokens", "store": {"path": "s"}}, "a store answers one with what another asked"),
    ],
)
def test_apart_is_refused_where_it_would_not_be(values, message):
    with pytest.raises(ConfigurationError, match=message):
        validate(TeacherConfig, {"model": "m", "isolate_students": True} | values)
