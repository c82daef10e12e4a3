"""The umbrella command, the doctor, and that nothing heavy is loaded to answer `--help`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer_doubles import FaultyServicer, InProcessTeacher, serving
from tutelage import cli as command
from tutelage import doctor
from tutelage.errors import IdentityMismatch, Terminated, Unreachable
from tutelage.identity import chat_template_digest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "vllm", "ray", "transformers", "polars", "altair", "datasets", "scipy")


COMMANDS = [
    "teacher",
    "teacher serve",
    "teacher info",
    "train",
    "students",
    "evaluate",
    "report",
    "study",
    "doctor",
    "",
]
# Prints the exit code of `tutelage … --help` and which heavy modules it loaded.
ASK_FOR_HELP = f"""
import sys
from tutelage.cli import main
try:
    exit_code = main([*sys.argv[1:], "--help"])
except SystemExit as ended:
    exit_code = ended.code or 0
print(exit_code, [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", COMMANDS)
def test_help_loads_nothing_heavy(arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "proto")}
    done = subprocess.run(
        [sys.executable, "-c", ASK_FOR_HELP, *arguments.split()], capture_output=True, text=True, env=environment
    )
    assert done.stderr.splitlines()[-1] == "0 []"
    assert "usage" in done.stdout.lower()


def test_an_unknown_command_is_refused_with_the_list(capsys):
    assert command.main(["trian"]) == 2
    assert "train" in capsys.readouterr().err
    assert command.main([]) == 2


def command_that(monkeypatch, does):
    entry = type("Entry", (), {"name": "train", "load": lambda self: does})()
    monkeypatch.setattr(command, "entry_points", lambda group: [entry])
    return lambda *arguments: command.main(["train", *arguments])


def raising(error: BaseException):
    def does(arguments):
        raise error

    return does


class GpuIsFull(RuntimeError):
    __module__, __qualname__ = "torch", "OutOfMemoryError"


class TaskFailed(Exception):
    """As Ray's error of a task has it."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("\x1b[36mray::StudentActor.run()\x1b[39m\n  File x, line 1\n")
        self.cause = cause


def not_utf8() -> UnicodeDecodeError:
    with pytest.raises(UnicodeDecodeError) as failed:
        b"\xe9".decode()
    return failed.value


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (Unreachable("no teacher answers"), 3, "no teacher answers"),
        (not_utf8(), 4, "a file is not UTF-8 ('utf-8' codec can't decode byte 0xe9 in position 0"),
        (PermissionError(13, "Permission denied", "/x/y"), 4, "/x/y: Permission denied"),
        (ModuleNotFoundError("No module named 'peft'"), 2, "No module named 'peft'; `tutelage doctor` says"),
        (json.JSONDecodeError("Expecting value", "x", 0), 4, "a file is not JSON"),
        (ConnectionRefusedError(111, "Connection refused"), 3, "Connection refused"),
        (ValueError("The repository contains custom code; pass `trust_remote_code=True`"), 2, "code of its own"),
        (GpuIsFull("CUDA out of memory"), 1, "the device has too little memory: CUDA out of memory"),
        (TaskFailed(PermissionError(13, "Permission denied", "/x")), 4, "/x: Permission denied"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_of_a_known_kind_is_one_line_and_its_exit_code(error, code, says, capsys, monkeypatch):
    assert command_that(monkeypatch, raising(error))() == code
    printed = capsys.readouterr().err
    assert printed.startswith("tutelage train: ")
    assert says in printed
    assert printed.count("\n") == 1


def test_a_damaged_file_of_weights_is_one_line(tmp_path, capsys, monkeypatch):
    from safetensors import safe_open

    (tmp_path / "model.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    opens = lambda arguments: safe_open(tmp_path / "model.safetensors", "np")  # noqa: E731
    assert command_that(monkeypatch, opens)() == 4
    assert "is damaged" in capsys.readouterr().err


def test_an_interrupt_ends_with_130(capsys, monkeypatch):
    assert command_that(monkeypatch, raising(KeyboardInterrupt()))() == 130
    assert capsys.readouterr().err == "tutelage train: interrupted\n"


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        command_that(monkeypatch, lambda arguments: 1 // 0)()
    monkeypatch.setenv("TUTELAGE_TRACEBACK", "1")
    with pytest.raises(Unreachable):
        command_that(monkeypatch, raising(Unreachable("x")))()


def test_sigterm_ends_with_143_what_is_open_is_closed_and_what_to_do_is_said(capsys, monkeypatch):
    closed = []

    def does(arguments):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except Terminated as end:
            closed.append(True)
            raise Terminated("again: tutelage train") from end

    before = signal.getsignal(signal.SIGTERM)
    assert command_that(monkeypatch, does)() == 143
    assert closed
    assert capsys.readouterr().err == "tutelage train: terminated; again: tutelage train\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_names_of_flags_take_underscores_and_values_keep_theirs(monkeypatch):
    given = []
    run = command_that(monkeypatch, lambda arguments: given.extend(arguments) or 0)
    run("--a.b_c", "d_e", "--f_g=h_i", "j_k", "--l-m")
    assert given == ["--a.b-c", "d_e", "--f-g=h_i", "j_k", "--l-m"]


@pytest.mark.parametrize("arguments", ["train --help-all", "--help", "evaluate --help"])
def test_a_reader_that_is_gone_is_no_traceback(arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "proto")}
    code = f"import sys; from tutelage.cli import main; sys.exit(main({arguments.split()!r}))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, env=environment, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_doctor_says_what_is_wrong(capsys, tmp_path):
    assert doctor.main(["--student", str(tmp_path), "--json"]) == 4
    findings = {finding["topic"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert findings["student"]["state"] == "bad"
    assert "tokenizer.json" in findings["student"]["text"]
    assert {"tutelage", "teacher", "trainer", "evaluator", "port 50051"} <= set(findings)


def test_the_doctor_does_not_find_a_teacher_where_there_is_none(capsys, monkeypatch, unused_tcp_port):
    monkeypatch.setattr(doctor, "ANSWER_SECONDS", 0.5)
    assert doctor.main(["--teacher", f"127.0.0.1:{unused_tcp_port}"]) == 3
    assert "is it started" in capsys.readouterr().out


def test_the_doctor_says_where_one_tokenizer_is_used_in_two_ways(capsys, tiny_model, tmp_path):
    student = tmp_path / "student"
    shutil.copytree(tiny_model, student)
    (student / "chat_template.jinja").write_text("{{ messages }}")
    teacher = FaultyServicer(InProcessTeacher(tiny_model), tiny_model)
    teacher.info.chat_template_digest = chat_template_digest(tiny_model)
    teacher.info.end_token_ids.extend([0, 2])
    with serving(teacher) as address:
        assert doctor.main(["--teacher", address, "--student", str(student), "--json"]) == IdentityMismatch.exit_code
        findings = {finding["topic"]: finding["text"] for finding in json.loads(capsys.readouterr().out)}
        assert "data.chat_template: student" in findings["chat template"]
        assert findings["end tokens"].startswith("the teacher ends texts with the ids [0, 2], the student with [2];")


def test_a_command_lists_its_subcommands_and_says_which_one_was_meant(capsys):
    ran = []
    commands = {
        name: command.Command(f"do {name}", lambda rest, name=name: ran.append((name, rest)) or 7)
        for name in ("plan", "run")
    }
    assert command.dispatch("tutelage x", commands, ["plan", "--a", "1"]) == 7
    assert ran == [("plan", ["--a", "1"])]
    assert command.dispatch("tutelage x", commands, ["--help"]) == 0
    listed = capsys.readouterr().out
    assert "usage: tutelage x COMMAND [OPTIONS]" in listed
    assert "  plan  do plan\n  run   do run" in listed
    assert command.dispatch("tutelage x", commands, ["paln"]) == 2
    assert "tutelage x: 'paln' is not a command; did you mean plan?" in capsys.readouterr().err
    assert command.dispatch("tutelage x", commands, []) == 2


def test_flags_without_a_subcommand_go_to_the_default(capsys):
    given = []
    commands = {"serve": command.Command("serve", lambda rest: 1)}
    default = lambda rest: given.append(rest) or 0  # noqa: E731
    for arguments in (["--checkpoint", "x"], [], ["--help"]):
        assert command.dispatch("tutelage x", commands, arguments, default) == 0
        assert given.pop() == arguments
    assert "  serve  serve" in capsys.readouterr().out
    assert command.dispatch("tutelage x", commands, ["exprt"], default) == 2
    assert given == []


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--certificate", "c.pem", "--key", "k.pem"], "give the server's --ca too"),
        (["--ca", "ca.pem", "--key", "k.pem"], "a certificate and its key come together"),
    ],
)
def test_tls_flags_that_do_not_go_together_are_refused(flags, says):
    import argparse

    from tutelage.errors import ConfigurationError
    from tutelage.rpc.tls import add_client_flags, client_access

    parser = argparse.ArgumentParser()
    add_client_flags(parser, "info")
    with pytest.raises(ConfigurationError, match=says):
        client_access(parser.parse_args(flags))
    assert client_access(parser.parse_args([])).tls is None
    assert str(client_access(parser.parse_args(["--ca", "ca.pem"])).tls.ca) == "ca.pem"
