"""The micro studies' data: what few answers, prompts alone and held-out problems are."""

from __future__ import annotations

import json
from pathlib import Path

from tutelage.data.overlap import overlaps
from tutelage.studies.micro_inputs import FEW_ANSWERS, KINDS, write_data


def test_few_answers_begin_all_prompts_have_none_and_rates_are_chosen_on_problems_of_their_own(tmp_path: Path) -> None:
    write_data(tmp_path)

    def rows(name: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]

    answered = rows("train")
    assert all(rows(f"train-{count}") == answered[:count] for count in FEW_ANSWERS)
    assert rows("prompts") == [{"question": row["question"]} for row in answered]
    rates = {row["question"] for row in rows("tasks/rates")}
    asked = {row["question"] for task in (*KINDS, "new-operands") for row in rows(f"tasks/{task}")}
    held_out = {row["question"] for row in rows("held-out")}
    assert (len(rates), len(held_out)) == (400, 32)
    assert held_out.isdisjoint(rates | asked | {row["question"] for row in answered})
    assert rates.isdisjoint(asked | {row["question"] for row in answered})
    texts = [(row["question"], [row["question"], row["answer"]]) for row in answered]
    found = overlaps({"tests": list(asked), "rates": list(rates)}, texts)
    assert [(each.exact, each.shared) for each in found.values()] == [(0, 0)] * 2
