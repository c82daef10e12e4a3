"""Log lines: readable, or JSON that holds whatever a student puts into its ids."""

from __future__ import annotations

import json
import logging

import pytest

from tutelage.teacher_server.server import logging as logs


@pytest.fixture
def own_logger():
    """Our logger, as it was before the test afterwards."""
    logger = logging.getLogger("tutelage")
    handlers = logger.handlers[:]
    yield logging.getLogger("tutelage.teacher_server.server.scoring_stream")
    logger.handlers, logger.propagate = handlers, True
    logger.setLevel(logging.NOTSET)


def test_json_lines_carry_ids_and_survive_what_is_in_them(own_logger, capsys):
    logs.to_stderr("json")
    nasty = 'a"\n{"level": "ERROR"}\x1b[31m'
    own_logger.info("refused: %s", "k", extra={"student": "ann", "request": nasty})
    own_logger.warning("plain")
    own_logger.debug("not shown")
    first, second = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert (first["level"], first["message"]) == ("INFO", "refused: k")
    assert (first["student"], first["request"]) == ("ann", nasty)
    assert first["logger"] == "tutelage.teacher_server.server.scoring_stream"
    assert first["time"].endswith("+00:00")
    assert (second["message"], "student" in second) == ("plain", False)


def test_readable_lines_say_whom_they_are_about(own_logger, capsys):
    logs.to_stderr("text")
    own_logger.info("refused", extra={"student": "ann", "request": "7"})
    own_logger.info("serving")
    about, plain = capsys.readouterr().err.splitlines()
    assert about.endswith("s  refused (student=ann request=7)")
    assert plain.endswith("s  serving")
