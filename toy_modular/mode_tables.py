"""Scores of a band's tables beside what tables without structure score (toy spec 5 and 6).

The table by the current state is the published one. What a code without structure shows in a
table depends on the state it is a code of: of the state that the table goes by, the same in every
mode; of the other one, an average over steps that has a peak of its own. Trained codes are of both
states, so both nulls stand beside every value, and what counts as beyond chance is beyond both.
NumPy.
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
    state_nulls,
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


def null_scores(
    row: Row, table: str, band: str, fixed: Sequence[int], k: int, code: str = NEXT
) -> Scores:
    """Returns the scores in a table of a code without structure, of the next or current state.

    Where table and code go by one state they follow from equal shares, else from the kernel of the
    step law. The expected shares of many directions: the greatest K of a few are higher by
    selection.
    """
    shares = null_shares(row, table, band, code)
    mass = pair_masses(shares)
    order = np.sort(mass)[::-1]
    chosen = mass[np.array([mode - 1 for mode in fixed], int)]
    return Scores(
        null_peak(row, table, band, code),
        float(order[0]),
        float(order[:k].sum()),
        float(chosen.sum()),
    )


def null_shares(row: Row, table: str, band: str, code: str = NEXT) -> np.ndarray:
    """Expected shares (c,), sum 1, of a table's modes under a code without structure."""
    c, _ = band_numbers(band)
    shares = np.ones(c) if table == code else kernel(row.array(LAW, band))
    shares[0] = 0.0
    return shares / shares.sum()


def null_peak(row: Row, table: str, band: str, code: str = NEXT) -> float:
    """H_peak of a table under a code without structure: `white_null`, or `next_code_null`."""
    c, _ = band_numbers(band)
    return white_null(c) if table == code else next_code_null(c, row.array(LAW, band)).share


def peak(row: Row, table: str, band: str) -> float:
    """H_peak of a measured step's table; NaN for a table that is constant."""
    return h_peak(row.array(table, band)).share


def mean_peak(row: Row, table: str, bands: Sequence[str]) -> float:
    """H_peak averaged over bands, which are not independent measurements of a run."""
    return float(np.mean([peak(row, table, band) for band in bands]))


def mean_excess(row: Row, table: str, bands: Sequence[str]) -> float:
    """H_peak less that of a code of the next state, averaged over bands.

    In the table by the current state that is the greater of the two nulls.
    """
    return float(np.mean([excess(peak(row, table, b), null_peak(row, table, b)) for b in bands]))


def mean_beyond(row: Row, table: str, bands: Sequence[str]) -> float:
    """What of H_peak lies above its null, 0 where nothing does, averaged over bands.

    The null of a band is the same in two stages, so it drops out of the difference of their
    H_peak; it does not out of the difference of this, which is the rise that reaches beyond what
    a code without structure has already.
    """
    beyond = [excess(peak(row, table, b), null_peak(row, table, b)) for b in bands]
    return float(np.mean(np.maximum(beyond, 0.0)))


def chance_peaks(row: Row, table: str, band: str) -> dict[str, Selection]:
    """Returns `selection_null` of codes of either state, at the effective width of the band's h.

    {"current": ..., "next": ...}: which state the code without structure is one of.
    """
    c, _ = band_numbers(band)
    width = effective_width(row.array("covariance", band))
    own, other = state_nulls(c, width, row.array(LAW, band))
    return {code: own if code == table else other for code in TABLES}


def fixed_modes(row: Row, band: str, k: int, table: str) -> tuple[int, ...]:
    """Returns the set S that is held fixed: the K greatest modes of the table at a step."""
    return dominant_modes(row.array(table, band), k)
