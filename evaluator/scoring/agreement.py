"""Agreement and fidelity between two evaluations of the same items: say the same, and say it in the same words.

Top-1 agreement is the share of items with the same extracted answer, as in the study (Ramesh et al. 2025,
arXiv 2505.15442). An output without an answer agrees with nothing, not even with another such output, and is
counted apart. Fidelity is BLEU and chrF of one evaluation's outputs against the other's (sacreBLEU, Post 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from tutelage.errors import DataError
from tutelage.evaluator.scoring.extraction import NUMBER_TOLERANCE, same_number


@dataclass(frozen=True)
class Agreement:
    """Shares are in [0, 1]; None where there is nothing to divide by.

    Attributes:
        items: items of both evaluations that failed in neither.
        agreement: same answer in both.
        kappa: Cohen's, among the items where both have an answer.
        when_teacher_right: agreement among items that the teacher has right.
        when_teacher_wrong: agreement among items where the teacher has a wrong answer or none.
        teacher_unparsable: share of items where the teacher has no answer.
        student_unparsable: share of items where the student has none.

    """

    items: int
    agreement: float | None
    kappa: float | None
    when_teacher_right: float | None
    when_teacher_wrong: float | None
    teacher_unparsable: float | None
    student_unparsable: float | None


@dataclass(frozen=True)
class Fidelity:
    """Student's outputs against the teacher's, on sacreBLEU's scale of 0 … 100."""

    items: int
    bleu: float | None
    sentence_bleu: float | None
    chrf: float | None
    signature: str


def pair(teacher: pl.DataFrame, student: pl.DataFrame) -> pl.DataFrame:
    """Rows of both, side by side, item by item; the student's columns end in `_student`.

    Items that failed in either are left out, so there may be none.

    Args:
        teacher: rows of one evaluation of one task under one protocol.
        student: rows of another evaluation of it.

    Raises:
        DataError: the rows are of several evaluations or tasks.

    """
    columns = ["task", "item_id", "item_hash", "output", "extracted", "score"]
    for name, rows in (("teacher", teacher), ("student", student)):
        if rows.select("evaluation_id", "task", "protocol").n_unique() != 1:
            raise DataError(f"the {name}'s rows are not of one evaluation of one task; filter them first")
    # An item that was answered several times is paired answer by answer, in the order of the seeds; failed ones count.
    answer = pl.int_range(pl.len()).over("item_id").alias("answer")
    numbered = [one.sort("seed").with_columns(answer) for one in (teacher, student)]
    left, right = (one.filter(error="").select(*columns, "answer") for one in numbered)
    both = left.join(right, on=["task", "item_id", "item_hash", "answer"], suffix="_student", validate="1:1")
    # Items are numbered as text: "10" comes after "9".
    return both.sort(pl.col("item_id").cast(pl.UInt32), "answer")


def agreement(both: pl.DataFrame) -> Agreement:
    """Agreement of the paired rows of `pair`."""
    answers = list(zip(both["extracted"], both["extracted_student"], strict=True))
    equal = pl.Series([same_answer(teacher, student) for teacher, student in answers], dtype=pl.Boolean)
    right = both["score"] == 1.0
    return Agreement(
        items=len(both),
        agreement=_share(equal),
        kappa=cohens_kappa([(teacher, student) for teacher, student in answers if teacher and student]),
        when_teacher_right=_share(equal.filter(right)),
        when_teacher_wrong=_share(equal.filter(~right)),
        teacher_unparsable=_share(both["extracted"] == ""),
        student_unparsable=_share(both["extracted_student"] == ""),
    )


def same_answer(one: str, other: str) -> bool:
    """Whether two answers are the same: equal texts, or numbers at most 0.001 apart; no answer is like nothing."""
    if not one or not other:
        return False
    try:
        return one == other or same_number(one, other)
    except ValueError:  # labels and letters are no numbers
        return False


def _share(values: pl.Series) -> float | None:
    return None if values.is_empty() else float(values.cast(pl.Float64).to_numpy().mean())


def cohens_kappa(pairs: Sequence[tuple[str, str]]) -> float | None:
    """(observed - expected) / (1 - expected) agreement (Cohen 1960), by statsmodels.

    Answers are the same by the rule of `same_answer`. That rule is no equivalence (3.333 and 3.3333333 are the same, a
    chain of such steps need not end where it began), so labels cannot be merged first; Cohen's weighted kappa (1968)
    with a weight of one where two labels differ says the same without merging.

    Args:
        pairs: the two raters' answers to each item, none of them empty.

    Returns:
        In [-1, 1]; None without pairs, or if chance alone is certain to agree.

    """
    from statsmodels.stats.inter_rater import cohens_kappa as weighted_kappa

    if not pairs:
        return None
    labels = {label: index for index, label in enumerate(dict.fromkeys(label for both in pairs for label in both))}
    table = np.zeros((len(labels), len(labels)))
    for one, other in pairs:
        table[labels[one], labels[other]] += 1
    values = np.array([_number(label) for label in labels])
    differ = ~(np.abs(values[:, None] - values) <= NUMBER_TOLERANCE)  # also where a label is no number
    np.fill_diagonal(differ, False)
    if not (differ * np.outer(table.sum(1), table.sum(0))).any():
        return None
    return float(weighted_kappa(table, weights=differ, return_results=False))


def _number(label: str) -> float:
    try:
        return float(label)
    except ValueError:
        return float("nan")


def fidelity(both: pl.DataFrame) -> Fidelity:
    """BLEU (of the corpus, and the mean over sentences) and chrF of the paired rows of `pair`.

    Tokenization and smoothing are sacreBLEU's defaults, as its signature says; a sentence's BLEU uses the
    effective order, so that short outputs do not count as zero.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    if both.is_empty():
        return Fidelity(0, None, None, None, "")
    hypotheses, references = both["output_student"].to_list(), both["output"].to_list()
    corpus, sentence, chrf = BLEU(), BLEU(effective_order=True), CHRF()
    sentences = [
        sentence.sentence_score(hypothesis, [reference]).score
        for hypothesis, reference in zip(hypotheses, references, strict=True)
    ]
    return Fidelity(
        items=len(both),
        bleu=corpus.corpus_score(hypotheses, [references]).score,
        sentence_bleu=sum(sentences) / len(sentences),
        chrf=chrf.corpus_score(hypotheses, [references]).score,
        signature=str(corpus.get_signature()),
    )
