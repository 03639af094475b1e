"""Spectra of a measurement with a part left out, for error bars and nulls; numpy, float64, host.

The parts are groups of consecutive windows (or gradient samples), so that what is correlated stays
together; `lens_jax.jackknife` turns these spectra into standard errors of any statistic
(protocol spec 1.12).
"""

from collections.abc import Sequence

import numpy as np

from lens_jax.spectra import Moments, covariance_eigenvalues, gram_singular_values, pool

MOST_GROUPS = 32


def even_groups(items: int, *passes: int, spread: bool = False, most: int = MOST_GROUPS) -> int:
    """The largest number of equal groups of `items`, at most `most`, that every pass fills evenly.

    A pass of n items fills them evenly if n is a multiple of a group's items or divides them or,
    with spread, if it has equally many for every group.
    """
    for groups in range(min(most, items), 1, -1):
        size = items // groups
        fit = (n % groups == 0 if spread else n % size == 0 or size % n == 0 for n in passes)
        if items % groups == 0 and all(fit):
            return groups
    return 1


class Resampled:
    """Covariance eigenvalues of subsets of groups (count (G,), mean (G, D), scatter (G, D, D))."""

    def __init__(self, groups: Moments):
        self._whole = pool(groups, np)
        self._count = groups.count
        self._shift = groups.mean - self._whole.mean[None]
        outer = self._shift[:, :, None] * self._shift[:, None, :]
        # about the common mean, so that parts add up
        self._scatter = groups.scatter + groups.count[:, None, None] * outer

    def left_out(self) -> np.ndarray | None:
        """Eigenvalues with each group left out, (G, D); None where that leaves under 2 vectors."""
        return self._all_without([[group] for group in range(len(self._count))])

    def halves(self) -> np.ndarray | None:
        """Eigenvalues of the even groups alone and of the odd ones, (2, D); None as above."""
        groups = range(len(self._count))
        return self._all_without([groups[1::2], groups[0::2]])

    def _all_without(self, parts: Sequence[Sequence[int]]) -> np.ndarray | None:
        left = [self._whole.count - self._count[list(out)].sum() for out in parts]
        return np.stack([self._without(out) for out in parts]) if min(left) >= 2 else None

    def _without(self, out: Sequence[int]) -> np.ndarray:
        out = list(out)
        count = self._whole.count - self._count[out].sum()
        mean = -(self._count[out] @ self._shift[out]) / count
        scatter = self._whole.scatter - self._scatter[out].sum(0) - count * np.outer(mean, mean)
        return covariance_eigenvalues(Moments(count, mean, scatter), np)


def gram_left_out(
    gram: np.ndarray, centred: np.ndarray, groups: int, rank: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Singular values, centred singular values and the mean's square with each group left out.

    gram, centred: (N, N) of the rows and of the centred rows; rank: as `gram_singular_values` takes
    it. Returns (G, N - N/G) twice and (G,).
    """
    plain, about_mean, mean_sq = [], [], []
    for out in np.split(np.arange(len(gram)), groups):
        keep = np.delete(np.arange(len(gram)), out)
        rest = gram[np.ix_(keep, keep)]
        plain.append(gram_singular_values(rest, np, rank))
        mean_sq.append(rest.mean())
        rest = centred[np.ix_(keep, keep)]
        rest = rest - rest.mean(0)[None] - rest.mean(1)[:, None] + rest.mean()
        about_mean.append(gram_singular_values(rest, np, rank, centred=True))
    return np.stack(plain), np.stack(about_mean), np.stack(mean_sq)
