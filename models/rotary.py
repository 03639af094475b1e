"""Rotary position embedding, half-split form (arXiv 2104.09864; ladder spec section 2)."""

import jax.numpy as jnp

BASE = 10_000.0


def rotary_tables(num_positions: int, head_dim: int, dtype) -> tuple[jnp.ndarray, jnp.ndarray]:
    """Cosine and sine of position times frequency, each (T, K/2) in `dtype`.

    Frequency j is BASE^(-2j/K); angles are formed in float32 before the cast.
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies = 1.0 / BASE**exponents  # (K/2,)
    angles = jnp.arange(num_positions, dtype=jnp.float32)[:, None] * frequencies[None, :]
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(x: jnp.ndarray, cos: jnp.ndarray, sin: jnp.ndarray, sign: int) -> jnp.ndarray:
    """Turn the halves of each head of x (B, T, H, K) by sign times the tabled angle.

    The result has x's dtype.
    """
    cos = cos[None, :, None, :]  # (1, T, 1, K/2)
    sin = sign * sin[None, :, None, :]
    first, second = jnp.split(x, 2, axis=-1)
    turned = [first * cos - second * sin, first * sin + second * cos]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
