"""Causal attention behind one function; callers never choose an implementation."""

import jax
import jax.numpy as jnp

QUERY_BLOCKS = 4  # of a row, off the flash kernel: 5/8 of the full square is computed


def causal_attention(q: jnp.ndarray, k: jnp.ndarray, v: jnp.ndarray) -> jnp.ndarray:
    """softmax(q k' / sqrt(K)) v over positions up to the query's own; all are (B, T, H, K).

    Scores and softmax are float32 whatever the inputs. On NVIDIA GPUs half-precision inputs take
    cuDNN's flash kernel; everything else goes block by block over the queries.
    """
    if jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    return blocked_attention(q, k, v)


def blocked_attention(q: jnp.ndarray, k: jnp.ndarray, v: jnp.ndarray) -> jnp.ndarray:
    """As `causal_attention`, each block of queries against the keys up to its own end only.

    The upper triangle beyond the block is never computed, and heads join the rows in one leading
    axis, so that every product is a plain batched one.
    """
    rows, length, heads, width = q.shape
    q, k, v = (
        x.transpose(0, 2, 1, 3).reshape(rows * heads, length, width) for x in (q, k, v)
    )  # (B*H, T, K)
    block = -(-length // QUERY_BLOCKS)
    outputs = [
        _attend(q[:, start : start + block], k[:, : start + block], v[:, : start + block], start)
        for start in range(0, length, block)
    ]
    joined = jnp.concatenate(outputs, axis=1).reshape(rows, heads, length, width)
    return joined.transpose(0, 2, 1, 3)


def _attend(q, k, v, start: int):  # (N, C, K), (N, S, K), (N, S, K) -> (N, C, K)
    scores = jnp.einsum("nqk,nsk->nqs", q, k, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5
    position = start + jnp.arange(q.shape[1])[:, None]
    visible = jnp.arange(k.shape[1])[None, :] <= position  # (C, S)
    scores = jnp.where(visible[None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("nqs,nsk->nqk", weights, v)
