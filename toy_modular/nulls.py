"""What the modes of a band table show when there is nothing to see (toy spec 6.3 and 6.4).

A code without structure, one independent random vector a state, does not give a flat spectrum in
every table. Three effects are known exactly, for any law P(d) of the steps:

averaging   A code of the next state, h = phi(s + d), has in the table by the current state s the
            modes kappa_r phi_r with kappa_r = sum_d P(d) exp(2 pi i r d / c). The law leaves out
            the least steps, so |kappa_r|^2 is not flat and peaks at r = 1.
sampling    With n walks drawn instead of all, the noise of the means adds the same to every mode.
selection   The largest of c // 2 shares lies above their mean, the more so the fewer directions a
            code has.

The first two give expected energies; the share that is returned is a ratio of expectations, the
limit of many directions. The third is a Monte Carlo estimate. NumPy in float64.
"""

from typing import NamedTuple

import numpy as np

from lens_jax.fits import participation_ratio
from toy_modular.features import Peak, peak_of

DRAWS = 400
NOTHING = 1e-24
"""Energies below this are the rounding of numbers of order 1."""


class Selection(NamedTuple):
    """The largest share of an unstructured code over `draws` codes.

    mean and its standard error se; upper: the 95% quantile, which a code without structure passes
    once in twenty.
    """

    mean: float
    se: float
    upper: float
    draws: int


def transfer(law) -> np.ndarray:
    """kappa (c,), complex: sum_d P(d) exp(2 pi i r d / c) of a law (c,) that sums to 1.

    The modes of E[phi(s + d) | s] are kappa_r times those of phi.
    """
    law = np.asarray(law, np.float64)
    if law.ndim != 1 or law.size < 2 or not np.isclose(law.sum(), 1.0, atol=1e-5):
        raise ValueError(f"law of shape {law.shape}, sum {law.sum():.6g}: give (c,) with sum 1")
    return np.conj(np.fft.fft(law / law.sum()))


def kernel(law) -> np.ndarray:
    """|kappa_r|^2 (c,): what averaging over the steps leaves of the energy of each mode.

    Its sum over r != 0 is c sum P^2 - 1. For P uniform on m0..c-1 it is
    (sin(pi r m0 / c) / ((c - m0) sin(pi r / c)))^2 for r != 0 (toy spec 6.3).
    """
    return np.abs(transfer(law)) ** 2


def next_code_null(c: int, law) -> Peak:
    """H_peak that an unstructured code of the next state has in the table by the current state.

    It is 0.134 for c = 97 and 0.133 for c = 179 under the law of training, at r = 1, without
    anything learned about the group. (NaN, 0) for a law under which nothing is left: the uniform
    one on all of Z_c. Raises ValueError for a law that is not (c,) with sum 1.
    """
    return _peak(_kernel_of(c, law))


def _kernel_of(c: int, law) -> np.ndarray:
    law = np.asarray(law)
    if law.shape != (c,):
        raise ValueError(f"law of shape {law.shape}: a band of modulus {c} has a law ({c},)")
    return kernel(law)


def _peak(energy: np.ndarray) -> Peak:
    """The peak of expected energies (c,); the entry of r = 0 plays no part."""
    energy = energy.copy()
    energy[0] = 0.0
    if energy.max() < NOTHING:
        return Peak(float("nan"), 0)
    return peak_of(energy / energy.sum())


def white_null(c: int) -> float:
    """1 / (c - 1): the share of each mode of an unstructured code in the table by its own state.

    The Nyquist mode of an even c has the same share, and so half the mass of a pair.
    """
    if c < 2:
        raise ValueError(f"c={c}: give a modulus of 2 or more")
    return 1 / (c - 1)


def sampled_null(c: int, law, n: int) -> Peak:
    """`next_code_null` of a probe of n walks drawn from the law, instead of all of them.

    Of a code with unit variance the averaged modes have |kappa_r|^2 / c, and the mean of the n / c
    walks of a state misses its expectation by (1 - sum P^2) c / n, which is (1 - sum P^2) / n a
    mode. So an unstructured H_peak depends on n: 0.029 for c = 97 and 0.012 for c = 179 with
    12,000 walks (toy spec 6.4, which leaves out sum P^2). Holds for n well above c, so that no
    state goes without walks. Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n={n}: give at least 1 walk")
    law = np.asarray(law, np.float64)
    return _peak(_kernel_of(c, law) / c + (1 - law @ law) / n)


def effective_width(covariance) -> float:
    """Participation ratio of a covariance (D, D): how many equal directions a code is worth."""
    return participation_ratio(np.linalg.eigvalsh(np.asarray(covariance, np.float64)))


def selection_null(
    c: int, width: float, law=None, *, draws: int = DRAWS, seed: int = 0
) -> Selection:
    """The largest share of an unstructured code of `width` directions, by `draws` random codes.

    Without a law it is that of the table by the code's own state; with one, a code of the next
    state in the table by the current state. `width` need not be whole: give the participation
    ratio of the code's covariance (`effective_width`). Normal vectors with variances v_j have
    modes of energy sum_j v_j e_j, e_j exponential and independent between positive modes, whose
    mean and variance are those of a gamma law of shape (sum v)^2 / sum v^2; so gamma numbers are
    drawn. That is exact for equal variances. A Nyquist mode is real: half the shape.
    All is NaN for a law under which nothing is left of a code.

    Raises ValueError for c < 2, a width or a number of draws that is not positive, and a law that
    is not (c,).
    """
    if c < 2:
        raise ValueError(f"c={c}: give a modulus of 2 or more")
    if not 0 < width < np.inf:
        raise ValueError(f"width={width}: give a positive number of directions")
    if draws < 2:
        raise ValueError(f"draws={draws}: give at least 2")
    positive = np.arange(1, c // 2 + 1)
    nyquist = 2 * positive == c
    shape = np.where(nyquist, width / 2, width)
    energy = np.random.default_rng(seed).gamma(shape, 1 / shape, (draws, positive.size))
    if law is not None:
        left = _kernel_of(c, law)[positive]
        if left.max() < NOTHING:
            return Selection(float("nan"), float("nan"), float("nan"), draws)
        energy = energy * left[None, :]
    members = np.where(nyquist, 1, 2)
    peaks = energy.max(axis=1) / (energy @ members)
    return Selection(
        float(peaks.mean()),
        float(peaks.std(ddof=1) / np.sqrt(draws)),
        float(np.quantile(peaks, 0.95)),
        draws,
    )


def state_nulls(c: int, width: float, law) -> tuple[Selection, Selection]:
    """`selection_null` in a table by one state: of codes of that state, and of the other one.

    Those of the other state are seen through the law of steps, the same from either side.
    """
    return selection_null(c, width), selection_null(c, width, law)


def excess(share: float, null: float) -> float:
    """The share of energy beyond what a null expects, share - null; below 0 is possible.

    A plain difference, so that at one band the change of the excess over training is the change of
    H_peak itself, which is what is published. It is not divided by the room above the
    null: that is 1/2 for an odd c and up to 1 for an even one, depending on the mode.
    """
    return share - null
