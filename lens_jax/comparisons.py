"""Comparisons of two measurements by their directions, which spectra alone do not show.

The comparison of two spectra by their shape is `fits.jsd`. numpy in float64.
"""

import numpy as np


def subspace_overlap(u, v) -> float:
    """Returns |U'V|_F^2 / k, the share of the span of V that lies in the span of U, in [0, 1].

    u, v: (D, k) with orthonormal columns, such as the k leading eigenvectors of two covariances.
    It is the mean squared cosine of the principal angles, so 1 for equal spans and 0 for
    orthogonal ones; signs, order and rotations of the columns play no part. Two unrelated spans
    have k / D on average.

    Raises ValueError unless both shapes are the same (D, k) with 1 <= k <= D.
    """
    u, v = np.asarray(u, dtype=np.float64), np.asarray(v, dtype=np.float64)
    if u.ndim != 2 or u.shape != v.shape or not 1 <= u.shape[1] <= u.shape[0]:
        raise ValueError(f"bases of shapes {u.shape} and {v.shape}: give two of one shape (D, k)")
    return float(np.clip(np.sum((u.T @ v) ** 2) / u.shape[1], 0.0, 1.0))
