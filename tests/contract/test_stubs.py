"""The committed stubs are those of the .proto files."""

from __future__ import annotations

import pytest

import make_stubs
from tutelage.evaluator.service.server import EvaluatorServicer
from tutelage.rpc.v1 import evaluator_pb2, evaluator_pb2_grpc, teacher_pb2, teacher_pb2_grpc
from tutelage.teacher_server.server.servicer import TeacherServicer


def test_stubs_are_up_to_date():
    assert make_stubs.stale_stubs() == []


@pytest.mark.parametrize(
    ("messages", "name", "generated", "ours"),
    [
        (teacher_pb2, "TeacherService", teacher_pb2_grpc.TeacherServiceServicer, TeacherServicer),
        (evaluator_pb2, "EvaluatorService", evaluator_pb2_grpc.EvaluatorServiceServicer, EvaluatorServicer),
    ],
)
def test_no_method_is_left_to_the_generated_class_which_only_says_not_implemented(messages, name, generated, ours):
    methods = [method.name for method in messages.DESCRIPTOR.services_by_name[name].methods]
    assert methods
    assert not [method for method in methods if getattr(ours, method) is getattr(generated, method)]
