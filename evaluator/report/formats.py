"""Numbers as people read them; the frames and the CSV files hold them whole."""

from __future__ import annotations

from collections.abc import Callable

NONE = "–"


def percent(share: float | None) -> str:
    """A share as points with one decimal; a dash for none."""
    return NONE if share is None else f"{100 * share:.1f}"


def signed_percent(difference: float) -> str:
    """A difference of shares as points with its sign (a true minus)."""
    return signed(100 * difference)


def points(value: float | None) -> str:
    """Points with one decimal; a dash for none."""
    return NONE if value is None else f"{value:.1f}"


def signed(value: float | None) -> str:
    """Points with their sign (a true minus); a dash for none."""
    return NONE if value is None else f"{value:+.1f}".replace("-", "−")


def p_value(value: float) -> str:
    """Two significant digits, never zero."""
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


def decimals(places: int, *, thousands: bool = False) -> Callable[[float], str]:
    """A fixed number of decimals, with commas between thousands where asked."""
    form = f"{{:{',' if thousands else ''}.{places}f}}"
    return form.format
