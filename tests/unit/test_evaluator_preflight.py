"""What is wrong is said before an engine starts, and by a dry run: in one line, of checkpoints, tasks and folders."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest

from tutelage.errors import CheckpointError, ConfigurationError, TutelageError
from tutelage.evaluator.cli import main
from tutelage.evaluator.models.registry import open_engine
from tutelage.evaluator.runner import evaluation as evaluation_module
from tutelage.evaluator.runner.preflight import require_checkpoint
from tutelage.files import require_writable


def with_pickled_weights_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def with_cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def with_damaged_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 100 + path.read_bytes()[100:])


def with_code_of_its_own(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "weird", "auto_map": {"AutoConfig": "weird.Config", "AutoModelForCausalLM": "weird.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "weird.py").write_text("raise SystemExit('this was run')")


def with_an_unknown_architecture(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "weird"}')


def without_a_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def with_a_cut_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-100])


def with_a_configuration_in_another_encoding(folder: Path) -> None:
    (folder / "config.json").write_bytes('{"note": "Zürich"}'.encode("latin-1"))


HARMS: dict[Callable[[Path], None], str] = {
    with_pickled_weights_only: "only safetensors are loaded, since a pickle can run code",
    with_cut_weights: "it was cut off; fetch it again",
    with_damaged_weights: "its beginning is damaged; fetch it again",
    with_code_of_its_own: "code of its own .*, which is not run",
    with_an_unknown_architecture: "does not load as a causal language model",
    without_a_tokenizer: "does not load as a causal language model",
    with_a_cut_tokenizer: "does not load as a causal language model",
    with_a_configuration_in_another_encoding: "config.json cannot be read",
}


@pytest.mark.parametrize(("harm", "reason"), HARMS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_checkpoint_that_no_engine_would_load_is_refused_in_one_line(
    harm: Callable[[Path], None], reason: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO("y\n"))  # transformers asks there whether to run a model's own code
    checkpoint = tmp_path / "model"
    shutil.copytree(tiny_model, checkpoint)
    require_checkpoint(checkpoint)
    harm(checkpoint)
    with pytest.raises(TutelageError, match=reason) as refused:
        require_checkpoint(checkpoint)
    assert "\n" not in str(refused.value)
    assert sys.stdin.read() == "y\n"
    with pytest.raises(CheckpointError):
        open_engine("transformers", checkpoint, dtype="float32", batch_size=4)


def own_task(folder: Path, rows: bytes, **said: str) -> str:
    (folder / "rows.jsonl").write_bytes(rows)
    lines = {"name": "own", "data": "rows.jsonl", "question": "'{q}'", "answer": "'{a}'", **said}
    (folder / "own.yaml").write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    return str(folder / "own.yaml")


TASKS: dict[str, tuple[bytes, dict[str, str], str]] = {
    "no rows": (b"", {}, "has no items"),
    "another encoding": ('{"q": "Zürich?", "a": "1"}\n'.encode("latin-1"), {}, "is not UTF-8"),
    "not JSON": (b"q,a\n1,2\n", {}, "is not JSON"),
    "a missing field": (b'{"q": "1 + 1?"}\n', {}, "does not fill '{a}'"),
    "an answer that is no choice": (
        b'{"q": "1 + 1?", "a": "2"}\n',
        {"choices": "['3', '4']"},
        "the answer '2' is none of",
    ),
    "no such extraction": (b'{"q": "1 + 1?", "a": "2"}\n', {"extraction": "float"}, "extraction"),
}


@pytest.mark.parametrize(("rows", "said", "reason"), TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_a_task_that_cannot_be_asked_is_refused_before_a_model_is_opened(
    dry_run: list[str],
    rows: bytes,
    said: dict[str, str],
    reason: str,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unneeded(*_: object, **__: object) -> None:
        raise AssertionError("opened a model")

    monkeypatch.setattr(evaluation_module, "open_engine", unneeded)
    task = own_task(tmp_path, rows, **said)
    flags = ["--checkpoint", str(tiny_model), "--tasks", task, "--out", str(tmp_path / "f"), "--engine", "transformers"]
    with pytest.raises(TutelageError, match=reason) as refused:
        main([*flags, *dry_run])
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "f").exists()


def test_one_item_that_cannot_be_asked_does_not_refuse_the_others(tiny_model: Path, tmp_path: Path) -> None:
    rows = b'{"q": "1 + 1?", "a": "7"}\n{"q": "1 + 1?", "a": "2"}\n'
    task = own_task(tmp_path, rows, choices="['2', '3']")
    flags = ["--checkpoint", str(tiny_model), "--tasks", task, "--out", str(tmp_path / "f"), "--engine", "transformers"]
    with pytest.raises(SystemExit) as ended:
        main([*flags, "--dry-run"])
    assert ended.value.code == 0


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"file is a file; name another one"):
        require_writable(tmp_path / "file" / "frames", "out")
    require_writable(tmp_path / "new" / "frames", "out")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root, as tests may be, can write everywhere
    with pytest.raises(ConfigurationError, match="this user may not change"):
        require_writable(tmp_path / "new" / "frames", "out")
