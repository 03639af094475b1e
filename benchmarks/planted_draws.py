"""Error bars of a measurement that is repeated: what the jackknife reports against the spread."""

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from planted_laws import (
    GROUPS,
    WINDOWS,
    Correlation,
    bent_law,
    blocks,
    fading,
    make_instrument,
    make_law,
    place,
    power_law,
    rank_windows,
)

from lens_jax.fits import fit_power_law, rankme
from lens_jax.jackknife import alpha_error, jackknife

# The probe set of the laptop profile.
DRAW_WIDTH, WINDOW, TOKENS = 96, 128, 16_384
RATIO_LIMIT = 0.15


class Cell(NamedTuple):
    """One planted law under one correlation of tokens; alpha None: the bent law.

    limit: why its error bars are not claimed to hold, or None where they are.
    """

    alpha: float | None
    correlation: Correlation
    tokens: int = TOKENS
    limit: str | None = None

    @property
    def eigenvalues(self) -> np.ndarray:
        """Of the law, at the width of the draws."""
        return bent_law(DRAW_WIDTH) if self.alpha is None else power_law(DRAW_WIDTH, self.alpha)


INDEPENDENT = Correlation("independent", np.eye(1))
PAIRED = Correlation("blocks of 8", blocks(8, 0.8))
DOCUMENT = 0.9 * fading(4 * WINDOW, 0.8) + 0.1  # a theme beside what fades
CELLS = (
    Cell(0.5, INDEPENDENT),
    Cell(1.0, INDEPENDENT),
    Cell(2.0, INDEPENDENT),
    Cell(None, INDEPENDENT),
    Cell(1.0, PAIRED),
    Cell(1.0, Correlation("AR(1) 0.85 in windows", fading(WINDOW, 0.85))),
    Cell(2.0, Correlation("documents of 4 windows", DOCUMENT)),
    Cell(
        2.0,
        Correlation("the same, cut by groups", DOCUMENT, cut=2 * WINDOW),
        limit="groups share documents",
    ),
    Cell(1.0, PAIRED, tokens=4096, limit="too few tokens"),
    Cell(0.5, INDEPENDENT, tokens=4096, limit="too few tokens"),
)


class Measured(NamedTuple):
    """A statistic over draws: its values (R,), their jackknife errors, and OLS errors or None."""

    values: np.ndarray
    errors: np.ndarray
    ols_errors: np.ndarray | None


def draw_cell(
    cell: Cell,
    draws: int,
    seed: Sequence[int],
    groups: int = GROUPS,
    windows: Sequence[str] = WINDOWS,
) -> dict[str, Measured]:
    """Alpha of every window and RankMe, over independent draws of all the tokens of a cell."""
    law = make_law(cell.eigenvalues, DRAW_WIDTH, np.random.default_rng(seed))
    window = min(WINDOW, cell.tokens // groups)
    measure = make_instrument(cell.tokens // window, groups)
    ranks = {name: rank_windows(DRAW_WIDTH)[name] for name in windows}

    def one(source) -> list[tuple[float, float, float]]:
        normals = cell.correlation.normals(cell.tokens, DRAW_WIDTH, np.random.default_rng(source))
        found = measure([place(law, normals.reshape(-1, window, DRAW_WIDTH))])
        whole = found["act_cov_eigenvalues"]
        left_out = found["act_cov_eigenvalues_left_out"]
        fits = {name: fit_power_law(whole, *each) for name, each in ranks.items()}
        row = [(f.alpha, alpha_error(left_out, *ranks[name]), f.se) for name, f in fits.items()]
        return [*row, (rankme(whole), jackknife(rankme, left_out), np.nan)]

    sources = np.random.SeedSequence(seed).spawn(draws)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        rows = np.array(list(pool.map(one, sources)))  # (R, statistics, 3)
    found = {name: Measured(*rows[:, k].T) for k, name in enumerate(ranks)}
    return found | {"RankMe": Measured(*rows[:, -1, :2].T, None)}


def error_rows(draws: int, seed: int) -> Iterator[dict[str, Any]]:
    """Root mean square of reported errors over the spread of what was measured, cell by cell."""
    for k, cell in enumerate(CELLS):
        effective = cell.tokens * cell.correlation.effective_share
        ranks = rank_windows(DRAW_WIDTH)
        for name, measured in draw_cell(cell, draws, (seed, k)).items():
            law = cell.eigenvalues
            truth = rankme(law) if name == "RankMe" else fit_power_law(law, *ranks[name]).alpha
            ratio = error_ratio(measured.values, measured.errors)
            ols = measured.ols_errors
            yield {
                "planted_alpha": cell.alpha,
                "correlation": cell.correlation.name,
                "tokens": cell.tokens,
                "effective_tokens": effective,
                "effective_tokens_per_direction": effective / DRAW_WIDTH,
                "statistic": name,
                "ranks": list(ranks[name]) if name in ranks else None,
                "spread": float(measured.values.std(ddof=1)),
                "mean_error": float(measured.values.mean()) - truth,
                "jackknife_over_spread": ratio,
                "ols_over_spread": None if ols is None else error_ratio(measured.values, ols),
                "uncertainty": ratio_uncertainty(draws),
                "limit": cell.limit,
                "passed": abs(ratio - 1) <= RATIO_LIMIT,
            }


def error_ratio(values: np.ndarray, errors: np.ndarray) -> float:
    """Root mean square of the reported errors over the standard deviation of the values."""
    return float(np.sqrt(np.mean(errors**2)) / values.std(ddof=1))


def ratio_uncertainty(draws: int) -> float:
    """Relative standard error of such a ratio, from that of a standard deviation."""
    return 1 / math.sqrt(2 * draws)
