"""The committed stubs are those of the .proto files."""

from __future__ import annotations

import make_stubs


def test_stubs_are_up_to_date():
    assert make_stubs.stale_stubs() == []
