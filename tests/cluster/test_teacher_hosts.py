"""Two teachers on hosts of their own, asked from a third over mutual TLS with tokens, of which one is cut off.

Run as a program it is such a teacher (around an engine double): HOST FOLDER.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

PORT, SEQUENCES, ROUNDS = 50051, 12, 60


def teacher(host: str, folder: Path) -> None:
    from fake_teacher import FakeScoringEngine, fake_teacher, serving

    async def serve() -> None:
        tls = {"certificate": folder / f"{host}.pem", "key": folder / f"{host}.key", "client_ca": folder / "ca.pem"}
        double = fake_teacher(FakeScoringEngine(seconds=0.02, parallel=1), frame_bytes=2000)
        async with serving(double, f"{host}:{PORT}", tls=tls, token_file=folder / "tokens"):
            (folder / f"{host}.serves").touch()
            await asyncio.Event().wait()

    asyncio.run(serve())


def student(addresses: list[str], folder: Path) -> None:
    """Asks for the same again and again; a line a round: how many seconds, how many servers, whether all is equal."""
    from fake_teacher import VOCABULARY_SIZE
    from tutelage.rpc.tls import ClientTls
    from tutelage.trainer.data.sequences import TokenSequence
    from tutelage.trainer.teacher.base import SignalSpec
    from tutelage.trainer.teacher.grpc_client import TeacherClient

    rng = np.random.default_rng(0)
    sequences = [
        TokenSequence(rng.integers(0, VOCABULARY_SIZE, 100).astype(np.int32), 0, 100) for _ in range(SEQUENCES)
    ]
    tls = ClientTls(ca=folder / "ca.pem", certificate=folder / "student.pem", key=folder / "student.key")
    with TeacherClient(
        addresses, student_id="ann", wait_seconds=60, tokenizer_digests={}, tls=tls, token_file=folder / "token"
    ) as client:
        expected = client.score(sequences, SignalSpec("hidden"))
        for _ in range(ROUNDS):
            began = time.monotonic()
            answers = client.score(sequences, SignalSpec("hidden"))
            equal = all(np.array_equal(a["hidden_RD"], b["hidden_RD"]) for a, b in zip(answers, expected, strict=True))
            row = {"seconds": time.monotonic() - began, "servers": len(client.servers), "equal": equal}
            print(json.dumps(row), flush=True)
            time.sleep(0.3)


@pytest.mark.timeout(150)
def test_a_teacher_host_that_is_cut_off_costs_time_only(tmp_path: Path) -> None:
    from hosts import hosts, why_not
    from tutelage.certificates import Authority

    reason = why_not()
    if reason:
        pytest.skip(reason)
    with hosts("one", "two", "student") as net:
        authority = Authority(tmp_path)
        authority.issue("student", [], 1)
        (tmp_path / "tokens").write_text("teach-me score,info\n")
        (tmp_path / "token").write_text("teach-me\n")
        environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        addresses = [net[name].address for name in ("one", "two")]
        for name in ("one", "two"):
            host = net[name]
            authority.issue(host.address, [host.address], 1)
            program = [sys.executable, __file__, "teacher", host.address, str(tmp_path)]
            host.start(program, tmp_path / f"{name}.log", environment)

        def wait_until(condition, seconds: float = 45) -> None:
            end = time.monotonic() + seconds
            while not condition():
                logs = "".join(log.read_text(errors="replace")[-1500:] for log in tmp_path.glob("*.log"))
                assert time.monotonic() < end, logs
                time.sleep(0.1)

        wait_until(lambda: all((tmp_path / f"{address}.serves").exists() for address in addresses))
        log = tmp_path / "student.log"
        servers = [f"{address}:{PORT}" for address in addresses]
        asks = net["student"].start([sys.executable, __file__, "student", *servers, str(tmp_path)], log, environment)

        def rows() -> list[dict[str, float]]:
            return [json.loads(line) for line in log.read_text().splitlines() if line.startswith('{"seconds')]

        wait_until(lambda: len(rows()) >= 2)
        # Beyond loopback each host is reached by its encrypted port only.
        for name in ("one", "two"):
            assert [line.split()[0] for line in net[name].listening()] == [f"{net[name].address}:{PORT}"]
        net["one"].cut_off()
        wait_until(lambda: rows()[-1]["servers"] == 1)
        net["one"].connect()
        wait_until(lambda: rows()[-1]["servers"] == 2)
        assert asks.wait(90) == 0
        assert len(rows()) == ROUNDS
        assert all(row["equal"] for row in rows())
        # A peer that is silent is noticed after 10 s of keepalive and 5 s for its answer.
        assert max(row["seconds"] for row in rows()) < 30


if __name__ == "__main__":
    if sys.argv[1] == "teacher":
        teacher(sys.argv[2], Path(sys.argv[3]))
    else:
        student(sys.argv[2:-1], Path(sys.argv[-1]))
