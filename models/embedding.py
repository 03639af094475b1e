"""Lookup of embedding rows (tokens, positions, values), and its gradient."""

import jax
import jax.numpy as jnp


def take_rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of table (V, D) at ids (B, T), as (B, T, D); an id outside the table gives NaN."""
    return jnp.take(table, ids, axis=0, mode="fill", fill_value=jnp.nan)
