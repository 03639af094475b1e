"""Regression on random Fourier features averaged over a sequence (toy spec 1.2).

    phi(z) = sqrt(2 / P) cos(omega z + phase)        y = a . mean_t phi(z_t) + noise_std N(0, 1)

with omega ~ N(0, sigma^2), phase uniform on [0, 2 pi) and a_r = +-r^-beta scaled to |a| = 1.
Shapes: N sequences, T = seq_len, d = input_dim, P = num_features.

With the published sizes there is more noise than signal: averaged over T latents the features have
a variance near 1 / (P T) = 1.2e-4, the noise has 4e-4.
"""

from typing import NamedTuple

import numpy as np

from toy_modular.config import RffConfig

SEED_OFFSET = 101

BLOCK = 256
"""Sequences in one pass: the features of all sequences would fill gigabytes."""


class Teacher(NamedTuple):
    """omega: float64 (P, d); phase: float64 (P,); coefficients: float64 (P,), of unit norm."""

    omega: np.ndarray
    phase: np.ndarray
    coefficients: np.ndarray


class Batch(NamedTuple):
    """latents: float32 (N, T, d); targets: float32 (N,)."""

    latents: np.ndarray
    targets: np.ndarray


class Splits(NamedTuple):
    train: Batch
    val: Batch
    test: Batch


def make_teacher(config: RffConfig, seed: int) -> Teacher:
    """Draws frequencies, phases and signs from a generator seeded with `seed`."""
    random = np.random.default_rng(seed)
    size = config.num_features
    omega = config.sigma * random.standard_normal((size, config.input_dim))
    phase = random.uniform(0.0, 2 * np.pi, size)
    coefficients = random.choice([-1.0, 1.0], size) * np.arange(1, size + 1) ** -float(config.beta)
    return Teacher(omega, phase, coefficients / np.linalg.norm(coefficients))


def features(latents: np.ndarray, teacher: Teacher) -> np.ndarray:
    """phi of latents (..., d): float64 (..., P)."""
    angles = latents @ teacher.omega.T + teacher.phase
    return np.sqrt(2 / teacher.phase.size) * np.cos(angles)


def clean_targets(latents: np.ndarray, teacher: Teacher) -> np.ndarray:
    """a . mean_t phi(z_t) of latents (N, T, d), without noise: float64 (N,)."""
    targets = np.empty(len(latents))
    for first in range(0, len(latents), BLOCK):
        block = slice(first, first + BLOCK)
        phi = features(latents[block], teacher)  # (B, T, P)
        targets[block] = (phi @ teacher.coefficients).mean(axis=1)
    return targets


def eigenvalues(config: RffConfig) -> np.ndarray:
    """Variances of the d coordinates, i^-gamma divided by their mean; all 1 for gamma = 0."""
    powers = np.arange(1, config.input_dim + 1) ** -float(config.gamma)
    return powers / powers.mean()


def make_splits(config: RffConfig, seed: int) -> Splits:
    """Draws the three splits, one after another, from one generator seeded with seed + 101.

    The teacher is make_teacher(config, seed), so it is the same whatever latents, sizes and noise
    are. Targets belong to the latents as they are stored, in float32.
    """
    random = np.random.default_rng(seed + SEED_OFFSET)
    teacher = make_teacher(config, seed)
    sizes = (config.train, config.val, config.test)
    return Splits(*(_draw(config, teacher, random, n) for n in sizes))


def _draw(config: RffConfig, teacher: Teacher, random: np.random.Generator, n: int) -> Batch:
    latents = _draw_latents(config, random, (n, config.seq_len, config.input_dim))
    latents = (latents * np.sqrt(eigenvalues(config))).astype(np.float32)
    noise = config.noise_std * random.standard_normal(n)
    return Batch(latents, (clean_targets(latents, teacher) + noise).astype(np.float32))


def _draw_latents(config: RffConfig, random: np.random.Generator, shape) -> np.ndarray:
    """Independent coordinates of mean 0 and variance 1, float64."""
    if config.latent == "gaussian":
        return random.standard_normal(shape)
    if config.latent == "uniform":
        return random.uniform(-np.sqrt(3), np.sqrt(3), shape)
    freedom = config.student_df
    return random.standard_t(freedom, shape) * np.sqrt((freedom - 2) / freedom)
