"""The doctor at a real teacher: a student that fits it, and one that does not."""

from __future__ import annotations

import json

from tutelage import doctor


def diagnosis(capsys, *arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    code = doctor.main([*arguments, "--json"])
    return code, {finding["topic"]: finding for finding in json.loads(capsys.readouterr().out)}


def test_a_student_with_the_teachers_tokenizer_fits(capsys, teacher_server, packaged_models):
    _, student = packaged_models
    code, findings = diagnosis(capsys, "--teacher", teacher_server.address, "--student", str(student))
    assert code == 0
    assert "vllm" in findings["teacher"]["text"]
    assert findings["student"]["text"].endswith("tokenizer the same as the teacher's")


def test_a_student_with_another_tokenizer_is_named_with_the_fields(capsys, teacher_server, tiny_model):
    code, findings = diagnosis(capsys, "--teacher", teacher_server.address, "--student", str(tiny_model))
    assert code == 2
    assert "differ in" in findings["student"]["text"]
    assert "vocabulary" in findings["student"]["text"]
