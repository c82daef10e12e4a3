"""A mixed-effects model: what a method adds, over tasks, seeds and pairs that could have been others."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl


@dataclass(frozen=True)
class FixedEffect:
    """One coefficient with its Wald interval and two-sided p-value."""

    name: str
    estimate: float
    standard_error: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class MixedModel:
    """A fitted model: coefficients, variances of the random intercepts, and what the optimiser said."""

    effects: tuple[FixedEffect, ...]
    variances: dict[str, float]
    residual_variance: float
    observations: int
    converged: bool
    remarks: tuple[str, ...]


def mixed_model(
    cells: pl.DataFrame, outcome: str, fixed: str, reference: str, random: Sequence[str], *, confidence: float = 0.95
) -> MixedModel:
    """Linear mixed model with a fixed factor and crossed random intercepts, by REML (Laird & Ware 1982).

    The coefficients are each level's difference to `reference`. Crossed intercepts are variance components
    of one group that holds everything (Baayen, Davidson & Bates 2008 for why they must be crossed). Wald
    intervals are too narrow with few levels; five levels of a random factor is few.

    Args:
        cells: one row an observation (a mean over items), without nulls.
        outcome: numeric column.
        fixed: categorical column, the method say.
        reference: the level of `fixed` that the others are compared with.
        random: categorical columns: task, seed, pair.
        confidence: of the intervals.

    """
    import statsmodels.formula.api as formulas

    names = {column: f"factor_{index}" for index, column in enumerate([outcome, fixed, *random])}
    table = cells.select(pl.col(column).alias(name) for column, name in names.items()).to_pandas()
    table["everything"] = 1
    model = formulas.mixedlm(
        f"{names[outcome]} ~ C({names[fixed]}, Treatment(reference={reference!r}))",
        table,
        groups="everything",
        vc_formula={column: f"0 + C({names[column]})" for column in random},
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # Without gradients, which mislead where a variance is zero: there the others stop early.
        fit = model.fit(reml=True, method="powell")
    bounds = fit.conf_int(alpha=1 - confidence)
    effects = tuple(
        FixedEffect(
            _level(name),
            float(fit.fe_params[name]),
            float(fit.bse_fe[name]),
            float(bounds.loc[name, 0]),
            float(bounds.loc[name, 1]),
            float(fit.pvalues[name]),
        )
        for name in fit.fe_params.index
    )
    variances = dict(zip(model.exog_vc.names, (float(value) for value in fit.vcomp), strict=True))
    remarks = tuple(dict.fromkeys(str(warning.message) for warning in caught))
    return MixedModel(effects, variances, float(fit.scale), cells.height, bool(fit.converged), remarks)


def _level(name: str) -> str:
    return name.rsplit("[T.", 1)[1].rstrip("]") if "[T." in name else name
