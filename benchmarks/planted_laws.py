"""Vectors and gradients whose spectrum is known, the instrument that measures them, and its twins.

A law is a normal distribution with given eigenvalues along random directions. Vectors drawn from it
are float32 and go through `activation_probe` in chunks, as the taps of a model do; eigenvalues are
taken on the host in float64. Nothing here prints.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lens_jax.fits import PAPER_WINDOWS, scale_ranks
from lens_jax.probes import Evidence, activation_probe, spectra

GROUPS = 32
CHUNK = 8192  # vectors in one pass
MEAN = 3.0  # of every coordinate, in units of the largest standard deviation
WINDOWS = ("default", "10-40", "40-90", "90-200")
SITE = "planted"


def rank_windows(width: int) -> dict[str, tuple[int, int]]:
    """The published windows at a width, by name."""
    return {name: scale_ranks(*PAPER_WINDOWS[name], width) for name in WINDOWS}


class Law(NamedTuple):
    """A normal distribution of D-vectors: r eigenvalues, their directions (D, r), mean (D,)."""

    eigenvalues: np.ndarray
    directions: np.ndarray
    mean: np.ndarray


def make_law(eigenvalues: np.ndarray, width: int, rng: np.random.Generator) -> Law:
    """Eigenvalues, largest first, along random directions, under a mean of 3 top deviations."""
    directions, triangle = np.linalg.qr(rng.normal(size=(width, len(eigenvalues))))
    directions *= np.sign(np.diag(triangle))[None]  # uniform over rotations
    return Law(eigenvalues, directions, np.full(width, MEAN * math.sqrt(eigenvalues[0])))


def power_law(width: int, alpha: float) -> np.ndarray:
    """Eigenvalues rank^-alpha, (D,)."""
    return np.arange(1, width + 1.0) ** -alpha


def bent_law(width: int) -> np.ndarray:
    """Eigenvalues rank^-0.7 exp(-4 rank / D), (D,): the local exponent climbs from 0.7 to 4.7."""
    ranks = np.arange(1, width + 1.0)
    return ranks**-0.7 * np.exp(-4 * ranks / width)


def place(law: Law, normals: np.ndarray) -> jax.Array:
    """Vectors (..., D) of a law from standard normals (..., r), in float32."""
    scaled = (law.directions * np.sqrt(law.eigenvalues)[None]).astype(np.float32)
    return _place(normals, scaled.T, law.mean.astype(np.float32))


@jax.jit
def _place(normals, scaled, mean):
    rotated = jnp.matmul(normals, scaled, precision="highest")
    return rotated + jnp.broadcast_to(mean, rotated.shape)


def draw_chunks(law: Law, count: int, rng: np.random.Generator) -> Iterator[jax.Array]:
    """`count` independent vectors of a law in chunks (B, D)."""
    chunk = min(count, CHUNK)
    for _ in range(count // chunk):
        yield place(law, rng.standard_normal((chunk, len(law.eigenvalues)), dtype=np.float32))


def make_instrument(windows: int, groups: int = GROUPS) -> Callable[..., dict[str, np.ndarray]]:
    """A function `measure(chunks, resample=True)` that returns the arrays of a record.

    The chunks (B, ..., D) come to `windows` windows, of which consecutive ones form the groups; a
    window may be a single vector. Vectors are taken as they are, not RMS-normalised. Names are
    without the site; resample: also the spectra with a group left out.
    """
    probe = activation_probe((SITE,), windows, groups, normalise=False)
    update = jax.jit(probe.update, donate_argnums=0)

    def measure(chunks: Iterable[jax.Array], *, resample: bool = True) -> dict[str, np.ndarray]:
        state = None
        for chunk in chunks:
            evidence = Evidence(None, {SITE: chunk})
            state = update(probe.init(evidence) if state is None else state, evidence)
        found = spectra(probe.summarize(state), resample=resample)
        return {name.removesuffix(f"/{SITE}"): array for name, array in found.items()}

    return measure


class Twin:
    """Covariance of the same vectors in float64 NumPy, summed about a fixed pilot of their mean."""

    def __init__(self, pilot: np.ndarray):
        self._pilot = pilot
        self._count = 0
        self._sum = np.zeros_like(pilot)
        self._products = np.zeros((pilot.size, pilot.size))

    def watch(self, chunks: Iterable[jax.Array]) -> Iterator[jax.Array]:
        """Pass the chunks (B, D) on, having seen them."""
        for chunk in chunks:
            x = np.asarray(chunk, np.float64) - self._pilot[None]
            self._count += len(x)
            self._sum += x.sum(0)
            self._products += x.T @ x
            yield chunk

    def eigenvalues(self) -> np.ndarray:
        """Of the covariance divided by n - 1, descending, (D,)."""
        scatter = self._products - np.outer(self._sum, self._sum) / self._count
        return np.linalg.eigvalsh(scatter / (self._count - 1))[::-1]


def first_order_bias(eigenvalues: np.ndarray, first: int, last: int, count: int) -> float:
    """What drawing only `count` vectors adds to alpha on a window of ranks, to first order.

    E[l_i] = lambda_i (1 + (1/n) sum_{j != i} lambda_j / (lambda_i - lambda_j)) for the ordered
    eigenvalues l_i of the covariance of n normal vectors, where gaps are wide against their errors;
    E[ln l_i] lies 1/n below ln E[l_i] at every rank alike, which tilts no fit. Source: Lawley,
    Tests of significance for the latent roots of covariance and correlation matrices, 1956.
    """
    gaps = eigenvalues[:, None] - eigenvalues[None, :]
    np.fill_diagonal(gaps, np.inf)
    shift = (eigenvalues[None, :] / gaps).sum(1)[first - 1 : last]
    return float(-np.polyfit(np.log(np.arange(first, last + 1)), shift, 1)[0] / count)


def resolution(eigenvalues: np.ndarray, first: int, last: int, count: int) -> float:
    """Smallest gap of neighbours in a window, in standard errors of one, lambda_i sqrt(2/n)."""
    window = eigenvalues[first - 1 : last]
    return float(np.min(1 - window[1:] / window[:-1]) * math.sqrt(count / 2))


class Correlation(NamedTuple):
    """How tokens depend on one another: every coordinate has correlation (T, T) within a document.

    The tokens are documents of T end to end, `cut` tokens of the first moved to the end.
    """

    name: str
    matrix: np.ndarray
    cut: int = 0

    @property
    def effective_share(self) -> float:
        """Independent tokens that know the covariance as well, as a share of the tokens.

        The variance of a sample covariance of normal vectors goes as the mean over tokens of the
        sum of squared correlations with all tokens.
        """
        return len(self.matrix) / float(np.sum(self.matrix**2))

    def normals(self, tokens: int, width: int, rng: np.random.Generator) -> np.ndarray:
        """Standard normals (tokens, D) in float32, correlated along the tokens only."""
        length = len(self.matrix)
        factor = np.linalg.cholesky(self.matrix).astype(np.float32)
        z = rng.standard_normal((length, tokens // length * width), dtype=np.float32)
        z = (
            (factor @ z if length > 1 else z)
            .reshape(length, -1, width)
            .swapaxes(0, 1)
            .reshape(tokens, width)
        )
        return np.roll(z, -self.cut, axis=0)


def blocks(length: int, share: float) -> np.ndarray:
    """Correlation of tokens that have a share of their variance in common, (T, T)."""
    return (1 - share) * np.eye(length) + share


def fading(length: int, decay: float) -> np.ndarray:
    """Correlation of an AR(1) sequence, decay^distance, (T, T)."""
    positions = np.arange(length)
    return decay ** np.abs(positions[:, None] - positions[None, :])


def gradient_rows(
    samples: int, parameters: int, rank: int, rng: np.random.Generator
) -> tuple[jax.Array, jax.Array]:
    """Rows (N, P) of `rank` equal singular values, and such rows under a mean of three times those.

    Without their mean the rows of the second matrix have the same rank.
    """
    left = rng.normal(size=(samples, rank))
    centred = np.linalg.qr(left - left.mean(0)[None])[0]
    right = np.linalg.qr(rng.normal(size=(parameters, rank)))[0]
    mean = 3 * right.sum(1) / math.sqrt(rank)
    plain = np.linalg.qr(left)[0] @ right.T
    return jnp.float32(plain), jnp.float32(centred @ right.T + mean[None])
