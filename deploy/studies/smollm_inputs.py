"""What `smollm.yaml` starts from: the packaged SmolLM2-135M-Instruct, students of some of its layers, and GSM8K rows.

    python deploy/studies/smollm_inputs.py build

writes below `models/` and `smollm/gsm8k.jsonl`; the questions come from the research data (TUTELAGE_DATA_DIR).
"""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path

from tutelage.files import make_directory_once
from tutelage.studies.prepare_models import prepare

DEPTHS = (8, 15, 22)
ROWS, LONGEST_CHARACTERS = 2000, 700


def write_rows(source: Path, target: Path) -> None:
    """A seeded sample of the rows that are short enough."""
    short = [line for line in source.read_text().splitlines() if len(line) <= LONGEST_CHARACTERS]
    target.write_text("".join(f"{line}\n" for line in random.Random(0).sample(short, ROWS)))


def main() -> None:
    """Makes what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    data = os.environ.get("TUTELAGE_DATA_DIR")
    if not data:
        raise SystemExit("set TUTELAGE_DATA_DIR to the folder with train/gsm8k_train.jsonl")
    for depth in DEPTHS:
        prepare(folder / "models", layers=depth)
    source = Path(data) / "train" / "gsm8k_train.jsonl"
    print(make_directory_once(folder / "smollm", lambda out: write_rows(source, out / "gsm8k.jsonl")))


if __name__ == "__main__":
    main()
