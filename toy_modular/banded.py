"""Modular walks in bands of the vocabulary: the language task of the toy study (toy spec 1.1).

A walk has four latents: modulus c, offset o, step d and phase a. Its state and its token at time k
are

    s_k = (a + d k) mod c        t_k = o + s_k        k = 0..T

so a walk visits the band of tokens [o, o + c). P(c) ~ c^-zipf_c on c_min..V; given c,
P(o) ~ (o + 1)^-zipf_o on 0..V-c, d is uniform on max(1, floor(min_step_frac c))..c-1, and a is
uniform on 0..c-1. With probability `non_coprime` the step is then edited, unless c is prime: g is
drawn among the divisors 2 <= g <= sqrt(c) of c, composite ones too, and d becomes
max(g, g floor(d / g)), which shares g with c and may lie below the least step.

Shapes: N sequences, T = seq_len, M = mix_max. The law is the published one; the numbers are not,
since the order of the draws inside a split is ours.
"""

from math import isqrt
from typing import NamedTuple

import numpy as np

from toy_modular.config import BandedConfig

SEED_OFFSET = 303


class Batch(NamedTuple):
    """Sequences and what made them.

    tokens: int32 (N, T + 1), inputs [:, :-1] and targets [:, 1:]; count: int32 (N,), walks averaged
    in a sequence; c, o, d, a: int32 (N, M), -1 beyond `count`; weights: float64 (N, M), of the
    walks in that average, 0 beyond `count`.
    """

    tokens: np.ndarray
    count: np.ndarray
    c: np.ndarray
    o: np.ndarray
    d: np.ndarray
    a: np.ndarray
    weights: np.ndarray


class Splits(NamedTuple):
    """Independent draws, not a partition.

    A frequent walk is in several splits, and more than once in each: with the published sizes a
    fifth of the validation sequences are training sequences too.
    """

    train: Batch
    val: Batch
    test: Batch


class Band(NamedTuple):
    """All walks of one band with their probabilities (see clean_band).

    tokens: int32 (n, T + 1); d, a: int32 (n,), step and phase; current, following: int32 (n,),
    the states s_{T-1} at the last input and s_T at its target; weights: float64 (n,), sum 1.
    """

    tokens: np.ndarray
    d: np.ndarray
    a: np.ndarray
    current: np.ndarray
    following: np.ndarray
    weights: np.ndarray


# The law


def moduli(config: BandedConfig) -> np.ndarray:
    """The possible c, ascending."""
    return np.arange(config.c_min, config.vocab_size + 1)


def modulus_law(config: BandedConfig) -> np.ndarray:
    """P(c) of `moduli(config)`."""
    mass = moduli(config) ** -float(config.zipf_c)
    return mass / mass.sum()


def offset_mass(config: BandedConfig) -> np.ndarray:
    """S (V + 1,) with S[n] = sum_{o < n} (o + 1)^-zipf_o; P(o < n | c) = S[n] / S[V - c + 1]."""
    ranks = np.arange(1, config.vocab_size + 1)
    return np.concatenate([[0.0], np.cumsum(ranks ** -float(config.zipf_o))])


def offset_law(c: int, config: BandedConfig) -> np.ndarray:
    """P(o | c) for o = 0..V-c."""
    cumulative = offset_mass(config)[: config.vocab_size - c + 2]
    return np.diff(cumulative) / cumulative[-1]


def small_divisors(c: int) -> np.ndarray:
    """The divisors g of c with 2 <= g <= sqrt(c), ascending; none for a prime."""
    candidates = np.arange(2, isqrt(c) + 1)
    return candidates[c % candidates == 0]


def min_step(c, config: BandedConfig) -> np.ndarray:
    """Least step before the edit; below c because min_step_frac < 1."""
    return np.maximum(1, np.floor(config.min_step_frac * np.asarray(c)).astype(np.int64))


def edit_step(d, g) -> np.ndarray:
    """The greatest multiple of g up to d, or g itself; below c where d is, since g divides c."""
    return np.maximum(g, g * (d // g))


def step_law(c: int, config: BandedConfig) -> np.ndarray:
    """P(d | c) for d = 0..c-1, the edit counted in as probability; P(0 | c) = 0."""
    steps = np.arange(min_step(c, config), c)
    uniform = np.bincount(steps, minlength=c) / steps.size
    divisors = small_divisors(c)
    if not divisors.size:
        return uniform
    edited = edit_step(steps[None, :], divisors[:, None])  # (G, D)
    edited = np.bincount(edited.ravel(), minlength=c) / edited.size
    return (1 - config.non_coprime) * uniform + config.non_coprime * edited


def sequence(c, o, d, a, length: int) -> np.ndarray:
    """Tokens t_0..t_{length-1} of walks, (..., length), for latents that broadcast to (...)."""
    c, o, d, a = (np.asarray(latent, np.int64)[..., None] for latent in (c, o, d, a))
    return o + (a + d * np.arange(length)) % c


# Sampling


def make_splits(config: BandedConfig, seed: int) -> Splits:
    """Draws the three splits, one after another, from one generator seeded with seed + 303.

    A split depends on the sizes of those before it and on no others'.
    """
    random = np.random.default_rng(seed + SEED_OFFSET)
    return Splits(*(_draw(config, random, n) for n in (config.train, config.val, config.test)))


def _draw(config: BandedConfig, random: np.random.Generator, n: int) -> Batch:
    shape = (n, config.mix_max)
    count = random.integers(config.mix_min, config.mix_max, size=n, endpoint=True)
    c = _draw_moduli(config, random, shape)
    o = _draw_offsets(c, config, random)
    d = _draw_steps(c, config, random)
    a = random.integers(0, c)
    weights = np.ones(shape)
    if config.component_weight_pareto_alpha is not None:
        weights += random.pareto(config.component_weight_pareto_alpha, shape)

    absent = np.arange(config.mix_max)[None, :] >= count[:, None]  # (N, M)
    weights[absent] = 0.0
    walks = sequence(c, o, d, a, config.seq_len + 1)  # (N, M, T + 1)
    mixed = np.einsum("nm,nmt->nt", weights, walks) / weights.sum(axis=1)[:, None]
    if config.token_noise_std > 0:
        mixed += config.token_noise_std * _draw_noise(config.token_noise_df, random, mixed.shape)
    tokens = np.clip(np.rint(mixed), 0, config.vocab_size - 1)
    latents = (np.where(absent, -1, latent).astype(np.int32) for latent in (c, o, d, a))
    return Batch(tokens.astype(np.int32), count.astype(np.int32), *latents, weights)


def _draw_moduli(config: BandedConfig, random: np.random.Generator, shape) -> np.ndarray:
    cumulative = np.cumsum(modulus_law(config))
    below = random.random(shape) * cumulative[-1]
    return config.c_min + np.searchsorted(cumulative, below, side="right")


def _draw_offsets(c: np.ndarray, config: BandedConfig, random: np.random.Generator) -> np.ndarray:
    """Offsets by inversion: one cumulative mass serves all c, each cut at its own V - c."""
    cumulative = offset_mass(config)
    below = random.random(c.shape) * cumulative[config.vocab_size - c + 1]
    return np.searchsorted(cumulative, below, side="right") - 1


def _draw_steps(c: np.ndarray, config: BandedConfig, random: np.random.Generator) -> np.ndarray:
    d = random.integers(min_step(c, config), c)
    present, position = np.unique(c, return_inverse=True)
    divisors = [small_divisors(modulus) for modulus in present.tolist()]
    number = np.array([len(some) for some in divisors])
    table = np.ones((present.size, max(1, number.max())), np.int64)  # a divisor of 1 edits nothing
    for row, some in zip(table, divisors, strict=True):
        row[: some.size] = some
    position = position.reshape(c.shape)
    edited = random.random(c.shape) < config.non_coprime
    choice = random.integers(0, np.maximum(1, number[position]))
    return np.where(edited, edit_step(d, table[position, choice]), d)


def _draw_noise(freedom: float | None, random: np.random.Generator, shape) -> np.ndarray:
    """Noise of unit variance: Student's t with `freedom` > 2 degrees, or normal."""
    if freedom is None:
        return random.standard_normal(shape)
    return random.standard_t(freedom, shape) * np.sqrt((freedom - 2) / freedom)


# The probe


def clean_band(c: int, o: int, config: BandedConfig) -> Band:
    """All walks of the band (c, o), one for each step d of positive probability and each phase a.

    A walk's weight is P(d | c) / c. Weighted means over the result are expectations under the law
    of training, without the noise of a sampled probe, which competes with the code it should read
    (toy spec 6.4). For a prime c all weights are equal: 8,245 walks for c = 97 are 85 steps times
    97 phases. For a composite c the edit raises the weight of the steps it leads to, and adds steps
    below the least one, so an unweighted mean there is another law. Every state is current with
    probability 1 / c, and next with the same.

    Walks are ordered by d, then a. Noise, mixing and c_min play no part. Raises ValueError for a
    band outside the vocabulary.
    """
    check_band(c, o, config)
    return walks_under(step_law(c, config), o, config)


def check_band(c: int, o: int, config: BandedConfig) -> None:
    """Raises ValueError for a band (c, o) outside the vocabulary."""
    if not 2 <= c <= config.vocab_size:
        raise ValueError(f"band {c}:{o}: give a modulus of 2 to vocab_size={config.vocab_size}")
    if not 0 <= o <= config.vocab_size - c:
        raise ValueError(
            f"band {c}:{o} leaves the vocabulary of {config.vocab_size} tokens; "
            f"give an offset of 0 to {config.vocab_size - c}"
        )


def walks_under(law: np.ndarray, o: int, config: BandedConfig) -> Band:
    """All walks at offset o under a law of steps (c,), which may leave steps out."""
    c = law.size
    d = np.repeat(np.flatnonzero(law), c)
    a = np.tile(np.arange(c), d.size // c)
    tokens = sequence(c, o, d, a, config.seq_len + 1)  # (n, T + 1)
    current, following = tokens[:, -2] - o, tokens[:, -1] - o
    integers = (array.astype(np.int32) for array in (tokens, d, a, current, following))
    return Band(*integers, weights=law[d] / c)
