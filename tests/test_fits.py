"""Summaries of spectra against closed forms, scipy and slow twins."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from lens_jax.fits import (
    COVARIANCE_FLOOR,
    GRAM_FLOOR,
    PAPER_WINDOWS,
    fit_alpha_req,
    fit_power_law,
    jsd,
    rankme,
    rankme_sigma,
    scale_ranks,
    topk_share,
    widest_power_law,
    window_alpha,
)

spectra = hnp.arrays(
    np.float64, st.integers(1, 40), elements=st.floats(1e-6, 1e6, allow_subnormal=False)
)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 1.76, 2.0, 4.5])
@pytest.mark.parametrize("window", [(1, 10), (30, 150), (90, 200), (200, 400)])
def test_planted_power_law_is_recovered(alpha, window):
    values = 7.5 * np.arange(1, 769.0) ** -alpha
    fit = fit_power_law(values, *window, floor=0)
    assert fit.alpha == pytest.approx(alpha, abs=1e-12)
    assert fit.se == pytest.approx(0, abs=1e-12)
    assert (fit.first, fit.last) == window
    assert math.isnan(fit.r2) if alpha == 0 else fit.r2 == pytest.approx(1, abs=1e-12)


def test_fit_agrees_with_scipy_on_noise():
    rng = np.random.default_rng(0)
    values = np.sort(np.arange(1, 301.0) ** -1.3 * np.exp(0.2 * rng.normal(size=300)))[::-1]
    for first, last in [(1, 300), (30, 150), (10, 12)]:
        fit = fit_power_law(values, first, last)
        ranks = np.arange(first, last + 1)
        twin = stats.linregress(np.log(ranks), np.log(values[first - 1 : last]))
        assert fit.alpha == pytest.approx(-twin.slope, rel=1e-10)
        assert fit.r2 == pytest.approx(twin.rvalue**2, rel=1e-10)
        assert fit.se == pytest.approx(twin.stderr, rel=1e-8)


def test_window_is_one_based_and_inclusive():
    values = np.exp(-np.array([0.0, 1.0, 5.0, 6.0, 20.0]))
    fit = fit_power_law(values, 2, 4)
    slope = np.polyfit(np.log([2, 3, 4]), [-1.0, -5.0, -6.0], 1)[0]
    assert fit.alpha == pytest.approx(-slope)


def test_last_rank_is_cut_to_the_spectrum():
    values = np.arange(1, 21.0) ** -1.5
    fit = fit_power_law(values, 5, 99)
    assert (fit.first, fit.last) == (5, 20)
    assert fit.alpha == pytest.approx(1.5)


def test_a_spectrum_ends_where_values_are_not_positive():
    values = np.arange(1, 31.0) ** -2.0
    values[25:] = [0.0, 0.0, -1e-18, -1e-17, -1e-17]
    fit = fit_power_law(values, 10, 30)
    assert fit.alpha == pytest.approx(2.0)
    assert (fit.first, fit.last) == (10, 25)


@pytest.mark.parametrize("fit", [fit_power_law, fit_alpha_req, widest_power_law])
def test_a_spectrum_ends_where_values_are_rounding(fit):
    """Forty values of a law and, from there on, the rounding of a float32 covariance."""
    values = np.arange(1, 257.0) ** -1.5
    values[40:] = COVARIANCE_FLOOR * np.linspace(0.9, 0.1, 216)
    window = {} if fit is widest_power_law else {"first": 10, "last": 150}
    found = fit(values, **window)
    assert found.alpha == pytest.approx(1.5)
    assert found.last == 40
    if window:
        assert fit(values, **window, floor=0).last == 150
    assert fit(values, **window, floor=1e-2).last == 21  # 21^-1.5 is the last above 1 %


def test_ranks_of_rounding_alone_have_no_exponent():
    values = np.arange(1, 257.0) ** -1.5
    values[40:] = COVARIANCE_FLOOR * np.linspace(0.9, 0.1, 216)
    for first, last in ((41, 150), (39, 150)):  # two values that are none of rounding make no fit
        fit = fit_power_law(values, first, last)
        assert np.isnan([fit.alpha, fit.r2, fit.se]).all()
        assert (fit.first, fit.last) == (first, last)
    assert math.isnan(window_alpha(values, 10, 150))
    assert window_alpha(values, 10, 40) == fit_power_law(values, 10, 150).alpha
    assert window_alpha(values[:40], 10, 150) == pytest.approx(1.5)  # no longer than that


def test_singular_values_have_half_the_alpha_of_eigenvalues():
    rng = np.random.default_rng(1)
    values = rng.lognormal(size=100)
    halves = fit_power_law(np.sqrt(values), 5, 60), fit_power_law(values, 5, 60)
    assert 2 * halves[0].alpha == pytest.approx(halves[1].alpha)


@pytest.mark.parametrize(
    "values",
    [np.zeros(200), np.r_[np.ones(31), np.zeros(169)], np.full(200, np.nan), -np.ones(200)],
)
def test_a_spectrum_without_three_usable_values_has_no_fit(values):
    fit = fit_power_law(values, 30, 150)
    assert np.isnan([fit.alpha, fit.r2, fit.se]).all()


def test_one_value_that_is_not_finite_spoils_the_fit():
    values = np.arange(1, 31.0) ** -2.0
    values[0] = np.inf
    assert math.isnan(fit_power_law(values, 10, 30).alpha)


@pytest.mark.parametrize(
    ("values", "window", "message"),
    [
        (np.ones(20), (21, 30), "beyond the spectrum of 20"),
        (np.ones(20), (0, 5), "give 1 <= first"),
        (np.ones(20), (6, 5), "give 1 <= first"),
        (np.ones((4, 5)), (1, 5), "one-dimensional"),
    ],
)
def test_bad_windows_are_refused_in_one_line(values, window, message):
    with pytest.raises(ValueError, match=message) as caught:
        fit_power_law(values, *window)
    assert "\n" not in str(caught.value)


@given(spectra, st.integers(1, 40), st.integers(0, 40), st.floats(1e-3, 1e3))
def test_fit_ignores_scale_and_order(values, first, length, scale):
    first = min(first, values.size)
    fit = fit_power_law(values, first, first + length)
    other = fit_power_law(scale * values[::-1], first, first + length)
    np.testing.assert_allclose(other.alpha, fit.alpha, rtol=1e-6, atol=1e-8)
    assert not fit.alpha < -1e-9  # a descending spectrum cannot rise
    assert not fit.se < 0


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.0])
def test_alpha_req_recovers_a_planted_law_on_its_own_ranks(alpha):
    values = 7.5 * np.arange(1, 769.0) ** -alpha
    values[:5] *= 100  # ranks 1-5 and those beyond 100 play no part
    values[100:] *= 1e-3
    fit = fit_alpha_req(values)
    assert fit.alpha == pytest.approx(alpha, abs=1e-12)
    assert fit.r2 == pytest.approx(1, abs=1e-12)
    assert (fit.first, fit.last) == (6, 100)
    assert fit_alpha_req(values[:50]).last == 50


def weighted_twin(x, y, weights):
    """Slope, weighted r2 and standard error by matrices, residuals of one common variance."""
    design = np.stack([np.ones_like(x), x], axis=1)  # (n, 2)
    solve = np.linalg.inv(design.T @ np.diag(weights) @ design) @ design.T @ np.diag(weights)
    residual_maker = np.eye(x.size) - design @ solve
    residual = residual_maker @ y
    variance = residual @ np.diag(weights) @ residual
    variance /= np.trace(residual_maker.T @ np.diag(weights) @ residual_maker)
    mean = np.average(y, weights=weights)
    r2 = 1 - np.sum(weights * residual**2) / np.sum(weights * (y - mean) ** 2)
    return (solve @ y)[1], r2, math.sqrt(variance * (solve @ solve.T)[1, 1])


def test_alpha_req_against_matrices_and_polyfit():
    rng = np.random.default_rng(3)
    values = np.sort(np.arange(1, 301.0) ** -1.3 * np.exp(0.2 * rng.normal(size=300)))[::-1]
    for first, last in [(6, 100), (1, 300), (10, 12)]:
        fit = fit_alpha_req(values, first, last)
        ranks = np.arange(first, last + 1.0)
        x, y = np.log(ranks), np.log(values[first - 1 : last])
        slope, r2, se = weighted_twin(x, y, 1 / ranks)
        assert fit.alpha == pytest.approx(-slope, rel=1e-9)
        assert fit.alpha == pytest.approx(-np.polyfit(x, y, 1, w=ranks**-0.5)[0], rel=1e-9)
        assert fit.r2 == pytest.approx(r2, rel=1e-9)
        assert fit.se == pytest.approx(se, rel=1e-7)


def test_error_of_alpha_req_is_the_spread_over_draws_of_equal_noise():
    rng = np.random.default_rng(4)
    # Steps of the planted law exceed the noise, so ranking changes nothing.
    law = -60 * np.log(np.arange(1, 101.0))
    fits = [fit_alpha_req(np.exp(law + 0.05 * rng.normal(size=100)), floor=0) for _ in range(2000)]
    spread = np.std([fit.alpha for fit in fits])
    assert np.sqrt(np.mean([fit.se**2 for fit in fits])) == pytest.approx(spread, rel=0.06)


def test_alpha_req_has_the_edges_of_the_plain_fit():
    assert np.isnan([fit_alpha_req(np.zeros(50)).alpha, fit_alpha_req(np.zeros(50)).se]).all()
    assert math.isnan(fit_alpha_req(np.r_[np.ones(49), np.nan]).alpha)
    flat = fit_alpha_req(np.full(50, 0.1))
    assert (flat.alpha, flat.se) == (0, 0)
    assert math.isnan(flat.r2)
    with pytest.raises(ValueError, match="ranks 6-100 begin beyond the spectrum of 5"):
        fit_alpha_req(np.ones(5))


def test_scaled_windows_of_the_paper():
    assert scale_ranks(30, 150, 768) == (30, 150)
    assert scale_ranks(30, 150, 96) == (4, 19)
    assert scale_ranks(90, 200, 96) == (11, 25)
    assert scale_ranks(10, 40, 32) == (1, 3)
    assert scale_ranks(200, 400, 1536) == (400, 800)


@given(st.sampled_from(sorted(PAPER_WINDOWS)), st.integers(3, 3000))
def test_scaled_windows_can_be_fitted(name, width):
    first, last = scale_ranks(*PAPER_WINDOWS[name], width)
    assert 1 <= first <= last - 2
    assert last <= width
    assert fit_power_law(np.arange(1, width + 1.0) ** -1.1, first, last).alpha == pytest.approx(1.1)


def test_scaling_refuses_what_cannot_be_fitted():
    with pytest.raises(ValueError, match="width=2"):
        scale_ranks(30, 150, 2)
    with pytest.raises(ValueError, match="ranks 9-8"):
        scale_ranks(9, 8, 768)


@pytest.mark.parametrize("rank", [1, 2, 7, 50])
def test_planted_rank_is_the_rankme(rank):
    values = np.r_[np.full(rank, 3.0), np.zeros(50 - rank)]
    assert rankme(values) == pytest.approx(rank)
    assert rankme_sigma(values) == pytest.approx(rank)


def test_rounding_below_a_floor_fills_no_direction():
    values = np.concatenate([np.ones(4), np.full(252, 1e-4)])
    assert rankme(values) > 4.1
    assert rankme(values, GRAM_FLOOR) == pytest.approx(4)
    assert rankme(values[:4], GRAM_FLOOR) == rankme(values[:4])


def test_rankme_against_a_loop():
    values = np.random.default_rng(2).lognormal(size=30)
    entropy = 0.0
    for value in values:
        entropy -= value / values.sum() * math.log(value / values.sum())
    assert rankme(values) == pytest.approx(math.exp(entropy))
    assert rankme_sigma(values) == pytest.approx(rankme([math.sqrt(v) for v in values]))


def test_statistics_of_zeros_are_nan_and_rounding_below_zero_is_nothing():
    for statistic in (rankme, rankme_sigma, lambda s: topk_share(s, 3), lambda s: jsd(s, s)):
        assert math.isnan(statistic(np.zeros(8)))
        assert math.isnan(statistic(np.array([])))
        assert math.isnan(statistic(np.array([np.nan, 1.0, 2.0])))
    assert rankme([1.0, 1.0, -1e-17]) == pytest.approx(2)
    assert rankme_sigma([1.0, 1.0, -1e-17]) == pytest.approx(2)
    assert math.isnan(jsd(np.zeros(8), np.ones(8)))


@given(spectra, st.floats(1e-3, 1e3))
def test_rankme_is_bounded_and_free_of_scale(values, scale):
    number = rankme(values)
    assert 1 - 1e-9 <= number <= values.size * (1 + 1e-9)
    assert rankme(scale * values) == pytest.approx(number, rel=1e-9)
    assert rankme_sigma(values) >= number * (1 - 1e-9)  # a root flattens the spectrum


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_extreme_scales_do_not_overflow(scale):
    values = scale * np.arange(1, 101.0)[::-1]
    assert rankme(values) == pytest.approx(rankme(np.arange(1, 101.0)))


def test_topk_share_counts_the_largest():
    assert topk_share([1.0, 4.0, 3.0, 2.0], 2) == pytest.approx(0.7)
    assert topk_share([1.0, 4.0], 10) == 1
    with pytest.raises(ValueError, match="k=0"):
        topk_share([1.0], 0)


@given(spectra, st.integers(1, 45))
def test_topk_share_grows_to_one(values, k):
    share = topk_share(values, k)
    assert min(k, values.size) / values.size - 1e-9 <= share <= topk_share(values, k + 1) + 1e-12
    assert topk_share(values, values.size) == pytest.approx(1)


def test_jsd_against_a_loop_and_its_ends():
    p, q = [0.5, 0.3, 0.2], [0.8, 0.1, 0.1]
    twin = 0.0
    for a, b in zip(p, q, strict=True):
        twin += 0.5 * a * math.log(2 * a / (a + b)) + 0.5 * b * math.log(2 * b / (a + b))
    assert jsd(p, q) == pytest.approx(twin)
    assert jsd([*p, 0.01], q) == pytest.approx(twin)  # cut to the shorter, then renormalised
    # Ranked spectra always share rank 1, so they reach ln 2 only in the limit.
    assert jsd([1.0, *[0.0] * 9999], np.ones(10_000)) == pytest.approx(math.log(2), abs=1e-3)


@given(spectra, spectra, st.randoms(use_true_random=False))
def test_jsd_is_a_symmetric_bounded_divergence_of_sets(a, b, random):
    value = jsd(a, b)
    assert 0 <= value <= math.log(2)
    assert jsd(b, a) == pytest.approx(value, abs=1e-12)
    assert jsd(a, a) == pytest.approx(0, abs=1e-12)
    shuffled = random.sample(list(a), a.size)
    assert jsd(shuffled, 3 * b) == pytest.approx(value, abs=1e-9)
