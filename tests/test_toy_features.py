"""Modes of a table against slow sums, and against tables whose modes are known."""

import cmath
import math

import numpy as np
import pytest

from toy_modular.features import (
    concentration,
    dominant_modes,
    effective_modes,
    energies,
    gini,
    h_peak,
    mode_shares,
    pair_masses,
    principal_modes,
)

MODULI = [2, 3, 4, 5, 12, 13, 36, 97]


def table_of(c: int, width: int = 5, seed: int = 0) -> np.ndarray:
    """A random table with a large mean, which must not matter."""
    return 7.0 + np.random.default_rng(seed).normal(size=(c, width))


def cosines(c: int, weights: dict[int, float]) -> np.ndarray:
    """A column pair a mode, amplitude sqrt(2 weight), so that E_r = weight; Nyquist: one column."""
    angle = 2 * np.pi * np.arange(c) / c
    columns = []
    for r, weight in weights.items():
        if 2 * r == c:
            columns.append(math.sqrt(weight) * np.cos(r * angle))
        else:
            columns += [math.sqrt(2 * weight) * f(r * angle) for f in (np.cos, np.sin)]
    return np.stack(columns, axis=1)


def slow_energies(table) -> list[float]:
    c, width = table.shape
    means = [sum(table[:, j]) / c for j in range(width)]
    found = []
    for r in range(c):
        modes = [
            sum((table[m, j] - means[j]) * cmath.exp(-2j * math.pi * r * m / c) for m in range(c))
            for j in range(width)
        ]
        found.append(sum(abs(mode / c) ** 2 for mode in modes))
    return found


@pytest.mark.parametrize("c", MODULI)
def test_energies_are_the_sums_they_are_defined_by(c):
    table = table_of(c)
    found = energies(table)
    np.testing.assert_allclose(found, slow_energies(table), rtol=1e-9, atol=1e-20)
    assert found[0] == 0
    np.testing.assert_allclose(found[1:], found[1:][::-1], rtol=1e-9)  # E_r = E_-r
    variance = np.sum((table - table.mean(axis=0)) ** 2) / c
    assert found.sum() == pytest.approx(variance)
    np.testing.assert_allclose(mode_shares(table), found / variance, rtol=1e-9)


@pytest.mark.parametrize("c", MODULI)
def test_peak_and_masses_follow_from_the_shares(c):
    table = table_of(c)
    q = mode_shares(table)
    share, mode = h_peak(table)
    assert 1 <= mode <= c // 2
    assert share == q[mode] == max(q[1 : c // 2 + 1])
    masses = pair_masses(q)
    assert masses.sum() == pytest.approx(1)
    slow = [q[r] if 2 * r == c else q[r] + q[c - r] for r in range(1, c // 2 + 1)]
    np.testing.assert_allclose(masses, slow)


def test_known_modes_are_found():
    table = cosines(13, {3: 4.0, 5: 2.0, 1: 1.0})
    assert h_peak(table) == (pytest.approx(4 / 14), 3)
    assert dominant_modes(table, 2) == (3, 5)
    assert dominant_modes(table, 100)[:3] == (3, 5, 1)
    assert len(dominant_modes(table, 100)) == 6
    assert concentration(table, dominant_modes(table, 1)) == pytest.approx(4 / 7)
    assert concentration(table, dominant_modes(table, 2)) == pytest.approx(6 / 7)
    assert concentration(table, (5,)) == pytest.approx(2 / 7)
    assert effective_modes(mode_shares(cosines(13, {3: 1.0, 5: 1.0}))) == pytest.approx(4)


def test_nyquist_counts_once():
    table = cosines(12, {6: 3.0, 2: 2.0})
    assert h_peak(table) == (pytest.approx(3 / 7), 6)
    assert dominant_modes(table, 1) == (2,)  # 4 in the pair, against 3
    assert concentration(table, (6,)) == pytest.approx(3 / 7)
    assert concentration(table, (6, 2)) == pytest.approx(1)
    assert h_peak(cosines(12, {6: 1.0})) == (pytest.approx(1), 6)
    assert h_peak(np.eye(2)) == (pytest.approx(1), 1)


def test_a_mode_counts_once_however_it_is_named():
    table = table_of(13)
    once = concentration(table, (3,))
    assert concentration(table, (3, -3, 10, 16)) == pytest.approx(once)
    with pytest.raises(ValueError, match="mode 0 is the mean"):
        concentration(table, (3, 26))


@pytest.mark.parametrize("value", [0.0, 0.1, 1e10])
def test_a_table_without_variance_has_no_shares(value):
    table = np.full((97, 4), value)
    assert np.all(energies(table) == 0)
    assert np.all(np.isnan(mode_shares(table)))
    peak = h_peak(table)
    assert math.isnan(peak.share)
    assert peak.mode == 0
    assert math.isnan(concentration(table, (1,)))
    assert math.isnan(gini(mode_shares(table)))
    assert math.isnan(effective_modes(mode_shares(table)))
    assert principal_modes(table).shares.size == 0


def test_gini_is_the_mean_difference():
    shares = np.random.default_rng(0).exponential(size=50)
    slow = np.abs(shares[:, None] - shares[None, :]).mean() / (2 * shares.mean())
    assert gini(shares) == pytest.approx(slow)
    assert gini(np.ones(9)) == pytest.approx(0)
    assert gini(np.eye(9)[0]) == pytest.approx(8 / 9)


def test_principal_modes_of_an_equivariant_code_are_its_modes():
    c = 13
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(10, 10)))
    table = np.pad(cosines(c, {3: 4.0, 5: 2.0, 1: 1.0}), ((0, 0), (0, 4))) @ turn + 2.0
    found = principal_modes(table)
    assert found.modes.tolist() == [3, 3, 5, 5, 1, 1]  # of rank 6, fewer than 8
    np.testing.assert_allclose(found.shares, np.array([4, 4, 2, 2, 1, 1]) / 14, rtol=1e-9)
    np.testing.assert_allclose(found.peaks, 0.5, rtol=1e-9)
    np.testing.assert_allclose(found.directions @ found.directions.T, np.eye(6), atol=1e-12)


def test_principal_modes_agree_with_the_covariance():
    table = table_of(36, width=6)
    found = principal_modes(table, k=4)
    rows = table - table.mean(axis=0)
    values, vectors = np.linalg.eigh(rows.T @ rows)
    np.testing.assert_allclose(found.shares, values[::-1][:4] / values.sum(), rtol=1e-9)
    overlap = np.abs(np.sum(found.directions * vectors[:, ::-1].T[:4], axis=1))
    np.testing.assert_allclose(overlap, 1, rtol=1e-9)
    for j in range(4):
        power = slow_energies((rows @ found.directions[j])[:, None])
        share = max(power[1:19]) / sum(power)
        assert found.peaks[j] == pytest.approx(share)
        assert found.modes[j] == 1 + int(np.argmax(power[1:19]))


@pytest.mark.parametrize(
    "call",
    [
        lambda: energies(np.zeros(5)),
        lambda: energies(np.zeros((1, 5))),
        lambda: dominant_modes(table_of(5), 0),
        lambda: principal_modes(table_of(5), 0),
    ],
)
def test_bad_arguments_are_told_in_one_line(call):
    with pytest.raises(ValueError, match="give") as raised:
        call()
    assert "\n" not in str(raised.value)
