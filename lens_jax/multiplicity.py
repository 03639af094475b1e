"""Many tests at once: which of them still say something, and what they say together. NumPy."""

from collections.abc import Sequence
from math import erfc, nan, sqrt
from statistics import NormalDist

import numpy as np


def benjamini_hochberg(p: Sequence[float]) -> np.ndarray:
    """Returns adjusted p values (n,), in the order given; NaN stays NaN and does not count.

    Calling a test positive when its adjusted p is at most q keeps the expected share of false ones
    among the positive below q, for independent tests and for positively dependent ones: with m
    tests sorted ascending, q_i = min over j >= i of m p_j / j, at most 1. Raises ValueError for a
    p outside [0, 1]. Source: Benjamini and Hochberg 1995.
    """
    values = np.asarray(p, np.float64)
    present = np.flatnonzero(np.isfinite(values))
    kept = values[present]
    if np.any((kept < 0) | (kept > 1)):
        raise ValueError(f"p={kept[(kept < 0) | (kept > 1)][0]}: give numbers from 0 to 1")
    order = np.argsort(kept)
    scaled = kept[order] * kept.size / np.arange(1, kept.size + 1)
    smallest_from_here = np.minimum.accumulate(scaled[::-1])[::-1]
    adjusted = np.full(values.shape, np.nan)
    adjusted[present[order]] = np.minimum(smallest_from_here, 1.0)
    return adjusted


def stouffer(p: Sequence[float], signs: Sequence[float]) -> tuple[float, float]:
    """Returns z and the two-sided p of independent tests together, all of one weight.

    p: two-sided, of each test; signs: positive where its statistic is. Each counts with
    z_i = sign * Phi^-1(1 - p_i / 2), and z = sum z_i / sqrt(k) is normal under the null. A p of few
    orders has z_i of too little variance, so the result is cautious: with six families of four
    members p <= 0.05 comes in 1 % of cases, and `correlations.joint_permutation_p`, which is exact,
    decides. A test whose p is NaN does not count; (NaN, NaN) without any. Raises ValueError for a p
    outside (0, 1] and for lists of unlike length.
    Source: Stouffer et al. 1949; protocol spec 1.11 T3.
    """
    pairs = [pair for pair in zip(p, signs, strict=True) if np.isfinite(pair[0])]
    if outside := [own for own, _ in pairs if not 0 < own <= 1]:
        raise ValueError(f"p={outside[0]}: give numbers above 0 and up to 1")
    if not pairs:
        return nan, nan
    # the lower half of the distribution: 1 - p / 2 would be 1 for a small p
    normal = [-np.sign(sign) * NormalDist().inv_cdf(own / 2) for own, sign in pairs]
    z = float(sum(normal) / sqrt(len(normal)))
    return z, erfc(abs(z) / sqrt(2))
