"""Many tests at once: which of them still say something. NumPy."""

from collections.abc import Sequence

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
