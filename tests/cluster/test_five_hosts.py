"""Five hosts that are cut off, lose packets and lose their machine: everything finishes, and everything once.

A teacher with vLLM on each of two, Ray's head, two workers of Ray, the evaluator beside one of them; mutual TLS and
tokens between all. `make test-cluster` runs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import polars
import pytest

from sites import EVALUATOR_PORT, HEAD_PLAINTEXT, PLAINTEXT, RAY_PORT, TEACHER_PORT, Site, site
from trainer_cases import metric_rows
from tutelage.evaluator.results.frames import read
from tutelage.runtime.programs import tutelage

STUDENTS, STEPS, ITEMS, EVERY_STEPS = ("ann", "bob", "cid", "dan"), 200, 12, 40
AWAY_SECONDS, LOSS_SECONDS, LOSS_PERCENT = 30, 60, 5
# What a teacher's host sends in a second. A step of four students is 48 kB: it takes minutes anywhere.
TEACHER_KILOBITS = 256


def started(folder: Path, model: Path, here: Site) -> Path:
    """All services, one after the other where they take processor time, and the cohort's file."""
    ready = [here.start_teacher("one"), here.start_teacher("two")]
    here.start_ray("head")
    ready.append(here.start_evaluator("right"))
    here.wait_until("teachers and evaluator", lambda: all(each() for each in ready), 400)
    # Ray's nodes wait for each other's processors, and give up, if they start at once. Each has room for two students:
    # who was on a host that is lost waits until it is back, or until others have finished.
    here.start_ray("left", cpus=2)
    here.start_ray("right", cpus=2)
    return here.cohort(STUDENTS, ("one", "two"), STEPS, evaluator={
        "address": f"{here.net['right'].address}:{EVALUATOR_PORT}",
        "tasks": [{"task": "arithmetic", "protocol": "paper", "limit": ITEMS}],
        "every_steps": EVERY_STEPS,
        **here.access("evaluator"),
    })  # fmt: skip


def assert_closed(here: Site) -> None:
    """Whoever has no certificate is let in nowhere; what Ray serves in plaintext is what is listed, and is closed."""
    encrypted = {"one": {TEACHER_PORT}, "two": {TEACHER_PORT}, "head": {RAY_PORT}, "left": set()}
    for name, ports in (encrypted | {"right": {EVALUATOR_PORT}}).items():
        within, from_elsewhere = here.answers(name, name), here.answers(name, "two" if name == "one" else "one")
        plaintext = {port for port, answer in within.items() if answer.startswith("plaintext")}
        listed = {*PLAINTEXT.values(), *(HEAD_PLAINTEXT.values() if name == "head" else ())}
        assert plaintext == (listed if name in ("head", "left", "right") else set()), (name, within)
        for port, answer in from_elsewhere.items():
            assert answer == ("closed" if port in plaintext else "mutual TLS"), (name, port, answer)
        assert ports <= from_elsewhere.keys() - plaintext


@pytest.mark.cluster
@pytest.mark.long
@pytest.mark.timeout(900)
def test_hosts_are_cut_off_and_lost_and_everything_finishes_once(tiny_model: Path, tmp_path: Path) -> None:
    with site(tmp_path, tiny_model, "one", "two", "head", "left", "right") as here:
        net = here.net
        cohort = started(tmp_path, tiny_model, here)
        for name in ("one", "two"):
            net[name].slow_down(TEACHER_KILOBITS)
        train = here.start("head", "train", tutelage("train", "--config", str(cohort)))

        def all_are_further(by: int) -> Callable[[], bool]:
            goal = [min(STEPS, steps + by) for steps in here.steps_done(STUDENTS)]

            def are() -> bool:
                assert train.poll() is None, here.logs()
                return all(a >= b for a, b in zip(here.steps_done(STUDENTS), goal, strict=True))

            return are

        here.wait_until("the first steps", all_are_further(6), 200)
        assert_closed(here)

        net["left"].cut_off()
        time.sleep(AWAY_SECONDS)
        net["left"].connect()
        here.wait_until("steps of all after a worker's host was away", all_are_further(10), 300)

        net["head"].lose(LOSS_PERCENT)
        lossy_until = time.monotonic() + LOSS_SECONDS
        net["one"].cut_off()
        time.sleep(AWAY_SECONDS)
        net["one"].connect()
        time.sleep(max(0.0, lossy_until - time.monotonic()))
        assert net["head"].lose_no_more() > 0
        here.wait_until("steps of all after a teacher's host was away", all_are_further(10), 300)
        on_left = [name for name, host in zip(STUDENTS, here.hosts_of(STUDENTS), strict=True) if host == "left"]
        assert on_left
        assert max(here.steps_done(on_left)) < STEPS

        here.destroy("left")
        here.wait_until("the end", lambda: train.poll() is not None, 400)
        assert train.returncode == 0, here.logs()
        for name in STUDENTS:
            steps = [row["step"] for row in metric_rows(tmp_path / "run/students" / name)]
            assert steps == list(range(STEPS + 1)), name
        wanted = len(STUDENTS) * len(range(0, STEPS + 1, EVERY_STEPS)) * ITEMS

        def scored() -> polars.DataFrame:
            return read(tmp_path / "frames").collect()

        here.wait_until("the scores", lambda: scored().height >= wanted, 120)
        frame = scored()
        assert frame.height == wanted
        assert frame.select("student", "step", "item_id").n_unique() == wanted
