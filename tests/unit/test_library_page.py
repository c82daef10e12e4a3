"""The programs of docs/library.md run as they stand there, without Ray, and print what the page says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from trainer_doubles import FaultyServicer, InProcessTeacher, serving

PAGE = Path(__file__).resolve().parents[2] / "docs" / "library.md"
ADDRESS = "127.0.0.1:50051"
RUN = """
import json, sys
sys.modules["ray"] = None  # importing it is an error
for block in json.loads(sys.stdin.read()):
    exec(compile(block, "docs/library.md", "exec"), {"__name__": "__main__"})
    print("end of block", flush=True)
"""


def test_every_program_of_the_page_runs_without_ray_and_prints_what_it_says(tiny_model, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 4
    (tmp_path / "student").symlink_to(tiny_model)
    with serving(FaultyServicer(InProcessTeacher(tiny_model), tiny_model)) as address:
        programs = json.dumps([program.replace(ADDRESS, address) for program, _ in blocks])
        ran = subprocess.run(
            [sys.executable, "-c", RUN], input=programs, capture_output=True, text=True, cwd=tmp_path, check=False
        )
    assert ran.returncode == 0, ran.stderr
    printed = ran.stdout.split("end of block\n")[:-1]
    for (_, expected), actual in zip(blocks, printed, strict=True):
        assert actual == expected or not expected
    asked, _, _, rows = printed
    assert re.match(r"\[('[^']+', ){4}'[^']+'\] \[-", asked)
    assert re.search(r"shape: \(\d, 5\)", rows)  # a random model has hardly an item right
    assert re.search(r"student +┆ 0 +┆ arithmetic", rows)
