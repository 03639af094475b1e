"""Rank correlations of few members, with permutation tests; NumPy in float64.

A spectrum's exponent is compared with an efficiency over four or five batch sizes, so every
probability here comes from the orders of the members themselves and none from a large-sample
formula. Ranks are average ranks. Pairs with a value that is not finite are left out, and a
correlation of fewer than three pairs, or with a constant, is NaN.

Up to MOST_EXACT members all n! orders are compared. Beyond, orders are drawn from a seeded
generator, and p = (1 + orders at least as extreme) / (1 + draws), which is valid but never below
1 / (1 + draws). Ties need no correction: what is permuted are the observed values.
Source: protocol spec 1.10 and 1.11; Phipson and Smyth 2010 for the Monte Carlo p.
"""

from collections.abc import Sequence
from itertools import permutations
from math import factorial
from typing import Literal, NamedTuple

import numpy as np

MOST_EXACT = 8
"""Members up to which all orders are compared: 8! = 40,320."""

MOST_SUMS = 1_000_000
"""Distinct sums over families up to which a joint distribution is exact."""

DRAWS = 19_999
_SAME = 1e-9  # correlations that differ by less are equal but for rounding


class PermutationTest(NamedTuple):
    """A statistic and the share of the compared arrangements that are at least as extreme.

    exact: whether all arrangements were compared; arrangements: how many there are, or were drawn.
    """

    statistic: float
    p: float
    arrangements: int
    exact: bool


UNDEFINED = PermutationTest(np.nan, np.nan, 0, True)


def average_ranks(values) -> np.ndarray:
    """Ranks from 1 along the last axis, equal values sharing the mean of theirs; (..., n)."""
    values = np.asarray(values, dtype=np.float64)
    lower = np.sum(values[..., None, :] < values[..., :, None], axis=-1)
    equal = np.sum(values[..., None, :] == values[..., :, None], axis=-1)  # itself among them
    return lower + (equal + 1) / 2


def spearman(x, y) -> float:
    """Returns the Pearson correlation of the average ranks of the finite pairs, or NaN."""
    x, y = _pairs(x, y)
    return float(_rank_correlations(x, y[None, :])[0])


def spearman_exact_p(x, y, *, draws: int = DRAWS, seed: int = 0) -> PermutationTest:
    """Tests spearman(x, y), two-sided: the share of orders of y with |rho| at least the observed.

    Null: given the values of x, all orders of the values of y are equally likely.
    """
    x, y = _pairs(x, y)
    return max_over_looks_p(x[None, :], y, draws=draws, seed=seed)._replace(
        statistic=spearman(x, y)
    )


def critical_rho(n: int, level: float = 0.05) -> float:
    """Returns the least |rho| of n members without ties whose two-sided p is `level` or below.

    NaN where even |rho| = 1 is not enough (p = 2 / n!, so below five members at 0.05).
    """
    if n < 3:
        return float("nan")
    orders, _ = _orders(n, DRAWS, 0)
    found = np.abs(_rank_correlations(np.arange(n), orders))
    for rho in np.unique(found.round(9)):
        if np.mean(found >= rho - _SAME) <= level:
            return float(rho)
    return float("nan")


def joint_permutation_p(
    families: Sequence[tuple],
    statistic: Literal["absolute", "signed"] = "absolute",
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> PermutationTest:
    """Tests families (x, y) of members together, each permuted within itself and on its own.

    statistic: mean |rho| over families ("absolute", large is extreme), or mean rho ("signed",
    two-sided). Null: within each family all orders of y are equally likely, and families are
    independent. Families that are repetitions of the same members (seeds over the same batch
    sizes) are not: what the members are moves all of them at once, and this p is then too small;
    `alike_permutation_p` is the test for those. A family with no correlation is left out.

    The distribution is exact as long as families have at most MOST_EXACT members and their sums
    take at most MOST_SUMS values: it is the convolution of those of the families.
    Source: protocol spec 1.11 T3, "permute tiers within families".
    """
    if statistic not in ("absolute", "signed"):
        raise ValueError(f"statistic={statistic}: give absolute or signed")
    pairs = [_pairs(*family) for family in families]
    rhos = [spearman(*pair) for pair in pairs]
    pairs = [pair for pair, rho in zip(pairs, rhos, strict=True) if np.isfinite(rho)]
    if not pairs:
        return UNDEFINED
    fold = np.abs if statistic == "absolute" else np.asarray
    observed = float(np.mean(fold([rho for rho in rhos if np.isfinite(rho)])))
    null = _summed_null(pairs, fold)
    if null is not None:
        sums, chances = null
        extreme = np.abs(sums) / len(pairs) >= abs(observed) - 1e-6
        count = int(np.prod([factorial(x.size) for x, _ in pairs], dtype=object))
        return PermutationTest(observed, float(min(chances[extreme].sum(), 1.0)), count, True)
    random = np.random.default_rng(seed)
    total = np.zeros(draws)
    for x, y in pairs:
        orders = random.permuted(np.tile(y, (draws, 1)), axis=1)
        total += fold(_rank_correlations(x, orders))
    beyond = np.sum(np.abs(total) / len(pairs) >= abs(observed) - _SAME)
    return PermutationTest(observed, float((1 + beyond) / (1 + draws)), draws, False)


def alike_permutation_p(
    families: Sequence[tuple], *, draws: int = DRAWS, seed: int = 0
) -> PermutationTest:
    """Tests mean rho over families of the same members, two-sided, permuted alike in all.

    families: (x, y) with the members in the same places. Null: the y of a member, in all families
    at once, might as well be another member's. Repeating a sweep of batch sizes with other seeds
    steadies rho and gives no new members: with five of them p stays at 2 / 120 or above. A y that
    is missing in one family is permuted as the member's others are.
    """
    x, y = (np.array([family[i] for family in families], np.float64) for i in (0, 1))
    return max_over_looks_p(x[:, None, :], y, draws=draws, seed=seed)


def max_over_looks_p(looks, y, *, draws: int = DRAWS, seed: int = 0) -> PermutationTest:
    """Tests the best |rho| of several looks at the same members (steps, rank windows, layers).

    looks: (L, n) values of n members at L looks, and y: (n,); or of F families of the same members
    (F, L, n) and (F, n), which are permuted alike. The statistic is the largest |mean over families
    of rho| of any look; p is the share of the orders whose own best look is at least as good, which
    counts every look that was taken. Null: as in `alike_permutation_p`. For one look the statistic
    keeps its sign. A look without a correlation takes no part, nor does a member without any y.
    """
    looks, y = np.asarray(looks, np.float64), np.asarray(y, np.float64)
    if y.ndim == 1:
        looks, y = looks[None], y[None]
    if looks.ndim != 3 or looks.shape[::2] != y.shape:
        raise ValueError(f"looks {looks.shape} at members {y.shape}: give (F, L, n) and (F, n)")
    present = np.any(np.isfinite(y), axis=0)
    looks, y = looks[:, :, present], y[:, present]
    orders, exact = _orders(y.shape[1], draws, seed)  # the first one is the observed
    best = np.full(len(orders), np.nan)
    for look in range(looks.shape[1]):
        rho = _mean_rho(looks[:, look], y, orders)
        best = np.fmax(best, np.abs(rho))
    if not np.isfinite(best[0]):
        return UNDEFINED
    p = float(np.mean(np.nan_to_num(best) >= best[0] - _SAME))
    signed = rho[0] if looks.shape[1] == 1 else best[0]
    return PermutationTest(float(signed), p, len(orders) - (not exact), exact)


def partial_spearman(x, y, given) -> float:
    """Returns the correlation of the ranks of x and y without what the ranks of `given` explain.

    given: (n,), or (K, n) several. Both are freed of it by least squares, so for one it is
    (r_xy - r_xg r_yg) / sqrt((1 - r_xg^2) (1 - r_yg^2)). NaN where `given` determines the order of
    x or of y, since nothing is left to correlate, and for fewer than 3 + K members.
    Source: protocol spec 1.11 T1 (an exponent beside the batch size itself).
    """
    x, y, given = _triples(x, y, given)
    if x.size < 3 + len(given):
        return float("nan")
    return float(_partials(x[None, :], y, given)[0])


def partial_spearman_p(x, y, given, *, draws: int = DRAWS, seed: int = 0) -> PermutationTest:
    """Tests partial_spearman, two-sided, over the orders of x with y and `given` left in place.

    Null: x is independent of y and `given` together, which is more than no partial correlation; a
    test of that alone has no exact form. Orders in which `given` determines x count as 0.
    """
    x, y, given = _triples(x, y, given)
    observed = partial_spearman(x, y, given)
    if not np.isfinite(observed):
        return UNDEFINED
    orders, exact = _orders(x.size, draws, seed)
    found = np.nan_to_num(np.abs(_partials(x[orders], y, given)))
    p = float(np.mean(found >= abs(observed) - _SAME))
    return PermutationTest(observed, p, len(orders) - (not exact), exact)


def _pairs(x, y) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"values of shapes {x.shape} and {y.shape}: give two of one length (n,)")
    kept = np.isfinite(x) & np.isfinite(y)
    return x[kept], y[kept]


def _triples(x, y, given) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    given = np.atleast_2d(np.asarray(given, np.float64))
    if x.ndim != 1 or x.shape != y.shape or given.shape[1:] != x.shape:
        raise ValueError(
            f"values of shapes {x.shape} and {y.shape} given {given.shape}: give one length (n,)"
        )
    kept = np.isfinite(x) & np.isfinite(y) & np.all(np.isfinite(given), axis=0)
    return x[kept], y[kept], given[:, kept]


def _orders(n: int, draws: int, seed: int) -> tuple[np.ndarray, bool]:
    """Orders of n members, (P, n), the unchanged one first, and whether they are all."""
    if n <= MOST_EXACT:
        return np.array(list(permutations(range(n))), int), True
    unchanged = np.arange(n)[None, :]
    drawn = np.random.default_rng(seed).permuted(np.repeat(unchanged, draws, axis=0), axis=1)
    return np.concatenate([unchanged, drawn]), False


def _rank_correlations(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """rho of x (n,) with every row (P, n) over their finite pairs.

    NaN for fewer than three pairs or a constant.
    """
    present = np.isfinite(x)[None, :] & np.isfinite(rows)
    if np.all(present):
        left = average_ranks(x)[None, :]
    else:
        left = average_ranks(np.where(present, x[None, :], np.nan))
        rows = np.where(present, rows, np.nan)
    count = present.sum(axis=1, keepdims=True)
    left, right = ((r - (count + 1) / 2) * present for r in (left, average_ranks(rows)))
    norms = np.sqrt(np.sum(left**2, axis=1) * np.sum(right**2, axis=1))
    defined = (norms > 0) & (count[:, 0] >= 3)
    products = np.sum(left * right, axis=1)
    return np.divide(products, norms, out=np.full(len(rows), np.nan), where=defined)


def _mean_rho(x: np.ndarray, y: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """Mean over families (F, n) of rho, for every order (P,), NaN where no family has any.

    A rho that an order leaves undefined counts as 0.
    """
    rhos = [_rank_correlations(own, other[orders]) for own, other in zip(x, y, strict=True)]
    rhos = [np.nan_to_num(own) for own in rhos if np.any(np.isfinite(own))]
    return np.mean(rhos, axis=0) if rhos else np.full(len(orders), np.nan)


def _summed_null(pairs, fold) -> tuple[np.ndarray, np.ndarray] | None:
    """Values and chances of the sum of the families' rho under the null; None if too many."""
    sums, chances = np.zeros(1), np.ones(1)
    for x, y in pairs:
        if x.size > MOST_EXACT:
            return None
        rhos = fold(_rank_correlations(x, y[_orders(x.size, 0, 0)[0]])).round(9)
        values, counts = np.unique(rhos, return_counts=True)
        if sums.size * values.size > MOST_SUMS:
            return None
        together = (sums[:, None] + values[None, :]).round(9).ravel()
        weights = (chances[:, None] * (counts / counts.sum())[None, :]).ravel()
        sums, place = np.unique(together, return_inverse=True)
        chances = np.bincount(place, weights)
    return sums, chances


def _partials(rows: np.ndarray, y: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Partial rank correlations of every row (P, n) with y; NaN where `given` leaves nothing."""
    design = np.column_stack([np.ones(y.size), *(average_ranks(given))])
    left, sizes, _ = np.linalg.svd(design, full_matrices=False)
    basis = left[:, sizes > 1e-10 * sizes[0]]

    def freed(ranks):
        rest = ranks - ranks @ basis @ basis.T
        return np.where(np.sum(rest**2, axis=-1, keepdims=True) > 1e-9, rest, 0.0)

    rows, y = freed(average_ranks(rows)), freed(average_ranks(y))
    norms = np.sqrt((y @ y) * np.sum(rows**2, axis=1))
    return np.divide(rows @ y, norms, out=np.full(len(rows), np.nan), where=norms > 0)
