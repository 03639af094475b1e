"""Jackknife errors and the sampling floor of the JSD against closed forms and repeated draws."""

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest

from lens_jax.fits import fit_power_law, gradient_noise_scale, jsd, rankme
from lens_jax.jackknife import alpha_error, estimate, expected_jsd, jackknife, jsd_null

GROUPS, WIDTH = 16, 12


def test_error_of_a_mean_is_the_textbook_one():
    x = np.random.default_rng(0).normal(size=20)
    left_out = np.array([np.delete(x, i).mean() for i in range(20)])
    assert jackknife(float, left_out) == pytest.approx(x.std(ddof=1) / math.sqrt(20), rel=1e-12)
    groups = x.reshape(5, 4).mean(axis=1)
    left_out = np.array([np.delete(groups, i).mean() for i in range(5)])
    assert jackknife(float, left_out) == pytest.approx(groups.std(ddof=1) / math.sqrt(5), rel=1e-12)


def test_error_of_a_statistic_of_spectra_against_a_loop():
    left_out = np.random.default_rng(1).lognormal(size=(7, 30))
    replicates = [rankme(spectrum) for spectrum in left_out]
    total = 0.0
    for value in replicates:
        total += (value - sum(replicates) / 7) ** 2
    assert jackknife(rankme, left_out) == pytest.approx(math.sqrt(6 / 7 * total), rel=1e-12)


def test_rows_of_several_arrays_go_together():
    rng = np.random.default_rng(2)
    gradients = rng.normal(size=(24, 40)) + 0.5
    sigma, mean_sq, replicates = [], [], []
    for group in range(8):
        rest = np.delete(gradients, np.s_[3 * group : 3 * group + 3], axis=0)
        sigma.append(np.linalg.svd(rest - rest.mean(0), compute_uv=False))
        mean_sq.append(np.sum(rest.mean(0) ** 2))
        replicates.append(gradient_noise_scale(sigma[-1], mean_sq[-1]).b_simple)
    error = jackknife(lambda s, m: gradient_noise_scale(s, m).b_simple, sigma, np.float32(mean_sq))
    assert error == pytest.approx(math.sqrt(7 * np.var(replicates)), rel=1e-5)


def test_one_replicate_without_a_value_leaves_no_error():
    left_out = np.ones((4, 6)) + np.arange(6)
    left_out[2] = 0
    for value in (math.nan, math.inf):
        assert math.isnan(jackknife(lambda row, v=value: row[0] or v, left_out))
    assert math.isnan(expected_jsd(left_out))
    assert jackknife(lambda row: row[0], left_out[:2]) == 0


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ((np.ones((1, 5)),), "1 groups left out"),
        ((np.ones((0, 5)),), "0 groups left out"),
        ((np.ones((4, 5)), np.ones(3)), r"left-out arrays of \[3, 4\] groups"),
    ],
)
def test_a_jackknife_needs_the_same_groups_twice(arrays, message):
    with pytest.raises(ValueError, match=message):
        jackknife(lambda *rows: 0.0, *arrays)


class Draws(NamedTuple):
    """Spectra of repeated measurements of one planted law, and of parts of each."""

    whole: np.ndarray  # (R, D)
    left_out: np.ndarray  # (R, G, D)
    halves: np.ndarray  # (R, 2, D)


@cache
def draws(block: int, shuffled: bool = False, count: int = 150) -> Draws:
    """Measurements of 2048 tokens whose covariance has eigenvalues rank^-1.5.

    Every `block` tokens share four fifths of their variance; shuffled: they are dealt to any group.
    """
    rng = np.random.default_rng(3)
    tokens, scale = 2048, np.arange(1, WIDTH + 1.0) ** -0.75
    spectra = []
    for _ in range(count):
        common = np.repeat(rng.normal(size=(tokens // block, WIDTH)), block, axis=0)
        x = (math.sqrt(0.8) * common + math.sqrt(0.2) * rng.normal(size=common.shape)) * scale
        x = rng.permutation(x) if shuffled else x
        parts = x.reshape(GROUPS, -1, WIDTH)
        subsets = [
            x,
            *(np.delete(parts, g, axis=0) for g in range(GROUPS)),
            parts[::2],
            parts[1::2],
        ]
        covariances = [np.cov(s.reshape(-1, WIDTH), rowvar=False) for s in subsets]
        spectra.append(np.linalg.eigvalsh(np.stack(covariances))[:, ::-1])
    spectra = np.stack(spectra)  # (R, 1 + G + 2, D)
    return Draws(spectra[:, 0], spectra[:, 1:-2], spectra[:, -2:])


def error_over_spread(measured: Draws, window) -> float:
    spread = np.std([fit_power_law(s, *window).alpha for s in measured.whole], ddof=1)
    errors = np.array([alpha_error(left_out, *window) for left_out in measured.left_out])
    return np.sqrt(np.mean(errors**2)) / spread


@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("window", [(1, 12), (3, 9)])
def test_error_of_alpha_is_its_spread_over_draws(block, window):
    assert error_over_spread(draws(block), window) == pytest.approx(1, abs=0.15)


def test_groups_that_cut_correlated_tokens_apart_understate_the_error():
    assert error_over_spread(draws(8, shuffled=True), (1, 12)) < 0.6


@pytest.mark.parametrize("block", [1, 8])
def test_expected_jsd_is_that_between_independent_draws(block):
    measured = draws(block)
    pairs = zip(measured.whole[:-1], measured.whole[1:], strict=True)
    direct = np.mean([jsd(a, b) for a, b in pairs])
    expected = np.mean([expected_jsd(left_out) for left_out in measured.left_out])
    assert expected == pytest.approx(direct, rel=0.25)
    # A half holds half the tokens, and the divergence goes as one over their number.
    assert np.mean([jsd_null(h) for h in measured.halves]) == pytest.approx(2 * direct, rel=0.25)


def test_expected_jsd_against_a_loop_and_the_scale_of_a_replicate():
    left_out = np.random.default_rng(4).lognormal(size=(5, 8))
    shares = [sorted(row / row.sum(), reverse=True) for row in left_out]
    twin = 0.0
    for rank in range(8):
        column = [row[rank] for row in shares]
        mean = sum(column) / 5
        twin += 4 / 5 * sum((p - mean) ** 2 for p in column) / mean / 4
    assert expected_jsd(left_out) == pytest.approx(twin, rel=1e-12)
    assert expected_jsd(left_out * np.arange(1, 6.0)[:, None]) == pytest.approx(twin, rel=1e-12)
    padded = np.concatenate([left_out, np.zeros((5, 2)), np.full((5, 1), -1e-18)], axis=1)
    assert expected_jsd(padded) == pytest.approx(twin, rel=1e-12)


def test_jsd_null_is_the_divergence_of_the_halves():
    halves = np.random.default_rng(5).lognormal(size=(2, 20))
    assert jsd_null(halves) == jsd(halves[0], halves[1]) > 0
    assert jsd_null(halves[[0, 0]]) == 0


def test_what_is_not_halves_or_replicates_is_refused():
    for shape in [(3, 8), (2,), (2, 8, 1)]:
        with pytest.raises(ValueError, match=r"give two spectra, \(2, D\)"):
            jsd_null(np.ones(shape))
    for shape in [(1, 8), (8,)]:
        with pytest.raises(ValueError, match=r"give \(G, D\) with G >= 2"):
            expected_jsd(np.ones(shape))


def test_an_estimate_is_the_statistic_and_its_jackknife_error():
    rng = np.random.default_rng(0)
    arrays = {"s/a": rng.random(5), "s_left_out/a": rng.random((4, 5)), "t/a": np.float64(2.0)}
    value, error = estimate(np.sum, arrays, "a", "s")
    assert value == pytest.approx(arrays["s/a"].sum())
    assert error == pytest.approx(jackknife(np.sum, arrays["s_left_out/a"]))
    value, error = estimate(lambda s, t: s.sum() * t, arrays, "a", "s", "t")
    assert value == pytest.approx(2 * arrays["s/a"].sum())
    assert math.isnan(error)  # t was never left out
