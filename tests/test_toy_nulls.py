"""The nulls of band tables against random codes pushed through the walks one by one."""

import math

import numpy as np
import pytest

from toy_modular.banded import step_law
from toy_modular.config import BandedConfig
from toy_modular.features import energies, h_peak, mode_shares
from toy_modular.nulls import (
    effective_width,
    excess,
    kernel,
    next_code_null,
    sampled_null,
    selection_null,
    transfer,
    white_null,
)

PUBLISHED = BandedConfig()


def law_of(c: int) -> np.ndarray:
    return step_law(c, PUBLISHED)


def odd_law(c: int) -> np.ndarray:
    """A law with nothing regular about it."""
    law = np.random.default_rng(c).exponential(size=c)
    return law / law.sum()


def averaged(code: np.ndarray, law: np.ndarray) -> np.ndarray:
    """E[phi(s + d) | s] by a loop over states and steps."""
    c = len(code)
    table = np.zeros_like(code)
    for s in range(c):
        for d in range(c):
            table[s] += law[d] * code[(s + d) % c]
    return table


def dirichlet(c: int, r: int) -> float:
    """The closed form of toy spec 6.3."""
    least = c // 8
    return (math.sin(math.pi * r * least / c) / ((c - least) * math.sin(math.pi * r / c))) ** 2


@pytest.mark.parametrize("c", [97, 101, 179])
def test_kernel_of_a_prime_is_the_closed_form(c):
    found = kernel(law_of(c))
    np.testing.assert_allclose(found[1:], [dirichlet(c, r) for r in range(1, c)], rtol=1e-8)
    least = c // 8
    assert found[1:].sum() == pytest.approx(least / (c - least))
    assert found[0] == pytest.approx(1)


@pytest.mark.parametrize("c", [2, 5, 12, 36])
def test_averaging_over_steps_multiplies_modes_by_the_kernel(c):
    code = np.random.default_rng(0).normal(size=(c, 3))
    for law in (law_of(c), odd_law(c)):
        table = averaged(code, law)
        np.testing.assert_allclose(
            energies(table)[1:], (kernel(law) * energies(code))[1:], rtol=1e-9, atol=1e-25
        )
        np.testing.assert_allclose(
            np.fft.fft(table, axis=0), transfer(law)[:, None] * np.fft.fft(code, axis=0), atol=1e-9
        )
        assert kernel(law)[1:].sum() == pytest.approx(c * np.sum(law**2) - 1)


@pytest.mark.parametrize(("c", "share"), [(97, 0.134), (179, 0.133)])
def test_unstructured_next_state_codes_have_the_published_peak(c, share):
    null = next_code_null(c, law_of(c))
    assert round(null.share, 3) == share
    assert null.mode == 1
    code = np.random.default_rng(1).normal(size=(c, 2000))
    modes = transfer(law_of(c))[:, None] * np.fft.fft(code, axis=0)
    table = np.fft.ifft(modes, axis=0).real
    assert h_peak(table) == (pytest.approx(null.share, abs=0.01), 1)
    assert mode_shares(code)[1:].max() == pytest.approx(white_null(c), rel=0.15)


def test_composite_moduli_have_another_peak():
    null = next_code_null(96, law_of(96))
    code = np.random.default_rng(2).normal(size=(96, 2000))
    assert h_peak(averaged(code, law_of(96))) == (pytest.approx(null.share, abs=0.02), 48)
    assert null == (pytest.approx(0.2, abs=0.001), 48)  # edited steps are mostly even ones


@pytest.mark.parametrize(
    ("c", "predicted", "simulated"), [(97, 0.029, 0.0288), (179, 0.012, 0.0127)]
)
def test_sampled_probes_have_the_published_peak(c, predicted, simulated):
    null = sampled_null(c, law_of(c), 12_000)
    assert null.share == pytest.approx(predicted, abs=0.001)
    assert null.share == pytest.approx(simulated, abs=0.001)


def test_sampled_probes_against_drawn_walks():
    c, n, rng = 97, 4000, np.random.default_rng(3)
    law, shares = law_of(c), np.zeros(c)
    for _ in range(4):
        code = rng.normal(size=(c, 400))
        s, d = rng.integers(0, c, n), rng.choice(c, n, p=law)
        table = np.zeros_like(code)
        np.add.at(table, s, code[(s + d) % c])
        shares += energies(table / np.bincount(s, minlength=c)[:, None]) / 400
    null = sampled_null(c, law, n)
    # 1,600 directions scatter by 2.5%; states are met unequally often, which adds c / n to noise
    assert shares[1] / shares.sum() == pytest.approx(null.share, rel=0.1)
    assert np.argmax(shares[:49]) == null.mode == 1


def test_many_walks_have_the_null_of_all():
    law = law_of(97)
    assert sampled_null(97, law, 10**12).share == pytest.approx(next_code_null(97, law).share)
    assert sampled_null(97, law, 1).share == pytest.approx(white_null(97), rel=0.1)


@pytest.mark.parametrize(("c", "width"), [(13, 3), (12, 2), (2, 4)])
@pytest.mark.parametrize("through", [False, True])
def test_selection_against_drawn_codes(c, width, through):
    law, rng = odd_law(c) if through else None, np.random.default_rng(4)
    peaks = []
    for _ in range(3000):
        code = rng.normal(size=(c, width))
        if through:
            code = np.fft.ifft(transfer(law)[:, None] * np.fft.fft(code, axis=0), axis=0).real
        peaks.append(h_peak(code).share)
    found = selection_null(c, width, law, draws=3000)
    error = math.hypot(found.se, np.std(peaks) / math.sqrt(3000))
    assert found.mean == pytest.approx(np.mean(peaks), abs=4 * error + 1e-12)
    assert found.upper == pytest.approx(np.quantile(peaks, 0.95), abs=0.03)
    assert found.draws == 3000


def test_selection_of_unequal_directions_goes_by_the_effective_width():
    c, rng = 31, np.random.default_rng(5)
    spread = 0.8 ** np.arange(20)
    width = effective_width(np.diag(spread**2))
    assert width == pytest.approx(np.sum(spread**2) ** 2 / np.sum(spread**4))
    peaks = [h_peak(rng.normal(size=(c, 20)) * spread).share for _ in range(1000)]
    found = selection_null(c, width)
    assert found.mean == pytest.approx(np.mean(peaks), rel=0.05)
    assert found == selection_null(c, width)  # seeded


def test_selection_shrinks_with_width():
    means = [selection_null(97, width).mean for width in (2, 10, 100, 10_000)]
    assert means == sorted(means, reverse=True)
    assert means[-1] == pytest.approx(white_null(97), rel=0.05)


def test_nothing_is_left_of_a_uniform_law():
    null = next_code_null(7, np.full(7, 1 / 7))
    assert math.isnan(null.share)
    assert null.mode == 0
    assert math.isnan(selection_null(7, 3, np.full(7, 1 / 7)).mean)


def test_excess_is_a_difference():
    assert excess(0.15, 0.134) == pytest.approx(0.016)
    assert excess(0.1, 0.134) < 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: next_code_null(5, np.full(4, 0.25)),
        lambda: next_code_null(5, np.full(5, 0.25)),
        lambda: kernel(np.ones((2, 2)) / 4),
        lambda: white_null(1),
        lambda: sampled_null(5, law_of(5), 0),
        lambda: selection_null(1, 3),
        lambda: selection_null(5, 0),
        lambda: selection_null(5, 3, draws=1),
    ],
)
def test_bad_arguments_are_told_in_one_line(call):
    with pytest.raises(ValueError, match=r"give|has a law") as raised:
        call()
    assert "\n" not in str(raised.value)
