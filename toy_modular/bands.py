"""Probing a model with the walks of a band: which walks, and one forward pass over all of them.

The measurement is that of the last position: h (n, D), the normalised stream that the head reads,
and the loss of the last target. Tables are weighted means under the law of the walks, so they are
expectations and not samples (toy spec 6.4).
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.gpt import GPT, head_kernel, token_loss
from models.head import head_logits
from toy_modular.banded import (
    check_band,
    moduli,
    modulus_law,
    offset_law,
    step_law,
    walks_under,
)
from toy_modular.config import BandedConfig

CHUNK = 512


class BandWalks(NamedTuple):
    """Walks of the band [o, o + c), all or some of them, with their probabilities.

    law: float64 (c,), P(d) of the steps that are there, sum 1; the other fields are those of
    `banded.Band`, n walks ordered by step, then phase.
    """

    c: int
    o: int
    law: np.ndarray
    tokens: np.ndarray
    d: np.ndarray
    a: np.ndarray
    current: np.ndarray
    following: np.ndarray
    weights: np.ndarray


def parse_band(text: str, config: BandedConfig) -> tuple[int, int]:
    """(c, o) of a band written modulus:offset, such as 97:200.

    Raises ValueError for another form and, as `check_band`, for a band outside the vocabulary.
    """
    match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    if not match:
        raise ValueError(f"band {text!r}: give modulus:offset in whole numbers, 97:200 for example")
    c, o = int(match[1]), int(match[2])
    check_band(c, o, config)
    return c, o


def expected_sequences(c: int, o: int, config: BandedConfig) -> float:
    """Training sequences expected in exactly this band: train * P(c) * P(o | c) of single walks.

    The published probe bands are all but absent from training: 0.02 sequences for 97:200 and 0.05
    for 179:50 of 32,000 (toy spec 1.1). 0 for a modulus below c_min.
    """
    check_band(c, o, config)
    if c < config.c_min:
        return 0.0
    modulus = modulus_law(config)[c - moduli(config)[0]]
    return float(config.train * modulus * offset_law(c, config)[o])


def band_walks(c: int, o: int, config: BandedConfig, most: int) -> BandWalks:
    """All walks of a band where they are `most` or fewer, else those of some of its steps.

    The steps are cut into most // c runs of nearly equal length and one is drawn from each, the
    same ones for every offset. All phases of a step stay, so every state is current, and next, with
    probability 1 / c as before. What changes is the law of the steps, which is returned as it then
    is: the nulls are exact for any law. But the fewer the steps, the less is averaged, and the more
    a code of the next state shows in the table by the current one, so tables of different laws do
    not compare. Every k-th step instead would leave the modes near multiples of c / k as they are
    and give an unstructured code a peak there (for c = 179 and k = 3, 0.31 instead of 0.13).

    Raises ValueError for a band outside the vocabulary, or fewer walks than phases.
    """
    check_band(c, o, config)
    if most < c:
        raise ValueError(f"most={most}: band {c}:{o} has {c} phases; give at least {c} walks")
    law = step_law(c, config)
    steps = _thin(np.flatnonzero(law), most // c, seed=c)
    kept = np.zeros_like(law)
    kept[steps] = law[steps] / law[steps].sum()
    return BandWalks(c, o, kept, *walks_under(kept, o, config))


def _thin(steps: np.ndarray, most: int, seed: int) -> np.ndarray:
    if steps.size <= most:
        return steps
    ends = np.arange(most + 1) * steps.size // most
    return steps[np.random.default_rng(seed).integers(ends[:-1], ends[1:])]


def make_band_probe(model: GPT, band: BandWalks, chunk: int = CHUNK) -> Callable:
    """probe(params) -> {"h": (n, D), "losses": (n,)}, NumPy float32, at the last position.

    One compiled function takes `chunk` walks at a time; only the last position gets logits. The
    tokens lie on the device from here on. Raises ValueError for a chunk below 1.
    """
    chunks = _chunks(chunk, band.tokens)

    @jax.jit
    def forward(params, tokens):  # (chunk, T + 1)
        _, taps = model.apply({"params": params}, tokens[:, :-1])
        h = taps["final_norm"][:, -1].astype(jnp.float32)
        return h, head_losses(model, params, h, tokens[:, -1])

    def probe(params) -> dict[str, np.ndarray]:
        h, losses = zip(*(jax.device_get(forward(params, rows)) for (rows,) in chunks), strict=True)
        n = len(band.tokens)
        return {"h": np.concatenate(h)[:n], "losses": np.concatenate(losses)[:n]}

    return probe


def _chunks(chunk: int, *arrays: np.ndarray) -> list[tuple[jax.Array, ...]]:
    """Pieces of `chunk` rows of arrays of one length; the last is filled up with first rows."""
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: give at least 1 walk")
    n = len(arrays[0])
    rows = np.arange(-(-n // chunk) * chunk) % n if n > chunk else np.arange(n)
    pieces = rows.reshape(-1, min(chunk, n))
    return [tuple(jnp.asarray(array[piece]) for array in arrays) for piece in pieces]


def head_losses(model: GPT, params: dict, h: jax.Array, targets: jax.Array) -> jax.Array:
    """Losses (n,) in nats of targets (n,) where the head reads h (n, D)."""
    arch = model.arch
    logits = head_logits(
        h[:, None],  # (n, 1, D)
        head_kernel(params, arch),
        softcap=arch.softcap,
        dtype=model.dtype,
        float8=arch.head_dtype == "float8",
    )
    return token_loss(logits, targets[:, None])[:, 0]


def make_head_probe(model: GPT, band: BandWalks, chunk: int = CHUNK) -> Callable:
    """probe(params, h (n, D)) -> the mean loss in nats of the band's last targets given h."""
    losses = jax.jit(lambda params, h, targets: head_losses(model, params, h, targets))

    def probe(params, h) -> float:
        pieces = _chunks(chunk, np.asarray(h, np.float32), band.following + np.int32(band.o))
        found = [jax.device_get(losses(params, *piece)) for piece in pieces]
        return float(band.weights @ np.concatenate(found)[: len(h)].astype(np.float64))

    return probe


def band_arrays(h, losses, band: BandWalks, embedding) -> dict[str, np.ndarray]:
    """The arrays that are stored of a probed band, by their kind.

    h: (n, D) and losses: (n,), of the last position; embedding: (V, D), the input table. Returns

        current, next   (c, D)  mean h given the current state, and given the next one
        covariance      (D, D)  of h over the walks, divided by their total weight
        law             (c,)    P(d) of the steps
        loss            ()      mean loss
        embedding       (c, D)  the rows of the band's tokens

    means under the law of the walks, summed in float64. Tables are not centred. law and loss stay
    float64, the rest is float32.
    """
    h, weights = np.asarray(h, np.float64), band.weights
    deviations = h - (weights @ h)[None, :]
    covariance = deviations.T @ (weights[:, None] * deviations)
    found = {
        "current": state_means(h, band.current, band),
        "next": state_means(h, band.following, band),
        "covariance": covariance,
        "embedding": np.asarray(embedding)[band.o : band.o + band.c],
    }
    found = {kind: array.astype(np.float32) for kind, array in found.items()}
    loss = weights @ np.asarray(losses, np.float64)
    return found | {"law": band.law.copy(), "loss": np.float64(loss)}


def state_means(values, states, band: BandWalks) -> np.ndarray:
    """Means (c, D) of values (n, D) over the walks of each of the states (n,), by weight."""
    values, weights = np.asarray(values, np.float64), band.weights
    total = np.zeros((band.c, values.shape[1]))
    np.add.at(total, states, weights[:, None] * values)
    return total / np.bincount(states, weights, minlength=band.c)[:, None]
