"""Agreement by hand, BLEU and chrF against sacreBLEU itself and its command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tutelage.errors import DataError
from tutelage.evaluator.results import frames as fr
from tutelage.evaluator.scoring.agreement import agreement, cohens_kappa, fidelity, pair

TEACHER = [("4", 1.0), ("5", 0.0), ("", 0.0), ("7", 1.0), ("8", 1.0), ("", 0.0)]
STUDENT = [("4", 1.0), ("5", 0.0), ("", 0.0), ("9", 0.0), ("8.0", 1.0), ("3", 1.0)]
TEXTS = [
    ("3 + 1 = 4. The answer is 4.", "First 3 + 1 = 4. The answer is 4."),
    ("The answer is 5.", "The answer is 5."),
    ("no idea at all about this one", ""),
    ("2 + 5 = 7. The answer is 7.", "The sum is 9"),
    ("It is 8, since 2 * 4 = 8.", "It is 8 since 2 * 4 = 8"),
    ("", "3"),
]


def rows(name: str, answers: list[tuple[str, float]], texts: list[str]) -> pl.DataFrame:
    def row(index: int) -> dict[str, Any]:
        return {
            **dict.fromkeys(fr.SCHEMA),
            "evaluation_id": name,
            "task": "arithmetic",
            "protocol": "paper",
            "item_id": str(index),
            "item_hash": f"h{index}",
            "output": texts[index],
            "extracted": answers[index][0],
            "score": answers[index][1],
            "error": "",
        }

    return fr.frame_of_rows([row(index) for index in range(len(answers))])


@pytest.fixture
def both() -> pl.DataFrame:
    teacher = rows("teacher", TEACHER, [text for text, _ in TEXTS])
    return pair(teacher, rows("student", STUDENT, [text for _, text in TEXTS]).reverse())


def test_agreement_counts_outputs_without_an_answer_apart(both: pl.DataFrame) -> None:
    measured = agreement(both)
    assert measured.items == 6
    assert measured.agreement == pytest.approx(3 / 6)  # 4, 5, and 8 = 8.0; two empty ones do not agree
    assert measured.when_teacher_right == pytest.approx(2 / 3)
    assert measured.when_teacher_wrong == pytest.approx(1 / 3)
    assert measured.teacher_unparsable == pytest.approx(2 / 6)
    assert measured.student_unparsable == pytest.approx(1 / 6)


def test_kappa_is_cohens() -> None:
    # Cohen 1960 on a 2 x 2 table: 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no gives 0.4.
    pairs = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    assert cohens_kappa(pairs) == pytest.approx(0.4)
    assert cohens_kappa([("y", "y")]) is None
    assert cohens_kappa([]) is None


def test_kappa_and_agreement_call_the_same_answers_the_same() -> None:
    answers = [("3.333", "3.3333333"), ("5", "5"), ("7", "8")]
    sides = [rows(name, [(side[k], 0.0) for side in answers], ["", "", ""]) for k, name in enumerate(("t", "s"))]
    measured = agreement(pair(*sides))
    assert measured.agreement == pytest.approx(2 / 3)
    # By chance a teacher's and a student's answer are the same in 2 of 9 pairings: 3.333 with 3.3333333, 5 with 5.
    assert measured.kappa == pytest.approx((2 / 3 - 2 / 9) / (1 - 2 / 9))


def test_bleu_and_chrf_are_sacrebleus(both: pl.DataFrame) -> None:
    import sacrebleu

    hypotheses, references = [text for _, text in TEXTS], [text for text, _ in TEXTS]
    measured = fidelity(both)
    assert measured.bleu == pytest.approx(sacrebleu.corpus_bleu(hypotheses, [references]).score, abs=1e-12)
    assert measured.chrf == pytest.approx(sacrebleu.corpus_chrf(hypotheses, [references]).score, abs=1e-12)
    sentences = [sacrebleu.sentence_bleu(h, [r]).score for h, r in zip(hypotheses, references, strict=True)]
    assert measured.sentence_bleu == pytest.approx(sum(sentences) / 6, abs=1e-12)
    assert measured.signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def test_bleu_is_the_command_lines(both: pl.DataFrame, tmp_path: Path) -> None:
    for name, side in (("reference", 0), ("hypothesis", 1)):
        (tmp_path / name).write_text("".join(f"{texts[side]}\n" for texts in TEXTS), encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", "reference", "-i", "hypothesis", "-b", "-w", "6"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert fidelity(both).bleu == pytest.approx(float(done.stdout), abs=1e-6)


def test_only_rows_of_the_same_items_are_paired() -> None:
    teacher = rows("teacher", TEACHER, [text for text, _ in TEXTS])
    other = teacher.with_columns(item_hash=pl.lit("other"))
    assert pair(teacher, other).is_empty()
    with pytest.raises(DataError, match="not of one evaluation"):
        pair(pl.concat([teacher, teacher.with_columns(evaluation_id=pl.lit("second"))]), teacher)
    failed = teacher.with_columns(error=pl.when(pl.col("item_id") == "0").then(pl.lit("broken")).otherwise(pl.lit("")))
    assert len(pair(failed, teacher)) == 5


def test_answers_after_one_that_failed_are_paired_with_those_of_their_place() -> None:
    texts = [text for text, _ in TEXTS]
    several = rows("teacher", TEACHER, texts).with_columns(item_id=pl.lit("0"), item_hash=pl.lit("h"))
    several = several.with_columns(seed=pl.int_range(pl.len()))
    broken = several.with_columns(error=pl.when(pl.col("seed") == 1).then(pl.lit("broken")).otherwise(pl.lit("")))
    pairs = pair(several, broken)
    assert pairs["output"].to_list() == pairs["output_student"].to_list() == [texts[0], *texts[2:]]
