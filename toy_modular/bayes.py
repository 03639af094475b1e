"""The least loss that any predictor can reach on the banded task, and its law of single tokens.

The optimal predictor knows the law of `toy_modular.banded` and mixes all walks that agree with the
tokens so far. Its loss at target k is ln P(t_0..t_{k-1}) - ln P(t_0..t_k), so only the probability
of prefixes is needed, and that is an exact finite sum. Summed over all (c, o, d, a) it would
have 10^11 terms at the published sizes. But t_0..t_k is a walk with modulus c exactly if

    every t_j - t_{j-1} mod c is one and the same d, and all t_j lie in [o, o + c)

and then d and the phase a = t_0 - o are known. What remains is a sum over c, in which the offsets
allowed are an interval whose mass is a difference of two cumulative sums:

    P(t_0..t_k) = sum_c P(c) (1/c) P(d | c) P(max t - c < o <= min t | c) [one d fits all j <= k]

without P(d | c) for k = 0. That is V terms a prefix, no approximation, float64 throughout. All
losses are in nats. Only single walks without noise are covered: averaged walks have no such sum.
"""

from typing import NamedTuple

import numpy as np

from toy_modular.banded import Batch, moduli, modulus_law, offset_law, offset_mass, step_law
from toy_modular.config import BandedConfig

BLOCK = 64
"""Sequences in one pass: what is kept for each is a few arrays over all c."""


def bayes_loss(tokens: np.ndarray, config: BandedConfig) -> np.ndarray:
    """Losses (N, T) in nats of the optimal predictor at each target of tokens (N, T + 1).

    Column k - 1 predicts t_k from t_0..t_{k-1}. Its mean over sequences drawn from the law is the
    conditional entropy of the task, up to the sampling of those sequences. Raises ValueError for
    averaged or noisy tasks, tokens outside the vocabulary, and a sequence that is no walk.
    """
    _check_clean(config)
    tokens = np.asarray(tokens, np.int64)
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(f"tokens of shape {tokens.shape}: give (N, T + 1) with a target or more")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < config.vocab_size:
        raise ValueError(f"tokens {tokens.min()} to {tokens.max()}: give 0 to vocab_size - 1")
    probability = prefix_probability(tokens, config)
    impossible = np.flatnonzero(probability[:, -1] == 0)
    if impossible.size:
        raise ValueError(
            f"tokens[{impossible[0]}] is no walk of this configuration; "
            f"give the configuration that the tokens were drawn with"
        )
    return -np.diff(np.log(probability), axis=1)


def _check_clean(config: BandedConfig) -> None:
    if config.mix_max > 1 or config.token_noise_std > 0:
        raise ValueError(
            f"mix_max={config.mix_max}, token_noise_std={config.token_noise_std}: the optimal loss "
            f"is known for clean single walks; give mix_max=1 and token_noise_std=0"
        )


def prefix_probability(tokens: np.ndarray, config: BandedConfig) -> np.ndarray:
    """P(t_0..t_k) for k = 0..T of tokens (N, T + 1) of the vocabulary; 0 once it is no walk."""
    steps = _step_table(config)
    probability = np.empty(tokens.shape)
    for first in range(0, len(tokens), BLOCK):
        block = slice(first, first + BLOCK)
        probability[block] = _block_probability(tokens[block], steps, config)
    return probability


def _block_probability(tokens: np.ndarray, steps: np.ndarray, config: BandedConfig) -> np.ndarray:
    """prefix_probability of B sequences, (B, T + 1); steps: P(d | c), (C, V)."""
    c = moduli(config)[None, :]  # (1, C)
    mass = offset_mass(config)
    weight = modulus_law(config)[None, :] / c / mass[config.vocab_size - c + 1]

    lowest = np.minimum.accumulate(tokens, axis=1)
    highest = np.maximum.accumulate(tokens, axis=1)
    probability = np.empty(tokens.shape)
    for k in range(tokens.shape[1]):
        if k > 0:
            move = (tokens[:, k] - tokens[:, k - 1])[:, None] % c  # (B, C)
        if k == 1:
            d = move
            weight = weight * steps[np.arange(c.size)[None, :], d]
        elif k > 1:
            weight = weight * (move == d)
        end = mass[np.minimum(lowest[:, k, None], config.vocab_size - c) + 1]
        start = mass[np.maximum(highest[:, k, None] - c + 1, 0)]
        probability[:, k] = np.sum(weight * np.maximum(end - start, 0.0), axis=1)
    return probability


def _step_table(config: BandedConfig) -> np.ndarray:
    """P(d | c), (C, V): a row for each of `moduli(config)`, 0 for d >= c."""
    table = np.zeros((moduli(config).size, config.vocab_size))
    for row, c in zip(table, moduli(config).tolist(), strict=True):
        row[:c] = step_law(c, config)
    return table


class Floor(NamedTuple):
    """The conditional entropy of the task in nats a target, and the standard error of that."""

    mean: float
    se: float


def bayes_floor(batch: Batch, config: BandedConfig) -> Floor:
    """The expected mean over T targets of `bayes_loss`, from sequences drawn from the law.

    With z = (c, o, d, a) and t a sequence, H(t) = H(z) - H(z | t), so the floor is

        (H(z) - H(t_0) - H(z | t)) / T

    whose first two terms are exact sums. Only the third is an average over `batch`, and it is
    small, since a whole sequence nearly tells its latents: the error is about a quarter of that of
    a mean of losses. (H(z) - H(t_0)) / T by itself is an exact upper bound.
    Raises ValueError for averaged or noisy tasks, and for fewer than two sequences.
    """
    _check_clean(config)
    num, length = batch.tokens.shape
    if num < 2:
        raise ValueError(f"{num} sequences: a standard error needs at least 2")
    known = walk_entropy(config) - unigram_entropy(config)
    evidence = prefix_probability(batch.tokens.astype(np.int64), config)[:, -1]
    ambiguity = np.log(evidence) - _log_latent_law(batch, config)  # -ln P(z | t), (N,)
    losses = (known - ambiguity) / (length - 1)
    return Floor(float(losses.mean()), float(losses.std(ddof=1) / np.sqrt(num)))


def _log_latent_law(batch: Batch, config: BandedConfig) -> np.ndarray:
    """ln P(c, o, d, a) of single walks, (N,)."""
    c, o, d = batch.c[:, 0], batch.o[:, 0], batch.d[:, 0]
    row = c - config.c_min
    mass = offset_mass(config)
    offset = (mass[o + 1] - mass[o]) / mass[config.vocab_size - c + 1]
    return np.log(modulus_law(config)[row] * offset * _step_table(config)[row, d] / c)


def walk_entropy(config: BandedConfig) -> float:
    """H(c, o, d, a) in nats, exactly."""
    given_c = [
        _entropy(offset_law(c, config)) + _entropy(step_law(c, config)) + np.log(c)
        for c in moduli(config).tolist()
    ]
    law = modulus_law(config)
    return _entropy(law) + float(law @ np.array(given_c))


def token_law(config: BandedConfig) -> np.ndarray:
    """P(t) (V,) of a token of a clean single walk, the same at every position.

    Given c and d the state is uniform at every time, because the phase is.
    """
    return prefix_probability(np.arange(config.vocab_size)[:, None], config)[:, 0]


def unigram_entropy(config: BandedConfig) -> float:
    """Loss in nats of the best predictor that ignores the context: the entropy of `token_law`."""
    return _entropy(token_law(config))


def _entropy(law: np.ndarray) -> float:
    present = law[law > 0]
    return float(-np.sum(present * np.log(present)))
