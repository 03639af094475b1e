"""Fourier modes of a table of mean activations: what the toy study calls a feature (toy spec 5, 6).

A band probe gives for every state m of Z_c the mean activation H[m], a row of a table (c, D). With
the rows centred over m, weighted alike, its modes and their energies are

    Ht_r = (1/c) sum_m H[m] exp(-2 pi i r m / c)        E_r = |Ht_r|^2        q_r = E_r / sum E

for r = 0..c-1, so E_0 = 0 and E_r = E_{c-r}. sum E is the mean squared norm of the centred rows,
the trace of their covariance. A positive mode is 1 <= r <= c // 2. It stands for the pair of r
and -r, but for the Nyquist mode r = c/2 of an even c, which is its own partner.

Every function takes c >= 2, prime or not, and works in float64.
"""

from typing import NamedTuple

import numpy as np

from lens_jax.fits import rankme


class Peak(NamedTuple):
    """The largest share q_r among the positive modes, and that mode; (NaN, 0) where all is 0."""

    share: float
    mode: int


class PrincipalModes(NamedTuple):
    """Principal components of a table and the frequency of each, K of them.

    shares: (K,), of the variance of all components, descending; peaks: (K,), the largest share of
    a positive mode in the component's scores over the states; modes: (K,) int, that mode;
    directions: (K, D), orthonormal rows.
    """

    shares: np.ndarray
    peaks: np.ndarray
    modes: np.ndarray
    directions: np.ndarray


def centred(table) -> np.ndarray:
    """The table (c, D) less its mean row, float64; a column that is constant is exactly 0.

    Raises ValueError unless it has two axes and two rows or more.
    """
    table = np.asarray(table, np.float64)
    if table.ndim != 2 or len(table) < 2:
        raise ValueError(f"table of shape {table.shape}: give (c, D) with c of 2 or more")
    constant = np.all(table == table[:1], axis=0)[None, :]  # (1, D)
    # The mean of equal numbers may miss them by rounding, which would then be all there is to see.
    return np.where(constant, 0.0, table - table.mean(axis=0)[None, :])


def modes(table) -> np.ndarray:
    """Ht (c, D), complex: the Fourier modes of the centred table."""
    rows = centred(table)
    found = np.fft.fft(rows, axis=0) / len(rows)
    found[0] = 0.0
    return found


def energies(table) -> np.ndarray:
    """E (c,): squared norms of the modes of the centred table (c, D)."""
    return np.sum(np.abs(modes(table)) ** 2, axis=1)


def mode_shares(table) -> np.ndarray:
    """q (c,), sum 1: the share of each mode in the energy; all NaN for a table without variance."""
    return _shares(energies(table))


def _shares(energy: np.ndarray) -> np.ndarray:
    total = energy.sum()
    return energy / total if total > 0 else np.full_like(energy, np.nan)


def pair_masses(shares) -> np.ndarray:
    """Mass (c // 2,) of the positive modes 1..c//2: q_r + q_-r, the Nyquist mode counted once."""
    shares = np.asarray(shares, np.float64)
    c = len(shares)
    mass = 2 * shares[1 : c // 2 + 1]
    if c % 2 == 0:
        mass[-1] = shares[c // 2]
    return mass


def h_peak(table) -> Peak:
    """max q_r over 1 <= r <= c // 2, the published score of a band (toy spec 5).

    For an odd c it lies between 1 / (c - 1) and 1/2, since q_r = q_-r; for an even one the Nyquist
    mode alone may hold everything. Of equal modes the lowest is named.
    """
    return peak_of(mode_shares(table))


def peak_of(shares) -> Peak:
    """`h_peak` of shares (c,) that are known already."""
    positive = np.asarray(shares)[1 : len(shares) // 2 + 1]
    if not np.all(np.isfinite(positive)):
        return Peak(float("nan"), 0)
    mode = int(np.argmax(positive))
    return Peak(float(positive[mode]), mode + 1)


def dominant_modes(table, k: int) -> tuple[int, ...]:
    """The k positive modes of the most pair mass, the greatest first; all c // 2 where k is more.

    For an even c the first need not be the mode of `h_peak`, which compares a pair by one member.
    Raises ValueError for k < 1.
    """
    if k < 1:
        raise ValueError(f"k={k}: give at least 1 mode")
    order = np.argsort(-pair_masses(mode_shares(table)), kind="stable")
    return tuple(int(r) + 1 for r in order[:k])


def concentration(table, modes) -> float:
    """H_S: the share of energy in the modes r and -r for r in `modes`, in [0, 1].

    No mode counts twice, whether it is named twice, with both signs, or is its own partner.
    Three choices of S are in use (toy spec 5): the dominant mode, `dominant_modes(table, 1)`; the
    K greatest, `dominant_modes(table, K)`; and a set fixed once, that of the last checkpoint.
    NaN for a table without variance. Raises ValueError for a mode that is 0 modulo c.
    """
    shares = mode_shares(table)
    c = len(shares)
    residues = {sign * int(r) % c for r in modes for sign in (1, -1)}
    if 0 in residues:
        raise ValueError(f"modes={tuple(modes)}: mode 0 is the mean; give modes 1 to {c // 2}")
    if not np.all(np.isfinite(shares)):
        return float("nan")
    return float(min(sum(shares[sorted(residues)]), 1.0))


def gini(shares) -> float:
    """Gini coefficient of shares (n,): 0 where all are equal, (n - 1) / n where one holds all.

    NaN for shares that are not finite or sum to 0.
    """
    ascending = np.sort(np.asarray(shares, np.float64))
    total, n = ascending.sum(), ascending.size
    if not np.isfinite(total) or total <= 0:
        return float("nan")
    return float(2 * np.arange(1, n + 1) @ ascending / (n * total) - (n + 1) / n)


def effective_modes(shares) -> float:
    """exp of the entropy of shares: how many modes hold the energy, r and -r counted apart.

    It is RankMe of the energies, and that of the between-state covariance of an equivariant code.
    """
    return rankme(shares)


def principal_modes(table, k: int = 8) -> PrincipalModes:
    """The first k principal components of the centred table H = U S V^T with their frequencies.

    The scores u_j of a component, a function on Z_c, have a Fourier spectrum of their own, whose
    greatest positive mode is named: at most 1/2 of it, but for the Nyquist mode. There are
    fewer than k components where the table has a lower rank.
    Raises ValueError for k < 1.
    """
    if k < 1:
        raise ValueError(f"k={k}: give at least 1 component")
    rows = centred(table)
    scores, sigma, directions = np.linalg.svd(rows, full_matrices=False)
    least = sigma[0] * max(rows.shape) * np.finfo(np.float64).eps
    k = min(k, int(np.count_nonzero(sigma > least)))
    peaks = [peak_of(_shares(energies(column[:, None]))) for column in scores.T[:k]]
    variance = sigma**2
    return PrincipalModes(
        variance[:k] / max(variance.sum(), np.finfo(np.float64).tiny),
        np.array([peak.share for peak in peaks]),
        np.array([peak.mode for peak in peaks], int),
        directions[:k],
    )
