"""That the check of how time grows finds what grows too fast."""

from __future__ import annotations

import pytest

from growth import assert_linear


def test_quadratic_time_is_found() -> None:
    with pytest.raises(AssertionError, match="a quarter"):
        assert_linear(lambda text: [text.count("y") for _ in text[::10]], "x" * 100_000)


def test_linear_time_is_not() -> None:
    assert_linear(lambda text: sum(ord(letter) for letter in text * 20), "x" * 100_000)
