"""What was looked at and found, shown alike by the doctor, before a run and in its report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from tutelage.errors import EXIT_DONE, ConfigurationError

State = Literal["ok", "note", "bad"]
MARKS: dict[State, str] = {"ok": "✓", "note": "·", "bad": "✗"}


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis."""

    topic: str
    state: State
    """"ok", "note" (may make numbers mean something else, or is worth knowing) or "bad" (certainly wrong: refused)."""
    text: str
    exit_code: int = EXIT_DONE
    """Exit code that this finding asks for."""

    def __str__(self) -> str:
        """As a line for people."""
        return f"{MARKS[self.state]} {self.topic:<12} {self.text}"


def refuse_bad(findings: Iterable[Finding]) -> None:
    """Refuses what is certainly wrong.

    Raises:
        ConfigurationError: names all of it.

    """
    bad = [f"{finding.topic}: {finding.text}" for finding in findings if finding.state == "bad"]
    if bad:
        raise ConfigurationError("; ".join(bad))
