"""Small symmetric matrices whose eigenvalues are the spectra: covariances and Gram matrices.

They are formed inside jit in float32 with products at the highest matmul precision, and kept so
that no digit is lost to cancellation: covariances are centred chunk by chunk and merged by Chan's
rule with compensated sums (a high and a low word, float64 quality without float64), Gram matrices
are centred before the product. The eigen-decomposition takes `xp`, numpy for float64 on the host
or jax.numpy inside the compiled step.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Covariance(NamedTuple):
    """Running centred second moment of D-vectors; each pair is a high and a low word.

    mean: (2, D); scatter: (2, D, D), the sum over n vectors of (x - mean)(x - mean)'; count: ().
    Groups of vectors that are kept apart have a leading axis of G on all three.
    """

    count: jax.Array
    mean: jax.Array
    scatter: jax.Array


class Moments(NamedTuple):
    """Second moment of n vectors in single words: count (), mean (D,), scatter (D, D)."""

    count: Any
    mean: Any
    scatter: Any


def empty_covariance(width: int) -> Covariance:
    """No vectors seen yet; count is int32, exact up to two thousand million vectors."""
    return Covariance(jnp.zeros((), jnp.int32), jnp.zeros((2, width)), jnp.zeros((2, width, width)))


def empty_groups(width: int, groups: int) -> Covariance:
    """No vectors seen yet in any of the groups."""
    empty = empty_covariance(width)
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (groups, *leaf.shape)), empty)


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


def merge_into_groups(state: Covariance, x: jax.Array, first: jax.Array, filled: int) -> Covariance:
    """The groups after seeing the windows x (B, ..., D), an equal share of them in each of some.

    They belong, in order, to `filled` groups from number `first` on. Raises ValueError where B is
    not a multiple of that.
    """
    if x.shape[0] % filled:
        raise ValueError(f"{x.shape[0]} windows at a time do not fill {filled} groups evenly")
    parts = x.reshape(filled, -1, x.shape[-1])  # (groups of this pass, n, D)
    there = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, filled), state)
    merged = jax.vmap(merge_covariance)(there, parts)
    return jax.tree.map(
        lambda leaf, new: jax.lax.dynamic_update_slice_in_dim(leaf, new, first, 0), state, merged
    )


def widen_groups(state: Covariance, xp) -> Moments:
    """The groups in single words: count (G,), mean (G, D), scatter (G, D, D)."""
    count, mean, scatter = (_widen(leaf, xp) for leaf in state)
    return Moments(count, mean.sum(1), scatter.sum(1))


def pool(groups: Moments, xp) -> Moments:
    """All groups as one set of vectors."""
    count = groups.count.sum()
    mean = (groups.count[:, None] * groups.mean).sum(0) / count
    shift = groups.mean - mean[None]
    between = xp.matmul((groups.count[:, None] * shift).T, shift)
    return Moments(count, mean, groups.scatter.sum(0) + between)


def covariance_eigenvalues(moments: Moments, xp) -> jax.Array:
    """Eigenvalues of scatter / (n - 1), descending, (D,).

    n vectors minus their mean have rank n - 1 at most: what follows is exactly 0. All are NaN for
    fewer than 2 vectors, or where one of them is not finite.
    """
    rank = moments.count - 1
    # a division by 0, or by less, has no covariance to give
    values = _eigenvalues(moments.scatter / xp.where(rank > 0, rank, xp.nan), xp)
    return _up_to(values, rank, xp)


def covariance_eigenvectors(moments: Moments, count: int, xp) -> jax.Array:
    """The leading eigenvectors of the scatter as columns, (D, count); signs are arbitrary.

    NaN where `covariance_eigenvalues` is.
    """
    scatter = xp.where(moments.count > 1, moments.scatter, xp.nan)
    if xp is not jnp and not xp.isfinite(scatter).all():
        return xp.full_like(scatter, xp.nan)[:, :count]
    return xp.linalg.eigh(scatter)[1][:, ::-1][:, :count]


def _eigenvalues(matrix, xp):
    """Descending, (D,); NaN unless every entry is finite, where LAPACK on the host would raise."""
    if xp is not jnp and not xp.isfinite(matrix).all():
        return xp.full(len(matrix), xp.nan)
    return xp.linalg.eigvalsh(matrix)[::-1]


def _up_to(values, rank, xp):
    """Descending values (D,) with those beyond a rank, which are rounding, set to 0; keeps NaN."""
    beyond = xp.arange(len(values)) >= xp.maximum(rank, 0)
    return xp.where(beyond & ~xp.isnan(values), 0, values)


def mean_square(moments: Moments) -> jax.Array:
    """Squared norm of the mean vector, ()."""
    return (moments.mean * moments.mean).sum()


def gram_with_mean(rows: jax.Array) -> jax.Array:
    """Gram matrix (N+1, N+1) of the N centred rows of (N, P) and, last, of their mean.

    It holds the Gram of the rows as they are and of the centred rows, each to full precision, also
    where a strong common direction would swamp the differences.
    """
    rows = rows.astype(jnp.float32)
    mean = jnp.mean(rows, axis=0, keepdims=True)
    stacked = jnp.concatenate([rows - mean, mean])
    return jnp.matmul(stacked, stacked.T, precision="highest")


def split_gram(gram: jax.Array, xp) -> tuple[jax.Array, jax.Array]:
    """Gram matrices (N, N) of the rows as they are and of the centred rows."""
    gram = _widen(gram, xp)
    inner, cross = gram[:-1, :-1], gram[:-1, -1]
    return inner + cross[:, None] + cross[None, :] + gram[-1:, -1:], inner


def gram_singular_values(gram: jax.Array, xp, rank=None, *, centred: bool = False) -> jax.Array:
    """Singular values of N rows, descending, (N,), from their Gram matrix (N, N).

    rank: what the rows can have at most, min(N, P) for P entries (None: N); centred: they have lost
    their mean and so have rank N - 1. What follows is exactly 0; the length always tells N. The
    Gram matrix squares the condition number: values below about 3e-4 of the largest are rounding of
    its float32 products (`fits.GRAM_FLOOR`). All are NaN where an entry is not finite.
    """
    rank = len(gram) if rank is None else rank
    rank = xp.minimum(rank, len(gram) - 1) if centred else rank
    return _up_to(xp.sqrt(xp.maximum(_eigenvalues(gram, xp), 0)), rank, xp)


def matrix_singular_values(matrix: jax.Array, xp) -> jax.Array:
    """Singular values of a matrix (in, out), descending, (min(in, out),).

    On the host through the float64 Gram of the short side, six times faster than an SVD and exact
    to 1e-8 of the largest value; inside jit by SVD, whose float32 has no digits to spare.
    """
    matrix = _widen(matrix, xp)
    if xp is jnp:
        return jnp.linalg.svd(matrix, compute_uv=False)
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return gram_singular_values(wide @ wide.T, xp)


def _widen(array, xp):
    return xp.asarray(array, jnp.float32 if xp is jnp else xp.float64)
