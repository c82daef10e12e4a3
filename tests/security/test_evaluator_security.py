"""Who may ask the evaluator: TLS and bearer tokens, over a real connection."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path
from typing import Any

import grpc
import pytest

from evaluator_support import EchoEngine
from tutelage.errors import ConfigurationError
from tutelage.evaluator.config import ServeConfig
from tutelage.evaluator.service.server import SCOPE_OF_METHOD, Service
from tutelage.rpc.tls import ClientTls
from tutelage.rpc.transport import open_channel
from tutelage.rpc.v1 import evaluator_pb2 as pb
from tutelage.rpc.v1 import evaluator_pb2_grpc as pb_grpc
from tutelage.tasks import TaskConfig
from tutelage.trainer.cluster.evaluator_client import EvaluatorClient
from tutelage.trainer.config.services import EvaluatorConfig

SPEC = importlib.util.spec_from_file_location("certificates", Path(__file__).with_name("certificates.py"))
certificates = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(certificates)


def service(folder: Path, **settings: Any) -> Service:
    config = ServeConfig(**{"port": 0, "frames": folder / "frames", "queue": folder / "queue", **settings})
    return Service(config, engines=lambda _checkpoint: EchoEngine())


def call(address: str, method: str, token: str | None, tls: ClientTls | None = None) -> str:
    """The status; OK stands for whatever a method says about an empty request once the caller is let in."""
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    with open_channel(address, tls) as channel:
        stub, name = pb_grpc.EvaluatorServiceStub(channel), method.rpartition("/")[2]
        try:
            answer = getattr(stub, name)(getattr(pb, f"{name}Request")(), metadata=metadata, timeout=5)
            if name == "WatchEvaluation":
                list(answer)
        except grpc.RpcError as error:
            refused = error.code().name in ("UNAUTHENTICATED", "PERMISSION_DENIED", "UNAVAILABLE")
            return str(error.code().name) if refused else "OK"
    return "OK"


async def test_every_method_with_every_token(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("all-secret info,submit\nread-secret info\n")
    served = service(tmp_path, token_file=tmp_path / "tokens")
    await served.start()
    read = {method: "OK" if scope == "info" else "PERMISSION_DENIED" for method, scope in SCOPE_OF_METHOD.items()}
    nothing = dict.fromkeys(SCOPE_OF_METHOD, "UNAUTHENTICATED")
    tables = {
        None: nothing,
        "all-secre": nothing,
        "read-secret": read,
        "all-secret": dict.fromkeys(SCOPE_OF_METHOD, "OK"),
    }
    for token, expected in tables.items():
        for method, status in expected.items():
            assert await asyncio.to_thread(call, f"127.0.0.1:{served.port}", method, token) == status, (token, method)
    await served.stop()


def test_every_method_of_the_contract_has_a_scope() -> None:
    described = pb.DESCRIPTOR.services_by_name["EvaluatorService"]
    assert {f"/{described.full_name}/{method.name}" for method in described.methods} == SCOPE_OF_METHOD.keys()


async def test_certificates(tmp_path: Path) -> None:
    ours, theirs = certificates.Authority(tmp_path, "ours"), certificates.Authority(tmp_path, "theirs")
    served = service(tmp_path, host="0.0.0.0", tls=ours.issue("127.0.0.1") | {"client_ca": ours.ca})
    await served.start()
    answers = [
        await asyncio.to_thread(call, f"127.0.0.1:{served.port}", "GetEvaluatorInfo", None, tls)
        for tls in (
            ClientTls(ca=ours.ca, **ours.issue("student")),
            ClientTls(ca=ours.ca),
            ClientTls(ca=ours.ca, **theirs.issue("student")),
            ClientTls(ca=theirs.ca, **ours.issue("student")),
            None,
        )
    ]
    await served.stop()
    assert answers == ["OK", *["UNAVAILABLE"] * 4]


async def test_beyond_loopback_only_with_a_certificate(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="certificate"):
        await service(tmp_path, host="0.0.0.0").start()


async def test_a_student_submits_with_certificate_and_token(tmp_path: Path) -> None:
    ours = certificates.Authority(tmp_path, "ours")
    (tmp_path / "tokens").write_text("ann-secret submit ann\n")
    (tmp_path / "own").write_text("ann-secret\n")
    served = service(tmp_path, tls=ours.issue("127.0.0.1"), token_file=tmp_path / "tokens")
    await served.start()

    def submit(student_id: str) -> str:
        from tutelage.config import validate
        from tutelage.trainer.config.student import StudentConfig

        config = EvaluatorConfig(
            address=f"127.0.0.1:{served.port}",
            tls=ClientTls(ca=ours.ca),
            token_file=tmp_path / "own",
            tasks=(TaskConfig(task="arithmetic"),),
        )
        student = validate(StudentConfig, {"id": student_id, "init": "x", "data": {"path": "d.jsonl"}})
        folder = tmp_path / student_id
        folder.mkdir()
        with EvaluatorClient(config, run="r", student=student, teacher="t", folder=folder) as client:
            client.submit(0, tmp_path / "nothing")
        return (folder / "evaluations.jsonl").read_text()

    assert "another student" in await asyncio.to_thread(submit, "bob")
    assert "another student" not in await asyncio.to_thread(submit, "ann")
    await served.stop()
