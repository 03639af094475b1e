"""Spectra of token counts, against plain covariances, and figure 5."""

import json

import numpy as np
import pytest
from synthetic_language_study import make_study

from experiments.figures.__main__ import main as figures
from experiments.shards import write_shard
from experiments.window_counts import (
    WindowConfig,
    compare,
    gram_of_counts,
    main,
    sample_names,
    spectrum,
)
from lens_jax.fits import jsd
from models.command_line import UsageError

VOCAB = 5000  # more than one block


def sample(rng, count, power, length=64):
    p = np.arange(1, VOCAB + 1.0) ** -power
    return rng.choice(VOCAB, size=(count, length), p=p / p.sum())


def test_the_gram_matrix_is_that_of_the_counts():
    windows = sample(np.random.default_rng(0), 6, 1.0)
    counts = np.stack([np.bincount(window, minlength=VOCAB) for window in windows])
    np.testing.assert_array_equal(gram_of_counts(windows, VOCAB), counts @ counts.T)


def test_the_spectrum_is_that_of_the_covariance():
    windows = sample(np.random.default_rng(1), 12, 1.2)
    counts = np.stack([np.bincount(window, minlength=VOCAB) for window in windows]).astype(float)
    singular = np.linalg.svd(counts - counts.mean(axis=0), compute_uv=False)
    found = spectrum(gram_of_counts(windows, VOCAB))
    np.testing.assert_allclose(found, singular**2 / 11, atol=1e-10)


def test_another_law_is_told_from_chance_and_the_same_is_not():
    rng = np.random.default_rng(2)
    a, same, other = sample(rng, 80, 1.0), sample(rng, 40, 1.0), sample(rng, 40, 1.5)
    alike, unlike = (compare(a, b, VOCAB, 40, 0) for b in (same, other))
    assert alike.p > 0.05
    assert unlike.p == pytest.approx(1 / 41)
    assert alike.divergence == jsd(alike.a, alike.b)
    with pytest.raises(ValueError, match="twice as many"):
        compare(a, a, VOCAB, 3, 0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(3)
    for name, power in (("one", 1.0), ("two", 1.0)):
        place = folder / name
        place.mkdir()
        write_shard(place / f"{name}_train_0.bin", sample(rng, 1, power, 4000)[0])
        (place / "meta.json").write_text(f'{{"vocab_size": {VOCAB}, "eot_token": 0}}')
    return folder


def test_the_record_of_the_command_makes_figure_5(shards, tmp_path, capsys):
    study = make_study(
        tmp_path / "study", rungs=("muon",), batches=(8,), seed_cells=(), trials=(), kernels=()
    )
    assert figures([f"study={study}", "fig=5", f"out={tmp_path / 'out'}"]) == 1
    assert "python -m experiments.window_counts" in capsys.readouterr().out
    words = [f"a={shards}/one/*.bin", f"b={shards}/two/*.bin", f"out={study}/window_counts"]
    assert main([*words, "windows=20", "window=64", "resamples=20"]) == 0
    assert figures([f"study={study}", "fig=5", f"out={tmp_path / 'out'}"]) == 0
    assert "5: Held" in capsys.readouterr().out
    assert (tmp_path / "out" / "figure_5.png").stat().st_size > 10_000
    (claim,) = json.loads((tmp_path / "out" / "claims_5.json").read_text())
    assert claim["p"] is None  # a small one would speak against the claim
    assert "over 20 halves (least possible 0.048)" in claim["sentence"]
    assert main([*words, "windows=20", "window=64", "resamples=18"]) == 0
    assert figures([f"study={study}", "fig=5", f"out={tmp_path / 'out'}"]) == 0
    assert "5: Undecided" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "a= is missing"),
        (["a=x", "b=y", "out=z", "windows=2"], "windows=2"),
        (["a=nothing*", "b=y", "out=z"], "matches no file"),
    ],
)
def test_bad_words_end_in_one_line(words, said):
    with pytest.raises(UsageError, match=said):
        main(words)


def test_two_samples_of_one_source_are_told_apart():
    config = WindowConfig(a="mix/train_1.bin", b="mix/train_2.bin")
    assert sample_names(config, ("mix", "mix")) == ("train_1", "train_2")
    assert sample_names(config, ("mix", "web")) == ("mix", "web")


def test_too_short_a_text_is_named(shards, tmp_path):
    words = [f"a={shards}/one/*.bin", f"b={shards}/two/*.bin", f"out={tmp_path}", "windows=500"]
    with pytest.raises(UsageError, match="give fewer windows="):
        main(words)
