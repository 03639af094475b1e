"""Muon: momentum whose 2-D updates are orthogonalised by a Newton-Schulz iteration.

buf <- mu buf + g,  u = g + mu buf,  O = NS(u),  W <- W - lr sqrt(max(1, out / in)) O   (ladder spec
5.1; K. Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024). The sum form of
the momentum is the point: `optax.contrib.muon` averages and bias-corrects, which is another rule.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

# Quintic with the steepest slope at 0 that still maps (0, 1] into a band around 1.
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_EPSILON = 1e-7


def newton_schulz(u: jax.Array, steps: int, dtype) -> jax.Array:
    """Move every singular value of `u` towards 1 and keep its singular vectors.

    u: (in, out) or a stack (K, in, out) of kernels; each matrix is divided by its own Frobenius
    norm. `dtype` ("bfloat16" or "float32") is the arithmetic of the products; `u` is rounded to it
    first. Returns float32 of the shape of `u`, singular values about 0.7 to 1.2 for those that were
    not tiny; zeros stay zeros. The rule commutes with transposition, so (in, out) kernels need no
    other care than running on the wide orientation. Source: ladder spec 5.1.
    """
    if u.ndim not in (2, 3):
        raise ValueError(f"newton_schulz: shape {u.shape}: give (in, out) or (K, in, out)")
    dtype = jnp.dtype(dtype)
    # Default precision would run float32 products in TF32 on a GPU.
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    matmul = partial(jnp.matmul, precision=precision)
    linear, cubic, quintic = NS_COEFFICIENTS
    tall = u.shape[-2] > u.shape[-1]

    rounded = u.astype(dtype).astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(jnp.square(rounded), axis=(-2, -1), keepdims=True)) + NS_EPSILON
    x = (rounded / norm).astype(dtype)
    x = x.mT if tall else x  # (..., short, long)
    for _ in range(steps):
        gram = matmul(x, x.mT)  # (..., short, short)
        x3 = matmul(gram, x)
        x5 = matmul(gram, x3)
        # Summed in float32: a Python scalar times a bfloat16 array would round the coefficient too
        # (3.4445 to 3.4375), where torch multiplies by the unrounded one.
        x, x3, x5 = (term.astype(jnp.float32) for term in (x, x3, x5))
        x = (linear * x + cubic * x3 + quintic * x5).astype(dtype)
    return (x.mT if tall else x).astype(jnp.float32)


class MuonState(NamedTuple):
    """Number of updates made and the momentum buffer, float32 in the shapes of the parameters."""

    count: jax.Array  # (), int32
    buffer: optax.Updates


def scale_by_muon(
    momentum: float | Callable[[jax.Array], jax.Array],
    *,
    ns_steps: int = 5,
    ns_dtype: str = "bfloat16",
    split: jax.sharding.NamedSharding | None = None,
    joined: jax.sharding.NamedSharding | None = None,
) -> optax.GradientTransformation:
    """Replace gradients of (in, out) kernels by sqrt(max(1, out / in)) NS(g + mu buf), in float32.

    split: how a stack of matrices lies on several devices, its leading axis cut among them, so that
    each orthogonalises its share and not all of them; None where all is on one device. joined: how
    it lies before and after, whole on every device where parameters do; None leaves that to XLA,
    which sees where parts of parameters are, but moves whole ones matrix by matrix.

    `momentum` is a number or a function of the 0-based step. The result points along the gradient:
    sign and learning rate belong to a later link of the chain. Every parameter must be a matrix;
    anything else raises ValueError. Source: ladder spec 5.1.
    """

    def init(params):
        return MuonState(
            count=jnp.zeros([], jnp.int32),
            buffer=optax.tree.zeros_like(params, dtype=jnp.float32),
        )

    def update(updates, state, params=None):
        del params
        mu = momentum(state.count) if callable(momentum) else momentum
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        buffer = jax.tree.map(lambda g, b: mu * b + g, grads, state.buffer)
        nesterov = jax.tree.map(lambda g, b: g + mu * b, grads, buffer)
        directions = _orthogonalise_tree(nesterov, ns_steps, ns_dtype, split, joined)
        return directions, MuonState(optax.safe_increment(state.count), buffer)

    return optax.GradientTransformation(init, update)


def _orthogonalise_tree(tree, steps, dtype, split, joined):
    """Run one batched Newton-Schulz per distinct shape: few large products, not many small ones."""
    leaves, treedef = jax.tree.flatten(tree)
    indices_of = defaultdict(list)
    for index, leaf in enumerate(leaves):
        if leaf.ndim != 2:
            raise ValueError(f"Muon takes (in, out) matrices, not shape {leaf.shape}: use Adam")
        indices_of[leaf.shape].append(index)
    for (fan_in, fan_out), indices in indices_of.items():
        stack = jnp.stack([leaves[index] for index in indices])  # (K, in, out)
        stack = _newton_schulz_split(stack, steps, dtype, split, joined)
        stack = math.sqrt(max(1.0, fan_out / fan_in)) * stack
        for index, direction in zip(indices, jnp.unstack(stack), strict=True):
            leaves[index] = direction
    return jax.tree.unflatten(treedef, leaves)


def _newton_schulz_split(stack, steps, dtype, split, joined):
    """Newton-Schulz of a stack (K, in, out), each device working on its share of the K."""
    if split is None:
        return newton_schulz(stack, steps, dtype)
    count, devices = stack.shape[0], split.mesh.size

    def place(stack):
        return stack if joined is None else jax.lax.with_sharding_constraint(stack, joined)

    # equal shares: zero matrices stay zero
    padded = place(jnp.pad(stack, ((0, -count % devices), (0, 0), (0, 0))))
    directions = newton_schulz(jax.lax.with_sharding_constraint(padded, split), steps, dtype)
    return place(directions)[:count]
