"""A picture of Ray's dashboard while students have others write, as docs/ray.md shows it.

    python benchmarks/dashboard_writers.py [--out build/pictures]

Hosts are network namespaces, so it runs as root: a teacher, Ray's head, and two nodes for four students with two
writers each. When all train, Chromium (`chromium` on the PATH) takes the picture on the head's host; then they finish.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "proto"), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import yaml  # noqa: E402
from dashboard_joined_node import BUILD, DASHBOARD, ENTRANCE, STUDENTS, take  # noqa: E402

from sites import site  # noqa: E402
from tiny import write_tiny_model  # noqa: E402
from tutelage.files import make_directory_once  # noqa: E402
from tutelage.runtime.programs import tutelage  # noqa: E402

SAMPLING = {"max_new_tokens": 12, "max_staleness": 1, "writers": {"count": 2}}
STEPS = 60


def main() -> None:
    """Takes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=BUILD / "pictures")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    model = make_directory_once(BUILD / "models" / "tiny", write_tiny_model)
    with (
        tempfile.TemporaryDirectory(prefix="tutelage-") as name,
        site(Path(name), model, "teacher", "head", "first", "second") as here,
    ):
        serves = here.start_teacher("teacher")
        for node, cpus in (("head", 0), ("first", 6), ("second", 6)):
            here.start_ray(node, cpus)
        here.wait_until("the teacher", serves, 300)
        cohort = here.cohort(STUDENTS, ("teacher",), STEPS)
        values = yaml.safe_load(cohort.read_text())
        values["defaults"]["sampling"] = SAMPLING
        cohort.write_text(yaml.safe_dump(values))
        trains = here.start("head", "train", tutelage("train", "--config", str(cohort)))
        here.start("head", "entrance", [sys.executable, "-c", ENTRANCE, str(here.folder / "ray.token"), DASHBOARD])
        here.wait_until("all train", lambda: min(here.steps_done(STUDENTS)) >= 2, 400)
        take(here, "#/actors", out / "dashboard-writers.png", 1400)
        here.wait_until("all are done", lambda: trains.poll() is not None, 400)
        assert here.steps_done(STUDENTS) == [STEPS] * len(STUDENTS), here.logs()


if __name__ == "__main__":
    main()
