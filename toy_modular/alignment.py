"""Which measured steps of different runs are compared, and the numbers taken from them.

Runs are aligned at the same validation loss, at the same share of their own length, or at the same
training tokens. The nearest measured row is taken and never interpolated, and none is taken that is
off by more than a tolerance: a table that pairs trained with untrained states shows that and
nothing else (toy spec 9.6). NumPy, float64.
"""

from collections.abc import Callable, Sequence
from math import inf, log, nan
from typing import NamedTuple

import numpy as np

from lens_jax.fits import fit_power_law, rankme
from lens_jax.jackknife import alpha_error
from toy_modular.records import LAST, SPECTRUM, Row, Run

REFERENCE_WIDTH = 128
"""Width of the published toy model, for which its rank windows are meant."""

LOSS_TOLERANCE = 0.02
RATIO_TOLERANCE = 0.18
"""In ln(tokens): half the distance of rows of which two are measured while the tokens double."""


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


def at_loss(rows: Sequence[Row], loss: float, tolerance: float = LOSS_TOLERANCE) -> Match | None:
    """Returns the row of nearest validation loss; None if it is off by more than `tolerance`."""
    return _nearest(rows, lambda row: row.val_loss - loss, tolerance)


def at_progress(
    run: Run, rows: Sequence[Row], progress: float, tolerance: float = RATIO_TOLERANCE
) -> Match | None:
    """Returns the row nearest a share 0..1 of the run's own last step, as `at_tokens` of it.

    The last step of a run that stops at a loss is known only when it is over, so what is read at a
    share of it is no prediction (protocol spec 1.11 T2); `at_tokens` is.
    """
    tokens = progress * run.result.get("tokens", 0)
    return at_tokens(rows, tokens, tolerance) if tokens > 0 else None


def at_tokens(
    rows: Sequence[Row], tokens: float, tolerance: float = RATIO_TOLERANCE
) -> Match | None:
    """Returns the row nearest in ln(tokens); None if it is off by more than `tolerance` there.

    A run that had ended before has no such row, so its endpoint is never taken for an early value.
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


def toy_window(first: int, last: int, width: int) -> tuple[int, int]:
    """Takes a rank window of the width-128 model to a spectrum of `width` values.

    A rank becomes round(rank * width / 128), halves to even; at 128 it stays. The result starts at
    rank 1 or later, ends at `width` or earlier (50-200 is 50-128) and holds at least three ranks,
    the rule of `fits.scale_ranks`. Raises ValueError for a width below 3 or no window.
    """
    if width < 3:
        raise ValueError(f"width={width}: a fit needs at least 3 ranks")
    if first < 1 or last < first:
        raise ValueError(f"ranks {first}-{last}: give 1 <= first <= last")
    low = min(max(round(first * width / REFERENCE_WIDTH), 1), width - 2)
    return low, min(max(round(last * width / REFERENCE_WIDTH), low + 2), width)


def spectrum(row: Row, site: str = LAST) -> np.ndarray:
    """Returns the eigenvalues of the covariance at a site, (D,), descending."""
    return row.array(SPECTRUM, site)


def alpha(row: Row, window: tuple[int, int], site: str = LAST) -> Alpha:
    """Returns the exponent on a window given for width 128, scaled by `toy_window`."""
    values = spectrum(row, site)
    fit = fit_power_law(values, *toy_window(*window, values.size))
    error = nan
    if row.has(f"{SPECTRUM}_left_out", site):
        error = alpha_error(row.array(f"{SPECTRUM}_left_out", site), fit.first, fit.last)
    return Alpha(fit.alpha, fit.r2, error, fit.first, fit.last)


def effective_rank(row: Row, site: str = LAST) -> float:
    """Returns RankMe of the eigenvalues at a site."""
    return rankme(spectrum(row, site))


def tokens_to_target(run: Run) -> float:
    """Returns training tokens at which the validation loss crossed the target.

    Interpolated where the run says it, else those of the first evaluation that found it reached.

    inf for a run that ended without reaching it (censored); NaN for one that has not ended.
    """
    if not run.finished:
        return nan
    crossing, evaluated = run.result["crossing_tokens"], run.result.get("tokens_to_target")
    found = evaluated if crossing is None else crossing
    return inf if found is None else float(found)


def token_efficiency(runs: Sequence[Run]) -> dict[str, float]:
    """Returns {run name: T_min / T} within each stage and seed, T the tokens to the target.

    T_min is the least of the runs of that stage and seed. A run that never reached the target has
    0, the last rank, in which several of them tie; all are NaN where none reached it.
    """
    found = {}
    for run in runs:
        family = [other for other in runs if (other.stage, other.seed) == (run.stage, run.seed)]
        best = min((tokens_to_target(other) for other in family if other.finished), default=nan)
        own = tokens_to_target(run)
        found[run.name] = best / own if np.isfinite(best) else nan
    return found
