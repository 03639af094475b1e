"""Which measured steps of different runs are compared: at equal validation loss or equal tokens.

The nearest measured row is taken and never interpolated, and none is taken that is off by more than
a tolerance: a table that pairs trained with untrained states shows that and nothing else. Rows are
`step_files.StepFile`, or anything with tokens and val_loss. NumPy.
"""

from collections.abc import Callable, Sequence
from math import log, nan
from typing import NamedTuple

import numpy as np

from lens_jax.fits import COVARIANCE_FLOOR, fit_power_law
from lens_jax.jackknife import alpha_error
from lens_jax.step_files import StepFile as Row

LOSS_TOLERANCE = 0.02
RATIO_TOLERANCE = 0.21
"""In ln(tokens): a little over half of ln 1.5. Where two rows are measured while the tokens
double, at whole steps, neighbours lie a factor of up to 1.5 apart (2 and 3, 4 and 6, 8 and 12)."""


class Match(NamedTuple):
    """A measured row and by how much it is off what was asked for (row minus asked)."""

    row: Row
    off: float


class Alpha(NamedTuple):
    """Exponent of a spectrum on ranks first..last; error by the jackknife, NaN if not recorded."""

    value: float
    r2: float
    error: float
    first: int
    last: int


def alpha_of(
    values: np.ndarray,
    ranks: tuple[int, int],
    left_out: np.ndarray | None = None,
    floor: float = COVARIANCE_FLOOR,
) -> Alpha:
    """Returns the exponent of a spectrum (D,) on ranks as they are, NaN where it ends inside them.

    left_out: (G, D), the same with each group of windows left out; None if it was not recorded.
    floor: as of `fit_power_law`.
    """
    fit = fit_power_law(values, *ranks, floor).on_whole(ranks[1], np.size(values))
    error = nan if left_out is None else alpha_error(left_out, *ranks, floor)
    return Alpha(fit.alpha, fit.r2, error, fit.first, fit.last)


def at_loss(rows: Sequence[Row], loss: float, tolerance: float = LOSS_TOLERANCE) -> Match | None:
    """Returns the row of nearest validation loss; None if it is off by more than `tolerance`."""
    return _nearest(rows, lambda row: row.val_loss - loss, tolerance)


def at_tokens(
    rows: Sequence[Row], tokens: float, tolerance: float = RATIO_TOLERANCE
) -> Match | None:
    """Returns the row nearest in ln(tokens); None if it is off by more than `tolerance` there.

    A run that had ended well before has no such row: its endpoint is no early value.
    """
    positive = [row for row in rows if row.tokens > 0]
    return _nearest(positive, lambda row: log(row.tokens / tokens), tolerance)


def _nearest(rows: Sequence[Row], off: Callable[[Row], float], tolerance: float) -> Match | None:
    matches = [Match(row, off(row)) for row in rows]
    matches = [match for match in matches if abs(match.off) <= tolerance + 1e-12]  # NaN fails too
    return min(matches, key=lambda match: abs(match.off), default=None)


def common_loss(
    runs: Sequence[Sequence[Row]], tolerance: float = LOSS_TOLERANCE
) -> tuple[float, int]:
    """Returns the loss at which the most runs have a row within tolerance, and how many have.

    Among equals the lowest, for which training has done most. Only losses decide, so the choice
    knows nothing of the spectra. (NaN, 0) where nothing was measured.
    """
    losses = [
        np.array([row.val_loss for row in rows if np.isfinite(row.val_loss)]) for rows in runs
    ]
    candidates = np.unique(np.concatenate([np.empty(0), *losses]))
    best, most = nan, 0
    for loss in candidates:
        count = sum(bool(np.any(np.abs(own - loss) <= tolerance)) for own in losses)
        if count > most:
            best, most = float(loss), count
    return best, most


def equal_losses(
    one: Sequence[Row], other: Sequence[Row], tolerance: float = LOSS_TOLERANCE
) -> list[tuple[Row, Row]]:
    """Returns the rows of two runs that are each other's nearest in loss, within the tolerance.

    The published comparison takes five quantiles of the pooled losses and whatever row is nearest
    (toy spec section 4 and 9.6); a quantile that neither run was measured at would lose matches
    that exist, so here rows are matched to rows.
    """
    found = []
    for row in one:
        there = at_loss(other, row.val_loss, tolerance)
        back = at_loss(one, there.row.val_loss, tolerance) if there else None
        if back and back.row.step == row.step:
            found.append((row, there.row))
    return found
