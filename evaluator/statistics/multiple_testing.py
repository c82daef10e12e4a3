"""Several tests at once: Holm's adjustment within each declared family."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray
from statsmodels.stats.multitest import multipletests

from tutelage.errors import DataError


@dataclass(frozen=True)
class Adjusted:
    """Adjusted p-values in the order given, and which hypotheses fall at `alpha`."""

    p_values: NDArray[np.float64]
    rejected: NDArray[np.bool_]
    alpha: float


def holm(p_values: ArrayLike, *, alpha: float = 0.05) -> Adjusted:
    """Holm's step-down adjustment, which bounds the chance of any false rejection by `alpha`.

    The k-th smallest of m is multiplied by m - k + 1, then made monotone and cut at 1 (Holm 1979,
    Scandinavian Journal of Statistics 6), by statsmodels. No assumption on dependence.

    Raises:
        DataError: a p-value is no number; statsmodels would make every larger one NaN.

    """
    values = np.asarray(p_values, dtype=np.float64)
    if np.isnan(values).any():
        raise DataError(
            f"{int(np.isnan(values).sum())} of {len(values)} p-values are no numbers; leave these tests out"
        )
    if not len(values):  # statsmodels divides by the number of hypotheses
        return Adjusted(values, np.zeros(0, dtype=bool), alpha)
    rejected, adjusted, *_ = multipletests(values, alpha=alpha, method="holm")
    return Adjusted(adjusted, rejected, alpha)


def holm_within(frame: pl.DataFrame, family: list[str], *, p_value: str = "p_value") -> pl.DataFrame:
    """The frame with `p_holm`: `p_value` adjusted among the rows that agree on the `family` columns.

    A null p-value (a test that could not be computed) is no member of its family and stays null.
    """

    def adjust(values: pl.Series) -> pl.Series:
        known = values.is_not_null()
        adjusted = np.full(len(values), np.nan)
        adjusted[known.to_numpy()] = holm(values.drop_nulls().to_numpy()).p_values
        return pl.Series(adjusted).fill_nan(None)

    rank = pl.col(p_value).map_batches(adjust, return_dtype=pl.Float64)
    return frame.with_columns(p_holm=rank.over(family) if family else rank)
