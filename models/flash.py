"""Flash attention over intervals of keys, as Pallas kernels for GPUs (Triton lowering).

Query t of row b sees exactly the keys first_key[b, t] <= k <= t. Every mask of the ladder is of
this form (ladder spec section 3.4): documents are contiguous, and a window, in tokens or in blocks,
cuts off the far end. `first_key` is an array, so that one compiled program serves every window and
every packing of documents.

A tile is a stretch of queries times a stretch of keys. The tiles of keys that a stretch of queries
meets are one range; inside it lies the range of tiles without a hidden pair, which skip the mask.
Both follow from `first_key` at the ends of the stretch. Forward and backward are those of
FlashAttention-2 (arXiv 2307.08691), with 2**x in place of exp.

Legend of shape comments: B rows, T positions, H heads, K head width, N tiles of Q queries, S keys.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

LOG2_E = math.log2(math.e)
# Both finite, since inf - inf is NaN. A hidden score lies so far below even the maximum over no key
# at all that its weight is exactly 0, whatever the scale.
HIDDEN = -1e30
NO_MAXIMUM = -1e20
DTYPES = ("float32", "bfloat16", "float16")


class Launch(NamedTuple):
    """One kernel's queries and keys of a tile (powers of two), warps and pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """The launches of the three kernels."""

    forward: Launch
    dq: Launch
    dkv: Launch


def plan_for(head_dim: int, dtype) -> Plan:
    """Tiles, warps and stages for one head width and input dtype.

    Those of half precision compiled for Hopper (sm_90) without spilling registers. Up to width 64
    they leave room for a second program on the multiprocessor, which computes exponentials while
    the first multiplies; above, where one program fills it, they are as large as fits.
    """
    if jnp.dtype(dtype) == jnp.float32:
        # Full precision has no tensor cores: every operand passes through registers.
        size = 32 if head_dim <= 128 else 16
        return Plan(*[Launch(size, size, 8, 1)] * 3)
    if head_dim <= 64:
        return Plan(Launch(128, 64, 8, 3), Launch(128, 64, 8, 3), Launch(64, 64, 4, 3))
    if head_dim <= 128:
        return Plan(Launch(128, 64, 8, 3), Launch(128, 64, 8, 2), Launch(64, 128, 8, 2))
    return Plan(Launch(64, 64, 8, 2), Launch(64, 32, 8, 2), Launch(32, 64, 8, 2))


def supports(head_dim: int) -> bool:
    """Whether the kernels take heads of this width: a power of two from 16 to 256."""
    return 16 <= head_dim <= 256 and head_dim & (head_dim - 1) == 0


def flash_attention(
    q, k, v, first_key, *, scale: float, interpret: bool = False, _plan: Plan | None = None
) -> jax.Array:
    """softmax(scale q k') v over the keys first_key[b, t] <= k <= t of each query t.

    q, k, v: (B, T, H, K), one dtype of float32, bfloat16 and float16; T any, K as `supports` says.
    first_key: (B, T) int32, not differentiated; its values are trusted: non-decreasing along t,
    with 0 <= first_key[b, t] <= t. Returns (B, T, H, K) in the dtype of v. Scores, softmax and sums
    are float32, and float32 inputs multiply at full precision, never in TF32. Differentiable once
    in q, k and v; `jax.vmap` works.

    interpret: run the kernels as plain XLA operations, on any device, slowly. Raises ValueError for
    shapes, dtypes, widths and scales out of these bounds. Source: ladder spec section 3.4, arXiv
    2307.08691.
    """
    _check(q, k, v, first_key, scale)
    plan = _plan or plan_for(q.shape[-1], q.dtype)
    length = q.shape[1]
    first_key = _pad_rows(first_key, *(size for launch in plan for size in launch[:2]))
    after = first_key.shape[1] - length
    q, k, v = (jnp.pad(x, ((0, 0), (0, after), (0, 0), (0, 0))) for x in (q, k, v))
    return _attention(q, k, v, first_key, float(scale), plan, interpret)[:, :length]


def visited_tiles(first_key, tile_q: int, tile_k: int) -> int:
    """How many tiles of tile_q queries by tile_k keys the forward kernel visits for one head.

    first_key: (B, T), concrete, as in `flash_attention`; rows are padded to whole tiles of both
    kinds. Times tile_q * tile_k it is the number of pairs computed, against the exact number, the
    sum of t - first_key + 1.
    """
    padded = _pad_rows(jnp.asarray(first_key), tile_q, tile_k)
    bounds = _bounds_of_query_tiles(padded, tile_q, tile_k)  # (B, 4, N)
    return int(jnp.sum(bounds[:, 3] - bounds[:, 0]))


def _check(q, k, v, first_key, scale):
    alike = q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype
    if q.ndim != 4 or not alike or q.dtype.name not in DTYPES:
        given = ", ".join(f"{x.dtype} {x.shape}" for x in (q, k, v))
        wanted = f"one shape (B, T, H, K) and one dtype of {', '.join(DTYPES)}"
        raise ValueError(f"flash_attention: q, k, v are {given}: give {wanted}")
    if not supports(q.shape[-1]):
        width = q.shape[-1]
        raise ValueError(f"flash_attention: head width {width}: give a power of two, 16 to 256")
    if first_key.shape != q.shape[:2] or first_key.dtype != jnp.int32:
        given = f"{first_key.dtype} {first_key.shape}"
        raise ValueError(f"flash_attention: first_key is {given}: give int32 {q.shape[:2]}")
    if not scale > 0:  # the maximum is taken before the scale
        raise ValueError(f"flash_attention: scale={scale}: give a positive number")


def _pad_rows(first_key, *tiles: int) -> jax.Array:
    """Lengthen (B, T) to whole tiles, all powers of two.

    Queries of the padding repeat the last interval, so that their softmax has a key. Their output
    and cotangent are cut off by the caller, and no query before them sees their keys.
    """
    after = -first_key.shape[1] % max(tiles)
    return jnp.pad(first_key, ((0, 0), (0, after)), mode="edge")


# Which tiles meet


def _bounds_of_query_tiles(first_key, tile_q: int, tile_k: int) -> jax.Array:
    """(B, 4, N): per tile of queries, the start, whole start, whole end and end of its key tiles.

    Tiles from start to end hold a visible pair, those from whole start to whole end nothing else.
    """
    first = jnp.arange(0, first_key.shape[1], tile_q)[None, :]  # (1, N), of the tile's queries
    start = first_key[:, ::tile_q] // tile_k  # the tile's first query reaches furthest back
    end = jnp.broadcast_to((first + tile_q - 1) // tile_k + 1, start.shape)
    whole_start = -(-first_key[:, tile_q - 1 :: tile_q] // tile_k)
    whole_end = jnp.broadcast_to((first + 1) // tile_k, start.shape)
    return _ordered(start, whole_start, whole_end, end)


def _bounds_of_key_tiles(first_key, tile_q: int, tile_k: int) -> jax.Array:
    """(B, 4, N): the same four per tile of keys, counted in tiles of queries.

    `first_key` is sorted, so the tiles of queries that reach back to a key are the first so many.
    """
    first = jnp.arange(0, first_key.shape[1], tile_k)[None, :]  # (1, N), of the tile's keys
    last = first + tile_k - 1

    def reaching(furthest, key):  # (B, M) per tile of queries, (1, N) -> (B, N)
        return jnp.sum(furthest[:, None, :] <= key[:, :, None], axis=-1, dtype=jnp.int32)

    end = reaching(first_key[:, ::tile_q], last)
    start = jnp.broadcast_to(first // tile_q, end.shape)
    whole_start = jnp.broadcast_to(-(-last // tile_q), end.shape)
    whole_end = reaching(first_key[:, tile_q - 1 :: tile_q], first)
    return _ordered(start, whole_start, whole_end, end)


def _ordered(start, whole_start, whole_end, end):
    """The four stacked, an empty whole range given length 0, so that each tile has one visit.

    A query sees itself, which keeps both ends of the whole range between start and end.
    """
    return jnp.stack([start, whole_start, jnp.maximum(whole_start, whole_end), end], axis=1)


def _visit(bounds_ref, tile, step, carry):
    """Fold step(index, carry, masked) over the tiles that `tile` meets: whole ones, then the rest.

    A softmax takes its keys in any order. One loop over both edges instead of two is one pipeline
    less to fill and a third less code.
    """
    start, whole_start, whole_end, end = (bounds_ref[i, tile] for i in range(4))
    carry = lax.fori_loop(whole_start, whole_end, partial(step, masked=False), carry)
    skipped = whole_end - whole_start

    def edge(n, carry):
        return step(jnp.where(n < whole_start, n, n + skipped), carry, masked=True)

    return lax.fori_loop(start, end - skipped, edge, carry)


# The kernels. Each program has one tile of one head of one row; the references are to whole rows,
# from which it takes what it needs.


def _dot(a, b, axes: tuple[int, int]):
    """Product of two tiles over one axis of each, summed in float32."""
    dimensions = (axes[:1], axes[1:]), ((), ())
    highest = lax.Precision.HIGHEST  # float32 would go through TF32 otherwise
    return lax.dot_general(a, b, dimensions, highest, preferred_element_type=jnp.float32)


def _stretch(tile, size: int):
    """The slice of a tile of queries or keys, and their positions (size,)."""
    return pl.ds(tile * size, size), tile * size + jnp.arange(size, dtype=jnp.int32)


def _query_tile(bounds_ref):
    """This program's. The last queries come first: where nothing is cut off they see most keys."""
    return bounds_ref.shape[-1] - 1 - pl.program_id(0)


def _visible(first_key, keys, queries):
    return (first_key <= keys) & (keys <= queries)


def _forward_kernel(bounds_ref, first_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, *, scale, launch):
    tile = _query_tile(bounds_ref)
    rows, queries = _stretch(tile, launch.queries)
    q, first_key = q_ref[rows, :], first_ref[rows]  # (Q, K), (Q,)

    def step(index, carry, masked):
        acc, top, total = carry  # (Q, K), (Q,), (Q,)
        columns, keys = _stretch(index, launch.keys)
        k, v = k_ref[columns, :], v_ref[columns, :]  # (S, K)
        scores = _dot(q, k, (1, 1))  # (Q, S)
        if masked:
            visible = _visible(first_key[:, None], keys[None, :], queries[:, None])
            scores = jnp.where(visible, scores, HIDDEN)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1) * (scale * LOG2_E))
        weights = jnp.exp2(scores * (scale * LOG2_E) - new_top[:, None])
        decay = jnp.exp2(top - new_top)
        acc = acc * decay[:, None] + _dot(weights.astype(v.dtype), v, (1, 0))
        return acc, new_top, total * decay + jnp.sum(weights, axis=1)

    none = jnp.zeros(queries.shape, jnp.float32)
    carry = jnp.zeros(q.shape, jnp.float32), none + NO_MAXIMUM, none
    acc, top, total = _visit(bounds_ref, tile, step, carry)
    out_ref[rows, :] = (acc / total[:, None]).astype(out_ref.dtype)
    lse_ref[rows] = top + jnp.log(total) * LOG2_E


def _dq_kernel(
    bounds_ref, first_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, dq_ref, *, scale, launch
):
    tile = _query_tile(bounds_ref)
    rows, queries = _stretch(tile, launch.queries)
    q, do, first_key = q_ref[rows, :], do_ref[rows, :], first_ref[rows]  # (Q, K), (Q, K), (Q,)
    lse, delta = lse_ref[rows], delta_ref[rows]  # (Q,)

    def step(index, dq, masked):
        columns, keys = _stretch(index, launch.keys)
        k, v = k_ref[columns, :], v_ref[columns, :]  # (S, K)
        weights = jnp.exp2(_dot(q, k, (1, 1)) * (scale * LOG2_E) - lse[:, None])  # (Q, S)
        if masked:
            visible = _visible(first_key[:, None], keys[None, :], queries[:, None])
            weights = jnp.where(visible, weights, 0.0)
        slope = weights * (_dot(do, v, (1, 1)) - delta[:, None])
        return dq + _dot(slope.astype(k.dtype), k, (1, 0))

    dq = _visit(bounds_ref, tile, step, jnp.zeros(q.shape, jnp.float32))
    dq_ref[rows, :] = (dq * scale).astype(dq_ref.dtype)


def _dkv_kernel(
    bounds_ref, first_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *outputs, scale, launch
):
    dk_ref, dv_ref = outputs
    tile = pl.program_id(0)
    columns, keys = _stretch(tile, launch.keys)
    k, v = k_ref[columns, :], v_ref[columns, :]  # (S, K)

    def step(index, carry, masked):
        dk, dv = carry  # (S, K)
        rows, queries = _stretch(index, launch.queries)
        q, do = q_ref[rows, :], do_ref[rows, :]  # (Q, K)
        # Transposed, (S, Q), so that they enter the second product as they leave the first.
        weights = jnp.exp2(_dot(k, q, (1, 1)) * (scale * LOG2_E) - lse_ref[rows][None, :])
        if masked:
            visible = _visible(first_ref[rows][None, :], keys[:, None], queries[None, :])
            weights = jnp.where(visible, weights, 0.0)
        dv = dv + _dot(weights.astype(do.dtype), do, (1, 0))
        slope = weights * (_dot(v, do, (1, 1)) - delta_ref[rows][None, :])
        return dk + _dot(slope.astype(q.dtype), q, (1, 0)), dv

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = _visit(bounds_ref, tile, step, (zeros, zeros))
    dk_ref[columns, :] = (dk * scale).astype(dk_ref.dtype)
    dv_ref[columns, :] = dv.astype(dv_ref.dtype)


def _run(kernel, launch: Launch, per_row, per_head, outputs, scale: float, interpret: bool):
    """One program per tile, head and row; neighbours in the grid read the same keys or queries.

    per_row: bounds (B, 4, N) and first_key (B, T). per_head: (B, T, H, K) or (B, H, T). outputs:
    what the results look like, shapes as in per_head.
    """
    bounds, _ = per_row
    rows, _, heads, _ = per_head[0].shape

    def of_row(x):
        return pl.BlockSpec((None, *x.shape[1:]), lambda i, h, b: (b,) + (0,) * (x.ndim - 1))

    def of_head(x):
        if x.ndim == 3:
            return pl.BlockSpec((None, None, x.shape[2]), lambda i, h, b: (b, h, 0))
        return pl.BlockSpec((None, x.shape[1], None, x.shape[3]), lambda i, h, b: (b, 0, h, 0))

    return pl.pallas_call(
        partial(kernel, scale=scale, launch=launch),
        grid=(bounds.shape[2], heads, rows),
        in_specs=[*map(of_row, per_row), *map(of_head, per_head)],
        out_specs=[of_head(x) for x in outputs],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        compiler_params=triton.CompilerParams(num_warps=launch.warps, num_stages=launch.stages),
        interpret=interpret,
        name="flash" + kernel.__name__.removesuffix("_kernel"),
    )(*per_row, *per_head)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attention(q, k, v, first_key, scale: float, plan: Plan, interpret: bool):
    return _forward(q, k, v, first_key, scale, plan, interpret)[0]


def _forward(q, k, v, first_key, scale, plan, interpret):
    rows, length, heads, _ = q.shape
    bounds = _bounds_of_query_tiles(first_key, plan.forward.queries, plan.forward.keys)
    outputs = v, jax.ShapeDtypeStruct((rows, heads, length), jnp.float32)
    run = partial(_run, scale=scale, interpret=interpret)
    out, lse = run(_forward_kernel, plan.forward, (bounds, first_key), (q, k, v), outputs)
    return out, (q, k, v, first_key, out, lse)


def _backward(scale, plan, interpret, saved, do):
    q, k, v, first_key, out, lse = saved
    delta = jnp.sum(do.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)  # (B, T, H)
    per_head = q, k, v, do, lse, delta.transpose(0, 2, 1)
    run = partial(_run, scale=scale, interpret=interpret)
    bounds = _bounds_of_query_tiles(first_key, plan.dq.queries, plan.dq.keys)
    (dq,) = run(_dq_kernel, plan.dq, (bounds, first_key), per_head, (q,))
    bounds = _bounds_of_key_tiles(first_key, plan.dkv.queries, plan.dkv.keys)
    dk, dv = run(_dkv_kernel, plan.dkv, (bounds, first_key), per_head, (k, v))
    return dq, dk, dv, None


_attention.defvjp(_forward, _backward)
