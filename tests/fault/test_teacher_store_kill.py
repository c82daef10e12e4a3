"""Kill -9 at every step of a write: what the store then gives is right, or nothing."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch

from tutelage.data.signal_store import Prefixes, teacher_key
from tutelage.teacher_server.signals.store import SignalStore

OLD, NEW = [1, 2, 3, 4], [5, 6, 7]
STEPS, MOMENTS = 6, ("before", "half", "after")
# A child for each step and moment: the calls of a write are counted, and the one whose turn it is kills
# before or after it is done, or (for the write itself) when half of the bytes are under the temporary name.
PROGRAM = """
import itertools, os, pathlib, signal, sys, torch
from tutelage.teacher_server.signals import store
calls = 0

def step_of(real, wanted, moment, half=None):
    def call(*arguments, **keywords):
        global calls
        calls += 1
        mine = calls == wanted
        if mine and moment == "half" and half:
            half(*arguments)
        if mine and moment != "after":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **keywords)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

def half_write(path, content):
    path.with_name(f".{path.name}.1.partial").write_bytes(content[: len(content) // 2])

def write_and_die(root, step, moment):
    opened = store.SignalStore(root, "teacher", 10**6)
    store.os.fsync = step_of(os.fsync, step, moment)
    store.os.open = step_of(os.open, step, moment)
    pathlib.Path.open = step_of(pathlib.Path.open, step, moment)
    pathlib.Path.replace = step_of(pathlib.Path.replace, step, moment)
    store.write_durably = step_of(store.write_durably, step, moment, half_write)
    opened.put(store.Prefixes([5, 6, 7]), torch.full((3, 8), 2.0))
    os._exit(calls)

torch.set_num_threads(1)
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    step, moment = folder.name.split("-")
    if (child := os.fork()) == 0:
        write_and_die(folder, int(step), moment)
    print(folder.name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def states(tokens: list[int], value: float) -> torch.Tensor:
    return torch.full((len(tokens), 8), value, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folders after the kills, and how each child ended."""
    root = tmp_path_factory.mktemp("stores")
    for step, moment in [*itertools.product(range(1, STEPS + 1), MOMENTS), (0, "never")]:
        store = SignalStore(root / f"{step}-{moment}", "teacher", 10**6)
        store.put(Prefixes(OLD), states(OLD, 1.0))
        store.close()
    environment = os.environ | {"PYTHONPATH": "proto"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(root)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root, dict(line.split() for line in done.stdout.splitlines())


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_kill_while_writing_leaves_nothing_wrong(killed, step, moment):
    root, codes = killed
    assert codes[f"{step}-{moment}"] == "-9"
    store = SignalStore(root / f"{step}-{moment}", "teacher", 10**6)
    assert torch.equal(store.get(Prefixes(OLD)), states(OLD, 1.0))
    found = store.get(Prefixes(NEW))
    assert found is None or torch.equal(found, states(NEW, 2.0))
    assert (found is not None) == (len(store) == 2)
    assert not list((root / f"{step}-{moment}").rglob("*.partial"))
    store.put(Prefixes(NEW), states(NEW, 2.0))
    assert torch.equal(store.get(Prefixes(NEW)), states(NEW, 2.0))


def test_these_are_all_the_steps(killed):
    assert killed[1]["0-never"] == str(STEPS)


def test_another_teachers_states_are_elsewhere(tmp_path):
    one = SignalStore(tmp_path, teacher_key("weights", "bfloat16", "vllm 1"), 10**6)
    other = SignalStore(tmp_path, teacher_key("weights", "bfloat16", "vllm 2"), 10**6)
    one.put(Prefixes(OLD), states(OLD, 1.0))
    assert other.get(Prefixes(OLD)) is None
