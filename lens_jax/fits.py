"""Summaries of a spectrum: rank power law, RankMe, top-k share, Jensen-Shannon divergence.

Everything here is numpy in float64 and reads a spectrum as a set of numbers: values are ranked from
the largest down first, so no result depends on the order in which they arrive. A statistic that a
spectrum does not define (all zeros, as the gradients of a zero-initialised head at step 0, or a
value that is not finite) is NaN and never an exception.

An alpha fitted on singular values is half the alpha of the eigenvalues that are their squares.
"""

from typing import NamedTuple

import numpy as np

REFERENCE_WIDTH = 768
"""Width at which the rank windows below were published."""

PAPER_WINDOWS = {
    "default": (30, 150),
    "10-40": (10, 40),
    "40-90": (40, 90),
    "90-200": (90, 200),
    "200-400": (200, 400),
}
"""Published rank windows, both ends included (arXiv 2605.05683, captions and extraction code).

"default" is the window of the released extraction code; 10-40, 40-90 and 90-200 are the windows of
the 12-layer tier, 200-400 that of the 36- and 48-layer tiers. `scale_ranks` takes them to other
widths.
"""


class PowerLaw(NamedTuple):
    """Least-squares line through (ln rank, ln value); `alpha` is minus its slope."""

    alpha: float
    r2: float
    se: float
    first: int
    last: int


def _ranked(values) -> np.ndarray:
    """Returns the values as float64, descending; ValueError unless they form one axis."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"spectrum of shape {array.shape}: give a one-dimensional array")
    return np.sort(array)[::-1]


def _shares(spectrum: np.ndarray) -> np.ndarray | None:
    """Returns p = s / sum s with negative rounding at 0; None where p is not defined."""
    clipped = np.maximum(spectrum, 0.0)  # keeps NaN
    if clipped.size == 0 or not np.all(np.isfinite(clipped)) or clipped[0] == 0:
        return None
    scaled = clipped / clipped[0]  # first, so that neither tiny nor huge spectra overflow the sum
    return scaled / scaled.sum()


def fit_power_law(values, first: int, last: int) -> PowerLaw:
    """Fits value = c * rank^-alpha by unweighted least squares of ln(value) on ln(rank).

    Ranks are 1-based and both ends of the window belong to it; `last` beyond the spectrum is cut to
    its length, and the result carries the window that was used. Values that are not positive are
    left out and the others keep their rank. `se` is the standard error of the slope under
    independent residuals (neighbouring ranks are not independent, so it is a lower bound). With
    fewer than three usable points, or a non-finite value anywhere, alpha, r2 and se are NaN; r2 is
    NaN too where all values are equal.

    Raises ValueError for a window that is not a window or that begins beyond the spectrum.
    Source: protocol spec 1.5.
    """
    spectrum = _ranked(values)
    if first < 1 or last < first:
        raise ValueError(f"ranks {first}-{last}: give 1 <= first <= last")
    if first > spectrum.size:
        raise ValueError(
            f"ranks {first}-{last} begin beyond the spectrum of {spectrum.size} values: "
            "give a lower window"
        )
    last = min(last, spectrum.size)
    window = spectrum[first - 1 : last]
    usable = window > 0
    if not np.all(np.isfinite(spectrum)) or np.count_nonzero(usable) < 3:
        return PowerLaw(np.nan, np.nan, np.nan, first, last)

    x = np.log(np.arange(first, last + 1, dtype=np.float64)[usable])
    y = np.log(window[usable])
    if y[0] == y[-1]:  # descending, so all are equal; their mean would differ by rounding
        return PowerLaw(0.0, np.nan, 0.0, first, last)
    x, y = x - x.mean(), y - y.mean()
    slope = (x @ y) / (x @ x)
    residual = y - slope * x
    r2 = 1.0 - (residual @ residual) / (y @ y)
    se = np.sqrt((residual @ residual) / (x.size - 2) / (x @ x))
    return PowerLaw(float(-slope), float(r2), float(se), first, last)


def scale_ranks(first: int, last: int, width: int) -> tuple[int, int]:
    """Takes a rank window of a width-768 spectrum to another width.

    A rank becomes round(rank * width / 768), halves to even. The result starts at rank 1 or later,
    ends at `width` or earlier and holds at least three ranks.
    Raises ValueError for a width below 3 or a window that is not a window.
    """
    if width < 3:
        raise ValueError(f"width={width}: a fit needs at least 3 ranks")
    if first < 1 or last < first:
        raise ValueError(f"ranks {first}-{last}: give 1 <= first <= last")
    low = min(max(round(first * width / REFERENCE_WIDTH), 1), width - 2)
    high = min(max(round(last * width / REFERENCE_WIDTH), low + 2), width)
    return low, high


def rankme(values) -> float:
    """Returns exp(-sum p ln p) with p = s / sum s: the number of directions a spectrum fills.

    Between 1 and the number of values; negative rounding counts as 0; NaN for all zeros. What it
    means depends on what is passed, and three uses are told apart by name:
    RankMe_lambda: eigenvalues of a covariance (primary for activations);
    RankMe_sigma: singular values, or square roots of eigenvalues (`rankme_sigma`; primary for
    gradients and weights; arXiv 2210.02885 has it on uncentred singular values);
    last-token RankMe: eigenvalues of the covariance of each sequence's last token
    (arXiv 2509.23024).
    """
    shares = _shares(_ranked(values))
    if shares is None:
        return float("nan")
    present = shares[shares > 0]
    return float(np.exp(-np.sum(present * np.log(present))))


def rankme_sigma(eigenvalues) -> float:
    """Returns RankMe of the square roots of eigenvalues; negative rounding counts as 0."""
    return rankme(np.sqrt(np.maximum(_ranked(eigenvalues), 0.0)))


def topk_share(values, k: int) -> float:
    """Returns the share of sum s that the k largest values hold, in (0, 1]; NaN for all zeros.

    A k beyond the spectrum counts all of it. Raises ValueError for k < 1.
    """
    if k < 1:
        raise ValueError(f"k={k}: give at least 1")
    shares = _shares(_ranked(values))
    return float("nan") if shares is None else float(min(shares[:k].sum(), 1.0))


def jsd(a, b) -> float:
    """Returns the Jensen-Shannon divergence of two spectra by rank, in nats, between 0 and ln 2.

    Both are cut to the shorter length and renormalised. It compares shapes only: rank is the index,
    so eigenvectors play no part. NaN when either is all zeros. Source: protocol spec 1.10.
    """
    a, b = _ranked(a), _ranked(b)
    length = min(a.size, b.size)
    p, q = _shares(a[:length]), _shares(b[:length])
    if p is None or q is None:
        return float("nan")
    middle = (p + q) / 2
    return float(np.clip((_divergence(p, middle) + _divergence(q, middle)) / 2, 0.0, np.log(2)))


def _divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Returns KL(p || q) in nats with 0 ln 0 = 0; q must be positive wherever p is."""
    present = p > 0
    return float(np.sum(p[present] * np.log(p[present] / q[present])))
