"""What another seed changes, what another batch changes beyond that, and the tests of it.

The same seeds run in every cell, and what a seed changes in all cells alike (its data order is one
and the same for all of them) cancels wherever cells are compared: it is no noise there. So a number
y of a run is taken as

    y = cell + seed + rest

by least squares, and noise is the rest. Where cells have seeds of their own, or only one cell has
several, the two cannot be told apart, and noise is what lies about the mean of a cell. Rests count
as normal and independent, with one variance in all cells. NumPy, float64.
"""

from collections.abc import Callable, Sequence
from functools import cache
from math import atan2, exp, isfinite, lgamma, nan
from typing import NamedTuple

import numpy as np

from experiments.study_records import Cell, Run, Study
from lens_jax.correlations import UNDEFINED, PermutationTest

NODES = 400  # of the quadrature behind a p of F


class Spread(NamedTuple):
    """How a number varies over seeds (pooled over cells) and over the batches of a family.

    seeds: sd of one run about its cell and what its seed changes everywhere; within: about its cell
    alone. They are equal where `crossed` is false, which says whether the two could be told apart.
    batches: sd of the means of a family's cells. f: mean square of batches over that of seeds, NaN
    without both; under no effect of batches it is F with batch_freedom and freedom degrees.
    per_cell: runs behind the mean of a cell, so that f is 1 + per_cell * (true sd of batches /
    seeds)^2 in the mean. cells: those of several seeds.
    """

    seeds: float
    within: float
    batches: float
    f: float
    cells: int
    freedom: int
    batch_freedom: int
    per_cell: float
    crossed: bool

    @property
    def ratio(self) -> float:
        """Sd of the batches' means over what seeds alone make of it: about 1 for no effect."""
        return self.f**0.5


class _Row(NamedTuple):
    cell: Cell
    seed: int
    value: float


def seed_spread(study: Study, statistic: Callable[[Run], float]) -> Spread:
    """Returns how a number of a chosen run varies over seeds, and over batches of one family."""
    return spread_of(study.chosen, statistic)


def spread_of(runs: Sequence[Run], statistic: Callable[[Run], float]) -> Spread:
    """Returns how a number of a run varies over seeds, and over batches in the same families.

    Only families with a cell of two seeds or more count. A number that is not finite is left out.
    """
    found = [_Row(run.cell, run.seed, statistic(run)) for run in runs]
    found = [row for row in found if isfinite(row.value)]
    counts: dict[Cell, int] = {}
    for row in found:
        counts[row.cell] = counts.get(row.cell, 0) + 1
    repeated = [cell for cell, count in counts.items() if count > 1]
    families = {cell.family for cell in repeated}
    return _spread([row for row in found if row.cell.family in families], len(repeated))


def _spread(rows: Sequence[_Row], repeated: int) -> Spread:
    if not rows:
        return Spread(nan, nan, nan, nan, 0, 0, 0, nan, False)
    values = np.array([row.value for row in rows])
    cells = _indicators([row.cell for row in rows])
    families = _indicators([row.cell.family for row in rows])
    seeds = _indicators([row.seed for row in rows])
    within, apart = _rest(cells, values), len(rows) - cells.shape[1]
    both = np.hstack([cells, seeds])
    freedom = len(rows) - int(np.linalg.matrix_rank(both))
    crossed = freedom > 0
    full = both if crossed else cells
    less = np.hstack([families, seeds]) if crossed else families
    freedom = freedom if crossed else apart
    batch_freedom = int(np.linalg.matrix_rank(full) - np.linalg.matrix_rank(less))
    noise = _squares(_rest(full, values)) / freedom
    between = (_squares(_rest(less, values)) - noise * freedom) / max(batch_freedom, 1)
    return Spread(
        seeds=noise**0.5,
        within=(_squares(within) / apart) ** 0.5,
        batches=_over_batches(rows),
        f=max(between, 0.0) / noise if batch_freedom and noise > 0 else nan,
        cells=repeated,
        freedom=freedom,
        batch_freedom=batch_freedom,
        per_cell=_squares(_rest(less, cells)) / batch_freedom if batch_freedom else nan,
        crossed=crossed,
    )


def _indicators(keys: Sequence) -> np.ndarray:
    """Columns (n, kinds), 1 where a row is of that kind."""
    kinds = list(dict.fromkeys(keys))
    return np.array([[float(key == kind) for kind in kinds] for key in keys])


def _rest(design: np.ndarray, values: np.ndarray) -> np.ndarray:
    """What least squares on the columns of a design (n, k) leaves of values, (n,) or (n, m)."""
    return values - design @ np.linalg.lstsq(design, values, rcond=None)[0]


def _squares(values: np.ndarray) -> float:
    return float(np.sum(values**2))


def _over_batches(rows: Sequence[_Row]) -> float:
    """The sd over a family's cells of their means; of several families the mean."""
    means: dict = {}
    for cell in dict.fromkeys(row.cell for row in rows):
        own = [row.value for row in rows if row.cell == cell]
        means.setdefault(cell.family, []).append(float(np.mean(own)))
    sds = [np.std(own, ddof=1) for own in means.values() if len(own) > 1]
    return float(np.mean(sds)) if sds else nan


# Errors of what is compared


def difference_error(spread: Spread, before: Sequence[Run], after: Sequence[Run]) -> float:
    """Returns the seed error of the difference between the means of two cells' runs.

    Of equal seeds the difference is one of pairs, so what a seed changes in both is not in it.
    """
    if sorted(run.seed for run in before) == sorted(run.seed for run in after):
        return spread.seeds * (2 / len(before)) ** 0.5
    return spread.within * (1 / len(before) + 1 / len(after)) ** 0.5


# Tests


@cache
def _quadrature() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(NODES)


def f_upper(f: float, first: int, second: int) -> float:
    """Returns the chance that F with `first` and `second` degrees of freedom is `f` or more.

    It is the share of sin^(second-1) cos^(first-1) over 0..pi/2 that lies below the angle whose
    squared tangent is second / (first f), here by Gauss-Legendre quadrature.
    """
    angle = atan2(second**0.5, (first * f) ** 0.5)
    nodes, weights = _quadrature()
    at = angle * (nodes + 1) / 2
    whole = exp(lgamma((first + second) / 2) - lgamma(first / 2) - lgamma(second / 2))
    heights = np.sin(at) ** (second - 1) * np.cos(at) ** (first - 1)
    return min(1.0, float(angle * whole * np.sum(weights * heights)))


def batches_test(spread: Spread) -> PermutationTest:
    """Tests that a number differs between batches by more than seeds explain; one-sided, F.

    Null: the batches of a family have one mean, which leaves f about 1 whatever the number of
    seeds. p follows from the law of F, not from arrangements.
    """
    if not (isfinite(spread.f) and spread.freedom > 0):
        return UNDEFINED
    return _known(spread.f, f_upper(spread.f, spread.batch_freedom, spread.freedom))


def small_effect_test(spread: Spread) -> PermutationTest:
    """Tests that batches differ by less than single runs of one batch do; one-sided, F.

    Null: batches are drawn with the sd of seeds or a larger one, so that f is at least
    1 + per_cell times as large as without an effect. A small p excludes an effect of that size,
    which a failure to find any does not.
    """
    if not (isfinite(spread.f) and spread.freedom > 0):
        return UNDEFINED
    f = spread.f / (1 + spread.per_cell)
    return _known(f, 1 - f_upper(f, spread.batch_freedom, spread.freedom))


def t_test(difference: float, error: float, freedom: int) -> PermutationTest:
    """Tests that a difference of known standard error is 0, two-sided, Student's t; statistic t.

    freedom: degrees of freedom of the error. UNDEFINED for what is not finite.
    """
    if not (isfinite(difference) and isfinite(error) and error > 0 and freedom > 0):
        return UNDEFINED
    t = difference / error
    return _known(t, f_upper(t**2, 1, freedom))


def _known(statistic: float, p: float) -> PermutationTest:
    return PermutationTest(statistic, p, 0, True)
