"""Reads the tables that the paper's authors released (repository LCS2-IIITD/KD_generalization, `results/`)."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from tutelage.errors import DataError
from tutelage.evaluator.statistics.scores import BASE, FINE_TUNED, SCORES, SIMILARITIES

MATH, COMMONSENSE = "math", "commonsense"

_SCORE_FILES = {
    MATH: ("math_results_main.csv", "llama_math_results.csv"),
    COMMONSENSE: ("cs_results_main.csv", "llama_cs_results.csv"),
}
# What each file measures is argued in `correlations`: BLEU.csv is no BLEU, EM2's distilled rows compare two students.
_SIMILARITY_FILES = {
    ("agreement", MATH): "EM1.csv",
    ("agreement_with_sft_student", MATH): "EM2.csv",
    ("agreement", COMMONSENSE): "EM1_cs.csv",
    ("agreement_with_sft_student", COMMONSENSE): "EM2_cs.csv",
    ("similarity", MATH): "BLEU.csv",
    ("bleu", MATH): "BLEU2.csv",
}
_METHODS = {"KD": "Seq-KD", "RevKD": "Rev-KD", "GKD": "GKD", "BaseModel": BASE, "SFT": FINE_TUNED}

# Items of each test set; every agreement in the released tables is a whole number of them.
TEST_ITEMS = {
    "AddSub": 395, "MultiArith": 600, "SingleEq": 508, "SVAMP": 1000, "gsm8k": 1319, "AQuA": 254,
    "ARC-Challenge": 1172, "ARC-Easy": 2376, "boolq": 3270, "hellaswag": 10042, "openbookqa": 500, "piqa": 1838,
    "social_i_qa": 1954, "winogrande": 1267,
}  # fmt: skip


def _read(path: Path) -> pl.DataFrame:
    try:
        return pl.read_csv(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(
            f"cannot read {path}: {error}; give the folder with the authors' released result tables", "from_paper"
        ) from error


def _long(table: pl.DataFrame, keys: list[str], value: str) -> pl.DataFrame:
    tasks = [name for name in table.columns if name not in keys]
    return table.unpivot(pl.selectors.by_name(tasks), index=keys, variable_name="task", value_name=value)


def read_scores(folder: Path) -> pl.DataFrame:
    """The accuracies of both tracks as rows of `SCORES`.

    `student_KD_base_teacher_temp_1.0` is the task-unaware teacher; `_ckpt2400` after a teacher's name is
    dropped, as the authors do. Sizes are billions of parameters, from the names.

    Raises:
        DataError: a table is missing or unreadable.

    """
    parts = []
    for track, names in _SCORE_FILES.items():
        for name in names:
            long = _long(_read(folder / name), ["Teacher", "Student", "Method"], "score")
            parts.append(long.with_columns(track=pl.lit(track)))
    raw = pl.concat(parts)
    method = pl.col("Method").str.strip_prefix("student_").str.replace("_base_teacher", "").str.replace("_temp_.*", "")
    teacher = pl.when(pl.col("Teacher") != "-").then(pl.col("Teacher").str.replace("_ckpt.*", ""))
    return raw.with_columns(
        teacher=teacher,
        student=pl.col("Student"),
        student_size=pl.col("Student").str.extract(r"-([\d.]+)B$").cast(pl.Float64),
        method=method.replace_strict(_METHODS),
        temperature=pl.col("Method").str.extract(r"_temp_([\d.]+)$").cast(pl.Float64),
        teacher_tuned=pl.when(teacher.is_not_null()).then(~pl.col("Method").str.contains("base_teacher")),
    ).select(SCORES.names())


def read_similarities(folder: Path) -> pl.DataFrame:
    """Agreement, similarity and BLEU of both tracks as rows of `SIMILARITIES`.

    Raises:
        DataError: a table is missing or unreadable.

    """
    parts = []
    for (measure, track), name in _SIMILARITY_FILES.items():
        table = _read(folder / name).drop("Pair")
        long = _long(table, ["Teacher", "Student", "Method"], "value")
        parts.append(long.with_columns(track=pl.lit(track), measure=pl.lit(measure)))
    raw = pl.concat(parts, how="diagonal")
    return raw.with_columns(
        of=pl.col("Method").str.to_lowercase(), teacher=pl.col("Teacher"), student=pl.col("Student")
    ).select(SIMILARITIES.names())
