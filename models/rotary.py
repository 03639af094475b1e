"""Rotary position embedding, half-split form (arXiv 2104.09864; ladder spec section 2)."""

import jax.numpy as jnp

BASE = 10_000.0
HALF_BASE = 1024.0


def frequencies(head_dim: int) -> jnp.ndarray:
    """BASE^(-2j/K) for j = 0 .. K/2 - 1, float32."""
    return 1.0 / BASE ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)


def half_frequencies(head_dim: int) -> jnp.ndarray:
    """HALF_BASE^(-j/(K/4 - 1)) for j = 0 .. K/4 - 1, then as many zeros: (K/2,) float32.

    Half of the K/2 pairs of a head turn, the other half never do.
    """
    turning = head_dim // 4
    exponents = jnp.arange(turning, dtype=jnp.float32) / (turning - 1)
    return jnp.concatenate([HALF_BASE**-exponents, jnp.zeros(head_dim // 2 - turning)])


def rotary_tables(
    num_positions: int, frequency: jnp.ndarray, dtype
) -> tuple[jnp.ndarray, jnp.ndarray]:
    """Cosine and sine of position times frequency (K/2,), each (T, K/2) in `dtype`.

    Angles are formed in float32 before the cast.
    """
    angles = jnp.arange(num_positions, dtype=jnp.float32)[:, None] * frequency[None, :]
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(x: jnp.ndarray, cos: jnp.ndarray, sin: jnp.ndarray, sign: int) -> jnp.ndarray:
    """Turn the halves of each head of x (B, T, H, K) by sign times the tabled angle.

    float32 tables make the products float32; the result has x's dtype.
    """
    cos = cos[None, :, None, :]  # (1, T, 1, K/2)
    sin = sign * sin[None, :, None, :]
    first, second = jnp.split(x, 2, axis=-1)
    turned = [first * cos - second * sin, first * sin + second * cos]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
