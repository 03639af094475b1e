"""Tokens to a loss, what they are worth in a family, and the states at which runs are compared.

Everything is in training tokens: validation tokens are not counted. NumPy, float64.
Source: protocol spec 1.10 and 1.12.
"""

from collections.abc import Sequence
from math import exp, inf, log, nan

import numpy as np

from experiments.study_records import ACTIVATION, GRADIENT, Run
from lens_jax.alignment import RATIO_TOLERANCE, Alpha, alpha_of, at_loss, at_tokens
from lens_jax.fits import COVARIANCE_FLOOR, GRAM_FLOOR, REFERENCE_WIDTH, scale_ranks
from lens_jax.step_files import StepFile


def crossing_tokens(run: Run, target: float) -> float:
    """Returns the tokens at which the validation loss first falls below a target.

    Interpolated linearly in (ln tokens, loss) between the validation before and the first one
    below. inf for a run that ended without one, or diverged. NaN for one that has not ended, and
    for one that stopped at a target of its own above this one: it might have gone on to it.
    Raises ValueError for a target that the loss is below before any training.
    """
    tokens, losses = run.val["tokens"], run.val["loss"]
    below = np.flatnonzero(losses < target)
    if not below.size:
        return _without_crossing(run)
    k = int(below[0])
    if tokens[k] <= 0:
        raise ValueError(
            f"target_loss={target}: {run.path} is below it before training; give a lower one"
        )
    if k == 0 or tokens[k - 1] <= 0:
        return float(tokens[k])
    share = (losses[k - 1] - target) / (losses[k - 1] - losses[k])
    return exp(log(tokens[k - 1]) + share * (log(tokens[k]) - log(tokens[k - 1])))


def first_below_tokens(run: Run, target: float) -> float:
    """Returns the tokens of the first validation below a target, the authors' count.

    It is late by up to the tokens between validations. inf and NaN as in `crossing_tokens`.
    """
    below = np.flatnonzero(run.val["loss"] < target)
    if below.size:
        return float(run.val["tokens"][below[0]])
    return _without_crossing(run)


def _without_crossing(run: Run) -> float:
    return inf if run.finished and not run.reached else nan


def excess_tokens(runs: Sequence[Run], target: float) -> dict[str, float]:
    """Returns {run name: T / min T - 1} within the runs given; inf for a censored run.

    NaN for a run that has not ended or stopped at a higher target, and for all where none has
    reached this one.
    """
    found = {run.name: crossing_tokens(run, target) for run in runs}
    best = min((tokens for tokens in found.values() if tokens < inf), default=nan)
    return {name: tokens / best - 1 for name, tokens in found.items()}


def efficiency(runs: Sequence[Run], target: float) -> dict[str, float]:
    """Returns {run name: -ln(T / min T)} within the runs given: 0 at best, -inf for a censored run.

    NaN as in `excess_tokens`.
    """
    return {
        name: -log(1 + excess) if excess < inf else (-inf if excess == inf else nan)
        for name, excess in excess_tokens(runs, target).items()
    }


def ranks_of(run: Run, window: tuple[int, int]) -> tuple[int, int]:
    """Returns the ranks of a published window, given at width 768, at the width of a run."""
    return window if run.width >= REFERENCE_WIDTH else scale_ranks(*window, run.width)


def alpha_at(row: StepFile, site: str, ranks: tuple[int, int], kind: str = ACTIVATION) -> Alpha:
    """Returns the exponent of a recorded spectrum on ranks as they are."""
    floor = GRAM_FLOOR if kind.startswith(GRADIENT) else COVARIANCE_FLOOR
    return alpha_of(row.array(kind, site), ranks, row.left_out(kind, site), floor)


def early_row(run: Run, tokens: float, tolerance: float = RATIO_TOLERANCE) -> StepFile | None:
    """Returns the measured step nearest in ln(tokens), None if it is off by more there."""
    match = at_tokens(run.steps, tokens, tolerance)
    return None if match is None else match.row


def loss_at(run: Run, tokens: float) -> float:
    """Returns the validation loss at some tokens, interpolated linearly in (ln tokens, loss).

    NaN for a run whose validations end before or begin after, by more than a measured step may be
    off: what it showed at another time is no early loss.
    """
    seen = run.val["tokens"] > 0
    ahead = np.log(run.val["tokens"][seen] / tokens)
    if not ahead.size or ahead[0] > RATIO_TOLERANCE or ahead[-1] < -RATIO_TOLERANCE:
        return nan
    return float(np.interp(0.0, ahead, run.val["loss"][seen]))


def matched_row(run: Run, loss: float, tolerance: float) -> StepFile | None:
    """Returns the measured step of nearest validation loss, None beyond the tolerance."""
    match = at_loss(run.steps, loss, tolerance)
    return None if match is None else match.row
