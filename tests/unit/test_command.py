"""The umbrella command, the doctor, and that nothing heavy is loaded to answer `--help`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trainer_doubles import FaultyServicer, InProcessTeacher, serving
from tutelage import cli as command
from tutelage import doctor
from tutelage.errors import Unreachable
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


def test_errors_become_one_line_and_their_exit_code(capsys, monkeypatch):
    def fails(arguments):
        raise Unreachable("no teacher answers")

    entry = type("Entry", (), {"name": "train", "load": lambda self: fails})()
    monkeypatch.setattr(command, "entry_points", lambda group: [entry])
    assert command.main(["train"]) == 3
    assert capsys.readouterr().err == "tutelage train: no teacher answers\n"


def test_an_interrupt_ends_with_130(monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    entry = type("Entry", (), {"name": "train", "load": lambda self: interrupted})()
    monkeypatch.setattr(command, "entry_points", lambda group: [entry])
    assert command.main(["train"]) == 130


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
        assert doctor.main(["--teacher", address, "--student", str(student), "--json"]) == 0
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
