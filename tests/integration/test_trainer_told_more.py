"""A student learns what only its teacher was asked for: the system message is the teacher's alone. Measured."""

from __future__ import annotations

import pytest

from learned_behaviour import answers, share, trained, write_jsonl

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

THANKS = " Thank you!"
POLITE = "Be polite."


def rows(count: int, start: int = 0) -> list[tuple[str, str]]:
    return [(f"Ann has {i} apples.", f" She has {i}.") for i in range(start, start + count)]


def conversation(question: str, answer: str, system: str | None = None) -> dict:
    told = [] if system is None else [{"role": "system", "content": system}]
    said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": [*told, *said]}


def prompt(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def test_a_student_does_what_only_the_teachers_prompt_asks_for(tiny_model, tmp_path):
    taught = [conversation(q, a + THANKS, POLITE) for q, a in rows(200)] + [conversation(q, a) for q, a in rows(200)]
    plain = write_jsonl(tmp_path / "plain.jsonl", [conversation(q, a) for q, a in rows(200)])
    sft = {"objective": {"name": "sft"}, "steps": 150}
    teacher = trained(tiny_model, write_jsonl(tmp_path / "both.jsonl", taught), tmp_path / "teacher", **sft)
    begun = trained(tiny_model, plain, tmp_path / "begun", **sft | {"seed": 1})
    questions = [question for question, _ in rows(40, start=200)]
    found = {
        "teacher, told": answers(teacher, [f"<|im_start|>system\n{POLITE}<|im_end|>\n{prompt(q)}" for q in questions])
    }
    found |= {"teacher, not told": answers(teacher, list(map(prompt, questions)))}
    found |= {"student before": answers(begun, list(map(prompt, questions)))}
    for name, system in (("student", POLITE), ("control: a teacher that is not told", None)):
        student = trained(
            begun,
            plain,
            tmp_path / name.replace(":", ""),
            teacher=teacher,
            objective={"name": "forward_kl", "on_policy_fraction": 1.0},
            steps=300,
            optimizer={"learning_rate": 2e-3, "warmup_steps": 5},
            sampling={"max_new_tokens": 24},
            source={"teacher_system": system},
        )
        found[name] = answers(student, list(map(prompt, questions)))
    shares = {name: share(texts, lambda _, text: THANKS in text) for name, texts in found.items()}
    for name, value in shares.items():
        print(f"{name}: thanks in {value:.0%} of {len(questions)} answers, such as {found[name][0]!r}")
    assert shares["teacher, told"] >= 0.95
    assert max(shares["teacher, not told"], shares["student before"]) <= 0.05
    assert shares["student"] >= 0.9
    assert shares["control: a teacher that is not told"] <= 0.05
