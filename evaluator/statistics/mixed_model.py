"""A mixed-effects model: what a method adds, over tasks, seeds and pairs that could have been others."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from scipy import stats

from tutelage.errors import DataError

_FURTHER_SEARCHES = 5
_SAME_LIKELIHOOD = 1e-5  # of the logarithm; far below what moves a printed digit


@dataclass(frozen=True)
class FixedEffect:
    """One coefficient with its interval and two-sided p-value by Student's t."""

    name: str
    estimate: float
    standard_error: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class MixedModel:
    """A fitted model: coefficients, variances of the random intercepts, and what the optimisers said.

    `converged` is true if a further search from the best point, by two optimisers, found no higher likelihood.
    """

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
    of one group that holds everything (Baayen, Davidson & Bates 2008 for why they must be crossed).

    Intervals and p-values are by Student's t, with the degrees of freedom that containment gives (Schluchter & Elashoff
    1990, J. Statist. Comput. Simulation 37): of a difference those that fixed and random levels leave of the
    observations; of the reference's own mean one less than the fewest levels of a random factor. The normal
    distribution, statsmodels' own, covers too little with few levels.

    Args:
        cells: one row an observation (a mean over items), without nulls.
        outcome: numeric column.
        fixed: categorical column, the method say.
        reference: the level of `fixed` that the others are compared with.
        random: categorical columns: task, seed, pair.
        confidence: of the intervals.

    Raises:
        DataError: an outcome is missing or no number, or no optimiser finds a fit.

    """
    import statsmodels.formula.api as formulas

    lacking = cells.filter(pl.col(outcome).is_null() | ~pl.col(outcome).is_finite()).height
    if lacking:
        raise DataError(f"{lacking} of {cells.height} values of {outcome} are no numbers; leave these cells out")
    names = {column: f"factor_{index}" for index, column in enumerate([outcome, fixed, *random])}
    table = cells.select(pl.col(column).alias(name) for column, name in names.items()).to_pandas()
    table["everything"] = 1
    model = formulas.mixedlm(
        f"{names[outcome]} ~ C({names[fixed]}, Treatment(reference={reference!r}))",
        table,
        groups="everything",
        vc_formula={column: f"0 + C({names[column]})" for column in random},
    )
    fit, converged, remarks = _fit(model)
    levels = [cells[column].n_unique() for column in random]
    left = max(cells.height - cells[fixed].n_unique() - sum(level - 1 for level in levels), 1)
    effects = []
    for name in fit.fe_params.index:
        estimate, error = float(fit.fe_params[name]), float(fit.bse_fe[name])
        freedom = left if "[T." in name else min(levels) - 1
        reach = float(stats.t.isf((1 - confidence) / 2, freedom)) * error
        p_value = float(2 * stats.t.sf(abs(estimate) / error, freedom))
        label = name.rsplit("[T.", 1)[1].rstrip("]") if "[T." in name else name  # statsmodels' name of a level
        effects.append(FixedEffect(label, estimate, error, estimate - reach, estimate + reach, p_value))
    variances = dict(zip(model.exog_vc.names, (float(value) for value in fit.vcomp), strict=True))
    return MixedModel(tuple(effects), variances, float(fit.scale), cells.height, converged, remarks)


def _fit(model: Any) -> tuple[Any, bool, tuple[str, ...]]:
    """The fit of the highest REML likelihood, whether no search from there finds a higher one, and its warnings.

    No optimiser of statsmodels is right alone. Powell stops up to 0.01 below the optimum and says that it converged
    (in 4 of 12 simulated studies); those with gradients are misled where a variance is zero, by up to 14; Nelder-Mead
    finds the optimum and does not always say so.
    """

    def search(method: str, start: Any = None) -> tuple[Any, tuple[str, ...]]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                fit = model.fit(reml=True, method=method, start_params=start)
            except np.linalg.LinAlgError:
                # An optimiser that ends where a variance is infinite or the curvature singular has found nothing.
                return None, ()
        return fit, tuple(dict.fromkeys(str(warning.message) for warning in caught))

    best, remarks = max((search(method) for method in ("powell", "nm", "lbfgs")), key=_likelihood)
    if best is None:
        raise DataError("no optimiser fits the mixed model to these scores; more seeds, tasks or students can")
    converged = False
    for _ in range(_FURTHER_SEARCHES):
        further = max((search(method, best.params_object) for method in ("powell", "nm")), key=_likelihood)
        gain = _likelihood(further) - best.llf
        if gain > 0:
            best, remarks = further
        converged = gain <= _SAME_LIKELIHOOD
        if converged:
            break
    return best, converged, remarks


def _likelihood(found: tuple[Any, tuple[str, ...]]) -> float:
    value = -np.inf if found[0] is None else float(found[0].llf)
    return value if np.isfinite(value) else -np.inf
