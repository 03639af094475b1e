"""Lookup of embedding rows (tokens, values), and two ways to sum its gradient.

Frequent tokens make the sum a contest: on a CPU a plain scatter-add is fastest, while some jaxlibs
turn float32 atomic adds on NVIDIA GPUs into loops of compare and swap, hundreds of times slower
where many tokens are equal (openxla/xla issue 46225). `scan_rows` writes every row of the table at
most once. `python -m experiments.bench sections=scatter` and benchmarks/first_gpu.py time both.
"""

import jax
import jax.numpy as jnp

COLUMNS = 256  # most of the width that scan_rows takes at a time


@jax.custom_vjp
def take_rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of table (V, D) at ids (B, T), as (B, T, D); an id outside 0..V-1 gives NaN."""
    return jnp.take(table, beyond_end(ids, len(table)), axis=0, mode="fill", fill_value=jnp.nan)


def beyond_end(ids: jax.Array, vocab: int) -> jax.Array:
    """Ids with those below 0, which would count from the end of a table, as one beyond it."""
    return jnp.where(ids < 0, vocab, ids)


def _take_forward(table, ids):
    return take_rows(table, ids), (table, ids)


def _take_backward(residuals, cotangent):
    table, ids = residuals
    vocab, width = table.shape
    # the choice for GPUs is by the argument above, not by a measurement
    sum_rows = scan_rows if jax.default_backend() == "gpu" else scatter_rows
    total = sum_rows(beyond_end(ids, vocab).reshape(-1), cotangent.reshape(-1, width), vocab)
    return total.astype(table.dtype), None


take_rows.defvjp(_take_forward, _take_backward)


def scatter_rows(ids: jax.Array, rows: jax.Array, vocab: int) -> jax.Array:
    """Sum of the rows (N, D) of every id (N,), (V, D) in their dtype: a scatter-add in order."""
    return jnp.zeros((vocab, rows.shape[1]), rows.dtype).at[ids].add(rows, mode="drop")


def scan_rows(ids: jax.Array, rows: jax.Array, vocab: int) -> jax.Array:
    """The same by a parallel scan over the sorted ids, then one row written for each id.

    Columns do not meet, so they are taken some at a time: a scan holds several copies of its rows.
    """
    order = jnp.argsort(ids)
    ids = ids[order]
    first = jnp.diff(ids, prepend=-1) != 0
    last = jnp.diff(ids, append=vocab) != 0
    # all but the last of an id go to places of their own beyond the table, which are dropped
    places = jnp.where(last, ids, vocab + jnp.arange(len(ids), dtype=ids.dtype))

    def add(left, right):
        (left_first, left_sum), (right_first, right_sum) = left, right
        kept = jnp.where(right_first[:, None], 0, left_sum)
        return left_first | right_first, kept + right_sum

    width = rows.shape[1]
    columns = max(count for count in range(1, min(width, COLUMNS) + 1) if width % count == 0)

    def visit(block, table):
        some = jax.lax.dynamic_slice_in_dim(rows, block * columns, columns, axis=1)
        _, sums = jax.lax.associative_scan(add, (first, some[order]))
        part = jnp.zeros((vocab, columns), rows.dtype)
        part = part.at[places].set(sums, mode="drop", unique_indices=True)
        return jax.lax.dynamic_update_slice_in_dim(table, part, block * columns, axis=1)

    table = jnp.zeros((vocab, width), rows.dtype)
    return jax.lax.fori_loop(0, width // columns, visit, table)
