"""The optimal loss against enumeration of every walk, and its published and measured values."""

import math
from collections import defaultdict

import numpy as np
import pytest

from toy_modular.banded import make_splits, modulus_law, offset_law, step_law
from toy_modular.bayes import (
    bayes_floor,
    bayes_loss,
    prefix_probability,
    token_law,
    unigram_entropy,
    walk_entropy,
)
from toy_modular.config import BandedConfig

PUBLISHED = BandedConfig()

# Mean of bayes_loss over 32,000 sequences and of bayes_floor over 16,000, both within 0.0004.
FLOOR = 0.1551


@pytest.fixture(scope="module")
def sample():
    return make_splits(BandedConfig(train=1200, val=1, test=1), 0).train


@pytest.fixture(scope="module")
def losses(sample):
    return bayes_loss(sample.tokens, PUBLISHED)


def small(**knobs) -> BandedConfig:
    base = {"vocab_size": 13, "c_min": 3, "seq_len": 6, "min_step_frac": 0.3}
    return BandedConfig(**(base | knobs))


def every_sequence(config: BandedConfig) -> dict[tuple[int, ...], float]:
    """Probability of every possible sequence, by running every walk."""
    mass = defaultdict(float)
    for c in range(config.c_min, config.vocab_size + 1):
        steps, offsets = step_law(c, config), offset_law(c, config)
        for o in range(config.vocab_size - c + 1):
            for d in range(1, c):
                for a in range(c):
                    walk = tuple(o + (a + d * k) % c for k in range(config.seq_len + 1))
                    probability = modulus_law(config)[c - config.c_min] * offsets[o]
                    mass[walk] += probability * steps[d] / c
    return mass


@pytest.mark.parametrize(
    "knobs", [{}, {"c_min": 2, "min_step_frac": 0.0}, {"non_coprime": 1.0, "zipf_o": 0.0}]
)
def test_losses_are_those_of_enumeration(knobs):
    config = small(**knobs)
    mass = every_sequence(config)
    assert sum(mass.values()) == pytest.approx(1)
    possible = {walk: p for walk, p in mass.items() if p > 0}
    prefixes = defaultdict(float)
    for walk, probability in possible.items():
        for k in range(1, len(walk) + 1):
            prefixes[walk[:k]] += probability
    walks = np.array([*possible])
    expected = [
        [-math.log(prefixes[walk[: k + 1]] / prefixes[walk[:k]]) for k in range(1, len(walk))]
        for walk in possible
    ]
    np.testing.assert_allclose(bayes_loss(walks, config), expected, atol=1e-11)


def test_no_predictor_beats_it_on_average():
    config = small()
    mass = {walk: p for walk, p in every_sequence(config).items() if p > 0}
    law = np.array([*mass.values()])
    floor = law @ bayes_loss(np.array([*mass]), config).mean(axis=1)
    entropy = -law @ np.log(law)
    assert floor == pytest.approx((entropy - unigram_entropy(config)) / config.seq_len)
    for knobs in ({"zipf_c": 1.2}, {"non_coprime": 0.2}, {"zipf_o": 1.3}, {"min_step_frac": 0.0}):
        other = law @ bayes_loss(np.array([*mass]), small(**knobs)).mean(axis=1)
        assert other > floor + 1e-6


def test_the_law_of_one_token_is_that_of_enumeration_at_every_position():
    config = small()
    mass = every_sequence(config)
    for position in (0, 3, 6):
        law = np.zeros(config.vocab_size)
        for walk, probability in mass.items():
            law[walk[position]] += probability
        np.testing.assert_allclose(token_law(config), law, atol=1e-14)


def test_the_published_unigram_entropy():
    assert token_law(PUBLISHED).sum() == pytest.approx(1)
    assert unigram_entropy(PUBLISHED) == pytest.approx(5.51, abs=0.005)


def test_latent_entropy_is_that_of_all_walks():
    config = small()
    total = 0.0
    for c, p in zip(range(3, 14), modulus_law(config), strict=True):
        joint = p * np.outer(offset_law(c, config), step_law(c, config)).ravel() / c
        joint = joint[joint > 0]
        total -= c * np.sum(joint * np.log(joint))
    assert walk_entropy(config) == pytest.approx(total)


def test_the_floor_of_the_small_task_is_its_conditional_entropy():
    config = small(train=3000, val=1, test=1)
    law = np.array([p for p in every_sequence(config).values() if p > 0])
    exact = (-law @ np.log(law) - unigram_entropy(config)) / config.seq_len
    floor = bayes_floor(make_splits(config, 0).train, config)
    assert floor.mean == pytest.approx(exact, abs=4 * floor.se)
    assert floor.se < 0.01 * exact


def test_losses_at_the_published_positions(losses):
    # Means and deviations of one sequence over 32,000; 400 sequences published somewhat lower
    # values at positions 1 and 2, two standard errors off.
    measured = {1: (4.463, 1.77), 2: (2.531, 2.13), 3: (0.914, 1.70), 4: (0.484, 1.25)}
    measured |= {6: (0.207, 0.83), 8: (0.103, 0.57), 16: (0.030, 0.28), 32: (0.009, 0.15)}
    for position, (mean, deviation) in measured.items():
        found = losses[:, position - 1].mean()
        assert found == pytest.approx(mean, abs=4 * deviation / math.sqrt(len(losses)))
    assert losses[:, -1].mean() < 0.02
    assert losses.min() > -1e-9


def test_two_estimates_of_the_floor_agree(sample, losses):
    means = losses.mean(axis=1)
    error = means.std(ddof=1) / math.sqrt(len(means))
    assert means.mean() == pytest.approx(FLOOR, abs=4 * error)
    floor = bayes_floor(sample, PUBLISHED)
    assert floor.mean == pytest.approx(FLOOR, abs=4 * floor.se)
    assert floor.se < error / 3
    bound = (walk_entropy(PUBLISHED) - unigram_entropy(PUBLISHED)) / 64
    assert FLOOR < bound == pytest.approx(0.1658, abs=5e-5)


def test_blocks_do_not_matter(sample, losses):
    some = np.r_[0:3, 61:67, 1199]
    np.testing.assert_array_equal(bayes_loss(sample.tokens[some], PUBLISHED), losses[some])
    assert bayes_loss(sample.tokens[:0], PUBLISHED).shape == (0, 64)


def test_a_prefix_that_is_no_walk_is_impossible_from_there_on():
    walk = np.array([[0, 2, 4, 1, 2, 4, 1]])
    probability = prefix_probability(walk, small())[0]
    assert np.all(probability[:4] > 0)
    assert np.all(probability[4:] == 0)


@pytest.mark.parametrize(
    ("tokens", "knobs", "message"),
    [
        ([[0, 2, 4, 1, 2]], {}, r"tokens\[0\] is no walk"),
        ([[3, 3]], {}, r"tokens\[0\] is no walk"),
        ([[0, 13]], {}, "tokens 0 to 13"),
        ([[0]], {}, "shape"),
        ([0, 1], {}, "shape"),
        ([[0, 1]], {"mix_max": 2}, "mix_max=2"),
        ([[0, 1]], {"token_noise_std": 0.5}, "token_noise_std=0.5"),
    ],
)
def test_bad_tokens_are_refused_in_one_line(tokens, knobs, message):
    with pytest.raises(ValueError, match=message) as caught:
        bayes_loss(np.array(tokens), small(**knobs))
    assert "\n" not in str(caught.value)


def test_a_floor_needs_two_sequences(sample):
    with pytest.raises(ValueError, match="at least 2"):
        bayes_floor(type(sample)(*(array[:1] for array in sample)), PUBLISHED)
