"""Runs of the toy at the same share of their own length, and the numbers taken from a row.

Equal loss and equal tokens are in `lens_jax.alignment`. NumPy, float64.
"""

from collections.abc import Sequence
from math import inf, nan

import numpy as np

from lens_jax.alignment import RATIO_TOLERANCE, Alpha, Match, alpha_of, at_tokens
from lens_jax.fits import rankme
from toy_modular.records import LAST, SPECTRUM, Row, Run

REFERENCE_WIDTH = 128
"""Width of the published toy model, for which its rank windows are meant."""


def at_progress(
    run: Run, rows: Sequence[Row], progress: float, tolerance: float = RATIO_TOLERANCE
) -> Match | None:
    """Returns the row nearest a share 0..1 of the run's own last step, as `at_tokens` of it.

    The last step of a run that stops at a loss is known only when it is over, so what is read at a
    share of it is no prediction (protocol spec 1.11 T2); `at_tokens` is.
    """
    tokens = progress * run.result.get("tokens", 0)
    return at_tokens(rows, tokens, tolerance) if tokens > 0 else None


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
    return alpha_of(values, toy_window(*window, values.size), row.left_out(SPECTRUM, site))


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
