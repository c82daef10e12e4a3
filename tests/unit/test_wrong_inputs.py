"""Every wrong input of the table: one line, an exit code of the documented set, no traceback, nothing started."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tutelage import cli
from tutelage.errors import EXIT_CODES
from wrong_inputs import WRONG, prepare

HAVE_A_DRY_RUN = ("train", "teacher serve", "teacher precompute", "teacher write")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "command-line.md"


@pytest.fixture(scope="module")
def here(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    prepare(folder, tiny_model)
    return folder


def started(*_: object) -> None:
    raise AssertionError("Ray was started")


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.command)
@pytest.mark.parametrize("dry", [False, True], ids=["", "dry-run"])
def test_it_is_one_line_with_its_exit_code(wrong, dry, here, monkeypatch, capfd):
    arguments = shlex.split(wrong.command.replace("{here}", str(here)))
    if dry and arguments[0] not in HAVE_A_DRY_RUN and " ".join(arguments[:2]) not in HAVE_A_DRY_RUN:
        pytest.skip("has no dry run")
    monkeypatch.chdir(here)
    monkeypatch.setattr("tutelage.trainer.cluster.supervisor.local_or_connected_ray", started)
    code = cli.main([*arguments, *["--dry-run"] * dry])
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    assert "\x1b[" not in err
    assert code == wrong.code
    assert code in EXIT_CODES
    line, *others = err.strip().splitlines()
    assert wrong.says in line
    assert not others or line.endswith("?") or not others[0]  # the list of commands may follow
    assert not (here / "run").exists()


def test_the_page_lists_every_exit_code():
    listed = re.findall(r"^\| (\d+) \|", PAGE.read_text(), re.MULTILINE)
    assert [int(code) for code in listed] == list(EXIT_CODES)
