"""Attention behind one function: which implementation runs is a matter of device and mask.

dense    every pair of a row, masked afterwards: the oracle, for small sizes only
blocked  plain JAX: blocks of queries against the keys within reach; time and memory grow with
         T times the widest window
cudnn    cuDNN's flash kernel through jax.nn, for rows without documents and window
pallas   a block-sparse flash kernel (models.flash) that skips the tiles nobody sees
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from models import flash
from models.blocked_attention import blocked_attention
from models.hardware import nvidia_capability
from models.masks import Rule, first_keys, visible_pairs
from models.sharded import on_own_rows

Implementation = Literal["auto", "dense", "blocked", "cudnn", "pallas"]
HALF = (jnp.bfloat16, jnp.float16)
FIRST_HALF = (8, 0)  # compute capability of the first cards for which the kernels are written


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    documents: jax.Array | None = None,
    window: jax.Array | None = None,
    *,
    rule: Rule = "none",
    block: int = 128,
    widest: int | None = None,
    scale: float | None = None,
    implementation: Implementation = "auto",
    mesh: jax.sharding.Mesh | None = None,
) -> jax.Array:
    """softmax(scale q k') v over the keys that `models.masks` lets each query see.

    q, k, v: (B, T, H, K); documents: (B, T) int32, non-decreasing, or None; window: (B,) int32
    tokens, data and not a constant, read unless rule is "none"; block: tokens in a mask block;
    widest: a static bound to which the window is cut, by which `blocked` sizes its work (None: the
    row); scale:
    None for 1 / sqrt(K); mesh: the devices over which rows are split, for kernels that XLA cannot
    split. Scores and softmax are float32 whatever the inputs; the result has v's
    dtype. Raises ValueError for an implementation that device or mask does not allow.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    masked = documents is not None or rule != "none"
    chosen = choose(implementation, masked, q.dtype, q.shape[-1])
    if chosen == "cudnn":
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, scale=scale, implementation="cudnn"
        )
    if window is not None and widest is not None:
        window = jnp.minimum(window, widest)
    mask = {"documents": documents, "window": window, "rule": rule, "block": block}
    if chosen == "dense":
        return dense_attention(q, k, v, visible_pairs(q.shape[:2], **mask), scale)
    first = first_keys(q.shape[:2], **mask) if masked or chosen == "pallas" else None
    if chosen == "pallas":
        return on_own_rows(partial(flash.flash_attention, scale=scale), mesh, q, k, v, first)
    return blocked_attention(q, k, v, first, scale, widest if rule != "none" else None)


def choose(implementation: Implementation, masked: bool, dtype, head_dim: int) -> str:
    """The implementation that runs; raises ValueError for one that cannot.

    masked: whether documents or a window narrow the causal mask.
    """
    flash_runs = jax.default_backend() == "gpu" and flash.supports(head_dim)
    capability = nvidia_capability() or (0, 0)
    half_runs = dtype in HALF and capability >= FIRST_HALF
    widest = 256 if capability >= (9, 0) else 128
    cudnn_runs = half_runs and not masked and head_dim % 8 == 0 and head_dim <= widest
    if implementation == "auto":
        if cudnn_runs:
            return "cudnn"
        return "pallas" if flash_runs and half_runs else "blocked"
    if implementation == "cudnn" and not cudnn_runs:
        raise ValueError(
            f"attention=cudnn needs an NVIDIA GPU from Ampere on, a half-precision dtype, a rung "
            f"without documents and window, and heads of a multiple of 8 up to 128 (256 from "
            f"Hopper on; here {jax.default_backend()}, {jnp.dtype(dtype).name}, "
            f"{'masked' if masked else 'plainly causal'}, heads of {head_dim}); "
            f"choose attention=auto"
        )
    if implementation == "pallas" and not flash_runs:
        raise ValueError(
            f"attention=pallas needs a GPU, and heads of a power of two from 16 to 256 (here "
            f"{jax.default_backend()}, heads of {head_dim}); choose attention=auto"
        )
    return implementation


def dense_attention(q, k, v, visible: jax.Array, scale: float) -> jax.Array:
    """Masked softmax over all pairs; visible: bool (B, T, T), at least one key a query."""
    scores = jnp.einsum(
        "bqhk,bshk->bhqs", q, k, preferred_element_type=jnp.float32, precision="highest"
    )
    scores = jnp.where(visible[:, None], scale * scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqs,bshk->bqhk", weights, v, precision="highest")
