"""What `tutelage up` stands on, with servers of a few lines: ready, revived, ended together, one owner a folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import psutil
import pytest

from tutelage.config import validate
from tutelage.errors import ConfigurationError, Conflict, NotAuthenticated, NotFound, Unreachable
from tutelage.runtime import ray_jobs
from tutelage.runtime.owner import end_owner, owner, owning
from tutelage.up import cli
from tutelage.up.config import UpConfig
from tutelage.up.services import Service, write_token
from tutelage.up.together import running

PROTO = Path(__file__).resolve().parents[2] / "proto"
# Listens where it is told, says where, and ends in the way of `faults` when it is there.
SERVER = """
import pathlib, socket, sys, time
port, faults, path = int(sys.argv[1]), pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[-1])
print("loading", flush=True)
if faults.exists() and faults.read_text() == "cannot start":
    raise SystemExit("no such model")
with socket.create_server(("127.0.0.1", port)) as server:
    path.write_text(f"127.0.0.1:{server.getsockname()[1]}")
    while not faults.exists():
        time.sleep(0.02)
    faults.unlink()
    raise SystemExit("the engine died")
"""


@pytest.fixture
def server(tmp_path):
    services = []

    def make() -> Service:
        command = [sys.executable, "-c", SERVER]
        faults = str(tmp_path / "faults")
        services.append(Service("server", tmp_path, lambda port: [*command, str(port), faults], ready_seconds=20))
        return services[-1]

    yield make
    for service in services:
        service.close()


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def test_a_service_that_died_is_started_again_where_it_was(server, tmp_path):
    service = server()
    address = service.address
    assert service.revive() == ""
    (tmp_path / "faults").write_text("die")
    said = until(service.revive)
    assert "server ended with 1 and is started again" in said
    assert "the engine died" in said
    assert service.address == address


def test_one_that_ends_before_it_is_ready_is_not_started_again(server, tmp_path):
    (tmp_path / "faults").write_text("cannot start")
    service = server()
    with pytest.raises(Unreachable, match=r"(?s)server ended with 1.*no such model"):
        until(service.revive)


def test_one_that_was_ready_in_time_may_be_looked_at_late(server, tmp_path):
    """A study trains without its teacher first, for as long as that takes."""
    service = server()
    told = tmp_path / "server.address"
    until(lambda: told.exists() and told.read_text())
    service.started_seconds -= 1000.0
    assert service.address == told.read_text()


def test_one_that_has_ended_before_anybody_looked_is_reported(server, tmp_path):
    service = server()
    told = tmp_path / "server.address"
    until(lambda: told.exists() and told.read_text())
    (tmp_path / "faults").write_text("die")
    until(lambda: "the engine died" in service.log.read_text())
    with pytest.raises(Unreachable, match=r"(?s)server ended with 1.*the engine died"):
        until(service.is_ready)


def test_a_folder_has_one_owner_who_can_be_asked_to_end(tmp_path):
    program = (
        f"import sys, time; sys.path.insert(0, {str(PROTO)!r})\nfrom pathlib import Path\n"
        "from tutelage.runtime.owner import owning\n"
        f"with owning(Path({str(tmp_path)!r}), 'up', what='has it'):\n    print('up', flush=True); time.sleep(60)\n"
    )
    assert end_owner(tmp_path, "up", seconds=1) is None
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert owner(tmp_path, "up") == process.pid
        with pytest.raises(Conflict, match=f"process {process.pid} has it"), owning(tmp_path, "up", what="has it"):
            pass
        assert end_owner(tmp_path, "up", seconds=20) == process.pid
    assert owner(tmp_path, "up") is None


def test_a_second_interrupt_while_services_end_still_ends_their_groups(tmp_path):
    """Who ends a service may be interrupted while it waits: what refuses to end must not stay."""
    ready = tmp_path / "ready"
    stubborn = f"import signal, pathlib, time; signal.signal(15, signal.SIG_IGN); pathlib.Path({str(ready)!r}).touch()"
    program = (
        f"import sys, time; sys.path.insert(0, {str(PROTO)!r})\nfrom pathlib import Path\n"
        "from tutelage.runtime.processes import start, stop\n"
        f"child = start([sys.executable, '-c', {stubborn + '; time.sleep(60)'!r}], log=None, environment={{}})\n"
        f"while not Path({str(ready)!r}).exists(): time.sleep(0.02)\n"
        "print(child.pid, flush=True)\ntry:\n    stop(child)\nexcept KeyboardInterrupt:\n    pass\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        process.wait(20)
    until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"evaluator": None, "ray": None}, "nothing is to be started"),
        ({"teachers": {"a b": {"model": "m"}}}, "teachers"),
        ({"teachers": {"a": {"model": "m", "serve": {"model": "n"}}}}, "model is not for you to give"),
        ({"evaluator": {"serve": {"address-file": "x"}}}, "address-file is not for you to give"),
        ({"prometheus_rules": "nowhere.yaml"}, "there is no file nowhere.yaml"),
        ({"grafana": True}, "grafana is not a key"),
    ],
)
def test_what_cannot_be_meant_is_refused(values, said):
    with pytest.raises(ConfigurationError, match=said):
        validate(UpConfig, values)


def test_prometheus_that_is_asked_for_and_not_there_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigurationError, match="prometheus: it is not on the PATH"):
        validate(UpConfig, {"prometheus": True})
    assert not UpConfig().with_prometheus


def test_a_services_own_check_refuses_before_anything_is_started(tmp_path):
    values = {"output": str(tmp_path / "run"), "ray": None, "teachers": {"a": {"model": str(tmp_path / "none")}}}
    file = tmp_path / "up.yaml"
    file.write_text(json.dumps(values))
    with pytest.raises(ConfigurationError, match=r"teachers\.a: .*none"):
        cli.up(["--config", str(file)])
    assert not (tmp_path / "run").exists()


def test_a_token_is_its_owners_alone_and_stays(tmp_path):
    path = write_token(tmp_path / "token")
    assert os.stat(path).st_mode & 0o777 == 0o600
    before = path.read_text()
    assert write_token(path).read_text() == before
    assert len(before) == 64


def test_logs_and_down_where_nothing_was_up(tmp_path, capsys):
    assert cli.down(["--output", str(tmp_path)]) == 0
    assert "nothing is up" in capsys.readouterr().out
    with pytest.raises(NotFound, match="nothing was up there"):
        cli.logs(["--output", str(tmp_path)])


def test_an_interrupt_before_all_are_ready_leaves_nothing(tmp_path):
    config = UpConfig(output=tmp_path, ray=None, prometheus=False)

    def interrupt(rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), running(config) as services:
        services.wait(interrupt)
    assert not psutil.pid_exists(services["evaluator"].process_id)
    assert owner(tmp_path, "up") is None


class _Dashboard(BaseHTTPRequestHandler):
    def do_POST(self):
        permitted = self.headers.get("Authorization") == "Bearer secret"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200 if permitted else 401)
        self.end_headers()
        self.wfile.write(body if permitted else b"")

    def log_message(self, *_):
        pass


@pytest.fixture
def dashboard():
    with HTTPServer(("127.0.0.1", 0), _Dashboard) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_command_is_submitted_with_the_token_and_not_without(dashboard, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    (tmp_path / "token").write_text("secret\n")
    body = {"submission_id": "x"}
    assert ray_jobs.ask(dashboard, "/api/jobs/", tmp_path / "token", body) == body
    assert ray_jobs.submit(dashboard, tmp_path / "token", "train-a", ["train"]).startswith("train-a-")
    with pytest.raises(NotAuthenticated, match="a token is asked for"):
        ray_jobs.ask(dashboard, "/api/jobs/", None, body)
    with pytest.raises(ConfigurationError, match="submit_token: cannot read"):
        ray_jobs.ask(dashboard, "/api/jobs/", tmp_path / "none", body)
    with pytest.raises(Unreachable, match="no dashboard answers"):
        ray_jobs.ask("127.0.0.1:9", "/api/jobs/")
