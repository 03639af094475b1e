"""Which keys a query sees (ladder spec 3.4), in two forms that the tests hold against each other.

base(q, k): k <= q, and k in q's document. A window of w tokens narrows it by a rule, with B(t) the
mask block of position t:

  none         nothing more
  token        q - k < w
  token_block  q - k < w and B(q) - B(k) < ceil(w / block)
  block        B(q) - B(k) < max(1, w // block)

Documents are contiguous, so under every rule a query sees one interval of keys that ends in itself,
and the mask is a vector: the first key that each query sees.
"""

from typing import Literal

import jax
import jax.numpy as jnp

Rule = Literal["none", "token", "token_block", "block"]


def document_ids(tokens: jax.Array, eot_token: int) -> jax.Array:
    """Number of document starts up to each position, (B, T) int32: a start opens its document."""
    return jnp.cumsum((tokens == eot_token).astype(jnp.int32), axis=1)


def first_keys(
    shape: tuple[int, int],
    documents: jax.Array | None = None,
    window: jax.Array | None = None,
    *,
    rule: Rule = "none",
    block: int = 1,
) -> jax.Array:
    """The first key that each query sees, int32 of `shape` (B, T), non-decreasing along T.

    documents: (B, T) from `document_ids`, or None for one document a row. window: (B,) tokens, read
    unless rule is "none".
    """
    position = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None, :], shape)
    first = jnp.zeros(shape, jnp.int32)
    if documents is not None:
        fresh = jnp.diff(documents, axis=1, prepend=documents[:, :1]) != 0
        first = jax.lax.cummax(jnp.where(fresh, position, 0), axis=1)
    if rule == "none":
        return first
    window = jnp.broadcast_to(window.astype(jnp.int32)[:, None], shape)
    if rule in ("token", "token_block"):
        first = jnp.maximum(first, position - window + 1)
    if rule in ("token_block", "block"):
        blocks = -(-window // block) if rule == "token_block" else jnp.maximum(window // block, 1)
        first = jnp.maximum(first, (position // block - blocks + 1) * block)
    return first


def visible_pairs(
    shape: tuple[int, int],
    documents: jax.Array | None = None,
    window: jax.Array | None = None,
    *,
    rule: Rule = "none",
    block: int = 1,
) -> jax.Array:
    """The same mask pair by pair, bool (B, T, T) over queries and keys: the definition."""
    rows, length = shape
    query, key = jnp.arange(length)[None, :, None], jnp.arange(length)[None, None, :]
    seen = jnp.broadcast_to(key <= query, (rows, length, length))
    if documents is not None:
        seen &= documents[:, :, None] == documents[:, None, :]
    if rule == "none":
        return seen
    window = window[:, None, None]
    if rule in ("token", "token_block"):
        seen &= query - key < window
    if rule in ("token_block", "block"):
        blocks = -(-window // block) if rule == "token_block" else jnp.maximum(window // block, 1)
        seen &= query // block - key // block < blocks
    return seen
