"""The commands as people type them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tutelage.evaluator.cli import main
from tutelage.evaluator.results.frames import read

PROGRAM = "import sys; from tutelage.cli import main; sys.exit(main(sys.argv[1:]))"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_checkpoint_is_scored_and_reported(tiny_model: Path, tmp_path: Path) -> None:
    frames = tmp_path / "frames"
    flags = ["--checkpoint", str(tiny_model), "--tasks", "arithmetic:paper,arithmetic:loglik", "--limit", "6"]
    flags += ["--out", str(frames), "--prompt", "chat", "--max-new-tokens", "8", "--run", "r1", "--student", "Tiny One"]
    flags += ["--engine", "transformers"]
    done = run("evaluate", *flags)
    assert done.returncode == 0, done.stderr
    assert "arithmetic    loglik  acc " in done.stdout
    assert "corrected extraction" in done.stdout
    assert len(read(frames).collect()) == 12
    assert main(flags) == 0
    assert len(read(frames).collect()) == 12  # the same again replaces
    done = run("report", "--frames", str(frames), "--out", str(tmp_path / "report.html"))
    assert done.returncode == 0, done.stderr
    assert "Tiny One" in (tmp_path / "report.html").read_text()


def test_training_files_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "train.json"
    assert main(["generate-arithmetic", "--split", "train", "--count", "7", "--seed", "2", "--out", str(out)]) == 0
    records = json.loads(out.read_text())
    assert len(records) == 7
    assert set(records[0]) == {"instruction", "input", "output", "answer"}


def test_tasks_are_listed_with_what_is_known_against_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TUTELAGE_DATA_DIR", raising=False)
    assert main(["tasks"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"boolq +3270 items, chance 50%, paper, loglik \(data missing\)", shown)
    assert "closed-book" in shown
    assert "TUTELAGE_DATA_DIR" in shown


@pytest.mark.parametrize(
    ("flags", "code", "reason"),
    [
        (
            ["--checkpoint", "nowhere", "--tasks", "arithmetic:paper"],
            4,
            "nowhere is no folder here, and the hub does not",
        ),
        (["--checkpoint", "x", "--tasks", "arithmetik:paper"], 2, "is not a task; choose from arithmetic"),
        (["--checkpoint", "x", "--tasks", "gsm8k:loglik"], 2, "has no protocol 'loglik'"),
        (["--checkpoint", "x", "--tasks", "gsm8k:paper", "--limt", "3"], 2, "limit"),
        (["--model_args", "pretrained=x", "--tasks", "gsm8k"], 2, "name the model by --checkpoint"),
        (["--checkpoint", "x", "--tasks", "gsm8k", "--num_fewshot", "5"], 2, "zero-shot"),
    ],
)
def test_mistakes_are_told(flags: list[str], code: int, reason: str) -> None:
    done = run("evaluate", *flags)
    assert done.returncode == code
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["evaluate", "--help"], ["evaluate", "serve", "--help"], ["report", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    program = f"""
import sys
from tutelage.cli import main
try:
    main({arguments})
except SystemExit:
    heavy = {{"torch", "transformers", "vllm", "polars", "altair", "grpc", "scipy"}}
    sys.exit(" ".join(sorted(heavy & set(sys.modules))))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)}, check=False)
    assert "usage:" in done.stdout
    assert done.stderr.strip() == ""
