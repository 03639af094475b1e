"""Widest power law, counts of directions, means, noise scale and overlaps against slow twins."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import linalg, stats

from lens_jax.comparisons import subspace_overlap
from lens_jax.fits import (
    fit_power_law,
    gradient_noise_scale,
    mean_fraction,
    participation_ratio,
    rankme,
    widest_power_law,
)


def widest_twin(values, min_r2=0.99, min_ranks=10, first=1):
    """Every range, one ordinary fit each."""
    values = np.sort(values)[::-1]
    best, widest = "none", (0.0, 0)
    for start in range(first, values.size + 1):
        for end in range(start + min_ranks - 1, np.count_nonzero(values > 0) + 1):
            fit = fit_power_law(values, start, end)
            width = (end / start, end - start)
            if fit.r2 >= min_r2 and width > widest:
                best, widest = fit, width
    return best


def widest_or_none(values, **settings):
    fit = widest_power_law(values, **settings)
    return "none" if math.isnan(fit.alpha) else fit


ranks60 = np.arange(1, 61.0)
BENT = {
    "law": ranks60**-1.2,
    "flat top": np.minimum(ranks60**-1.0, 0.1),
    "knee": np.where(ranks60 < 25, ranks60**-0.5, 5 * ranks60**-1.0),
    "plateaus": np.repeat([5.0, 4.0, 2.0, 1.0], 15),
    "exponential": np.exp(-0.05 * ranks60),
    "zeros": np.r_[ranks60[:35] ** -2.0, np.zeros(20), np.full(5, -1e-17)],
    "tiny steps": 1 + 1e-9 * ranks60[::-1],
    "noise": np.random.default_rng(5).lognormal(size=60),
    "spike": np.r_[1e9, np.random.default_rng(6).random(59)],
}


@pytest.mark.parametrize("name", BENT)
@pytest.mark.parametrize("settings", [{}, {"min_r2": 0.97, "min_ranks": 4}, {"first": 7}])
def test_widest_range_is_that_of_a_double_loop(name, settings):
    assert widest_or_none(BENT[name], **settings) == widest_twin(BENT[name], **settings)


@given(
    hnp.arrays(np.float64, st.integers(10, 24), elements=st.floats(-3, 3)),
    st.sampled_from([0.9, 0.96, 0.993]),
)
def test_widest_range_of_any_spectrum(logs, min_r2):
    values = np.exp(logs.round(2))
    settings = {"min_r2": min_r2, "min_ranks": 5}
    assert widest_or_none(values, **settings) == widest_twin(values, **settings)


def test_a_power_law_between_bends_is_found():
    ranks = np.arange(1, 401.0)
    values = np.where(ranks < 8, 8.0**-1.5, ranks**-1.5) * np.exp(-((ranks / 300) ** 6))
    fit = widest_power_law(values, min_r2=0.9995)
    assert fit.alpha == pytest.approx(1.5, abs=0.05)
    assert fit.first in range(5, 10)
    assert fit.last in range(180, 280)


def test_of_equally_wide_ranges_the_one_of_more_ranks_is_taken():
    ranks = np.arange(1, 113.0)
    values = ranks**-0.1 * np.exp(-50.0 * (ranks > 10) - 50.0 * (ranks > 110))
    assert widest_power_law(values, floor=0)[3:] == (11, 110)  # and not 1-10
    assert widest_power_law(values[:110], floor=0)[3:] == (11, 110)
    assert widest_power_law(values[:109], floor=0)[3:] == (1, 10)


def test_high_r2_does_not_mean_one_exponent():
    logs = np.log(np.arange(1, 769.0))
    values = np.exp(-(0.7 * logs + 0.6 * logs**2 / (2 * logs[-1])))  # local exponent 0.7 to 1.3
    fit = widest_power_law(values)
    assert (fit.first, fit.last) == (1, 768)
    assert fit.r2 == pytest.approx(0.995, abs=1e-3)
    assert fit_power_law(values, 10, 40).alpha < 1 < fit_power_law(values, 200, 400).alpha


@pytest.mark.parametrize(
    "values",
    [np.ones(40), np.zeros(40), np.r_[np.arange(9, 0, -1.0), np.zeros(31)], np.full(40, np.nan)],
)
def test_without_a_straight_range_there_is_no_widest(values):
    fit = widest_power_law(values)
    assert np.isnan([fit.alpha, fit.r2, fit.se]).all()
    assert (fit.first, fit.last) == (1, 40)
    assert widest_power_law(values, first=5)[3:] == (5, 40)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_r2": 1.0}, "min_r2=1.0: give a number between 0 and 1"),
        ({"min_ranks": 2}, "min_ranks=2"),
        ({"first": 21}, "beyond the spectrum of 20"),
        ({"first": 0}, "give 1 <= first"),
    ],
)
def test_widest_refuses_what_makes_no_range(settings, message):
    with pytest.raises(ValueError, match=message):
        widest_power_law(np.ones(20), **settings)


@pytest.mark.parametrize("rank", [1, 2, 7, 50])
def test_planted_rank_is_the_participation_ratio(rank):
    values = np.r_[np.full(rank, 3.0), np.zeros(50 - rank)]
    assert participation_ratio(values) == pytest.approx(rank)


def test_participation_ratio_against_a_loop_and_below_rankme():
    values = np.random.default_rng(7).lognormal(size=30)
    total, squares = 0.0, 0.0
    for value in values:
        total, squares = total + value, squares + value**2
    assert participation_ratio(values) == pytest.approx(total**2 / squares)
    assert participation_ratio(1e-300 * values) == pytest.approx(total**2 / squares)
    assert 1 < participation_ratio(values) < rankme(values)
    assert math.isnan(participation_ratio(np.zeros(3)))
    assert participation_ratio([2.0, 2.0, -1e-17]) == pytest.approx(2)


@pytest.mark.parametrize(("count", "offset"), [(500, 0.0), (500, 0.5), (5, 3.0), (2, 0.5)])
def test_mean_fraction_of_normalised_vectors_is_exact(count, offset):
    rng = np.random.default_rng(8)
    x = rng.normal(size=(count, 12)) + offset
    x /= np.sqrt(np.mean(x**2, axis=1, keepdims=True))  # RMS 1, as after the norm
    eigenvalues = np.linalg.eigvalsh(np.cov(x, rowvar=False))
    mean_sq = np.sum(x.mean(0) ** 2)
    assert mean_fraction(eigenvalues, mean_sq, count) == pytest.approx(mean_sq / 12, rel=1e-12)


def test_mean_fraction_of_other_vectors_and_its_ends():
    x = np.random.default_rng(9).lognormal(size=(40, 6))
    mean_sq = np.sum(x.mean(0) ** 2)
    fraction = mean_fraction(np.linalg.eigvalsh(np.cov(x.T)), mean_sq, 40)
    assert fraction == pytest.approx(mean_sq / np.mean(np.sum(x**2, axis=1)), rel=1e-12)
    assert mean_fraction(np.ones(3), 0.0, 9) == 0
    assert mean_fraction(np.zeros(3), 2.0, 9) == 1
    assert math.isnan(mean_fraction(np.zeros(3), 0.0, 9))
    assert math.isnan(mean_fraction([1.0, np.inf], 1.0, 9))
    with pytest.raises(ValueError, match="count=1"):
        mean_fraction(np.ones(3), 1.0, 1)


def noise_scale_of(gradients):
    centred = gradients - gradients.mean(0)
    sigma = np.linalg.svd(centred @ centred.T, compute_uv=False) ** 0.5  # (N,)
    return gradient_noise_scale(sigma, np.sum(gradients.mean(0) ** 2))


def test_noise_scale_against_pairs_of_samples():
    gradients = np.random.default_rng(10).normal(size=(7, 30)) + 0.5
    products, squares = [], []
    for i in range(7):
        squares.append(gradients[i] @ gradients[i])
        products += [gradients[i] @ gradients[j] for j in range(7) if j != i]
    # Different samples have independent noise: their products average to |G|^2 alone.
    scale = noise_scale_of(gradients)
    assert scale.mean_sq == pytest.approx(np.mean(products))
    assert scale.trace == pytest.approx(np.mean(squares) - np.mean(products))
    assert scale.b_simple == pytest.approx(np.mean(squares) / np.mean(products) - 1)


def test_noise_scale_against_two_batch_sizes():
    gradients = np.random.default_rng(11).normal(size=(16, 50)) + 0.3
    small, big = np.mean(np.sum(gradients**2, axis=1)), np.sum(gradients.mean(0) ** 2)
    scale = noise_scale_of(gradients)
    assert scale.mean_sq == pytest.approx((16 * big - 1 * small) / (16 - 1))
    assert scale.trace == pytest.approx((small - big) / (1 / 1 - 1 / 16))


def test_noise_scale_is_unbiased_in_both_parts():
    rng = np.random.default_rng(12)
    truth, sd = np.full(20, 0.4), np.linspace(0.5, 1.5, 20)
    scales = [noise_scale_of(truth + sd * rng.normal(size=(8, 20))) for _ in range(1500)]
    assert np.mean([s.trace for s in scales]) == pytest.approx(np.sum(sd**2), rel=0.02)
    assert np.mean([s.mean_sq for s in scales]) == pytest.approx(np.sum(truth**2), rel=0.04)


def test_noise_scale_where_there_is_no_answer():
    noise = gradient_noise_scale([3.0, 3.0, 0.0], 1.0)  # tr / N = 3 exceeds |g|^2
    assert noise == (math.inf, 9.0, -2.0)
    assert gradient_noise_scale([3.0, 3.0, 0.0], 3.0).b_simple == math.inf
    assert gradient_noise_scale([0.0, 0.0], 5.0) == (0.0, 0.0, 5.0)
    zeros = gradient_noise_scale(np.zeros(4), 0.0)
    assert math.isnan(zeros.b_simple)
    assert zeros[1:] == (0, 0)
    for broken in [([1.0], 1.0), ([1.0, np.nan], 1.0), ([1.0, 0.0], np.nan), ([1.0, 0.0], np.inf)]:
        assert np.isnan(gradient_noise_scale(*broken)).all()


def test_subspace_overlap_against_principal_angles():
    u = stats.ortho_group.rvs(9, random_state=1)[:, :4]
    v = stats.ortho_group.rvs(9, random_state=2)[:, :4]
    twin = np.mean(np.cos(linalg.subspace_angles(u, v)) ** 2)
    assert subspace_overlap(u, v) == pytest.approx(twin, rel=1e-12)
    assert subspace_overlap(v, u) == pytest.approx(twin, rel=1e-12)
    turned = v @ stats.ortho_group.rvs(4, random_state=3)
    assert subspace_overlap(-u[:, ::-1], turned) == pytest.approx(twin, rel=1e-12)


def test_subspace_overlap_at_its_ends_and_by_chance():
    basis = stats.ortho_group.rvs(10, random_state=4)
    assert subspace_overlap(basis[:, :3], basis[:, :3]) == pytest.approx(1)
    assert subspace_overlap(basis[:, :3], basis[:, 3:6]) == pytest.approx(0, abs=1e-12)
    assert subspace_overlap(basis[:, :4], basis[:, 2:6]) == pytest.approx(0.5)
    assert subspace_overlap(basis, np.eye(10)) == pytest.approx(1)
    draws = stats.ortho_group.rvs(10, size=400, random_state=5)[:, :, :3]
    assert np.mean([subspace_overlap(u, np.eye(10, 3)) for u in draws]) == pytest.approx(
        0.3, abs=0.02
    )


@pytest.mark.parametrize(
    "shapes", [((9, 3), (9, 2)), ((9, 3), (8, 3)), ((3, 9), (3, 9)), ((9,), (9,)), ((9, 0), (9, 0))]
)
def test_subspace_overlap_refuses_bases_of_other_shapes(shapes):
    with pytest.raises(ValueError, match=r"give two of one shape \(D, k\)"):
        subspace_overlap(*map(np.ones, shapes))
