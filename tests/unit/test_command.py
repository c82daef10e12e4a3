"""The umbrella command, the doctor, and that nothing heavy is loaded to answer `--help`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tutelage import cli as command
from tutelage import doctor
from tutelage.errors import Unreachable

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "vllm", "ray", "transformers", "polars", "altair", "datasets", "scipy")


COMMANDS = ["teacher", "teacher serve", "train", "evaluate", "report", "doctor", ""]
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
