"""The banded task against its law in slow loops, exact sums and the published statistics."""

import hashlib
import math

import numpy as np
import pytest
from scipy import stats

from toy_modular.banded import (
    clean_band,
    make_splits,
    min_step,
    moduli,
    modulus_law,
    offset_law,
    sequence,
    step_law,
)
from toy_modular.config import BandedConfig

PUBLISHED = BandedConfig()


@pytest.fixture(scope="module")
def splits():
    return make_splits(PUBLISHED, 0)


def sized(**knobs) -> BandedConfig:
    """Few sequences, and short ones, unless the knobs say otherwise."""
    return BandedConfig(**({"seq_len": 8, "train": 2000, "val": 1, "test": 1} | knobs))


def one_modulus(c: int, **knobs) -> BandedConfig:
    """All walks have modulus c and offset 0."""
    return sized(vocab_size=c, c_min=c, **knobs)


def fits(observed, law, floor: float = 5.0) -> bool:
    """Whether counts pass for a sample of a law, by chi-square with small cells pooled."""
    expected = np.asarray(law) * np.sum(observed)
    assert np.all(np.asarray(observed)[expected == 0] == 0)
    large = expected >= floor
    pooled = [np.append(x[large], x[~large].sum()) for x in (np.asarray(observed), expected)]
    present = pooled[1] > 0
    if present.sum() == 1:
        return True
    return stats.chisquare(pooled[0][present], pooled[1][present]).pvalue > 1e-4


def slow_step_law(c: int, config: BandedConfig) -> list[float]:
    law = [0.0] * c
    least = max(1, math.floor(config.min_step_frac * c))
    divisors = [g for g in range(2, c) if g * g <= c and c % g == 0]
    share = 1 / (c - least)
    for d in range(least, c):
        law[d] += share * (1 - config.non_coprime if divisors else 1)
        for g in divisors:
            edited = min(max(g * (d // g), g), c - 1)
            law[edited] += share * config.non_coprime / len(divisors)
    return law


# The law


def test_quantiles_of_the_modulus_are_the_published_ones():
    cumulative = np.cumsum(modulus_law(PUBLISHED))
    c = moduli(PUBLISHED)
    levels = [0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99]
    found = [int(c[np.searchsorted(cumulative, level)]) for level in levels]
    assert found == [6, 10, 25, 98, 327, 551, 896]
    law = modulus_law(PUBLISHED)
    assert law.sum() == pytest.approx(1)
    assert law @ c == pytest.approx(104.9, abs=0.05)
    assert law[c <= 10].sum() == pytest.approx(0.2787, abs=5e-5)
    assert law[c >= 64].sum() == pytest.approx(0.3185, abs=5e-5)


@pytest.mark.parametrize(("c", "o", "band", "modulus"), [(97, 200, 0.02, 49), (179, 50, 0.05, 22)])
def test_probe_bands_are_all_but_absent_from_training(c, o, band, modulus):
    expected = PUBLISHED.train * modulus_law(PUBLISHED)[c - PUBLISHED.c_min]
    assert round(expected) == modulus
    assert round(expected * offset_law(c, PUBLISHED)[o], 2) == band


def test_offsets_fill_the_room_that_the_modulus_leaves():
    law = offset_law(1000, PUBLISHED)
    assert law.size == 25
    assert law.sum() == pytest.approx(1)
    assert law[3] / law[0] == pytest.approx(4**-1.2)
    assert offset_law(1024, PUBLISHED).tolist() == [1.0]


def test_step_law_agrees_with_the_loop():
    for c in [*range(2, 130), 360, 1009, 1024]:
        np.testing.assert_allclose(step_law(c, PUBLISHED), slow_step_law(c, PUBLISHED), atol=1e-15)
        assert step_law(c, PUBLISHED).sum() == pytest.approx(1)


@pytest.mark.parametrize("share", [0.0, 0.125, 0.5, 1 - 2**-53])
def test_least_step_lies_below_the_modulus(share):
    config = BandedConfig(min_step_frac=share)
    c = np.arange(2, 1025)
    least = min_step(c, config)
    assert least.tolist() == [max(1, math.floor(share * int(modulus))) for modulus in c]
    assert np.all((least >= 1) & (least < c))


# Samples of it


def test_samples_have_the_published_statistics(splits):
    c, n = splits.train.c[:, 0], PUBLISHED.train
    for share, expected in [((c <= 10).mean(), 0.2787), ((c >= 64).mean(), 0.3185)]:
        assert share == pytest.approx(expected, abs=4 * math.sqrt(0.25 / n))
    assert c.mean() == pytest.approx(104.9, abs=4 * 185.1 / math.sqrt(n))
    # 6 % published; seeds scatter by 0.25 %
    distinct = len(np.unique(splits.train.tokens[:4000], axis=0))
    assert 1 - distinct / 4000 == pytest.approx(0.061, abs=0.01)


def test_a_fifth_of_the_validation_sequences_are_training_sequences(splits):
    known = {row.tobytes() for row in splits.train.tokens}
    share = np.mean([row.tobytes() in known for row in splits.val.tokens])
    assert share == pytest.approx(0.21, abs=4 * math.sqrt(0.21 * 0.79 / PUBLISHED.val))


def test_every_token_obeys_the_walk(splits):
    for batch in splits:
        c, o, d, a = (latent[:200, 0].tolist() for latent in batch[2:6])
        for row, tokens in enumerate(batch.tokens[:200].tolist()):
            walk = [o[row] + (a[row] + d[row] * k) % c[row] for k in range(65)]
            assert tokens == walk


def test_latents_are_in_their_ranges(splits):
    for batch, size in zip(splits, (32_000, 2048, 4096), strict=True):
        assert batch.tokens.shape == (size, 65)
        assert batch.tokens.dtype == np.int32
        c, o, d, a = batch[2:6]
        assert c.shape == batch.weights.shape == (size, 1)
        assert np.all((c >= 5) & (c <= 1024))
        assert np.all((o >= 0) & (o <= 1024 - c))
        assert np.all((d >= 1) & (d < c))
        assert np.all((a >= 0) & (a < c))
        assert np.all(batch.count == 1)
        assert np.all(batch.weights == 1)
        high = batch.tokens.max(axis=1)
        assert np.all((batch.tokens >= o) & (high[:, None] < o + c))


def test_sampled_latents_pass_for_the_law(splits):
    c, o, a = (latent[:, 0] for latent in (splits.train.c, splits.train.o, splits.train.a))
    assert fits(np.bincount(c - 5, minlength=1020), modulus_law(PUBLISHED))
    narrow = make_splits(sized(vocab_size=100, c_min=90, zipf_c=0.0, train=20_000), 0).train
    for modulus in (90, 97, 100):
        offsets = narrow.o[narrow.c == modulus]
        law = offset_law(modulus, sized(vocab_size=100))
        assert fits(np.bincount(offsets, minlength=law.size), law)
    for modulus in (5, 12):
        assert fits(np.bincount(a[c == modulus], minlength=modulus), np.full(modulus, 1 / modulus))
    # the phase knows nothing of the offset
    few = (c == 5) & (o < 4)
    pairs = np.bincount(5 * o[few] + a[few], minlength=20).reshape(4, 5)
    assert stats.chi2_contingency(pairs).pvalue > 1e-4


@pytest.mark.parametrize("c", [6, 36, 96, 97])
def test_sampled_steps_pass_for_the_enumerated_law(c):
    config = one_modulus(c, train=20_000)
    batch, band = make_splits(config, 0).train, clean_band(c, 0, config)
    law = np.bincount(band.d, weights=band.weights, minlength=c)
    np.testing.assert_allclose(law, step_law(c, config), atol=1e-14)
    assert fits(np.bincount(batch.d[:, 0], minlength=c), law)
    last_moves = (batch.tokens[:, -1] - batch.tokens[:, -2]) % c
    weighted = np.bincount((band.following - band.current) % c, band.weights, minlength=c)
    assert fits(np.bincount(last_moves, minlength=c), weighted)


@pytest.mark.parametrize("c", [4, 6, 49, 91, 360])
def test_every_edited_step_shares_a_divisor(c):
    d = make_splits(one_modulus(c, non_coprime=1.0), 0).train.d
    assert np.all(np.gcd(d, c) > 1)
    assert np.all((d >= 2) & (d < c))
    unedited = make_splits(one_modulus(c, non_coprime=0.0), 0).train.d
    assert np.any(np.gcd(unedited, c) == 1)


@pytest.mark.parametrize("c", [2, 3, 5, 97, 1021])
def test_primes_are_never_edited(c):
    edited, plain = (make_splits(one_modulus(c, non_coprime=p), 0).train for p in (1.0, 0.0))
    np.testing.assert_array_equal(edited.d, plain.d)
    assert plain.d.min() >= max(1, c // 8)


# Mixing and noise


def test_averaged_walks_agree_with_the_loop():
    config = sized(mix_min=2, mix_max=6, component_weight_pareto_alpha=1.5, train=300)
    batch = make_splits(config, 0).train
    assert set(batch.count.tolist()) == {2, 3, 4, 5, 6}
    for row in range(300):
        count = int(batch.count[row])
        for latent in batch[2:6]:
            assert np.all(latent[row, count:] == -1)
            assert np.all(latent[row, :count] >= 0)
        w, c, o, d, a = (x[row, :count].tolist() for x in (batch.weights, *batch[2:6]))
        assert min(w) > 1
        assert np.all(batch.weights[row, count:] == 0)
        for k in range(9):
            total = sum(w[j] * (o[j] + (a[j] + d[j] * k) % c[j]) for j in range(count))
            assert batch.tokens[row, k] == round(total / sum(w))
    # P(w > 2) = 2^-1.5 for 1 + Lomax(1.5)
    weights = batch.weights[batch.weights > 0]
    assert (weights > 2).mean() == pytest.approx(2**-1.5, abs=4 * 0.48 / math.sqrt(weights.size))


@pytest.mark.parametrize("freedom", [None, 6.0])
def test_noise_has_the_given_deviation(freedom):
    knobs = {"vocab_size": 1024, "c_min": 500, "zipf_o": 0.0}
    noisy = sized(**knobs, token_noise_std=3.0, token_noise_df=freedom)
    batch, clean = make_splits(noisy, 0).train, make_splits(sized(**knobs), 0).train
    np.testing.assert_array_equal(batch.o, clean.o)
    inside = (clean.tokens > 50) & (clean.tokens < 970)
    noise = (batch.tokens - clean.tokens)[inside]
    # rounding adds 1/12; kurtosis 3, or 6 for six degrees of freedom
    error = 4 * 9 * math.sqrt((2 if freedom is None else 5) / noise.size)
    assert noise.var() == pytest.approx(9 + 1 / 12, abs=error)
    assert stats.kurtosis(noise) == pytest.approx(0 if freedom is None else 3, abs=2.0)
    assert batch.tokens.min() >= 0
    assert batch.tokens.max() <= 1023


# Seeds


def test_splits_depend_on_the_seed_and_on_the_splits_before():
    config = sized(train=50, val=40, test=30)
    first, again, other = (make_splits(config, seed) for seed in (0, 0, 1))
    for one, two, three in zip(first, again, other, strict=True):
        for left, right in zip(one, two, strict=True):
            np.testing.assert_array_equal(left, right)
        assert not np.array_equal(one.tokens, three.tokens)
    assert not np.array_equal(first.train.tokens[:30], first.val.tokens[:30])
    assert not np.array_equal(first.val.tokens[:30], first.test.tokens)
    longer = make_splits(sized(train=50, val=40, test=99), 0)
    np.testing.assert_array_equal(longer.val.tokens, first.val.tokens)
    np.testing.assert_array_equal(longer.train.tokens, first.train.tokens)


def test_the_sequences_of_a_seed_are_pinned(splits):
    digest = hashlib.sha256()
    for batch in splits:
        digest.update(batch.tokens.astype("<i4").tobytes())
    assert digest.hexdigest()[:16] == "30db1c481bf74001"


# The exact probe


def test_the_band_of_97_has_8245_equal_walks():
    band = clean_band(97, 200, PUBLISHED)
    assert band.tokens.shape == (85 * 97, 65)
    assert np.ptp(band.weights) == 0
    assert band.weights.sum() == pytest.approx(1)
    assert len({*zip(band.d.tolist(), band.a.tolist(), strict=True)}) == 8245
    assert band.d.min() == 12
    np.testing.assert_array_equal(np.bincount(band.current), 85)


@pytest.mark.parametrize(("c", "o"), [(12, 0), (97, 200), (96, 928)])
def test_a_band_is_labelled_by_its_states(c, o):
    band = clean_band(c, o, PUBLISHED)
    np.testing.assert_array_equal(band.tokens, sequence(c, o, band.d, band.a, 65))
    for row in range(0, len(band.d), 37):
        d, a = int(band.d[row]), int(band.a[row])
        assert band.current[row] == (a + 63 * d) % c == band.tokens[row, 63] - o
        assert band.following[row] == (a + 64 * d) % c
    for states in (band.current, band.following):
        np.testing.assert_allclose(np.bincount(states, band.weights), 1 / c)


def test_steps_of_a_composite_band_have_unequal_weights():
    band = clean_band(96, 200, PUBLISHED)
    expected = np.array(slow_step_law(96, PUBLISHED))
    np.testing.assert_allclose(band.weights, expected[band.d] / 96)
    assert band.weights.max() > 8 * band.weights.min() > 0
    assert band.d.min() == 8  # eight divides some steps below the least one, 12


@pytest.mark.parametrize(
    ("c", "o", "message"),
    [(1, 0, "modulus of 2 to"), (1025, 0, "vocab_size=1024"), (97, 928, "offset of 0 to 927")],
)
def test_bands_outside_the_vocabulary_are_refused_in_one_line(c, o, message):
    with pytest.raises(ValueError, match=message) as caught:
        clean_band(c, o, PUBLISHED)
    assert "\n" not in str(caught.value)
