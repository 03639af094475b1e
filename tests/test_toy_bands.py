"""Probing a band against the plain forward pass, slow means and the exact enumeration."""

import jax
import numpy as np
import pytest
from tiny_models import quick_compiler, shake

from models.config import ArchConfig, SizeConfig
from models.gpt import GPT, init_params, token_loss
from toy_modular.banded import clean_band, step_law
from toy_modular.bands import (
    band_arrays,
    band_walks,
    expected_sequences,
    make_band_probe,
    make_head_probe,
    parse_band,
    state_means,
)
from toy_modular.config import BandedConfig
from toy_modular.features import energies
from toy_modular.nulls import next_code_null

PUBLISHED = BandedConfig()
CONFIG = BandedConfig(vocab_size=48, seq_len=8)
SIZE = SizeConfig(
    n_layer=2, n_head=2, n_embd=16, vocab_size=48, block=8, short_row=8, long_row=16, mlp_ratio=2
)


@pytest.fixture(scope="module", autouse=True)
def _quick_compiler():
    with quick_compiler():
        yield


@pytest.fixture(scope="module", params=["tied", "untied"])
def tiny(request):
    """A model whose head is tied, or untied with a cap, and its parameters."""
    softcap = 5.0 if request.param == "untied" else None
    arch = ArchConfig(position="rope", qk_norm=True, head=request.param, softcap=softcap)
    model = GPT(arch, SIZE)
    return model, jax.tree.map(np.float32, shake(init_params(model, 0)))


# Which walks


def test_bands_are_parsed():
    assert parse_band("97:200", PUBLISHED) == (97, 200)
    assert parse_band("1024:0", PUBLISHED) == (1024, 0)
    assert parse_band("2:1022", PUBLISHED) == (2, 1022)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("97", "band '97': give modulus:offset"),
        ("97:", "give modulus:offset"),
        ("97:200:3", "give modulus:offset"),
        ("-5:3", "give modulus:offset"),
        ("9 7:3", "give modulus:offset"),
        ("97:x\n", "give modulus:offset"),
        ("1:3", "band 1:3: give a modulus of 2 to vocab_size=1024"),
        ("1025:0", "give a modulus of 2"),
        ("97:928", "band 97:928 leaves the vocabulary of 1024 tokens; give an offset of 0 to 927"),
    ],
)
def test_bad_bands_are_told_in_one_line(text, said):
    with pytest.raises(ValueError, match="give") as raised:
        parse_band(text, PUBLISHED)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_probe_bands_are_all_but_absent_from_training():
    assert round(expected_sequences(97, 200, PUBLISHED), 2) == 0.02
    assert round(expected_sequences(179, 50, PUBLISHED), 2) == 0.05
    assert expected_sequences(4, 0, PUBLISHED) == 0
    bands = [(c, o) for c in range(5, 49) for o in range(49 - c)]
    assert sum(expected_sequences(*band, CONFIG) for band in bands) == pytest.approx(CONFIG.train)


@pytest.mark.parametrize(("c", "o"), [(13, 5), (12, 0), (2, 46)])
def test_small_bands_are_enumerated_exactly(c, o):
    walks, exact = band_walks(c, o, CONFIG, most=10_000), clean_band(c, o, CONFIG)
    for name in exact._fields:
        np.testing.assert_allclose(getattr(walks, name), getattr(exact, name), rtol=1e-12)
    np.testing.assert_allclose(walks.law, step_law(c, CONFIG), atol=1e-15)
    assert (walks.c, walks.o) == (c, o)


@pytest.mark.parametrize("c", [36, 37])
def test_large_bands_lose_steps_and_no_phase(c):
    walks, exact = band_walks(c, 5, CONFIG, most=400), clean_band(c, 5, CONFIG)
    assert len(walks.tokens) == (400 // c) * c
    assert walks.weights.sum() == pytest.approx(1)
    for states in (walks.current, walks.following):
        np.testing.assert_allclose(np.bincount(states, walks.weights), 1 / c)
    # the law is that of the walks, and in the proportions of training
    np.testing.assert_allclose(np.bincount(walks.d, walks.weights, minlength=c), walks.law)
    kept = walks.law > 0
    np.testing.assert_allclose(np.ptp(walks.law[kept] / step_law(c, CONFIG)[kept]), 0, atol=1e-15)
    assert {row.tobytes() for row in walks.tokens} < {row.tobytes() for row in exact.tokens}
    np.testing.assert_array_equal(walks.law, band_walks(c, 0, CONFIG, most=400).law)
    assert set(np.unique(walks.d % 2)) == {0, 1}


def test_the_null_of_fewer_walks_is_that_of_their_own_law():
    walks = band_walks(37, 5, CONFIG, most=400)
    code = np.random.default_rng(0).normal(size=(37, 3000))
    table = state_means(code[walks.following], walks.current, walks)
    energy = energies(table)
    null = next_code_null(37, walks.law)
    assert energy[null.mode] / energy.sum() == pytest.approx(null.share, rel=0.1)


def test_fewer_walks_than_phases_are_refused():
    with pytest.raises(ValueError, match="most=12: band 13:0 has 13 phases; give at least 13"):
        band_walks(13, 0, CONFIG, most=12)


# Measuring them


def plain_forward(model, params, walks):
    logits, taps = model.apply({"params": params}, walks.tokens[:, :-1])
    losses = token_loss(logits, walks.tokens[:, 1:])
    return np.asarray(taps["final_norm"])[:, -1], np.asarray(losses)[:, -1]


def test_probe_is_the_last_position_of_the_forward_pass(tiny):
    model, params = tiny
    walks = band_walks(13, 5, CONFIG, most=10_000)
    h, losses = plain_forward(model, params, walks)
    for chunk in (50, 10_000):  # 156 walks: a last chunk of 6, and one chunk
        found = make_band_probe(model, walks, chunk)(params)
        assert found["h"].dtype == np.float32
        np.testing.assert_allclose(found["h"], h, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(found["losses"], losses, rtol=2e-5, atol=2e-5)
        again = make_head_probe(model, walks, chunk)(params, h)
        assert again == pytest.approx(walks.weights @ losses, rel=1e-5)


def test_probe_refuses_an_empty_chunk(tiny):
    with pytest.raises(ValueError, match="chunk=0: give at least 1"):
        make_band_probe(tiny[0], band_walks(5, 0, CONFIG, most=100), chunk=0)


def test_arrays_are_weighted_means():
    c, o, rng = 12, 7, np.random.default_rng(1)
    walks = band_walks(c, o, CONFIG, most=10_000)
    n = len(walks.tokens)
    assert np.ptp(walks.weights) > 0  # so that weights matter
    h, losses, table = rng.normal(size=(n, 4)), rng.random(n), rng.normal(size=(48, 4))
    arrays = band_arrays(h + 5, losses, walks, table)
    for kind, states in (("current", walks.current), ("next", walks.following)):
        for m in range(c):
            weights = [walks.weights[i] if states[i] == m else 0.0 for i in range(n)]
            mean = sum(w * row for w, row in zip(weights, h + 5, strict=True)) / sum(weights)
            np.testing.assert_allclose(arrays[kind][m], mean, rtol=1e-6)
    covariance = np.cov(h.T, aweights=walks.weights, ddof=0)
    np.testing.assert_allclose(arrays["covariance"], covariance, rtol=1e-5, atol=1e-7)
    assert arrays["loss"] == pytest.approx(np.average(losses, weights=walks.weights))
    np.testing.assert_array_equal(arrays["law"], walks.law)
    np.testing.assert_array_equal(arrays["embedding"], table[7:19].astype(np.float32))
    shapes = {kind: np.shape(array) for kind, array in arrays.items()}
    assert shapes.pop("covariance") == (4, 4)
    assert shapes.pop("law") == (c,)
    assert shapes.pop("loss") == ()
    assert set(shapes) == {"current", "next", "embedding"}
    assert set(shapes.values()) == {(c, 4)}
