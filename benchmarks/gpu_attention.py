"""Sections of the first GPU measurement about attention.

Legend of shape comments: B rows, T positions, H heads, K head width.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gpu_job import ABSENT, Job, Shapes
from gpu_parts import normal, on_gpu, tera, time_calls

from experiments.bench_documents import random_documents
from experiments.bench_kernels import relative_difference
from models.attention import attention, dense_attention
from models.blocked_attention import blocked_attention, computed_pairs
from models.flash import Launch, flash_attention, plan_for, visited_tiles
from models.masks import document_ids, first_keys, visible_pairs

EOT = 0
RESULTS = ("out", "dq", "dk", "dv")
# Largest norm of a kernel's error over the norm of the reference. bfloat16 rounds the inputs of
# every product to 2**-9; float32 leaves sums in another order and an exponential of 22 bits.
TOLERANCES = {"bfloat16": 1e-2, "float32": 1e-5}
BACKWARD_FLOP = 2.5  # over the forward's: five products to two


class Row(NamedTuple):
    """Inputs of attention: q, k, v and a cotangent (B, T, H, K), and document numbers (B, T)."""

    arrays: tuple[jax.Array, ...]
    documents: jax.Array

    def mask(self, window: int | None, rule: str, block: int, cut: bool = True) -> dict[str, Any]:
        """The arguments of `models.masks` for one window for all rows."""
        rows = self.documents.shape[0]
        given = None if window is None else jnp.full((rows,), window, jnp.int32)
        documents = self.documents if cut else None
        return {"documents": documents, "window": given, "rule": rule, "block": block}


def make_row(shapes: Shapes, rows: int, length: int, dtype) -> Row:
    """Random inputs, cut into documents by the published law."""
    shape = rows, length, shapes.heads, shapes.head_dim
    random = np.random.default_rng(0)
    tokens = random_documents(random, shape[:2], shapes.vocab, EOT, shapes.block)
    arrays = tuple(normal(seed, shape, dtype) for seed in range(4))
    return Row(arrays, document_ids(jnp.asarray(tokens), EOT))


def both_passes(forward: Callable, arrays, *more):
    """The output and the gradients of forward(q, k, v, *more) for a cotangent."""
    *inputs, cotangent = arrays
    out, pull_back = jax.vjp(lambda *qkv: forward(*qkv, *more), *inputs)
    return out, *pull_back(cotangent)


def attention_check_section(job: Job) -> None:
    """Both passes of flash and cuDNN attention against dense attention in float32."""
    s = job.shapes
    scale = s.head_dim**-0.5
    flash = partial(flash_attention, scale=scale, interpret=not on_gpu())
    exact = jax.jit(partial(both_passes, partial(dense_attention, scale=scale)))
    for dtype, tolerance in TOLERANCES.items():
        row = make_row(s, 2, s.check_length, dtype)
        compare = partial(_compare, row, exact, tolerance)
        program = jax.jit(partial(both_passes, flash))
        wide, half = 4 * s.block, 2 * s.block + s.block // 2
        masks = {
            "causal": row.mask(None, "none", 1, cut=False),
            "documents": row.mask(None, "none", 1),
            "token window": row.mask(half, "token", s.block, cut=False),
            "both, by tokens": row.mask(half, "token", s.block),
            "both, by tokens and blocks": row.mask(half, "token_block", s.block),
            "both, by blocks": row.mask(wide, "block", s.block),
        }
        for name, mask in masks.items():
            first = first_keys(row.documents.shape, **mask)
            job.measure(f"flash {dtype}, {name}", compare, program, mask, first)
    row = make_row(s, 2, s.check_length, "bfloat16")
    mask = row.mask(None, "none", 1, cut=False)
    program = jax.jit(partial(both_passes, _cudnn))
    compare = partial(_compare, row, exact, TOLERANCES["bfloat16"])
    job.measure("cudnn bfloat16, causal", compare if on_gpu() else _absent, program, mask)


def _cudnn(q, k, v):
    return attention(q, k, v, implementation="cudnn")


def _absent(*arguments) -> str:
    return ABSENT


def _compare(row: Row, exact, tolerance: float, program, mask, *first) -> dict[str, Any]:
    """Errors of a program's output and gradients against those of exact(arrays, visible)."""
    visible = visible_pairs(row.documents.shape, **mask)
    wide = tuple(x.astype(jnp.float32) for x in row.arrays)
    references, found = exact(wide, visible), program(row.arrays, *first)
    entry: dict[str, Any] = {"max_error": 0.0, "relative_error": 0.0}
    for name, ours, reference in zip(RESULTS, found, references, strict=True):
        largest = float(jnp.max(jnp.abs(ours.astype(jnp.float32) - reference)))
        entry[name] = {"max": largest, "relative": relative_difference(ours, reference)}
    # not max(), which may pass over a NaN
    entry["max_error"] = float(np.max([entry[name]["max"] for name in RESULTS]))
    entry["relative_error"] = float(np.max([entry[name]["relative"] for name in RESULTS]))
    if not entry["relative_error"] <= tolerance:
        parts = ", ".join(f"{name} {entry[name]['relative']:.1e}" for name in RESULTS)
        entry["wrong"] = f"relative errors above {tolerance:g}: {parts}"
    return entry


def attention_time_section(job: Job) -> None:
    """Milliseconds of attention on one long row of documents, one layer's and all layers'.

    Window rule: blocks. One program serves all windows. Backward FLOP count 2.5 times the
    forward's; rates of the flash kernels are over the pairs in the tiles that the forward visits.
    """
    s = job.shapes
    row = make_row(s, 1, s.tokens, jnp.bfloat16)
    firsts = {w: first_keys((1, s.tokens), **row.mask(w, "block", s.block)) for w in s.windows}
    plan = plan_for(s.head_dim, jnp.bfloat16)
    forward, both = _passes(plan)
    for window, first in firsts.items():
        pairs = _pairs_in_tiles(plan, first)
        job.measure(f"window {window}", _time_attention, s, row, first, pairs, forward, both)
    short = make_row(s, s.tokens // s.short_row, s.short_row, jnp.bfloat16)
    plain = first_keys(short.documents.shape)
    name = f"{s.tokens // s.short_row} rows of {s.short_row}, causal"
    cudnn = jax.jit(lambda arrays: _cudnn(*arrays[:3])), jax.jit(partial(both_passes, _cudnn))
    time_cudnn = _time_attention if on_gpu() else _absent
    job.measure(f"cudnn, {name}", time_cudnn, s, short, None, None, *cudnn)
    pairs = _pairs_in_tiles(plan, plain)
    job.measure(f"flash, {name}", _time_attention, s, short, plain, pairs, forward, both)
    first = firsts[s.sweep_window]
    for words in s.sweep:
        kernel, launch = parse_launch(words)
        changed = plan._replace(**{kernel: launch})
        passes = (forward, both) if changed == plan else _passes(changed)
        pairs = _pairs_in_tiles(changed, first)
        job.measure(f"tiles {words}", _time_attention, s, row, first, pairs, *passes)
    blocked = partial(blocked_attention, scale=s.head_dim**-0.5, reach=s.sweep_window)
    passes = (
        jax.jit(lambda arrays, first: blocked(*arrays[:3], first)),
        jax.jit(partial(both_passes, blocked)),
    )
    pairs = computed_pairs(s.tokens, s.sweep_window)
    job.measure(f"blocked {s.sweep_window}", _time_attention, s, row, first, pairs, *passes)
    _attention_goals(job)


def _passes(plan) -> tuple[Callable, Callable]:
    def flash(q, k, v, first):
        scale = q.shape[-1] ** -0.5
        return flash_attention(q, k, v, first, scale=scale, interpret=not on_gpu(), _plan=plan)

    forward = jax.jit(lambda arrays, first: flash(*arrays[:3], first))
    return forward, jax.jit(partial(both_passes, flash))


def _pairs_in_tiles(plan, first) -> int:
    tile = plan.forward
    return visited_tiles(first, tile.queries, tile.keys) * tile.queries * tile.keys


def parse_launch(words: str) -> tuple[str, Launch]:
    """A kernel and its launch from "forward 128x64/8/3": queries, keys, warps, stages."""
    kernel, numbers = words.split(" ")
    return kernel, Launch(*map(int, re.split("[x/]", numbers)))


def _time_attention(shapes: Shapes, row: Row, first, pairs, forward, both) -> dict[str, Any]:
    """Times, and rates over `pairs`, those of which the forward pass computes the score.

    first: (B, T), or None where the program is plainly causal and takes no mask; pairs: None where
    nobody knows, for those of the mask.
    """
    more = () if first is None else (first,)
    one, _ = time_calls(lambda: forward(row.arrays, *more), shapes)
    two, _ = time_calls(lambda: both(row.arrays, *more), shapes)
    shape = row.documents.shape
    seen = np.asarray(first_keys(shape) if first is None else first, np.int64)
    exact = int(np.sum(np.arange(shape[1])[None, :] - seen + 1))
    pairs = exact if pairs is None else pairs
    flop = 4 * pairs * shapes.heads * shapes.head_dim
    backward_s = two["median_s"] - one["median_s"]
    return {
        "forward_ms": 1e3 * one["median_s"],
        "both_ms": 1e3 * two["median_s"],
        "layers_ms": 1e3 * shapes.layers * two["median_s"],
        "forward_tflops": tera(flop, one),
        "backward_tflops": BACKWARD_FLOP * flop / backward_s / 1e12 if backward_s > 0 else None,
        "waste": pairs / exact,
        "mean_keys": exact / seen.size,
        "exact_pairs": exact,
        "visited_pairs": pairs,
        "forward": one,
        "both": two,
    }


def _attention_goals(job: Job) -> None:
    def found(window: int, key: str) -> float | None:
        entry = job.found["entries"].get(f"window {window}", {})
        return entry.get(key)

    average = job.shapes.average_window
    job.goal("G6 window 1024, all layers ms", found(1024, "layers_ms"), 30, 19)
    job.goal("G6 mean of a ramp, all layers ms", found(average, "layers_ms"), 30, 15)
    job.goal("G7 waste, window 1024", found(1024, "waste"), 2.6, 1.35)


ATTENTION: dict[str, Callable[[Job], None]] = {
    "attention_check": attention_check_section,
    "attention_time": attention_time_section,
}
