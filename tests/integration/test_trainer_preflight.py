"""What a checkpoint needs is tried before the first step, and every file of it comes back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from trainer_cases import student_config, write_rows
from tutelage.errors import CheckpointError, ConfigurationError
from tutelage.evaluator.runner.checkpoint import pin
from tutelage.manifest import verify
from tutelage.trainer.training.loop import train


@pytest.fixture
def init(tiny_model: Path, tmp_path: Path) -> Path:
    """A model of its own, to be changed."""
    return Path(shutil.copytree(tiny_model, tmp_path / "init"))


def train_briefly(init: Path, folder: Path, **changes):
    data = write_rows(init.parent / "rows.jsonl")
    config = student_config(init, data, objective={"name": "sft"}, steps=2, held_out={"sequences": 0}, **changes)
    return train(config, folder=folder, teacher=None)


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("file", "values", "named"),
    [
        ("generation_config.json", {"do_sample": False, "temperature": 1e-6}, "`temperature` is set to `1e-06`"),
        ("generation_config.json", {"do_sample": False, "top_p": 0.5}, "`top_p` is set to `0.5`"),
        ("config.json", {"temperature": 0.3}, "`temperature` is set to `0.3`"),
    ],
)
def test_a_model_that_cannot_be_saved_is_refused_before_the_first_step(file, values, named, lora, init, tmp_path):
    path = init / file
    if file == "config.json":  # Where there is no other, a model's own settings become its generation_config.
        (init / "generation_config.json").unlink()
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))
    if lora:  # An adapter leaves the model's own files alone.
        assert train_briefly(init, tmp_path / "ann", lora=lora).finished
        return
    with pytest.raises(ConfigurationError, match=f"(?s){init} could not be saved: .*{named}.*generation_config.json"):
        train_briefly(init, tmp_path / "ann")
    assert not (tmp_path / "ann/metrics.jsonl").exists()
    assert not (tmp_path / "ann/.saving").exists()


def test_a_tokenizer_that_cannot_be_saved_is_refused_before_the_first_step(init, tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise TypeError("Object of type set is not JSON serializable")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", refuse)
    with pytest.raises(ConfigurationError, match="not JSON serializable"):
        train_briefly(init, tmp_path / "ann")
    assert not (tmp_path / "ann/metrics.jsonl").exists()


def test_what_a_kill_left_of_the_trial_is_removed_and_a_folder_that_cannot_be_written_refused(init, tmp_path):
    (tmp_path / "ann/.saving/additional_chat_templates").mkdir(parents=True)
    assert train_briefly(init, tmp_path / "ann").finished
    assert not (tmp_path / "ann/.saving").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=f"cannot write {tmp_path}/file"):
        train_briefly(init, tmp_path / "file" / "ann")


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "lora"])
def test_a_tokenizer_with_several_chat_templates_is_committed_resumed_and_pinned(lora, init, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(init)
    templates = {"default": tokenizer.chat_template, "tools": "{{ messages[0]['content'] }}", "rag": "{{ messages }}"}
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(init)
    outcome = train_briefly(init, tmp_path / "ann", lora=lora)
    names = json.loads((outcome.checkpoint / "MANIFEST.json").read_text())["files"]
    assert {"additional_chat_templates/tools.jinja", "additional_chat_templates/rag.jinja"} <= names.keys()
    files = [path for path in outcome.checkpoint.rglob("*") if path.is_file()]
    written = {path.relative_to(outcome.checkpoint).as_posix() for path in files}
    assert written - {"MANIFEST.json"} == names.keys()
    pinned = pin(outcome.checkpoint, tmp_path / "pinned")
    shutil.rmtree(outcome.checkpoint)
    verify(pinned)
    assert AutoTokenizer.from_pretrained(pinned).chat_template == templates
    (pinned / "additional_chat_templates/tools.jinja").write_text("{{ other }}")
    with pytest.raises(CheckpointError, match=r"additional_chat_templates/tools\.jinja"):
        verify(pinned)


def test_every_file_of_a_checkpoint_is_there_again_after_a_resume(init, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(init)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tools": "{{ messages }}"}
    tokenizer.save_pretrained(init)
    first = train_briefly(init, tmp_path / "ann", save_every_steps=1)
    shutil.rmtree(first.checkpoint)  # As if it had been killed before: the checkpoint of step 1 is the newest.
    again = train_briefly(init, tmp_path / "ann", save_every_steps=1)
    assert again.step == first.step == 2
    names = {path.relative_to(again.checkpoint).as_posix() for path in again.checkpoint.rglob("*")}
    assert "additional_chat_templates/tools.jinja" in names
