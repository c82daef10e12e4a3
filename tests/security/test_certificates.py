"""What `tutelage certificates` makes lets the right sides of a real connection in, and nobody else."""

from __future__ import annotations

import socket

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from fake_teacher import FakeScoringEngine, fake_teacher, serving
from tutelage.certificates import main
from tutelage.errors import ConfigurationError
from tutelage.rpc.tls import ServerTls
from tutelage.rpc.transport import bind
from tutelage.rpc.v1 import teacher_pb2, teacher_pb2_grpc


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "certificates"
    main(["--out", str(made), "--server", "teacher=localhost,127.0.0.1", "--client", "trainer"])
    return made


async def answer(folder, *, client: str, of=None, server: str = "teacher") -> int:
    """The health that a mutually authenticated server tells this client."""
    of = of or folder
    serves = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(), serves)
    tls = ServerTls(certificate=folder / f"{server}.pem", key=folder / f"{server}.key", client_ca=folder / "ca.pem")
    port = bind(serves, "127.0.0.1", 0, insecure=False, tls=tls)
    await serves.start()
    files = [folder / "ca.pem", of / f"{client}.key", of / f"{client}.pem"]
    try:
        credentials = grpc.ssl_channel_credentials(*[file.read_bytes() for file in files])
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            return (await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)).status
    finally:
        await serves.stop(0)


async def test_both_sides_know_each_other(folder):
    assert await answer(folder, client="trainer") == health_pb2.HealthCheckResponse.SERVING


async def test_a_client_that_is_added_later_is_of_the_same_authority(folder):
    before = (folder / "ca.pem").read_bytes()
    main(["--out", str(folder), "--client", "prometheus"])
    assert (folder / "ca.pem").read_bytes() == before
    assert await answer(folder, client="prometheus") == health_pb2.HealthCheckResponse.SERVING


async def test_a_client_of_another_authority_and_a_server_as_a_client_are_not_let_in(folder, tmp_path):
    main(["--out", str(tmp_path / "other"), "--client", "trainer"])
    with pytest.raises(grpc.aio.AioRpcError):
        await answer(folder, client="trainer", of=tmp_path / "other")
    with pytest.raises(grpc.aio.AioRpcError):
        await answer(folder, client="teacher")


async def test_a_node_of_ray_is_server_and_client(folder, capsys):
    main(["--out", str(folder), "--node", "head=localhost,127.0.0.1"])
    assert "to the node head (localhost, 127.0.0.1) alone: RAY_TLS_SERVER_CERT" in capsys.readouterr().out
    assert await answer(folder, client="head") == health_pb2.HealthCheckResponse.SERVING
    assert await answer(folder, client="head", server="head") == health_pb2.HealthCheckResponse.SERVING


def test_keys_are_their_owners_and_it_says_what_goes_where(folder, capsys):
    assert {path.stat().st_mode & 0o777 for path in folder.glob("*.key")} == {0o600}
    main(["--out", str(folder), "--client", "ann"])
    printed = capsys.readouterr().out
    assert "ann.pem, ann.key  to the client ann alone: tls.certificate, tls.key" in printed
    assert "ca.key  to nobody" in printed


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--client", "trainer"], "is there and stays"),
        (["--server", "teacher"], "has no hosts"),
        (["--client", "ca"], "the authority's own name"),
        (["--client", "../x"], "server"),
        (["--client", "b", "--client", "b"], "each once"),
        ([], "name servers as"),
    ],
)
def test_what_it_refuses_changes_nothing(folder, arguments, text):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigurationError, match=text):
        main(["--out", str(folder), *arguments])
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_half_an_authority_is_refused(folder):
    (folder / "ca.key").unlink()
    with pytest.raises(ConfigurationError, match="only one is there"):
        main(["--out", str(folder), "--client", "late"])


async def test_the_port_of_health_answers_without_a_certificate_and_answers_nothing_else(folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tls = {"certificate": folder / "teacher.pem", "key": folder / "teacher.key", "client_ca": folder / "ca.pem"}
    async with (
        serving(fake_teacher(FakeScoringEngine()), health_port=port, tls=tls),
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await teacher_pb2_grpc.TeacherServiceStub(channel).GetTeacherInfo(
                teacher_pb2.GetTeacherInfoRequest(), timeout=5
            )
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
