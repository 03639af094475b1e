"""Scores of a band's tables beside what tables without structure score (toy spec 5 and 6).

The table by the current state is the published one. A code of the next state, structured or not,
is seen in it through an average over steps that has a peak of its own, so its null is the kernel's;
the table by the next state has a flat one. NumPy.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from toy_modular.features import concentration, dominant_modes, h_peak, pair_masses
from toy_modular.nulls import (
    Selection,
    effective_width,
    excess,
    kernel,
    next_code_null,
    selection_null,
    white_null,
)
from toy_modular.records import CURRENT, LAW, NEXT, Row, band_numbers

TABLES = (CURRENT, NEXT)


class Scores(NamedTuple):
    """Of one table: H_peak, and H_S on the dominant mode, the greatest K, and a fixed set."""

    peak: float
    dominant: float
    greatest: float
    fixed: float


def scores(row: Row, table: str, band: str, fixed: Sequence[int], k: int) -> Scores:
    """Returns the scores of a measured step's table ("current" or "next")."""
    values = row.array(table, band)
    return Scores(
        h_peak(values).share,
        concentration(values, dominant_modes(values, 1)),
        concentration(values, dominant_modes(values, k)),
        concentration(values, fixed),
    )


def null_scores(row: Row, table: str, band: str, fixed: Sequence[int], k: int) -> Scores:
    """Returns the scores that a code of the next state without structure has in a table.

    Of the current table they follow from the kernel of the step law, of the next table from equal
    shares. The expected shares of many directions: the greatest K of a few are higher by selection.
    """
    shares = null_shares(row, table, band)
    mass = pair_masses(shares)
    order = np.sort(mass)[::-1]
    chosen = mass[np.array([mode - 1 for mode in fixed], int)]
    return Scores(
        null_peak(row, table, band), float(order[0]), float(order[:k].sum()), float(chosen.sum())
    )


def null_shares(row: Row, table: str, band: str) -> np.ndarray:
    """Expected shares (c,) of the modes of a table without structure, sum 1."""
    c, _ = band_numbers(band)
    shares = np.ones(c) if table == NEXT else kernel(row.array(LAW, band))
    shares[0] = 0.0
    return shares / shares.sum()


def null_peak(row: Row, table: str, band: str) -> float:
    """H_peak of a table without structure: `next_code_null`, or `white_null` of the next table."""
    c, _ = band_numbers(band)
    return white_null(c) if table == NEXT else next_code_null(c, row.array(LAW, band)).share


def peak(row: Row, table: str, band: str) -> float:
    """H_peak of a measured step's table; NaN for a table that is constant."""
    return h_peak(row.array(table, band)).share


def mean_peak(row: Row, table: str, bands: Sequence[str]) -> float:
    """H_peak averaged over bands, which are not independent measurements of a run."""
    return float(np.mean([peak(row, table, band) for band in bands]))


def mean_excess(row: Row, table: str, bands: Sequence[str]) -> float:
    """H_peak less its null, averaged over bands."""
    return float(np.mean([excess(peak(row, table, b), null_peak(row, table, b)) for b in bands]))


def mean_beyond(row: Row, table: str, bands: Sequence[str]) -> float:
    """What of H_peak lies above its null, 0 where nothing does, averaged over bands.

    The null of a band is the same in two stages, so it drops out of the difference of their
    H_peak; it does not out of the difference of this, which is the rise that reaches beyond what
    a code without structure has already.
    """
    beyond = [excess(peak(row, table, b), null_peak(row, table, b)) for b in bands]
    return float(np.mean(np.maximum(beyond, 0.0)))


def chance_peak(row: Row, table: str, band: str) -> Selection:
    """Returns `selection_null` at the effective width of the band's own activations."""
    c, _ = band_numbers(band)
    width = effective_width(row.array("covariance", band))
    return selection_null(c, width, None if table == NEXT else row.array(LAW, band))


def fixed_modes(row: Row, band: str, k: int, table: str) -> tuple[int, ...]:
    """Returns the set S that is held fixed: the K greatest modes of the table at a step."""
    return dominant_modes(row.array(table, band), k)
