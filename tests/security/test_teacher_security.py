"""Who gets in: TLS, mutual TLS and bearer tokens, each with everything that must not work."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fake_teacher import FakeGenerationEngine, FakeScoringEngine, fake_teacher, serving
from tutelage.config import validate
from tutelage.errors import ConfigurationError, NotAuthenticated, NotPermitted, TutelageError
from tutelage.rpc.auth import TokenFile
from tutelage.rpc.tls import ClientTls
from tutelage.rpc.transport import STUDENT_METADATA_KEY, error_of_rpc, open_channel, token_metadata
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.rpc.v1 import teacher_pb2_grpc as pb_grpc
from tutelage.teacher_server.cli import main
from tutelage.teacher_server.server.server import SCOPE_OF_METHOD
from tutelage.trainer.teacher.grpc_client import TeacherClient

SPEC = importlib.util.spec_from_file_location("certificates", Path(__file__).with_name("certificates.py"))
certificates = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(certificates)


@pytest.fixture
def ours(tmp_path):
    return certificates.Authority(tmp_path, "ours")


@pytest.fixture
def theirs(tmp_path):
    return certificates.Authority(tmp_path, "theirs")


def info(address: str, tls: ClientTls | None = None, metadata=()) -> str:
    """The teacher's name, or the class of our error."""
    with open_channel(address, tls) as channel:
        try:
            stub = pb_grpc.TeacherServiceStub(channel)
            return stub.GetTeacherInfo(pb.GetTeacherInfoRequest(), timeout=5, metadata=metadata).model_name
        except grpc.RpcError as error:
            return type(error_of_rpc(error, address, "teacher")).__name__


async def asked(address: str, *arguments, **keywords) -> str:
    started = time.monotonic()
    answer = await asyncio.to_thread(info, address, *arguments, **keywords)
    assert time.monotonic() - started < 6
    return answer


@pytest.mark.parametrize(
    ("host", "expired", "trusted", "expected"),
    [
        ("127.0.0.1", False, "ours", "fake"),
        ("127.0.0.1", False, "theirs", "NotAuthenticated"),
        ("127.0.0.1", True, "ours", "NotAuthenticated"),
        ("example.org", False, "ours", "NotAuthenticated"),
    ],
    ids=["good", "unknown authority", "expired", "for another host"],
)
async def test_certificates_of_a_server(ours, theirs, host, expired, trusted, expected):
    ca = {"ours": ours, "theirs": theirs}[trusted].ca
    async with serving(fake_teacher(FakeScoringEngine()), tls=ours.issue(host, expired=expired)) as server:
        assert await asked(server.address, ClientTls(ca=ca)) == expected


async def test_encryption_on_one_side_only(ours):
    async with serving(fake_teacher(FakeScoringEngine()), tls=ours.issue("127.0.0.1")) as server:
        assert await asked(server.address) == "Unreachable"
    async with serving(fake_teacher(FakeScoringEngine())) as server:
        assert await asked(server.address, ClientTls(ca=ours.ca)) != "fake"


async def test_certificates_of_a_client(ours, theirs):
    tls = ours.issue("127.0.0.1") | {"client_ca": ours.ca}
    clients = {
        "good": ours.issue("student"),
        "none": {},
        "unknown authority": theirs.issue("student"),
        "expired": ours.issue("student", expired=True),
    }
    async with serving(fake_teacher(FakeScoringEngine()), tls=tls) as server:
        answers = {name: await asked(server.address, ClientTls(ca=ours.ca, **files)) for name, files in clients.items()}
    assert answers.pop("good") == "fake"
    assert set(answers.values()) <= {"Unreachable", "NotAuthenticated"}, answers


async def test_a_server_that_asks_for_certificates_must_show_a_good_one_itself(ours, theirs):
    """Every fault of the server's certificate, met by a client whose own is good; and a client in the clear."""
    client = ours.issue("student")
    servers = {
        "unknown authority": theirs.issue("127.0.0.1"),
        "expired": ours.issue("127.0.0.1", expired=True),
        "for another host": ours.issue("example.org"),
    }
    for name, files in servers.items():
        async with serving(fake_teacher(FakeScoringEngine()), tls=files | {"client_ca": ours.ca}) as server:
            assert await asked(server.address, ClientTls(ca=ours.ca, **client)) == "NotAuthenticated", name
            assert await asked(server.address) == "Unreachable", name


async def test_a_renewed_certificate_of_the_same_authority_is_good_and_a_new_authority_is_not(ours, theirs):
    for certificate, expected in ((ours.issue("127.0.0.1"), "fake"), (theirs.issue("127.0.0.1"), "NotAuthenticated")):
        async with serving(fake_teacher(FakeScoringEngine()), tls=certificate) as server:
            assert await asked(server.address, ClientTls(ca=ours.ca)) == expected


async def test_a_renewed_certificate_is_used_without_a_restart(ours, theirs, caplog):
    files = ours.issue("127.0.0.1")
    async with serving(fake_teacher(FakeScoringEngine()), tls=files) as server:
        assert await asked(server.address, ClientTls(ca=ours.ca)) == "fake"
        good = {name: path.read_bytes() for name, path in files.items()}
        files["certificate"].unlink()
        assert await asked(server.address, ClientTls(ca=ours.ca)) == "fake"
        assert "stay as they were" in caplog.text
        for name, path in theirs.issue("127.0.0.1").items():
            files[name].write_bytes(path.read_bytes())
        assert await asked(server.address, ClientTls(ca=theirs.ca)) == "fake"
        assert await asked(server.address, ClientTls(ca=ours.ca)) == "NotAuthenticated"
        for name, content in good.items():
            files[name].write_bytes(content)
        assert await asked(server.address, ClientTls(ca=ours.ca)) == "fake"


def test_the_doctor_speaks_tls_and_shows_a_token(ours, tmp_path, capsys):
    from tutelage import doctor

    tokens, own = tmp_path / "tokens", tmp_path / "own"
    tokens.write_text("secret info")
    own.write_text("secret")

    def diagnose(address: str, *options: str) -> tuple[int, str]:
        code = doctor.main(["--teacher", address, *options])
        return code, [line for line in capsys.readouterr().out.splitlines() if " teacher  " in line][-1]

    async def serve() -> list[tuple[int, str]]:
        settings = {"tls": ours.issue("127.0.0.1"), "token_file": str(tokens)}
        async with serving(fake_teacher(FakeScoringEngine()), **settings) as server:
            tls = ("--ca", str(ours.ca))
            return [
                await asyncio.to_thread(diagnose, server.address, *options)
                for options in ((*tls, "--token-file", str(own)), tls)
            ]

    good, without_token = asyncio.run(serve())
    assert good[0] == 0
    assert "fake at 127.0.0.1" in good[1]
    assert without_token[0] == 2
    assert "asks for a bearer token" in without_token[1]


async def test_beyond_loopback_only_with_a_certificate(ours):
    from tutelage.teacher_server.server.server import TeacherServer

    with pytest.raises(ConfigurationError, match="certificate"):
        async with serving(fake_teacher(FakeScoringEngine()), address="0.0.0.0:0"):
            pass
    async with serving(fake_teacher(FakeScoringEngine()), address="0.0.0.0:0", tls=ours.issue("127.0.0.1")) as server:
        assert isinstance(server, TeacherServer)


def test_a_client_certificate_without_its_key_is_refused(ours):
    with pytest.raises(ConfigurationError, match="both or neither"):
        validate(ClientTls, {"ca": ours.ca, "certificate": ours.ca})


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"tls\.ca: cannot read"):
        open_channel("127.0.0.1:1", ClientTls(ca=tmp_path / "nowhere.pem"))


SCOPES = ("info", "score", "write")
TOKENS = "# who\nall-secret info,score,write\nread-secret info\n\nann-secret info,score ann\n"


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "tokens"
    path.write_text(TOKENS)
    return path


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def call(stub: pb_grpc.TeacherServiceStub, method: str, metadata) -> str:
    """The status of a call; a method that got past the tokens may still dislike the empty request."""
    name = method.rpartition("/")[2]
    request = getattr(pb, f"{name}Request")()
    try:
        answer = getattr(stub, name)(iter([]) if name == "ScoreSequences" else request, metadata=metadata, timeout=5)
        if not isinstance(answer, pb.GetTeacherInfoResponse | pb.GetTeacherUsageResponse):
            list(answer)
    except grpc.RpcError as error:
        return error.code().name
    return "OK"


async def test_every_method_with_every_token(token_file):
    tables = {
        (): dict.fromkeys(SCOPE_OF_METHOD, "UNAUTHENTICATED"),
        (("authorization", "all-secret"),): dict.fromkeys(SCOPE_OF_METHOD, "UNAUTHENTICATED"),
        bearer(""): dict.fromkeys(SCOPE_OF_METHOD, "UNAUTHENTICATED"),
        bearer("all-secre"): dict.fromkeys(SCOPE_OF_METHOD, "UNAUTHENTICATED"),
        bearer("all-secret"): dict.fromkeys(SCOPE_OF_METHOD, "OK"),
        bearer("read-secret"): {
            method: "OK" if scope == "info" else "PERMISSION_DENIED" for method, scope in SCOPE_OF_METHOD.items()
        },
        bearer("ann-secret"): dict.fromkeys(SCOPE_OF_METHOD, "PERMISSION_DENIED"),
        (*bearer("ann-secret"), (STUDENT_METADATA_KEY, "bob")): dict.fromkeys(SCOPE_OF_METHOD, "PERMISSION_DENIED"),
        (*bearer("ann-secret"), (STUDENT_METADATA_KEY, "ann")): {
            method: "PERMISSION_DENIED" if scope == "write" else "OK" for method, scope in SCOPE_OF_METHOD.items()
        },
    }
    teacher = fake_teacher(FakeScoringEngine(), FakeGenerationEngine())
    async with serving(teacher, token_file=str(token_file)) as server:
        with open_channel(server.address) as channel:
            stub = pb_grpc.TeacherServiceStub(channel)
            for metadata, expected in tables.items():
                for method, status in expected.items():
                    assert await asyncio.to_thread(call, stub, method, metadata) == status, (metadata, method)
            health = health_pb2_grpc.HealthStub(channel)
            answer = await asyncio.to_thread(health.Check, health_pb2.HealthCheckRequest(service=""))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_every_method_of_the_contract_has_a_scope():
    service = pb.DESCRIPTOR.services_by_name["TeacherService"]
    assert {f"/{service.full_name}/{method.name}" for method in service.methods} == SCOPE_OF_METHOD.keys()


def test_a_file_that_changes_is_read_again_and_a_broken_one_changes_nothing(token_file, caplog):
    tokens = TokenFile(token_file, SCOPES)
    assert tokens.grant("read-secret").scopes == {"info"}
    _replace(token_file, "new-secret info\n")
    assert tokens.grant("new-secret")
    with pytest.raises(NotAuthenticated):
        tokens.grant("read-secret")
    _replace(token_file, "other-secret everything\n")
    assert tokens.grant("new-secret")
    assert "line 1" in caplog.text
    token_file.unlink()
    assert tokens.grant("new-secret")
    assert "secret" not in caplog.text


async def test_a_running_server_takes_new_tokens_within_five_seconds_and_says_none_of_them(token_file, caplog, capfd):
    async with serving(fake_teacher(FakeScoringEngine()), token_file=str(token_file)) as server:
        with open_channel(server.address) as channel:
            stub, answers = pb_grpc.TeacherServiceStub(channel), {}
            assert await asyncio.to_thread(call, stub, "/GetTeacherInfo", bearer("read-secret")) == "OK"
            _replace(token_file, "new-secret info\n")
            for token in ("new-secret", "read-secret", "wrong-secret"):
                answers[token] = await asyncio.to_thread(call, stub, "/GetTeacherInfo", bearer(token))
    assert answers == {"new-secret": "OK", "read-secret": "UNAUTHENTICATED", "wrong-secret": "UNAUTHENTICATED"}
    printed = capfd.readouterr()
    assert "secret" not in caplog.text + printed.out + printed.err


def _replace(path: Path, text: str) -> None:
    path.with_suffix(".new").write_text(text)
    os.replace(path.with_suffix(".new"), path)


@pytest.mark.parametrize("line", ["lonely-secret", "a-secret all", "a-secret info ../x", "a-secret info ann more"])
def test_lines_that_are_refused_without_being_shown(tmp_path, line):
    (tmp_path / "tokens").write_text(line)
    with pytest.raises(ConfigurationError) as refused:
        TokenFile(tmp_path / "tokens", SCOPES)
    assert "secret" not in str(refused.value)


async def test_the_trainer_and_the_commands_with_certificate_and_token(ours, tmp_path, capsys):
    tokens, own = tmp_path / "tokens", tmp_path / "token"
    tokens.write_text("ann-secret info,score\n")
    own.write_text("ann-secret\n")
    settings = {"tls": ours.issue("127.0.0.1") | {"client_ca": ours.ca}, "token_file": str(tokens)}
    client = ours.issue("student")

    def connect(token_file: Path | None) -> str:
        tls = ClientTls(ca=ours.ca, **client)
        with TeacherClient(
            address, student_id="ann", wait_seconds=3, tokenizer_digests={}, tls=tls, token_file=token_file
        ) as teacher:
            return teacher.identity.model_name

    options = ["--ca", str(ours.ca), "--certificate", str(client["certificate"]), "--key", str(client["key"])]
    async with serving(fake_teacher(FakeScoringEngine()), **settings) as server:
        address = server.address
        assert await asyncio.to_thread(connect, own) == "fake"
        with pytest.raises(NotAuthenticated, match="token_file"):
            await asyncio.to_thread(connect, None)
        own_option = ["--token-file", str(own)]
        assert await asyncio.to_thread(main, ["info", "--address", address, *options, *own_option]) == 0
        with pytest.raises(TutelageError):
            await asyncio.to_thread(main, ["info", "--address", address, *options])
        own.write_text("wrong")
        with pytest.raises(NotAuthenticated, match="not one that this server knows"):
            await asyncio.to_thread(connect, own)
    assert "fake" in capsys.readouterr().out
    assert token_metadata(own) == bearer("wrong")
    assert NotPermitted.status == "PERMISSION_DENIED"
