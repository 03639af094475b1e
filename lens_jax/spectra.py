"""Small symmetric matrices whose eigenvalues are the spectra: covariances and Gram matrices.

They are formed inside jit in float32 with products at the highest matmul precision, and kept so
that no digit is lost to cancellation: covariances are centred chunk by chunk and merged by Chan's
rule with compensated sums (a high and a low word, float64 quality without float64), Gram matrices
are centred before the product. The eigen-decomposition takes `xp`, numpy for float64 on the host
or jax.numpy inside the compiled step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Covariance(NamedTuple):
    """Running centred second moment of D-vectors; each pair is a high and a low word.

    mean: (2, D); scatter: (2, D, D), the sum over n vectors of (x - mean)(x - mean)'; count: ().
    """

    count: jax.Array
    mean: jax.Array
    scatter: jax.Array


def empty_covariance(width: int) -> Covariance:
    """No vectors seen yet; count is int32, exact up to two thousand million vectors."""
    return Covariance(jnp.zeros((), jnp.int32), jnp.zeros((2, width)), jnp.zeros((2, width, width)))


def _add(pair: jax.Array, term: jax.Array) -> jax.Array:
    """pair + term without losing the rounding error of the sum (Knuth's two-sum)."""
    high, low = pair
    total = high + term
    shadow = total - high
    error = (high - (total - shadow)) + (term - shadow)
    low = low + error
    renormalised = total + low
    return jnp.stack([renormalised, low - (renormalised - total)])


def merge_covariance(state: Covariance, x: jax.Array) -> Covariance:
    """The state after seeing the vectors x (..., D) too (Chan, Golub and LeVeque 1983)."""
    x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)  # (n, D)
    n_new = x.shape[0]
    mean = jnp.mean(x, axis=0)
    centred = x - mean[None]
    remainder = jnp.mean(centred, axis=0)  # what rounding left of the mean
    centred = centred - remainder[None]
    scatter = jnp.matmul(centred.T, centred, precision="highest")

    n_old = state.count.astype(jnp.float32)
    total = n_old + n_new
    delta = (mean - state.mean[0]) + (remainder - state.mean[1])
    merged_scatter = _add(state.scatter, scatter)
    merged_scatter = _add(merged_scatter, jnp.outer(delta, delta) * (n_old * n_new / total))
    return Covariance(
        state.count + n_new, _add(state.mean, delta * (n_new / total)), merged_scatter
    )


def covariance_eigenvalues(state: Covariance, xp) -> jax.Array:
    """Eigenvalues of scatter / (n - 1), descending, (D,)."""
    scatter, count = _widen(state.scatter, xp), _scalar(state.count, xp)
    return xp.linalg.eigvalsh(scatter.sum(0) / (count - 1))[::-1]


def mean_square(state: Covariance, xp) -> jax.Array:
    """Squared norm of the mean vector, ()."""
    mean = _widen(state.mean, xp).sum(0)
    return (mean * mean).sum()


def gram_with_mean(rows: jax.Array) -> jax.Array:
    """Gram matrix (N+1, N+1) of the N centred rows of (N, P) and, last, of their mean.

    It holds the Gram of the rows as they are and of the centred rows, each to full precision, also
    where a strong common direction would swamp the differences.
    """
    rows = rows.astype(jnp.float32)
    mean = jnp.mean(rows, axis=0, keepdims=True)
    stacked = jnp.concatenate([rows - mean, mean])
    return jnp.matmul(stacked, stacked.T, precision="highest")


def gram_singular_values(gram: jax.Array, xp, *, centred: bool) -> jax.Array:
    """Singular values of N rows, descending, (N,), from `gram_with_mean` of them.

    centred: of the rows minus their mean. The Gram matrix squares the condition number: values
    below about 3e-4 of the largest lose digits to its float32 products.
    """
    gram = _widen(gram, xp)
    inner, cross = gram[:-1, :-1], gram[:-1, -1]
    if not centred:
        inner = inner + cross[:, None] + cross[None, :] + gram[-1:, -1:]
    eigenvalues = xp.linalg.eigvalsh(inner)[::-1]
    return xp.sqrt(xp.maximum(eigenvalues, 0))


def matrix_singular_values(matrix: jax.Array, xp) -> jax.Array:
    """Singular values of a matrix (in, out), descending, (min(in, out),).

    On the host through the float64 Gram of the short side, six times faster than an SVD and exact
    to 1e-8 of the largest value; inside jit by SVD, whose float32 has no digits to spare.
    """
    matrix = _widen(matrix, xp)
    if xp is jnp:
        return jnp.linalg.svd(matrix, compute_uv=False)
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return xp.sqrt(xp.maximum(xp.linalg.eigvalsh(wide @ wide.T)[::-1], 0))


def _widen(array, xp):
    return xp.asarray(array, jnp.float32 if xp is jnp else xp.float64)


def _scalar(count, xp):
    return count.astype(jnp.float32) if xp is jnp else float(count)
