"""What seeds change and what batches change beyond it: fits, degrees of freedom, sizes of tests."""

from math import pi
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.seed_spread import (
    _Row,
    _spread,
    batches_test,
    difference_error,
    f_upper,
    seed_spread,
    small_effect_test,
    t_test,
)
from experiments.study_records import Cell

DRAWS = 600


def rows_of(table, rung="muon", seeds=None):
    """Rows of a table (batches, seeds); NaN where a run is not there."""
    table = np.asarray(table, np.float64)
    return [
        _Row(Cell(rung, "d12", 2**batch), seed if seeds is None else seeds[batch][seed], value)
        for batch, own in enumerate(table)
        for seed, value in enumerate(own)
        if np.isfinite(value)
    ]


def spread_of(table, **kwargs):
    return _spread(rows_of(table, **kwargs), int(np.sum(np.isfinite(table).sum(1) > 1)))


def drawn(effect=0.0, common=2.0, cells=4, seeds=3):
    """Spreads of DRAWS tables with rests of sd 1: `effect` sd over batches, `common` over seeds."""
    rng = np.random.default_rng(0)
    for _ in range(DRAWS):
        table = rng.normal(size=(cells, seeds)) + common * rng.normal(size=seeds)
        yield spread_of(table + effect * rng.normal(size=(cells, 1)))


# The fit


def test_crossed_seeds_leave_the_two_way_residual():
    table = np.random.default_rng(1).normal(size=(4, 3))
    found = spread_of(table)
    rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    assert found.crossed
    assert (found.freedom, found.batch_freedom, found.cells) == (6, 3, 4)
    assert found.seeds == pytest.approx((np.sum(rest**2) / 6) ** 0.5)
    assert found.within == pytest.approx(np.mean(np.var(table, axis=1, ddof=1)) ** 0.5)
    assert found.batches == pytest.approx(np.std(table.mean(1), ddof=1))
    assert found.f == pytest.approx(3 * found.batches**2 / found.seeds**2)
    assert found.ratio == pytest.approx(found.batches / (found.seeds / 3**0.5))
    assert found.per_cell == pytest.approx(3)


def test_what_a_seed_changes_everywhere_is_no_noise():
    table = np.random.default_rng(1).normal(size=(4, 3))
    one, moved = spread_of(table), spread_of(table + np.array([0.0, 10.0, -5.0]))
    assert moved.seeds == pytest.approx(one.seeds)
    assert moved.f == pytest.approx(one.f)
    assert moved.within > 5


@pytest.mark.parametrize(
    ("present", "seeds", "freedom"),
    [
        ([3, 1, 1, 1], None, 2),  # one cell has several
        ([2, 2, 2], [(0, 1), (2, 3), (4, 5)], 3),  # each has seeds of its own
    ],
)
def test_without_common_seeds_the_noise_is_that_about_the_mean(present, seeds, freedom):
    table = np.random.default_rng(2).normal(size=(len(present), 3))
    table[np.arange(3) >= np.array(present)[:, None]] = np.nan
    found = spread_of(table, seeds=seeds)
    assert not found.crossed
    assert found.freedom == freedom
    assert found.seeds == found.within
    means, grand = np.nanmean(table, axis=1), np.nanmean(table)
    squares = np.nansum((table - means[:, None]) ** 2)
    between = np.sum(np.array(present) * (means - grand) ** 2) / (len(present) - 1)
    assert found.seeds == pytest.approx((squares / freedom) ** 0.5)
    assert found.f == pytest.approx(between / (squares / freedom))


def test_a_run_that_is_not_there_costs_one_degree():
    table = np.random.default_rng(3).normal(size=(4, 3))
    table[1, 2] = np.nan
    found = spread_of(table)
    assert (found.freedom, found.batch_freedom, found.crossed) == (5, 3, True)
    assert 2.5 < found.per_cell < 3


def test_families_have_batches_of_their_own():
    one, other = np.random.default_rng(4).normal(size=(2, 4, 3))
    apart = _spread(rows_of(one) + rows_of(other + 100, rung="untied"), 8)
    assert (apart.batch_freedom, apart.freedom) == (6, 14)  # 24 runs, 8 cells, 2 more seeds
    assert apart.f < 10


def test_numbers_that_are_not_finite_and_families_of_one_seed_are_left_out():
    cells = [Cell("muon", "d12", 2), Cell("muon", "d12", 4), Cell("rope", "d12", 2)]
    places = [(cells[0], 0), (cells[0], 1), (cells[1], 0), (cells[1], 1), (cells[2], 0)]
    runs = [SimpleNamespace(cell=cell, seed=seed) for cell, seed in places]
    values = dict(zip(map(id, runs), (1.0, 2.0, 4.0, np.inf, 9.0), strict=True))
    found = seed_spread(SimpleNamespace(chosen=runs), lambda run: values[id(run)])
    assert (found.cells, found.freedom, found.batch_freedom) == (1, 1, 1)
    assert found.seeds == pytest.approx(0.5**0.5)
    assert found.batches == pytest.approx(abs(1.5 - 4.0) / 2**0.5)
    none = seed_spread(SimpleNamespace(chosen=runs[4:]), lambda run: 1.0)
    assert np.isnan(none.seeds)
    assert np.isnan(batches_test(none).p)


def test_equal_seeds_are_compared_in_pairs():
    table = np.random.default_rng(5).normal(size=(4, 3))
    spread = spread_of(table + np.array([0.0, 9.0, -9.0]))
    runs = [SimpleNamespace(seed=seed) for seed in range(3)]
    assert difference_error(spread, runs, runs) == pytest.approx(spread.seeds * (2 / 3) ** 0.5)
    other = difference_error(spread, runs, runs[:1])
    assert other == pytest.approx(spread.within * (4 / 3) ** 0.5)


# The laws


def test_the_upper_tail_of_f():
    for f in (0.1, 1.0, 4.4):
        assert f_upper(f, 3, 2) == pytest.approx(1 - (3 * f / (3 * f + 2)) ** 1.5)
        assert f_upper(f, 2, 7) == pytest.approx((1 + 2 * f / 7) ** -3.5)
        assert f_upper(f, 1, 1) == pytest.approx(1 - 2 / pi * np.arctan(f**0.5))  # Cauchy squared
    assert f_upper(0.0, 3, 5) == pytest.approx(1.0)
    assert f_upper(4.757, 3, 6) == pytest.approx(0.05, abs=1e-5)  # of the printed table
    assert f_upper(3.936, 1, 100) == pytest.approx(0.05, abs=1e-4)


def test_a_t_test_is_two_sided():
    for sign in (1, -1):
        test = t_test(sign * 2.447, 1.0, 6)
        assert test.p == pytest.approx(0.05, abs=1e-5)
        assert test.statistic == sign * 2.447
    assert np.isnan(t_test(1.0, float("nan"), 6).p)
    assert np.isnan(t_test(1.0, 0.1, 0).p)


# Sizes, by simulation: of 600 draws at a rate of 5 % three standard errors are 2.7 %


def test_no_effect_of_batches_is_found_at_the_level():
    found = [batches_test(spread).p for spread in drawn()]
    assert 0.025 < np.mean(np.array(found) <= 0.05) < 0.077
    assert 0.44 < np.mean(found) < 0.56


def test_an_effect_as_large_as_that_of_seeds_is_excluded_at_the_level():
    spreads = list(drawn(effect=1.0))
    found = [small_effect_test(spread).p for spread in spreads]
    assert 0.025 < np.mean(np.array(found) <= 0.05) < 0.077
    assert np.mean([batches_test(spread).p <= 0.05 for spread in spreads]) > 0.2


def test_an_effect_of_no_size_can_be_excluded():
    found = np.array([small_effect_test(spread).p for spread in drawn(effect=0.0)])
    assert 0.15 < np.mean(found <= 0.05) < 0.45
