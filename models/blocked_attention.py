"""Attention in plain JAX, a block of queries at a time against the keys within its reach.

A long row goes through a loop, and nothing outlives a block but the output and the logarithm of
each softmax's denominator; the backward pass forms the weights again from them (arXiv 2205.14135,
section 3 and appendix B, with a whole reach of keys in place of a tile). Time and memory are
O(T (reach + block)). A short row is cut into four without a loop and keeps its weights, since
exponentials are what a CPU is slowest at.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

SHORT_ROW = 1024
QUERY_BLOCK = 256  # queries in a block of a longer row


def blocked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first_key: jax.Array | None,
    scale: float,
    reach: int | None,
) -> jax.Array:
    """softmax(scale q k') v over the keys first_key[b, q] to q.

    q, k, v: (B, T, H, K); first_key: (B, T) int32, None for 0 everywhere; reach: no query sees
    `reach` or more positions back (None: no bound). Scores, softmax and sums are float32; the
    result has v's dtype.
    """
    heads = tuple(_heads_first(x) for x in (q, k, v))  # (B, H, T, K)
    if q.shape[1] <= SHORT_ROW:
        out = _short(*heads, first_key, scale, reach)
    else:
        if first_key is None:
            first_key = jnp.zeros(q.shape[:2], jnp.int32)
        out = _long(*heads, first_key, scale, reach)
    return _heads_first(out)


def _short(q, k, v, first_key, scale, reach):
    blocks = []
    for queries, keys in _spans(q.shape[2], reach):
        first = None if first_key is None else first_key[:, queries]
        near = k[:, :, keys], v[:, :, keys]
        out, _ = _attend(q[:, :, queries], *near, first, queries.start, keys.start, scale)
        blocks.append(out)
    return jnp.concatenate(blocks, axis=2)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _long(q, k, v, first_key, scale, reach):
    return _loop_forward(q, k, v, first_key, scale, reach)[0]


def _long_forward(q, k, v, first_key, scale, reach):
    out, lse = _loop_forward(q, k, v, first_key, scale, reach)
    return out, (q, k, v, first_key, out, lse)


def _long_backward(scale, reach, residuals, cotangent):
    q, k, v, first_key, out, lse = residuals
    delta = jnp.sum(cotangent.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    by_query = (q, cotangent, lse, delta)
    grads = _loop_backward(by_query, k, v, first_key, scale, reach)
    return *(g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), None


_long.defvjp(_long_forward, _long_backward)


def computed_pairs(length: int, reach: int | None) -> int:
    """Scores that a head's forward pass over a row computes, to hold against the mask's."""
    if length <= SHORT_ROW:
        spans = _spans(length, reach)
        return sum((q.stop - q.start) * (k.stop - k.start) for q, k in spans)
    blocks, _, before = _layout(length, reach)
    return blocks * QUERY_BLOCK * (before + QUERY_BLOCK)


def _heads_first(x: jax.Array) -> jax.Array:  # (B, T, H, K) <-> (B, H, T, K)
    return x.swapaxes(1, 2)


def _spans(length: int, reach: int | None) -> Iterator[tuple[slice, slice]]:
    """Queries of each block of a short row, and the keys within their reach."""
    block = -(-length // 4)
    for start in range(0, length, block):
        lowest = 0 if reach is None else max(0, start - reach)
        end = min(length, start + block)
        yield slice(start, end), slice(lowest, end)


def _attend(q, k, v, first, start, lowest, scale):
    """A block of queries (B, H, C, K) from `start` on, keys (B, H, S, K) from `lowest` on."""
    scores = _scores(q, k, first, start, lowest, scale)  # (B, H, C, S)
    # any number would do here, so none of the gradient goes through it
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum(
        "bhqs,bhsk->bhqk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return (out / total).astype(v.dtype), (peak + jnp.log(total))[..., 0]


def _attend_backward(q, cotangent, lse, delta, k, v, first, start, lowest, scale):
    """Cotangents of a block's queries, and its share of those of the keys and values."""
    dot = partial(jnp.einsum, preferred_element_type=jnp.float32)
    weights = jnp.exp(_scores(q, k, first, start, lowest, scale) - lse[..., None])
    slope = dot("bhqk,bhsk->bhqs", cotangent, v) - delta[..., None]
    slope = (scale * weights * slope).astype(q.dtype)
    dv = dot("bhqs,bhqk->bhsk", weights.astype(v.dtype), cotangent)
    return dot("bhqs,bhsk->bhqk", slope, k), dot("bhqs,bhqk->bhsk", slope, q), dv


def _scores(q, k, first, start, lowest, scale):
    scores = jnp.einsum("bhqk,bhsk->bhqs", q, k, preferred_element_type=jnp.float32)
    query = (start + jnp.arange(q.shape[2]))[None, :, None]
    key = (lowest + jnp.arange(k.shape[2]))[None, None, :]
    visible = key <= query
    if first is not None:
        visible = visible & (key >= first[:, :, None])  # (B, C, S)
    return jnp.where(visible[:, None], scale * scores, -jnp.inf)


def _layout(length: int, reach: int | None) -> tuple[int, int, int]:
    """Of a long row: blocks, padding behind the queries, and keys before each block's own."""
    blocks = -(-length // QUERY_BLOCK)
    before = blocks * QUERY_BLOCK if reach is None else min(reach, blocks * QUERY_BLOCK)
    return blocks, blocks * QUERY_BLOCK - length, before


def _cut(x, blocks, behind):  # (B, H, T, ...) -> (blocks, B, H, C, ...)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, behind), *((0, 0) for _ in x.shape[3:])))
    x = x.reshape(*x.shape[:2], blocks, QUERY_BLOCK, *x.shape[3:])
    return jnp.moveaxis(x, 2, 0)


def _join(x, length):  # (blocks, B, H, C, ...) -> (B, H, T, ...)
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :length]


def _cut_first(first_key, blocks, behind):
    """First keys by block; a query of the padding sees from its row's end on, that is, itself."""
    first = jnp.pad(first_key, ((0, 0), (0, behind)), constant_values=first_key.shape[1])
    return jnp.moveaxis(first.reshape(first.shape[0], blocks, QUERY_BLOCK), 1, 0)


def _pad_keys(x, before, behind):
    return jnp.pad(x, ((0, 0), (0, 0), (before, behind), (0, 0)))


def _loop_forward(q, k, v, first_key, scale, reach):
    blocks, behind, before = _layout(q.shape[2], reach)
    k, v = (_pad_keys(x, before, behind) for x in (k, v))

    def visit(start, block):
        q, first = block
        near = (jax.lax.dynamic_slice_in_dim(x, start, before + QUERY_BLOCK, 2) for x in (k, v))
        return start + QUERY_BLOCK, _attend(q, *near, first, start, start - before, scale)

    inputs = _cut(q, blocks, behind), _cut_first(first_key, blocks, behind)
    _, found = jax.lax.scan(visit, jnp.int32(0), inputs)
    return tuple(_join(x, q.shape[2]) for x in found)


def _loop_backward(by_query, k, v, first_key, scale, reach):
    length = k.shape[2]
    blocks, behind, before = _layout(length, reach)
    k, v = (_pad_keys(x, before, behind) for x in (k, v))

    def visit(carry, block):
        start, totals = carry
        *queries, first = block
        near = [jax.lax.dynamic_slice_in_dim(x, start, before + QUERY_BLOCK, 2) for x in (k, v)]
        dq, *shares = _attend_backward(*queries, *near, first, start, start - before, scale)
        totals = tuple(
            _add_at(total, share, start) for total, share in zip(totals, shares, strict=True)
        )
        return (start + QUERY_BLOCK, totals), dq

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    inputs = *(_cut(x, blocks, behind) for x in by_query), _cut_first(first_key, blocks, behind)
    (_, totals), dq = jax.lax.scan(visit, (jnp.int32(0), zeros), inputs)
    dk, dv = (total[:, :, before : before + length] for total in totals)
    return _join(dq, length), dk, dv


def _add_at(total, share, start):
    here = jax.lax.dynamic_slice_in_dim(total, start, share.shape[2], 2)
    return jax.lax.dynamic_update_slice_in_dim(total, here + share, start, 2)
