"""Figure 3's tests: where gains led by activations lie, and what the ladder gains as a whole."""

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.figures.taxonomy import ends_test, prefix_test
from experiments.seed_spread import Spread, t_test

LATE = ("valuemix", "unet", "fixedwin", "flexwin", "vte", "betterwin", "sparsev", "truncrope")


def judged(rung, led, known=True):
    member = SimpleNamespace(family=SimpleNamespace(rung=rung))
    return SimpleNamespace(after=member, led=led, gains_learning=known, judged=known)


def test_the_prefix_test_counts_arrangements():
    rungs = ("muon", "untied", "flexwin", "betterwin", "attnscale")
    led = ("activation-led", "activation-led", "mixed", "unresolved", "activation-led")
    made = [judged(*pair) for pair in zip(rungs, led, strict=True)]
    test, least = prefix_test(made)
    hits = [sum(place < 2 for place in chosen) for chosen in combinations(range(5), 3)]
    assert test.p == pytest.approx(np.mean(np.array(hits) >= 2))
    assert least == pytest.approx(np.mean(np.array(hits) == 2))
    assert test.statistic == pytest.approx(2 / 2 - 1 / 3)
    made[0].led = made[1].led = "mixed"
    assert prefix_test(made)[0].p == pytest.approx(1.0)
    made[4].gains_learning = False
    assert np.isnan(prefix_test(made)[0].p)


def test_what_was_not_measured_is_no_evidence_for_the_prefix():
    early = [judged(rung, "activation-led") for rung in ("rope", "muon", "untied")]
    unknown = [judged(rung, "unresolved", known=False) for rung in LATE]
    assert np.isnan(prefix_test([*early, *unknown])[0].p)
    known = [judged(rung, "gradient-led") for rung in LATE]
    assert prefix_test([*early, *known])[0].p == pytest.approx(1 / 165)  # 11 over 3


def test_the_prefix_test_rejects_as_often_as_it_says():
    """Labels without regard to place: p <= level at most at that rate, one-sided."""
    rng = np.random.default_rng(0)
    rungs = ("rope", "muon", "untied", *LATE)
    found = []
    for _ in range(2000):
        led = np.where(rng.random(len(rungs)) < 0.4, "activation-led", "mixed")
        found.append(prefix_test([judged(*pair) for pair in zip(rungs, led, strict=True)])[0].p)
    for level in (0.05, 0.3):
        assert 0.1 * level < np.mean(np.array(found) <= level) < 1.1 * level


def test_the_gain_of_a_ladder_is_tested_by_its_ends():
    """Under no gain p is even; the sum of gains is the difference of the two ends."""
    rng = np.random.default_rng(0)
    runs = [SimpleNamespace(seed=seed) for seed in range(3)]
    member = SimpleNamespace(runs=runs, family=SimpleNamespace(rung="muon"))
    found = []
    for _ in range(1000):
        table = rng.normal(size=(6, 3)) + rng.normal(size=3)
        rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
        sd = (np.sum(rest**2) / 10) ** 0.5
        spread = Spread(sd, np.nan, np.nan, np.nan, 6, 10, 5, 3.0, True)
        tokens = np.expm1(-np.diff(table.mean(1)))
        made = [SimpleNamespace(before=member, after=member, tokens=own) for own in tokens]
        found.append(ends_test(made, SimpleNamespace(tokens=spread)))
    assert found[-1].statistic == pytest.approx(
        -(table[-1].mean() - table[0].mean()) / (sd * (2 / 3) ** 0.5)
    )
    assert 0.03 < np.mean([test.p <= 0.05 for test in found]) < 0.07
    assert 0.46 < np.mean([test.p <= 0.5 for test in found]) < 0.54


def test_the_best_of_several_batches_at_both_ends_is_not_found_more_often():
    rng = np.random.default_rng(0)
    ends = rng.normal(size=(4000, 2, 4)).min(axis=2)  # true error 1 of each mean, known
    t = (ends[:, 1] - ends[:, 0]) / 2**0.5
    assert np.mean([t_test(own, 1.0, 1000).p <= 0.05 for own in t]) < 0.05
