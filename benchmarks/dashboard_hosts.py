"""Pictures of Ray's dashboard from a cluster on hosts of its own, as docs/ray.md shows them.

    python benchmarks/dashboard_hosts.py [joined] [writers] [--out build/pictures]

Hosts are network namespaces, so it runs as root: a teacher, Ray's head, and two nodes, with mutual TLS and tokens.
Chromium (`chromium` on the PATH) takes the pictures on the head's host.

- joined: the first node has room for two of four students; when two wait, the second joins, and all train.
- writers: four students on both nodes have two writers each; when all train, a picture; then all finish.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "proto"), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import yaml  # noqa: E402

from browser import Browser  # noqa: E402
from sites import DASHBOARD_PORT, Site, site  # noqa: E402
from tiny import write_tiny_model  # noqa: E402
from tutelage.files import make_directory_once  # noqa: E402
from tutelage.runtime.programs import tutelage  # noqa: E402

BUILD = Path(os.environ.get("TUTELAGE_BUILD_DIR", ROOT / "build"))
STUDENTS = ("ann", "bob", "cid", "dan")
DASHBOARD = f"http://127.0.0.1:{DASHBOARD_PORT}"
SAMPLING = {"max_new_tokens": 12, "max_staleness": 1, "writers": {"count": 2}}
STEPS = 150  # The first of four must not be done when the last begins.


@contextmanager
def dashboard(here: Site) -> Iterator[Browser]:
    """A browser on the head's host."""
    token = (here.folder / "ray.token").read_text().strip()
    browser = Browser(DASHBOARD, token, ["ip", "netns", "exec", here.net["head"].namespace])
    try:
        yield browser
    finally:
        browser.close()


def joined(here: Site, out: Path) -> None:
    """Of students that wait, and start on the node that joins."""
    here.start_ray("first", cpus=2)
    cohort = here.cohort(STUDENTS, ("teacher",), 100_000)
    flags = ["--submit", DASHBOARD, "--submit-token", str(here.folder / "ray.token")]
    here.start("head", "submit", tutelage("train", "--config", str(cohort), *flags))
    here.wait_until("two train", lambda: sum(step >= 5 for step in here.steps_done(STUDENTS)) == 2, 120)
    here.start_ray("second", cpus=2)
    here.wait_until("all train", lambda: min(here.steps_done(STUDENTS)) >= 5, 120)
    with dashboard(here) as browser:
        browser.take(f"{DASHBOARD}/#/actors", out / "ray-joined.png", 860)


def writers(here: Site, out: Path) -> None:
    """Of students and their writers."""
    here.start_ray("first", cpus=6)
    here.start_ray("second", cpus=6)
    cohort = here.cohort(STUDENTS, ("teacher",), STEPS)
    values = yaml.safe_load(cohort.read_text())
    values["defaults"]["sampling"] = SAMPLING
    cohort.write_text(yaml.safe_dump(values))
    trains = here.start("head", "train", tutelage("train", "--config", str(cohort)))
    here.wait_until("all train", lambda: min(here.steps_done(STUDENTS)) >= 2, 400)
    with dashboard(here) as browser:
        browser.take(f"{DASHBOARD}/#/actors", out / "ray-writers.png", 1400)
    here.wait_until("all are done", lambda: trains.poll() is not None, 400)
    assert here.steps_done(STUDENTS) == [STEPS] * len(STUDENTS), here.logs()


PICTURES: dict[str, Callable[[Site, Path], None]] = {"joined": joined, "writers": writers}


def main() -> None:
    """Takes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", default=list(PICTURES), metavar="|".join(PICTURES))
    parser.add_argument("--out", type=Path, default=BUILD / "pictures")
    options = parser.parse_args()
    if unknown := set(options.pictures) - PICTURES.keys():
        parser.error(f"{', '.join(sorted(unknown))}: pictures are {', '.join(PICTURES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    model = make_directory_once(BUILD / "models" / "tiny", write_tiny_model)
    for picture in options.pictures:
        with (
            tempfile.TemporaryDirectory(prefix="tutelage-") as name,
            site(Path(name), model, "teacher", "head", "first", "second") as here,
        ):
            serves = here.start_teacher("teacher")
            here.start_ray("head")
            here.wait_until("the teacher", serves, 300)
            PICTURES[picture](here, options.out)


if __name__ == "__main__":
    main()
