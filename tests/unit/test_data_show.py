"""`tutelage data show`: rows as they are trained on, what of them is scored, and what was left out or cut."""

from __future__ import annotations

import json

from tutelage.trainer.cli import data


def test_rows_are_shown_with_what_is_scored_and_what_was_lost(tiny_model, tmp_path, capsys):
    talk = [{"role": role, "content": word} for role, word in zip(("user", "assistant") * 2, "abcd", strict=True)]
    rows = [{"messages": talk}, {"messages": [{"role": "user", "content": "Ann " * 300}, talk[1]]}]
    rows.append({"messages": [talk[0], {"role": "assistant", "content": "She " * 90}]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cohort = {
        "students": [{"id": "ann", "init": str(tiny_model), "data": {"path": str(tmp_path / "rows.jsonl")}}],
        "defaults": {"batch": {"max_tokens": 64}, "held_out": {"sequences": 0}},
    }
    (tmp_path / "cohort.yaml").write_text(json.dumps(cohort))
    assert data(["show", "--config", str(tmp_path / "cohort.yaml"), "--rows", "2"]) == 0
    out = capsys.readouterr().out
    assert (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦d<|im_end|>⟧\n"
    ) in out
    assert "2 rows to train on; left out because their prompt fills batch.max_tokens: 1; completions cut: 1 (" in out
    assert "held out: 0 rows" in out


def test_what_is_refused_when_training_is_refused_here(tiny_model, tmp_path):
    import pytest

    from tutelage.errors import DataError

    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": ""}))
    flags = ["--defaults.init", str(tiny_model), "--defaults.data.path", str(tmp_path / "rows.jsonl")]
    with pytest.raises(DataError, match="line 1: holds ''"):
        data(["show", *flags, "--students", '[{"id": "ann"}]'])


def test_what_only_the_teacher_reads_and_prompts_in_brackets_are_shown(tiny_model, tmp_path, capsys):
    rows = [{"prompt": "a [b] c", "teacher_prompt": "a [b] c, shortly"}, {"prompt": "a", "completion": "b"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    students = [{"id": "ann", "objective": {"name": "gkd", "on_policy_fraction": 1}, "held_out": {"sequences": 0}}]
    flags = ["--defaults.init", str(tiny_model), "--defaults.data.path", str(tmp_path / "rows.jsonl")]
    assert data(["show", *flags, "--students", json.dumps(students), "--rows", "2"]) == 0
    out = capsys.readouterr().out
    assert "user\na [b] c<|im_end|>" in out
    assert out.count("the teacher reads:\n<|im_start|>user\na [b] c, shortly<|im_end|>") == 1
