"""Summaries of a spectrum: rank power law, RankMe, top-k share, noise scale, JSD of two spectra.

Everything here is numpy in float64 and reads a spectrum as a set of numbers: values are ranked from
the largest down first, so no result depends on the order in which they arrive. A statistic that a
spectrum does not define (all zeros, as the gradients of a zero-initialised head at step 0, or a
value that is not finite) is NaN and never an exception.

An alpha fitted on singular values is half the alpha of the eigenvalues that are their squares.
"""

from collections.abc import Callable
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


COVARIANCE_FLOOR = 2.0**-23
"""Eigenvalues of a float32 covariance are rounding below this share of the largest.

Rank-deficient sets of vectors leave 1e-8 to 6e-8 of it where there should be nothing.
"""

GRAM_FLOOR = 2.0**-11.5
"""Singular values by way of a float32 Gram matrix are rounding below this share of the largest.

It is the root of COVARIANCE_FLOOR, as a singular value is of an eigenvalue.
"""


class PowerLaw(NamedTuple):
    """Least-squares line through (ln rank, ln value); `alpha` is minus its slope.

    first, last: the ranks it was fitted on, which may end before those that were asked for.
    """

    alpha: float
    r2: float
    se: float
    first: int
    last: int

    def on_whole(self, last: int, count: int) -> "PowerLaw":
        """The fit if it reaches rank `last` or the last of `count` values, else the same with NaN.

        For numbers that are held against each other: they have one window.
        """
        if self.last == min(last, count):
            return self
        return self._replace(alpha=float("nan"), r2=float("nan"), se=float("nan"))


def _ranked(values) -> np.ndarray:
    """Returns the values as float64, descending; ValueError unless they form one axis."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"spectrum of shape {array.shape}: give a one-dimensional array")
    return np.sort(array)[::-1]


def ranked_shares(values) -> np.ndarray | None:
    """Returns p = s / sum s, descending, negative rounding as 0; None where p is not defined."""
    clipped = np.maximum(_ranked(values), 0.0)  # keeps NaN
    if clipped.size == 0 or not np.all(np.isfinite(clipped)) or clipped[0] == 0:
        return None
    scaled = clipped / clipped[0]  # first, so that neither tiny nor huge spectra overflow the sum
    return scaled / scaled.sum()


def fit_power_law(values, first: int, last: int, floor: float = COVARIANCE_FLOOR) -> PowerLaw:
    """Fits value = c * rank^-alpha by unweighted least squares of ln(value) on ln(rank).

    Ranks are 1-based and both ends of the window belong to it. A spectrum ends where its values
    are no longer positive or fall below `floor` times the largest, where they are rounding: give
    GRAM_FLOOR for per-sample gradients, 0 for values that are exact. A `last` beyond that end is
    cut to it, and the result carries the window that was used. `se` is the standard error of the
    slope under independent residuals (neighbouring ranks are not independent, so it is a lower
    bound; see `jackknife.alpha_error`). With fewer than three usable points, or a non-finite value
    anywhere, alpha, r2 and se are NaN; r2 is NaN too where all values are equal.

    Raises ValueError for a window that is not a window or that begins beyond the values.
    Source: protocol spec 1.5.
    """
    return _fit(_ranked(values), first, last, np.ones_like, floor)


def window_alpha(values, first: int, last: int, floor: float = COVARIANCE_FLOOR) -> float:
    """Returns alpha of `fit_power_law` on all of a window; NaN where the spectrum ends inside it.

    For rows of a table and points of a curve, which are held against each other. A window may still
    reach beyond the number of values.
    """
    return fit_power_law(values, first, last, floor).on_whole(last, np.size(values)).alpha


def fit_alpha_req(
    values, first: int = 6, last: int = 100, floor: float = COVARIANCE_FLOOR
) -> PowerLaw:
    """Fits alpha-ReQ: least squares of ln(value) on ln(rank) with weights 1/rank.

    The weights give every factor of two in rank about the same say; without them the high ranks,
    of which there are most, decide. `r2` is weighted as the fit is. The weights are a
    choice of emphasis and not inverse variances: `se` is the standard error of this estimator under
    independent residuals of equal variance. Window, edges and errors as in `fit_power_law`.
    Source: Agrawal et al., alpha-ReQ, NeurIPS 2022, on centred features; protocol spec 1.10.
    """
    return _fit(_ranked(values), first, last, np.reciprocal, floor)


def widest_power_law(
    values,
    *,
    min_r2: float = 0.99,
    min_ranks: int = 10,
    first: int = 1,
    floor: float = COVARIANCE_FLOOR,
) -> PowerLaw:
    """Fits the widest range of ranks on which a spectrum passes for a power law.

    Of all ranges from rank `first` on that hold at least `min_ranks` values, none below `floor`
    times the largest, and whose `fit_power_law` has r2 >= min_r2, the one with the greatest
    ln(last / first); of two equally wide the one with more ranks. alpha, r2 and se are NaN, and the
    window is the whole spectrum from `first`, where no range passes or a value is not finite.

    Width is counted in ln(rank) because a power law claims the same slope over factors of rank.
    Counted in ranks the tail would always win: most ranks lie within one factor of two there, over
    which any smooth spectrum is nearly straight.

    It does not show that the spectrum is a power law. R2 forgives curvature: on ranks 1-768 a local
    exponent that climbs from 0.7 to 1.3 has r2 = 0.995. Always give the fixed windows of
    `PAPER_WINDOWS` beside it.

    Raises ValueError for min_r2 outside (0, 1), min_ranks below 3, or a `first` that is no rank of
    the spectrum.
    """
    spectrum = _ranked(values)
    if not 0 < min_r2 < 1:
        raise ValueError(f"min_r2={min_r2}: give a number between 0 and 1")
    if min_ranks < 3:
        raise ValueError(f"min_ranks={min_ranks}: a fit needs at least 3 ranks")
    _check_window(spectrum, first, spectrum.size)
    none = PowerLaw(np.nan, np.nan, np.nan, first, spectrum.size)
    if not np.all(np.isfinite(spectrum)):
        return none

    y = np.log(spectrum[: _end(spectrum, floor)])
    x = np.log(np.arange(1, y.size + 1, dtype=np.float64))
    width, window = 0.0, None
    for start in range(first, y.size - min_ranks + 2):
        if y.size / start < width:  # nor can any later start reach it
            break
        count = _longest_straight(x[start - 1 :], y[start - 1 :], min_r2, min_ranks)
        end = start + count - 1
        if count and end / start >= width:
            width, window = end / start, (start, end)
    return none if window is None else _fit(spectrum, *window, np.ones_like, floor)


def _check_window(spectrum: np.ndarray, first: int, last: int) -> None:
    if first > spectrum.size:
        raise ValueError(
            f"ranks {first}-{last} begin beyond the spectrum of {spectrum.size} values: "
            "give a lower window"
        )
    if first < 1 or last < first:
        raise ValueError(f"ranks {first}-{last}: give 1 <= first <= last")


def _end(spectrum: np.ndarray, floor: float) -> int:
    """Returns the last rank of a descending spectrum that is positive and not below the floor."""
    return int(np.count_nonzero((spectrum > 0) & (spectrum >= floor * spectrum[0])))


def _fit(spectrum: np.ndarray, first: int, last: int, weigh: Callable, floor: float) -> PowerLaw:
    """Returns the fit of a descending spectrum; weigh: ranks -> weights."""
    _check_window(spectrum, first, last)
    last = min(last, spectrum.size)
    finite = np.all(np.isfinite(spectrum))
    end = min(last, _end(spectrum, floor)) if finite else 0
    if end - first + 1 < 3:
        return PowerLaw(np.nan, np.nan, np.nan, first, last)

    ranks = np.arange(first, end + 1, dtype=np.float64)
    y = np.log(spectrum[first - 1 : end])
    if y[0] == y[-1]:  # descending, so all are equal; their mean would differ by rounding
        return PowerLaw(0.0, np.nan, 0.0, first, end)
    slope, r2, se = _least_squares(np.log(ranks), y, weigh(ranks))
    return PowerLaw(-slope, r2, se, first, end)


def _least_squares(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[float, float, float]:
    """Returns slope, r2 and standard error of the slope of a weighted least-squares line.

    r2 is weighted; the error is that of residuals of one common variance whatever the weights.
    """
    total, squares = weights.sum(), weights**2
    x, y = x - weights @ x / total, y - weights @ y / total
    spread = weights @ x**2
    slope = weights @ (x * y) / spread
    unexplained = weights @ (y - slope * x) ** 2
    r2 = 1.0 - unexplained / (weights @ y**2)
    # Expectation of `unexplained` in units of the variance; the number of points less 2 when all
    # weights are 1.
    freedom = total - squares.sum() / total - squares @ x**2 / spread
    se = np.sqrt(unexplained / freedom * (squares @ x**2)) / spread
    return float(slope), float(r2), float(se)


def _longest_straight(x: np.ndarray, y: np.ndarray, min_r2: float, min_count: int) -> int:
    """Returns how many leading points at most have r2 >= min_r2, of min_count or more; 0 if none.

    One running sum per moment serves all lengths; y descends.
    """
    # From the first point and not from a common origin: a short range far out would lose its
    # variance to cancellation.
    x, y = x - x[0], y - y[0]
    counts = np.arange(1, x.size + 1)

    def moment(a, b):
        return np.cumsum(a * b) - np.cumsum(a) * np.cumsum(b) / counts

    straight = moment(x, y) ** 2 >= min_r2 * moment(x, x) * moment(y, y)
    straight &= (y < 0) & (counts >= min_count)  # equal values have no r2
    return int(counts[straight].max(initial=0))


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


def rankme(values, floor: float = 0.0) -> float:
    """Returns exp(-sum p ln p) with p = s / sum s: the number of directions a spectrum fills.

    Between 1 and the number of values; negative rounding counts as 0, as do values below `floor`
    times the largest; NaN for all zeros. Give GRAM_FLOOR for per-sample gradients that are almost
    of low rank: many values that are nothing but rounding would fill directions. What it
    means depends on what is passed, and three uses are told apart by name:
    RankMe_lambda: eigenvalues of a covariance (primary for activations);
    RankMe_sigma: singular values, or square roots of eigenvalues (`rankme_sigma`; primary for
    gradients and weights; arXiv 2210.02885 has it on uncentred singular values);
    last-token RankMe: eigenvalues of the covariance of each sequence's last token
    (arXiv 2509.23024).
    """
    spectrum = _ranked(values)
    shares = ranked_shares(np.where(spectrum < floor * spectrum[:1], 0.0, spectrum))
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
    shares = ranked_shares(values)
    return float("nan") if shares is None else float(min(shares[:k].sum(), 1.0))


def participation_ratio(values) -> float:
    """Returns (sum s)^2 / sum s^2, a count of directions that small values hardly enter.

    Between 1 and RankMe of the same values (it is the exponential of the Renyi entropy of order 2,
    RankMe that of order 1); negative rounding counts as 0; NaN for all zeros.
    """
    shares = ranked_shares(values)
    return float("nan") if shares is None else float(1 / (shares @ shares))


def mean_fraction(eigenvalues, mean_sq: float, count: int) -> float:
    """Returns the share of the mean vector in the mean squared norm of n = `count` vectors.

    eigenvalues: of their covariance divided by n - 1; mean_sq: |mu|^2. The mean squared norm is
    |mu|^2 + trace (n - 1) / n exactly, so for RMS-normalised vectors of width d the share is
    |mu|^2 / d. Between 0 and 1; NaN when all vectors are 0. Raises ValueError for count < 2.
    """
    if count < 2:
        raise ValueError(f"count={count}: a covariance needs at least 2 vectors")
    mean_sq = float(mean_sq)
    # Rounding below 0 is summed with the rest: the trace is exact, no single eigenvalue is.
    norm_sq = mean_sq + float(_ranked(eigenvalues).sum()) * (count - 1) / count
    return mean_sq / norm_sq if np.isfinite(norm_sq) and norm_sq > 0 else float("nan")


class NoiseScale(NamedTuple):
    """Simple noise scale in samples and its parts: b_simple = trace / mean_sq.

    trace: of the covariance of per-sample gradients; mean_sq: squared norm of the true gradient.
    """

    b_simple: float
    trace: float
    mean_sq: float


def gradient_noise_scale(centred_singular_values, mean_sq: float) -> NoiseScale:
    """Returns B_simple = tr(Sigma) / |G|^2 of N per-sample gradients, in samples.

    centred_singular_values: (N,), of the rows minus their mean; mean_sq: |g|^2 of the mean of the
    N gradients. Both parts are unbiased: tr Sigma = sum sigma^2 / (N - 1), and |G|^2 =
    |g|^2 - tr Sigma / N, since the mean of N samples keeps a share 1/N of their noise. Where
    |G|^2 comes out at 0 or below, noise swamps the mean and b_simple is inf: N is too small to
    tell the scale. It is NaN when all gradients are 0, and all is NaN for fewer than two samples
    or a value that is not finite. In tokens: b_simple times the tokens of one sample.
    Source: McCandlish et al. 2018 (arXiv 1812.06162), section 2.2 and appendix A.1.
    """
    sigma, mean_sq = _ranked(centred_singular_values), float(mean_sq)
    if sigma.size < 2 or not np.all(np.isfinite(np.append(sigma, mean_sq))):
        return NoiseScale(np.nan, np.nan, np.nan)
    trace = float(sigma @ sigma) / (sigma.size - 1)
    true_sq = mean_sq - trace / sigma.size
    if true_sq > 0:
        return NoiseScale(trace / true_sq, trace, true_sq)
    return NoiseScale(np.inf if trace > 0 else np.nan, trace, true_sq)


def jsd(a, b) -> float:
    """Returns the Jensen-Shannon divergence of two spectra by rank, in nats, between 0 and ln 2.

    Both are cut to the shorter length and renormalised. It compares shapes only: rank is the index,
    so eigenvectors play no part. NaN when either is all zeros. Source: protocol spec 1.10.
    """
    a, b = _ranked(a), _ranked(b)
    length = min(a.size, b.size)
    p, q = ranked_shares(a[:length]), ranked_shares(b[:length])
    if p is None or q is None:
        return float("nan")
    middle = (p + q) / 2
    return float(np.clip((_divergence(p, middle) + _divergence(q, middle)) / 2, 0.0, np.log(2)))


def _divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Returns KL(p || q) in nats with 0 ln 0 = 0; q must be positive wherever p is."""
    present = p > 0
    return float(np.sum(p[present] * np.log(p[present] / q[present])))
