"""What `smollm.yaml` starts from: the packaged SmolLM2-135M-Instruct, students of some of its layers, and MAWPS rows.

    python deploy/studies/smollm_inputs.py build

writes below `models/` and `smollm/`; the problems come from the research data (TUTELAGE_DATA_DIR).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from pathlib import Path
from typing import Any

from tutelage.files import make_directory_once
from tutelage.studies.prepare_models import unpack_teacher

DEPTHS = (16, 20, 24)
HELD_OUT_ROWS, MEASURED_ROWS = 95, 100
_TERMS = re.compile(r"[\d.()+*/-]+")


def rows(problems: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Questions, each with its equation worked out: "49 - 44 = 5. The answer is 5.".

    Left out are equations to be solved, and those that come to another number than their answer, which was rounded.
    """
    from sympy import N
    from sympy.parsing.sympy_parser import parse_expr

    found = []
    for problem in problems:
        name, _, terms = problem["equation"].partition("=")
        if not (name.strip().isalpha() and _TERMS.fullmatch(terms)):
            continue
        answer, value = float(problem["ans"]), N(parse_expr(terms, evaluate=False))
        if not math.isclose(value, answer, rel_tol=1e-9):
            continue
        worked = f"{_as_written(terms)} = {_number(problem['ans'])}. The answer is {_number(problem['ans'])}."
        found.append({"question": problem["original_text"], "answer": worked})
    return found


def _as_written(terms: str) -> str:
    """Of "(49.0-44.0)" what one writes: "49 - 44"."""
    terms = terms[1:-1] if terms.startswith("(") and terms.find(")") == len(terms) - 1 else terms
    return re.sub(r"(?<=[\d)])([-+*/])", r" \1 ", re.sub(r"\.0(?!\d)", "", terms))


def _number(value: float) -> str:
    return str(value).removesuffix(".0")


def write_data(source: Path, out: Path) -> None:
    """Rows to learn from, and others to choose by."""
    found = rows(json.loads(source.read_text(encoding="utf-8")))
    for name, part in (("held-out", found[:HELD_OUT_ROWS]), ("train", found[HELD_OUT_ROWS:])):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def write_students(teacher: Path, data: Path, out: Path) -> None:
    """Students without the layers that change least, measured on the rows to learn from."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tutelage.trainer.model.layer_pruning import block_influence, prune_layers

    tokenizer = AutoTokenizer.from_pretrained(teacher)
    lines = [json.loads(line) for line in data.read_text().splitlines()[:MEASURED_ROWS]]
    said = [[{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}] for r in lines]
    sequences = [torch.tensor(tokenizer.apply_chat_template(one, return_dict=False)) for one in said]
    influence = block_influence(AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32), sequences)
    (out / "influence.json").write_text(json.dumps(influence) + "\n")
    most = sorted(range(len(influence)), key=influence.__getitem__, reverse=True)
    for depth in DEPTHS:
        prune_layers(teacher, out / f"{depth}-layers", layers=sorted(most[:depth]))


def main() -> None:
    """Makes what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    research = os.environ.get("TUTELAGE_DATA_DIR")
    if not research:
        raise SystemExit("set TUTELAGE_DATA_DIR to the folder with train/mawps/")
    teacher = make_directory_once(folder / "models" / "teacher", unpack_teacher)
    source = Path(research) / "train" / "mawps" / "mawps_clean_no_test_overlap.json"
    data = make_directory_once(folder / "smollm" / "data", lambda out: write_data(source, out))
    print(
        data,
        make_directory_once(
            folder / "smollm" / "students", lambda out: write_students(teacher, data / "train.jsonl", out)
        ),
    )


if __name__ == "__main__":
    main()
