"""Rank correlations and their permutation tests against loops over every order."""

from itertools import permutations, product
from math import factorial

import numpy as np
import pytest

from lens_jax.correlations import (
    DRAWS,
    PermutationTest,
    alike_permutation_p,
    average_ranks,
    critical_rho,
    joint_permutation_p,
    max_over_looks_p,
    partial_spearman,
    partial_spearman_p,
    spearman,
    spearman_exact_p,
)

NAN = float("nan")
TIED = [1.0, 2.0, 2.0, 4.0, 4.0, 4.0]


def slow_ranks(values):
    ordered = sorted(values)
    places = {v: [i + 1 for i, w in enumerate(ordered) if w == v] for v in values}
    return [sum(places[v]) / len(places[v]) for v in values]


def slow_rho(x, y):
    kept = [(a, b) for a, b in zip(x, y, strict=True) if np.isfinite(a) and np.isfinite(b)]
    if len(kept) < 3:
        return NAN
    x, y = (slow_ranks([pair[i] for pair in kept]) for i in (0, 1))
    if len(set(x)) == 1 or len(set(y)) == 1:
        return NAN
    return float(np.corrcoef(x, y)[0, 1])


def slow_p(x, y):
    observed = abs(slow_rho(x, y))
    found = [abs(slow_rho(x, order)) for order in permutations(y)]
    return sum(rho >= observed - 1e-9 for rho in found) / len(found)


def draws(n, seed, ties=False):
    random = np.random.default_rng(seed)
    return random.integers(0, 3, n).astype(float) if ties else random.normal(size=n)


def test_ranks_share_ties_and_go_along_the_last_axis():
    assert average_ranks(TIED).tolist() == slow_ranks(TIED)
    rows = np.array([[3.0, 1.0, 1.0], [5.0, 7.0, 6.0]])
    assert average_ranks(rows).tolist() == [[3.0, 1.5, 1.5], [1.0, 3.0, 2.0]]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ties", [False, True])
def test_rho_and_its_p_against_a_loop(seed, ties):
    x, y = draws(6, seed), draws(6, seed + 100, ties)
    assert spearman(x, y) == pytest.approx(slow_rho(x, y))
    found = spearman_exact_p(x, y)
    assert found.p == pytest.approx(slow_p(x, y))
    assert (found.exact, found.arrangements) == (True, factorial(6))
    assert found.statistic == pytest.approx(slow_rho(x, y))


def test_missing_pairs_are_left_out():
    x, y = [1.0, 2.0, NAN, 4.0, 5.0, 3.0], [2.0, 1.0, 9.0, 4.0, np.inf, 3.0]
    assert spearman(x, y) == pytest.approx(slow_rho(x, y)) == pytest.approx(0.8)
    assert spearman_exact_p(x, y).arrangements == factorial(4)


@pytest.mark.parametrize(
    ("x", "y"), [([1, 2], [1, 2]), ([1, 2, NAN], [1, 2, 3]), ([1, 1, 1], [1, 2, 3])]
)
def test_no_correlation_of_fewer_than_three_or_of_a_constant(x, y):
    assert np.isnan(spearman(x, y))
    assert np.isnan(spearman_exact_p(x, y).p)
    assert np.isnan(joint_permutation_p([(x, y)]).p)


def test_known_probabilities_of_few_members():
    # Protocol spec 1.10: chances of one side; a two-sided p doubles them.
    for n, chance in ((3, 1 / 6), (4, 1 / 24), (5, 1 / 120)):
        assert spearman_exact_p(range(n), range(n)).p == pytest.approx(2 * chance)
    assert spearman_exact_p(range(4), [0, 2, 1, 3]).p == pytest.approx(2 * 0.167, abs=1e-3)
    assert spearman_exact_p(range(5), [0, 1, 2, 4, 3]).p == pytest.approx(2 * 0.042, abs=1e-3)


def test_critical_rho_is_the_least_that_passes():
    assert np.isnan(critical_rho(2))
    assert np.isnan(critical_rho(4))
    assert critical_rho(5) == pytest.approx(1.0)
    found = [slow_rho(range(6), order) for order in permutations(range(6))]
    chances = {r: np.mean(np.abs(found) >= r - 1e-9) for r in {round(abs(r), 9) for r in found}}
    assert critical_rho(6) == pytest.approx(min(r for r, p in chances.items() if p <= 0.05))
    assert critical_rho(8) == pytest.approx(0.738, abs=1e-3)  # the tables' two-sided 5 %


def test_beyond_eight_members_orders_are_drawn():
    x = np.arange(12.0)
    found = spearman_exact_p(x, x)
    assert (found.exact, found.arrangements) == (False, DRAWS)
    assert found.p == pytest.approx(1 / (1 + DRAWS))  # a perfect order is hardly drawn again
    middling = draws(12, 3)
    assert spearman_exact_p(x, middling) == spearman_exact_p(x, middling)
    assert spearman_exact_p(x, middling, seed=1).p == pytest.approx(
        spearman_exact_p(x, middling).p, abs=0.02
    )


def slow_joint(families, fold):
    observed = abs(np.mean([fold(slow_rho(x, y)) for x, y in families]))
    found = [
        abs(np.mean([fold(slow_rho(x, o)) for (x, _), o in zip(families, orders, strict=True)]))
        for orders in product(*(list(permutations(y)) for _, y in families))
    ]
    return sum(value >= observed - 1e-9 for value in found) / len(found)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("statistic", "fold"), [("absolute", abs), ("signed", float)])
def test_joint_p_against_all_products_of_orders(seed, statistic, fold):
    tied = np.random.default_rng(seed).permutation([0.0, 1.0, 1.0, 2.0])
    families = [(draws(3, seed), draws(3, seed + 50)), (draws(4, seed + 7), tied)]
    found = joint_permutation_p(families, statistic)
    assert found.p == pytest.approx(slow_joint(families, fold))
    assert found.arrangements == 6 * 24
    assert found.exact


def test_joint_p_of_one_family_is_its_own_p():
    x, y = draws(6, 1), draws(6, 2)
    for statistic in ("absolute", "signed"):
        assert joint_permutation_p([(x, y)], statistic).p == pytest.approx(slow_p(x, y))


def test_joint_p_is_exact_where_products_are_far_too_many():
    families = [(range(5), range(5))] * 12
    found = joint_permutation_p(families, "signed")
    assert found.exact
    assert found.p == pytest.approx(2 / 120.0**12, rel=1e-6)


def test_joint_p_leaves_out_families_without_a_correlation_and_draws_for_large_ones():
    small, none = (range(4), [0, 2, 1, 3]), ([1, 1, 1], [1, 2, 3])
    assert joint_permutation_p([small, none]) == joint_permutation_p([small])
    large = (range(10), range(10))
    found = joint_permutation_p([small, large])
    assert (found.exact, found.arrangements) == (False, DRAWS)
    assert 1 / (1 + DRAWS) <= found.p < 0.01
    with pytest.raises(ValueError, match="statistic=mean: give absolute or signed"):
        joint_permutation_p([small], "mean")


def test_repeated_families_give_no_new_members():
    families = [(range(5), range(5))] * 3
    assert joint_permutation_p(families, "signed").p == pytest.approx(2 / 120**3)
    found = alike_permutation_p(families)
    assert found == PermutationTest(pytest.approx(1.0), pytest.approx(2 / 120), 120, True)


def slow_looks(looks, y):
    """looks (F, L, n), y (F, n)."""

    def best(order):
        rhos = [
            [slow_rho(x, own[order]) for x in family] for family, own in zip(looks, y, strict=True)
        ]
        return np.nanmax(np.abs(np.mean(np.nan_to_num(rhos), axis=0)))

    orders = [np.array(order) for order in permutations(range(y.shape[1]))]
    found = [best(order) for order in orders]
    return found[0], sum(value >= found[0] - 1e-9 for value in found) / len(found)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("missing", [False, True])
def test_best_look_against_all_orders(seed, missing):
    random = np.random.default_rng(seed)
    looks, y = random.normal(size=(2, 3, 5)), random.normal(size=(2, 5))
    if missing:
        looks[0, 1, 2] = y[1, 3] = NAN
    statistic, p = slow_looks(looks, y)
    found = max_over_looks_p(looks, y)
    assert found.statistic == pytest.approx(statistic)
    assert found.p == pytest.approx(p)


def test_more_looks_cost_significance():
    random = np.random.default_rng(4)
    y = np.arange(5.0)
    looks = np.stack([y, *random.normal(size=(30, 5))])
    assert max_over_looks_p(looks[:1], y).p == pytest.approx(2 / 120)
    assert max_over_looks_p(np.stack([y] * 9), y).p == pytest.approx(2 / 120)  # the same look
    assert max_over_looks_p(looks, y).p > 0.2
    with pytest.raises(ValueError, match=r"give \(F, L, n\) and \(F, n\)"):
        max_over_looks_p(looks, y[:4])


def test_best_look_is_rare_as_its_p_says():
    random = np.random.default_rng(5)
    tests = [(random.normal(size=(3, 6)), random.normal(size=6)) for _ in range(400)]
    found = np.array([max_over_looks_p(*test).p for test in tests])
    for level in (0.1, 0.3, 0.6):
        assert level - 0.13 < np.mean(found <= level) < level + 0.05  # few values, so p is coarse


def slow_partial(x, y, given):
    xy, xg, yg = slow_rho(x, y), slow_rho(x, given), slow_rho(y, given)
    return (xy - xg * yg) / np.sqrt((1 - xg**2) * (1 - yg**2))


@pytest.mark.parametrize("seed", range(4))
def test_partial_rho_and_its_p_against_the_formula(seed):
    x, y, given = draws(6, seed), draws(6, seed + 9), draws(6, seed + 18, seed % 2 == 1)
    assert partial_spearman(x, y, given) == pytest.approx(slow_partial(x, y, given))
    observed = abs(slow_partial(x, y, given))
    with np.errstate(all="ignore"):
        found = [abs(slow_partial(order, y, given)) for order in permutations(x)]
    found = [0.0 if not np.isfinite(value) or value > 1 + 1e-6 else value for value in found]
    expected = sum(value >= observed - 1e-9 for value in found) / len(found)
    assert partial_spearman_p(x, y, given).p == pytest.approx(expected, abs=2 / 720)


def test_partial_rho_of_two_controls_is_of_residuals():
    x, y, given = draws(7, 1), draws(7, 2), np.stack([draws(7, 3), draws(7, 4)])
    design = np.column_stack([np.ones(7), *(average_ranks(given))])
    left = [
        r - design @ np.linalg.lstsq(design, r, rcond=None)[0]
        for r in (average_ranks(x), average_ranks(y))
    ]
    assert partial_spearman(x, y, given) == pytest.approx(np.corrcoef(*left)[0, 1])


def test_partial_rho_is_nan_where_the_control_determines_the_order():
    x, y = draws(5, 1), draws(5, 2)
    for given in (np.exp(x), -np.exp(x), y):
        assert np.isnan(partial_spearman(x, y, given))
        assert np.isnan(partial_spearman_p(x, y, given).p)
    assert np.isnan(partial_spearman(x[:3], y[:3], [1, 3, 2]))
    with pytest.raises(ValueError, match="give one length"):
        partial_spearman(x, y, [1, 2, 3])


def test_nothing_at_all_has_no_p():
    assert np.isnan(spearman_exact_p([NAN] * 4, range(4)).p)
    assert np.isnan(max_over_looks_p([[1.0, 2.0, 3.0]], [NAN] * 3).p)
    assert np.isnan(alike_permutation_p([([NAN] * 4, range(4))]).p)
