"""Checks of the toy tasks' knobs, the grokking pairs and the random-feature regression."""

import hashlib
import math
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from toy_modular import grok, rff
from toy_modular.config import BandedConfig, GrokConfig, RffConfig

# Knobs


@pytest.mark.parametrize(
    ("kind", "knobs", "message"),
    [
        (BandedConfig, {"c_min": 1}, "c_min=1: give at least 2"),
        (BandedConfig, {"vocab_size": 64, "c_min": 65}, "c_min=65 is above vocab_size=64"),
        (BandedConfig, {"seq_len": 0}, "seq_len=0"),
        (BandedConfig, {"test": 0}, "test=0"),
        (BandedConfig, {"zipf_c": float("inf")}, "zipf_c=inf"),
        (BandedConfig, {"zipf_o": -1.0}, "zipf_o=-1.0"),
        (BandedConfig, {"min_step_frac": 1.0}, "min_step_frac=1.0"),
        (BandedConfig, {"non_coprime": 1.5}, "non_coprime=1.5"),
        (BandedConfig, {"mix_min": 3, "mix_max": 2}, "mix_max=2 is below mix_min=3"),
        (BandedConfig, {"component_weight_pareto_alpha": 0.0}, "pareto_alpha=0.0"),
        (BandedConfig, {"token_noise_std": float("nan")}, "token_noise_std=nan"),
        (BandedConfig, {"token_noise_df": 2.0}, "token_noise_df=2.0"),
        (GrokConfig, {"p": 1}, "p=1"),
        (GrokConfig, {"train_fraction": 1.0}, "train_fraction=1.0 of 9409 pairs"),
        (GrokConfig, {"train_fraction": 1e-9}, "train_fraction=1e-09"),
        (GrokConfig, {"train_fraction": float("nan")}, "train_fraction=nan"),
        (RffConfig, {"num_features": 0}, "num_features=0"),
        (RffConfig, {"sigma": -1.0}, "sigma=-1.0"),
        (RffConfig, {"student_df": 2.0}, "student_df=2.0"),
    ],
)
def test_bad_knobs_are_refused_in_one_line(kind, knobs, message):
    with pytest.raises(ValueError, match=message) as caught:
        kind(**knobs)
    assert "\n" not in str(caught.value)


def test_tasks_import_without_jax():
    names = ", ".join(
        f"toy_modular.{name}" for name in ("config", "banded", "bayes", "grok", "rff")
    )
    code = f"import sys, {names}; print('jax' in sys.modules)"
    root = Path(__file__).parents[1]
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert shown.stdout.strip() == "False", shown.stderr


# Pairs


def answer(operation: str, a: int, b: int, p: int) -> int:
    return {"add": a + b, "subtract": a + p - b, "multiply": a * b}[operation] % p


@pytest.mark.parametrize("operation", ["add", "subtract", "multiply"])
def test_the_splits_partition_all_pairs(operation):
    config = GrokConfig(operation=operation)
    train, val = grok.make_splits(config, 0)
    assert len(train.answers) == config.train == 2822
    seen = []
    for pairs in (train, val):
        assert pairs.tokens.dtype == pairs.answers.dtype == np.int32
        for (a, b, equals), result in zip(
            pairs.tokens.tolist(), pairs.answers.tolist(), strict=True
        ):
            assert equals == 97
            assert result == answer(operation, a, b, 97)
            seen.append((a, b))
    assert sorted(seen) == [*product(range(97), repeat=2)]


def test_pairs_in_order_are_the_table_of_the_operation():
    pairs = grok.all_pairs(GrokConfig(p=5, operation="subtract"))
    assert pairs.tokens[:, :2].tolist() == [[a, b] for a in range(5) for b in range(5)]
    assert pairs.answers.reshape(5, 5)[1].tolist() == [1, 0, 4, 3, 2]
    assert GrokConfig(p=5).vocab_size == 6


def test_the_split_is_a_matter_of_the_seed_alone():
    first, again, other = (grok.make_splits(GrokConfig(), seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.train.tokens, again.train.tokens)
    assert not np.array_equal(first.train.tokens, other.train.tokens)
    larger = grok.make_splits(GrokConfig(train_fraction=0.5, operation="multiply"), 0).train
    np.testing.assert_array_equal(larger.tokens[:2822], first.train.tokens)
    # not sorted: the held-out pairs lie everywhere
    assert np.bincount(first.train.tokens[:, 0], minlength=97).min() > 10
    digest = hashlib.sha256(first.train.tokens.astype("<i4").tobytes()).hexdigest()
    assert digest[:16] == "d2ccc56bb5ae57ac"


# Random features


def few(**knobs) -> RffConfig:
    sizes = {"num_features": 32, "train": 3000, "val": 50, "test": 60}
    return RffConfig(**(sizes | knobs))


def test_teacher_has_unit_coefficients_of_either_sign():
    config = RffConfig(num_features=2000, sigma=0.5)
    teacher = rff.make_teacher(config, 0)
    assert np.linalg.norm(teacher.coefficients) == pytest.approx(1)
    magnitude = np.abs(teacher.coefficients)
    np.testing.assert_allclose(magnitude / magnitude[0], np.arange(1, 2001) ** -1.5)
    assert (teacher.coefficients > 0).mean() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(2000))
    assert stats.kstest(teacher.omega.ravel() / 0.5, "norm").pvalue > 1e-4
    assert stats.kstest(teacher.phase / (2 * np.pi), "uniform").pvalue > 1e-4


@pytest.mark.parametrize("latent", ["gaussian", "uniform", "student_t"])
def test_latents_have_their_law_at_unit_variance(latent):
    latents = rff.make_splits(few(latent=latent, train=500), 0).train.latents
    assert latents.shape == (500, 16, 8)
    assert latents.dtype == np.float32
    law = {
        "gaussian": stats.norm(),
        "uniform": stats.uniform(-math.sqrt(3), 2 * math.sqrt(3)),
        "student_t": stats.t(3, scale=1 / math.sqrt(3)),
    }[latent]
    assert law.var() == pytest.approx(1)
    assert stats.kstest(latents.ravel(), law.cdf).pvalue > 1e-4


def test_variances_fall_as_a_power_of_rank():
    config = few(gamma=1.2)
    values = rff.eigenvalues(config)
    assert values.mean() == pytest.approx(1)
    np.testing.assert_allclose(values / values[0], np.arange(1, 9) ** -1.2)
    np.testing.assert_array_equal(rff.eigenvalues(few()), 1)
    latents = rff.make_splits(config, 0).train.latents.reshape(-1, 8).astype(np.float64)
    error = 4 * math.sqrt(2 / len(latents))
    np.testing.assert_allclose(latents.var(axis=0), values, rtol=error)
    correlation = np.corrcoef(latents.T) - np.eye(8)
    assert np.abs(correlation).max() < 5 / math.sqrt(len(latents))


def test_targets_agree_with_the_loop():
    config = few(train=300, noise_std=0.0)  # more than one block
    batch, teacher = rff.make_splits(config, 3).train, rff.make_teacher(config, 3)
    for row in (0, 255, 256, 299):
        total = 0.0
        for z in batch.latents[row].astype(np.float64):
            for r in range(32):
                phi = math.sqrt(2 / 32) * math.cos(teacher.omega[r] @ z + teacher.phase[r])
                total += teacher.coefficients[r] * phi / 16
        assert batch.targets[row] == pytest.approx(total, rel=1e-5, abs=1e-7)


def test_noise_has_the_given_level_and_outweighs_the_signal():
    config = RffConfig(train=1000, val=1, test=1)
    batch, teacher = rff.make_splits(config, 0).train, rff.make_teacher(config, 0)
    clean = rff.clean_targets(batch.latents, teacher)
    noise = batch.targets - clean
    assert noise.std() == pytest.approx(0.02, rel=4 / math.sqrt(2 * 1000))
    assert abs(noise.mean()) < 4 * 0.02 / math.sqrt(1000)
    assert abs(np.corrcoef(noise, clean)[0, 1]) < 4 / math.sqrt(1000)
    assert clean.var() == pytest.approx(1 / (512 * 16), rel=0.2)
    assert clean.var() < 0.4 * noise.var()


def test_random_features_are_a_matter_of_the_seed():
    first, again, other = (rff.make_splits(few(train=70), seed) for seed in (0, 0, 1))
    for one, two, three in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(one.targets, two.targets)
        assert not np.array_equal(one.latents, three.latents)
    assert [len(batch.targets) for batch in first] == [70, 50, 60]
    assert not np.array_equal(first.train.latents[:50], first.val.latents)
    noisy = rff.make_splits(few(train=70, noise_std=1.0), 0)
    np.testing.assert_array_equal(noisy.train.latents, first.train.latents)
    assert not np.array_equal(rff.make_teacher(few(), 0).omega, rff.make_teacher(few(), 1).omega)
