"""The output head: logits with an optional tanh cap, and their cross-entropy (ladder spec 2, 4).

z = x w in `dtype`; capped to c tanh(z / c) and turned into a loss in float32. At the published size
the logits of one micro-batch are 65,536 x 50,304 numbers, so the loss never holds them: it works on
a chunk of positions at a time and, when gradients are asked for, computes the chunk's part of them
in the same pass. The mean's cotangent is a single number, so gradients for cotangent 1 need only be
multiplied by it afterwards, and no logit is computed twice.

Legend of shape comments: B rows, T positions, C positions of a chunk, D width, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from models.float8 import (
    AROUND,
    BACKWARD,
    W_SCALE,
    X_SCALE,
    float8_linear,
    forward_product,
    gradient_scale,
    has_native_float8,
    input_gradient,
    kernel_gradient,
    operands,
    quantize,
    round_to,
)
from models.sharded import mean_over_rows

# Logits of a chunk. A CPU is fastest when they stay in the cache of a core (1 MB of float32); an
# accelerator wants few large products (half a GB of float32, half of that in bfloat16).
CHUNK_LOGITS_CPU = 2**18
CHUNK_LOGITS = 2**27
# Every chunk reads and writes all of dw, which costs as much as D / (B C) passes over its logits.
CHUNK_WIDTHS = 2  # so B C is at least this many D


def head_logits(
    x: jax.Array,
    kernel: jax.Array,
    *,
    softcap: float | None,
    dtype,
    float8: bool = False,
    product: Callable = jnp.matmul,
) -> jax.Array:
    """Logits (B, T, V) float32, after the cap, of x (B, T, D) under kernel (D, V).

    The plain definition, for whoever needs the logits themselves; differentiate `head_loss` instead
    of this where only the loss is needed. With `float8` the product and its gradients follow
    `models.float8`, whatever `dtype` and `product` are, and the gradient's scale takes the loss to
    be a mean over B * T positions.
    """
    if float8:
        z = float8_linear(x, kernel, x.shape[0] * x.shape[1], has_native_float8())
        return soft_cap(z, softcap, AROUND)
    return soft_cap(product(x.astype(dtype), kernel.astype(dtype)), softcap)  # (B, T, V)


def soft_cap(z: jax.Array, softcap: float | None, dtype=jnp.float32) -> jax.Array:
    """c tanh(z / c) as float32, or z without a cap; each of the operations rounds to `dtype`.

    The published code caps in the dtype of the logits, which is told from float32 in the last
    digits of a bfloat16 only; the float8 rungs keep to it.
    """
    z = z.astype(jnp.float32)
    if softcap is None:
        return z

    def rounded(value):
        return value if dtype == jnp.float32 else round_to(value, dtype).astype(jnp.float32)

    return rounded(softcap * rounded(jnp.tanh(rounded(z / softcap))))


def head_loss(
    x: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    *,
    softcap: float | None,
    dtype,
    float8: bool = False,
    chunk: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> jax.Array:
    """Mean cross-entropy in nats, () float32, of targets (B, T) under the logits of `head_logits`.

    x: (B, T, D); kernel: (D, V), the float32 master. `chunk` is the number of positions of every
    row that are worked on together; none picks it by the size of their logits. Only T is cut, so
    rows may lie on different devices. A target outside 0..V-1 makes the loss and all gradients NaN.

    Gradients with respect to x (in its dtype) and kernel (summed in float32) are made along with
    the loss, if at all. The slope of the logits is rounded to `dtype` before its products, and with
    `float8` on to e5m2, always for cotangent 1: scaling the loss does not change its rounding.
    mesh: devices over which rows are split, so that each works through its own rows alone.
    Raises ValueError for a chunk below 1, or targets that are not (B, T).
    """
    if targets.shape != x.shape[:2]:
        raise ValueError(f"targets of shape {targets.shape}: x {x.shape} takes {x.shape[:2]}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}: give at least 1 position")

    def mean_loss(x, kernel, targets):
        size = chunk or chunk_length(*x.shape, kernel.shape[1])
        head = _Head(softcap, jnp.dtype(AROUND if float8 else dtype), float8, min(size, x.shape[1]))
        return _mean_loss(head, x, kernel, targets)

    return mean_over_rows(mean_loss, mesh, x, kernel, targets)


def chunk_length(rows: int, length: int, width: int, vocab: int) -> int:
    """Positions of a chunk for x (rows, length, width) and `vocab` words; divides length if it can.

    Rows that a caller maps over with vmap are not seen here and multiply what a chunk holds.
    """
    logits = CHUNK_LOGITS_CPU if jax.default_backend() == "cpu" else CHUNK_LOGITS
    positions = max(logits // vocab, CHUNK_WIDTHS * width) // rows
    least = -(-length // max(positions, 1))
    for count in range(least, min(2 * least, length + 1)):
        if length % count == 0:
            return length // count
    return -(-length // least)


class _Head(NamedTuple):
    """What is known when the loss is traced."""

    softcap: float | None
    dtype: jnp.dtype
    float8: bool
    chunk: int

    def cross_entropy(self, z, targets):
        return _cross_entropy(z, targets, self.softcap, AROUND if self.float8 else jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mean_loss(head, x, kernel, targets):
    product, _ = _products(head, kernel, targets.size)

    def add(total, x, targets):  # (), (B, C, D), (B, C)
        losses, _ = head.cross_entropy(product(x), targets)
        return total + jnp.sum(losses), None

    total, _ = _fold(add, jnp.zeros((), jnp.float32), x, targets, head.chunk)
    return total / targets.size


def _loss_and_gradients(head, x, kernel, targets):
    num_tokens = targets.size
    product, gradients = _products(head, kernel, num_tokens)

    def add(sums, x, targets):  # ((), (D, V)), (B, C, D), (B, C)
        losses, slope = head.cross_entropy(product(x), targets)
        g = round_to(slope() / num_tokens, head.dtype)  # (B, C, V)
        dx, dw = gradients(x, g)
        return (sums[0] + jnp.sum(losses), sums[1] + dw), dx.astype(x.dtype)

    zeros = jnp.zeros((), jnp.float32), jnp.zeros(kernel.shape, jnp.float32)
    (total, dw), dx = _fold(add, zeros, x, targets, head.chunk)
    return total / num_tokens, (dx, dw.astype(kernel.dtype))


def _scale_gradients(head, saved, cotangent):
    del head
    dx, dw = saved
    return (cotangent * dx).astype(dx.dtype), (cotangent * dw).astype(dw.dtype), None


_mean_loss.defvjp(_loss_and_gradients, _scale_gradients)


def _products(head: _Head, kernel, num_tokens: int) -> tuple[Callable, Callable]:
    """x -> z, and (x, dloss/dz) -> (dx, dw); the kernel is made ready once for all chunks."""
    if head.float8:
        return _float8_products(kernel, num_tokens)
    w = kernel.astype(head.dtype)

    def product(x):
        return x.astype(head.dtype) @ w

    def gradients(x, g):
        dx = lax.dot_general(g, w, (((2,), (1,)), ((), ())))
        positions = ((0, 1), (0, 1))
        dw = lax.dot_general(
            x.astype(head.dtype), g, (positions, ((), ())), preferred_element_type=jnp.float32
        )
        return dx, dw

    return product, gradients


def _float8_products(kernel, num_tokens: int) -> tuple[Callable, Callable]:
    native = has_native_float8()
    w8 = operands(kernel, W_SCALE)
    if not native:
        w8 = w8.astype(jnp.float32)  # here, and not once a chunk

    def product(x):
        return forward_product(operands(x, X_SCALE), w8, native=native)

    def gradients(x, g):
        x8 = operands(x, X_SCALE)
        g8 = quantize(g, gradient_scale(num_tokens), BACKWARD)
        dx = input_gradient(g8, w8, num_tokens=num_tokens, native=native)
        return dx, kernel_gradient(x8, g8, num_tokens=num_tokens, native=native)

    return product, gradients


def _cross_entropy(z, targets, softcap: float | None, cap_dtype) -> tuple[jax.Array, Callable]:
    """Losses (B, C) of z (B, C, V) in float32, and a function to their slopes (B, C, V).

    The target's logit is found by comparing word numbers: the gradient of a gather is a scatter.
    """
    vocab = z.shape[-1]
    capped = soft_cap(z, softcap, cap_dtype)
    hit = lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1) == targets[..., None]
    highest = jnp.max(capped, axis=-1, keepdims=True)
    powers = jnp.exp(capped - highest)
    total = jnp.sum(powers, axis=-1, keepdims=True)  # (B, C, 1)
    # A target that no word can meet poisons its loss and, through the slopes, every gradient.
    known = (targets >= 0) & (targets < vocab)
    total = jnp.where(known[..., None], total, jnp.nan)
    losses = (jnp.log(total) + highest)[..., 0] - jnp.sum(jnp.where(hit, capped, 0), axis=-1)

    def slope():
        g = powers / total - hit  # softmax less the target
        return g if softcap is None else g * (1 - jnp.square(capped / softcap))

    return losses, slope


def _fold(add: Callable, sums, x, targets, chunk: int):
    """`add` over the chunks of x (B, T, D) and targets (B, T), the last of which may be shorter.

    add: (sums, x, targets) -> (sums, y), y (B, C, D) or None. Returns the sums and y (B, T, D).
    """
    count, rest = divmod(x.shape[1], chunk)

    def step(sums, start, size=chunk):
        x_piece, targets_piece = (
            lax.dynamic_slice_in_dim(each, start, size, axis=1) for each in (x, targets)
        )
        return add(sums, x_piece, targets_piece)

    if count == 1:
        sums, y = step(sums, 0)
    else:
        sums, stacked = lax.scan(step, sums, jnp.arange(count) * chunk)
        # (count, B, C, D) -> (B, count * C, D)
        y = jax.tree.map(
            lambda s: jnp.moveaxis(s, 0, 1).reshape(x.shape[0], -1, x.shape[2]), stacked
        )
    if rest:
        sums, tail = step(sums, count * chunk, rest)
        y = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), y, tail)
    return sums, y
