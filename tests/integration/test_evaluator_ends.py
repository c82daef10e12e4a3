"""Signals to `tutelage evaluate`: one line that says how to go on, the exit code of the signal, nothing left behind."""

from __future__ import annotations

import glob
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tutelage import manifest

# As a terminal starts it: what a shell starts in the background ignores Ctrl-C, and so would its children.
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from tutelage.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        pytest.param(signal.SIGTERM, 143, "terminated", marks=pytest.mark.long),
        (signal.SIGINT, 130, "interrupted"),
    ],
)
def test_a_signal_keeps_what_is_done_and_says_how_to_go_on(
    number: signal.Signals, code: int, word: str, tiny_model: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_model, checkpoint)
    manifest.commit(checkpoint)  # a trainer's, which is pinned by links
    flags = ["--checkpoint", str(checkpoint), "--tasks", "arithmetic:paper", "--out", str(tmp_path / "frames")]
    flags += ["--limit", "40", "--batch-size", "2", "--max-new-tokens", "200", "--prompt", "chat"]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "evaluate", *flags, "--engine", "transformers"],
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    unfinished = tmp_path / "frames.unfinished"
    deadline = time.monotonic() + 240
    try:
        # Not Path.rglob, which fails when a folder that it has seen goes away meanwhile.
        while not glob.glob("**/*.parquet", root_dir=unfinished, recursive=True):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, said
    assert said == f"tutelage evaluate: {word}; finished batches are kept, and the same command goes on with them\n"
    assert not list((tmp_path / "frames").rglob("*.*"))
    assert {path.suffix for path in unfinished.rglob("*.*")} == {".parquet"}
