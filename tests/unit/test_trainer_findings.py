"""Every finding before a run, from a configuration that has the fault; none from one that has not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from transformers import AutoTokenizer

from architectures import REFUSED, write_architecture
from trainer_cases import student_config, write_rows
from tutelage.errors import ConfigurationError, Unreachable
from tutelage.findings import refuse_bad
from tutelage.trainer.cli import main as trained_by
from tutelage.trainer.cluster.preflight import _against_itself
from tutelage.trainer.config.student import StudentConfig
from tutelage.trainer.data.sequences import token_sequence
from tutelage.trainer.teacher.base import TeacherIdentity
from tutelage.trainer.training.findings import findings_of, write
from tutelage.trainer.training.sources import read_data


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def found(config: StudentConfig, tokenizer, teacher_ends=()) -> dict[str, tuple[str, str]]:
    findings = findings_of(config, tokenizer, read_data(config, tokenizer), teacher_ends)
    return {finding.topic: (finding.state, finding.text) for finding in findings}


def rows_file(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_nothing_is_raised_where_nothing_is_wrong(tiny_model, tokenizer, tmp_path):
    for template in ("chat", "plain", "alpaca"):
        data = {"path": write_rows(tmp_path / "rows.jsonl"), "template": template}
        config = student_config(tiny_model, data["path"], batch={"max_tokens": 400})
        config = StudentConfig.model_validate(config.model_dump() | {"data": data})
        assert {state for state, _ in found(config, tokenizer).values()} == {"ok"}


def test_begin_tokens_doubled_or_lost(tiny_model, tokenizer, tmp_path):
    begin = "<|im_start|>"
    tokenizer.bos_token = begin
    rows = [{"prompt": f"{begin}{begin}What is {i}?", "completion": "It."} for i in range(8)]
    plain = {"path": rows_file(tmp_path / "rows.jsonl", rows), "template": "plain"}
    config = StudentConfig.model_validate(student_config(tiny_model, plain["path"]).model_dump() | {"data": plain})
    state, text = found(config, tokenizer)["begin token"]
    assert (state, text.partition(" begin with")[0]) == ("bad", "4 of 4 rows")

    class WithBegin:
        """A tokenizer that gives every text a begin token, with a template that gives none."""

        bos_token, bos_token_id = "<|endoftext|>", tokenizer.eos_token_id

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def encode(self, text, add_special_tokens=True):
            ids = tokenizer.encode(text, add_special_tokens=False)
            return [self.bos_token_id, *ids] if add_special_tokens else ids

        def __call__(self, *given, **more):
            return tokenizer(*given, **more)

    config = student_config(tiny_model, write_rows(tmp_path / "others.jsonl"))
    state, text = found(config, WithBegin())["begin token"]
    assert state == "note"
    assert text.startswith("36 of 36 rows lack the begin token")


def test_end_tokens_doubled_lost_or_another_than_the_teachers(tiny_model, tokenizer, tmp_path):
    end = tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id)
    rows = [{"prompt": f"What is {i}?", "completion": f"It.{end}{end}"} for i in range(8)]
    plain = {"path": rows_file(tmp_path / "rows.jsonl", rows), "template": "plain"}
    config = StudentConfig.model_validate(student_config(tiny_model, plain["path"]).model_dump() | {"data": plain})
    assert found(config, tokenizer)["end token"][0] == "bad"

    # Prompts have 27 tokens, which leaves two of each answer.
    cut = student_config(tiny_model, write_rows(tmp_path / "cut.jsonl"), batch={"max_tokens": 29})
    data = read_data(cut, tokenizer)
    assert [len(row.completion_ids) for row in data.read[0][1].examples] == [2] * 36
    state, text = found(cut, tokenizer)["end token"]
    assert (state, "raise it" in text) == ("bad", True)
    with pytest.raises(ConfigurationError, match="end token: no completion has its end token"):
        refuse_bad(findings_of(cut, tokenizer, data))

    config = student_config(tiny_model, write_rows(tmp_path / "whole.jsonl"))
    assert found(config, tokenizer, teacher_ends=[7])["end token"][0] == "note"


def test_rows_that_are_cut(tiny_model, tokenizer, tmp_path):
    rows = [{"prompt": f"What is {i}?", "completion": "It is. " * (40 if i % 4 == 0 else 1)} for i in range(20)]
    config = student_config(tiny_model, rows_file(tmp_path / "rows.jsonl", rows))
    state, text = found(config, tokenizer)["length"]
    assert state == "note"
    assert "completions lost their end" in text


def test_rows_that_are_left_out(tiny_model, tokenizer, tmp_path):
    rows = [{"prompt": "What is it? " * (40 if i % 4 == 0 else 1), "completion": "It."} for i in range(20)]
    config = student_config(tiny_model, rows_file(tmp_path / "rows.jsonl", rows), held_out={"sequences": 0})
    state, text = found(config, tokenizer)["length"]
    assert (state, text.split()[:3]) == ("note", ["5", "of", "20"])


@pytest.mark.parametrize(
    ("sampling", "state"),
    [({}, "ok"), ({"temperature": 2.0}, "ok"), ({"temperature": 0.7}, "note"), ({"top_p": 0.9}, "note"),
     ({"repetition_penalty": 1.2}, "note")],
)  # fmt: skip
def test_samples_that_are_not_the_students_own_distribution(sampling, state, tiny_model, tokenizer, tmp_path):
    objective = {"name": "gkd", "temperature": 2.0}
    config = student_config(tiny_model, write_rows(tmp_path / "rows.jsonl"), objective=objective, sampling=sampling)
    assert found(config, tokenizer)["sampling"][0] == state


@pytest.mark.parametrize(("shared", "state"), [(0, "ok"), (2, "note"), (4, "bad")])
def test_held_out_rows_that_are_training_rows(shared, state, tiny_model, tokenizer, tmp_path):
    def row(number: int) -> dict[str, str]:
        return {"prompt": f"What is {number}?", "completion": f"It is {number}."}

    train = rows_file(tmp_path / "train.jsonl", [row(number) for number in range(10)])
    held = rows_file(tmp_path / "held.jsonl", [row(number) for number in range(10 - shared, 14 - shared)])
    config = student_config(tiny_model, train, held_out={"sequences": 4, "data": {"path": held}})
    assert found(config, tokenizer)["held out"][0] == state


def test_held_out_rows_whose_prompts_the_student_answers(tiny_model, tokenizer, tmp_path):
    asked = rows_file(tmp_path / "asked.jsonl", [{"prompt": f"What is {number}?"} for number in range(10)])
    rows = [{"prompt": f"What is {number}?", "completion": f"It is {number}."} for number in (8, 9, 10, 11)]
    held = rows_file(tmp_path / "held.jsonl", rows)
    objective = {"name": "gkd", "on_policy_fraction": 1}
    config = student_config(
        tiny_model,
        asked,
        objective=objective,
        held_out={"sequences": 4, "data": {"path": held}},
        batch={"max_tokens": 96},
    )
    state, text = found(config, tokenizer)["held out"]
    assert (state, text.partition(";")[0]) == ("note", "2 of 4 held-out rows are training rows as well")


def test_held_out_rows_of_what_streams_are_not_called_untrained(tiny_model, tokenizer, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "folder").mkdir()
    shutil.copy(rows, tmp_path / "folder" / "train.jsonl")
    data = {"path": tmp_path / "folder", "streaming": True}
    config = student_config(tiny_model, rows, held_out={"sequences": 4, "data": {"path": rows}})
    config = StudentConfig.model_validate(config.model_dump() | {"data": data})
    assert found(config, tokenizer)["held out"][0] == "note"


def test_they_are_kept_for_the_report(tiny_model, tokenizer, tmp_path):
    config = student_config(tiny_model, write_rows(tmp_path / "rows.jsonl"))
    findings = findings_of(config, tokenizer, read_data(config, tokenizer))
    write(findings, tmp_path)
    kept = json.loads((tmp_path / "preflight.json").read_text())
    assert [each["topic"] for each in kept] == ["sampling", "begin token", "end token", "length", "held out"]
    assert all(each.keys() == {"topic", "state", "text"} for each in kept)


def test_a_row_that_is_there_twice_is_not_measured_on_and_trained_on(tiny_model, tokenizer, tmp_path):
    rows = [{"prompt": f"What is {number % 8}?", "completion": f"It is {number % 8}."} for number in range(40)]
    config = student_config(tiny_model, rows_file(tmp_path / "rows.jsonl", rows), held_out={"sequences": 4})
    assert found(config, tokenizer)["held out"][0] == "ok"


def test_the_doctor_says_of_each_student_what_its_training_would_refuse(tiny_model, tmp_path, capsys):
    students = [
        {"id": "whole", "objective": {"name": "sft"}},
        {
            "id": "adapted",
            "objective": {"name": "sft"},
            "init": {"student": "whole"},
            "lora": {"target_modules": ["nose"]},
        },
        {"id": "taught", "objective": {"name": "forward_kl"}},
    ]
    defaults = {
        "init": str(tiny_model),
        "data": {"path": str(write_rows(tmp_path / "rows.jsonl"))},
        "batch": {"max_tokens": 96},
    }
    teacher = {"address": "127.0.0.1:1", "wait_seconds": 60}
    (tmp_path / "cohort.yaml").write_text(
        yaml.safe_dump(
            {"output": str(tmp_path / "run"), "teacher": teacher, "defaults": defaults, "students": students}
        )
    )
    # As `tutelage doctor --config` calls it.
    assert trained_by(["--config", str(tmp_path / "cohort.yaml"), "--preflight"]) == 3
    shown = capsys.readouterr().out
    whole, adapted, taught = shown.split("student ")[1:]
    assert "✗" not in whole
    assert "the loss reaches all of them" in whole
    assert "✗ model        lora.target_modules: 'nose' is no linear layer" in adapted
    assert "✗ teacher" in taught
    assert not (tmp_path / "run/students").exists()


def test_the_doctor_says_what_adapters_the_loss_does_not_reach_and_what_data_has_no_row_that_fits(
    tiny_model, tmp_path, capsys
):
    """Adapters of a tower for images, which no row of text passes."""
    tower = write_architecture(tmp_path / "tower", tiny_model, *REFUSED["a tower for images"][:2])
    rows = str(write_rows(tmp_path / "rows.jsonl"))
    rows_file(tmp_path / "long.jsonl", [{"prompt": "What is it? " * 40, "completion": "It."}] * 8)
    students = [
        {"id": "adapted", "init": str(tower), "data": {"path": rows}, "lora": {"target_modules": ["q_proj"]}},
        {"id": "asked", "init": str(tiny_model), "data": {"path": str(tmp_path / "long.jsonl")}},
    ]
    defaults = {"objective": {"name": "sft"}, "batch": {"max_tokens": 96}}
    content = {"output": str(tmp_path / "run"), "defaults": defaults, "students": students}
    (tmp_path / "cohort.yaml").write_text(yaml.safe_dump(content))
    assert trained_by(["--config", str(tmp_path / "cohort.yaml"), "--preflight"]) != 0
    adapted, asked = capsys.readouterr().out.split("student ")[1:]
    assert "✗ model" in adapted
    assert "no gradient of the loss reaches" in adapted
    assert "✗ data" in asked


class Swaying:
    """A teacher whose answers depend on what else it is asked."""

    identity = TeacherIdentity("swaying", "", 512, 8, noise_floor_kl=1e-5)

    def __init__(self, sway: float) -> None:
        self._sway = sway

    def score(self, sequences, spec):
        answers = []
        for each in sequences:
            logits = np.linspace(0, -3, 8, dtype=np.float32)[None].repeat(each.rows, 0)
            logsumexp = np.log(np.exp(logits).sum(-1, keepdims=True)) + 0.01
            logits = logits + self._sway * (len(sequences) > 1) * np.arange(8, dtype=np.float32) / 8
            ids = {"ids_RK": np.arange(8, dtype=np.int32)[None].repeat(each.rows, 0)} if spec.kind == "topk" else {}
            answers.append({"logits_RK": logits, "logsumexp_RM": logsumexp, **ids})
        return answers


class Away(Swaying):
    """A teacher that has gone."""

    def score(self, sequences, spec):
        raise Unreachable("it is away")


@pytest.mark.parametrize(
    ("teacher", "state"),
    [(Swaying(0.0), "ok"), (Swaying(0.5), "bad"), (Swaying(float("nan")), "bad"), (Away(0.0), "bad")],
    ids=["the same", "far", "no number", "away"],
)
def test_a_teacher_that_is_far_from_itself_is_refused(teacher, state):
    ids = np.arange(6, dtype=np.int32)
    rows = [token_sequence(ids[:2], ids[2:], loss_on_prompt=False)] * 3
    (finding,) = _against_itself(teacher, rows, 512)
    assert (finding.topic, finding.state) == ("noise floor", state)
