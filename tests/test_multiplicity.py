"""Many tests at once: adjusted p values against their definition, and p values together."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lens_jax.correlations import spearman_exact_p
from lens_jax.multiplicity import benjamini_hochberg, stouffer


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_adjusted_p_values_are_those_of_the_definition(p):
    adjusted = benjamini_hochberg(p)
    for own, found in zip(p, adjusted, strict=True):
        larger = [other for other in p if other >= own]
        twin = min(len(p) * other / sum(x <= other for x in p) for other in larger)
        assert found == pytest.approx(min(twin, 1.0), rel=1e-12)


def test_adjusted_p_values_are_the_published_ones():
    # the fifteen p values of Benjamini and Hochberg's example: four are below 0.05 after it
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459]
    p += [0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0]
    adjusted = benjamini_hochberg(p)
    assert np.sum(adjusted <= 0.05) == 4
    assert adjusted[3] == pytest.approx(0.0095 * 15 / 4)


def test_adjusting_keeps_order_and_places():
    rng = np.random.default_rng(0)
    p = rng.uniform(size=20)
    p[3] = np.nan
    adjusted = benjamini_hochberg(p)
    assert np.isnan(adjusted[3])
    kept = np.isfinite(p)
    assert np.all(adjusted[kept] >= p[kept])
    order = np.argsort(p[kept])
    assert np.all(np.diff(adjusted[kept][order]) >= 0)
    with pytest.raises(ValueError, match=r"p=1\.5"):
        benjamini_hochberg([0.5, 1.5])


def test_several_p_values_together():
    assert stouffer([0.03], [-1.0]) == (pytest.approx(-2.1701, abs=1e-4), pytest.approx(0.03))
    # two at 0.05 of one sign: z = 1.96 * sqrt(2); of two signs they cancel
    z, p = stouffer([0.05, np.nan, 0.05], [0.8, 1.0, 0.2])
    assert (z, p) == (pytest.approx(2.77181, abs=1e-4), pytest.approx(0.005574, abs=1e-5))
    assert stouffer([0.05, 0.05], [1.0, -1.0]) == (0.0, 1.0)
    assert stouffer([1e-300] * 9, [1.0] * 9)[0] > 100  # 1 - p / 2 would have been 1
    assert np.all(np.isnan(stouffer([np.nan], [1.0])))
    with pytest.raises(ValueError, match=r"p=0\.0"):
        stouffer([0.0], [1.0])
    rng = np.random.default_rng(5)
    p = [stouffer(rng.uniform(size=6), rng.choice([-1, 1], 6))[1] for _ in range(2000)]
    assert 0.035 < np.mean(np.array(p) <= 0.05) < 0.065


def test_together_the_p_of_few_orders_are_cautious():
    # each family has 24 orders, so its z has a variance of 0.57 and not 1
    rng = np.random.default_rng(6)
    kinds = [spearman_exact_p(np.arange(4), np.array(own)) for own in permutations(range(4))]
    p = np.array([own.p for own in kinds])
    signs = np.array([own.statistic for own in kinds])
    drawn = rng.integers(0, 24, (2000, 6))
    found = np.array([stouffer(p[own], signs[own])[1] for own in drawn])
    assert 0.003 < np.mean(found <= 0.05) < 0.02
