"""Benchmark of attention on long rows, and of the chunked loss against one from all logits."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench_documents import random_documents
from experiments.bench_steps import Program, compile_program
from experiments.bench_timing import paired_ratio, spread, time_in_turns
from experiments.config import RunConfig
from experiments.devices import make_mesh, place_rows, replicated
from experiments.setup import compute_dtype
from models import flash
from models.attention import attention, choose
from models.blocked_attention import computed_pairs
from models.gpt import token_loss
from models.head import head_logits, head_loss
from models.masks import document_ids, first_keys

IMPLEMENTATIONS = ("dense", "blocked", "pallas")
BLOCK = 128  # of the mask, as published, whatever the profile: rows here have a length of their own
MOST_SCORES = 2**30  # bytes of the scores of a row up to which they are all formed
NOISE = 0.02  # scale of a head's kernel


class LongRow(NamedTuple):
    """One row for attention: its mask in the words of `models.masks`, and queries with theirs.

    documents: how many the row is cut into. first: (T,), the first key that each query sees.
    arrays: q, k, v and the cotangent of the result, (1, T, H, K) each.
    """

    mask: dict[str, Any]
    documents: int
    first: np.ndarray
    arrays: tuple[jax.Array, ...]

    @property
    def exact_pairs(self) -> int:
        """Pairs of a query and a key that it sees."""
        return int(np.sum(np.arange(len(self.first)) - self.first + 1))


def attention_section(
    config: RunConfig, lengths: Sequence[int], repeats: int, note: Callable[[str], None]
) -> dict[str, Any]:
    """Forward and backward pass of every implementation on one row of each length, in turns.

    Heads and mask are those of the configuration, at the widest window of its long layers in blocks
    of BLOCK tokens. `waste` is the number of pairs that the forward pass computes over those of the
    exact mask, also where an implementation does not run; `growth` the seconds over those of half
    the length.
    """
    random = np.random.default_rng(config.seed)
    rows = {length: _make_row(config, length, random) for length in sorted(set(lengths))}
    reasons = {
        (name, length): _reason_against(config, name, length)
        for length in rows
        for name in IMPLEMENTATIONS
    }
    programs = {}
    for (name, length), reason in reasons.items():
        if reason is None:
            programs[name, length] = _compile_attention(config, name, rows[length])
            note(f"compiled {name} at {length} in {programs[name, length].compile_s:.1f} s")
    timed = time_in_turns({key: program.call for key, program in programs.items()}, repeats)
    seconds = {key: timed[key].seconds for key in programs}
    entries: dict[str, Any] = {}
    for length, row in rows.items():
        entries[str(length)] = {
            "documents": row.documents,
            "mean_keys": row.exact_pairs / length,
        }
        for name in IMPLEMENTATIONS:
            entry = _time_entry(seconds, programs, name, length)
            pairs = _computed_pairs(config, name, row)
            entry["reason"] = reasons[name, length]
            entry["waste"] = None if pairs is None else pairs / row.exact_pairs
            entries[str(length)][name] = entry
            note(f"{name} at {length}: {_in_words(entry)}")
    return {
        "rows": 1,
        "heads": config.size.n_head,
        "head_width": config.size.head_dim,
        "dtype": compute_dtype(config).name,
        "rule": config.arch.window,
        "block": BLOCK,
        "window": _window(config),
        "cut_by_documents": config.arch.documents,
        "most_score_bytes": MOST_SCORES,
        "lengths": entries,
    }


def _window(config: RunConfig) -> int | None:
    return None if config.arch.window == "none" else config.arch.window_blocks * BLOCK


def _make_row(config: RunConfig, length: int, random: np.random.Generator) -> LongRow:
    size, window = config.size, _window(config)
    tokens = random_documents(random, (1, length), size.vocab_size, size.eot_token, BLOCK)
    documents = document_ids(jnp.asarray(tokens), size.eot_token)
    mask = {
        "documents": documents if config.arch.documents else None,
        "window": None if window is None else jnp.full((1,), window, jnp.int32),
        "rule": config.arch.window,
        "block": BLOCK,
    }
    shape = (1, length, size.n_head, size.head_dim)
    arrays = (random.standard_normal(shape, dtype=np.float32) for _ in range(4))
    return LongRow(
        mask,
        1 + int(documents[0, -1] - documents[0, 0]) if config.arch.documents else 1,
        np.asarray(first_keys((1, length), **mask))[0],
        tuple(jnp.asarray(each, compute_dtype(config)) for each in arrays),
    )


def _reason_against(config: RunConfig, name: str, length: int) -> str | None:
    """Why an implementation does not run on a row of this length, or None."""
    scores = 4 * config.size.n_head * length**2
    if name == "dense" and scores > MOST_SCORES:
        return f"its scores take {scores:,} bytes, more than {MOST_SCORES:,}"
    masked = config.arch.documents or config.arch.window != "none"
    try:
        choose(name, masked, compute_dtype(config), config.size.head_dim)
    except ValueError as error:
        return str(error)
    return None


def _compile_attention(config: RunConfig, name: str, row: LongRow) -> Program:
    mask = dict(row.mask)
    options = {key: mask.pop(key) for key in ("rule", "block")}
    options |= {"widest": _window(config), "scale": config.arch.attn_scale, "implementation": name}

    def both_passes(q, k, v, cotangent, mask):
        out, pull_back = jax.vjp(partial(attention, **mask, **options), q, k, v)
        return out, pull_back(cotangent)

    program = compile_program(jax.jit(both_passes), *row.arrays, mask)
    return program._replace(call=_caller(program.call, *row.arrays, mask))


def _caller(compiled: Callable, *arguments) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(compiled(*arguments))


def _time_entry(seconds: dict, programs: dict, name: str, length: int) -> dict[str, Any]:
    """Times, growth and memory of one implementation at one length; None where it did not run."""
    if (name, length) not in seconds:
        return dict.fromkeys(("row", "growth", "temp_bytes", "compile_s"))
    own, half = seconds[name, length], seconds.get((name, length // 2))
    program = programs[name, length]
    return {
        "row": spread(own),
        "growth": None if half is None or length % 2 else paired_ratio(own, half),
        "temp_bytes": program.memory["temp_bytes"],
        "compile_s": program.compile_s,
    }


def _computed_pairs(config: RunConfig, name: str, row: LongRow) -> int | None:
    """Pairs of a query and a key of which a forward pass forms the score; None: it cannot run."""
    length = len(row.first)
    if name == "dense":
        return length**2
    if name == "blocked":
        return computed_pairs(length, _window(config))
    if not flash.supports(config.size.head_dim):
        return None
    # the tiles of the device that the kernel is for, also where it does not run
    tile = flash.plan_for(config.size.head_dim, jnp.bfloat16).forward
    first = jnp.asarray(row.first)[None, :]
    return flash.visited_tiles(first, tile.queries, tile.keys) * tile.queries * tile.keys


def _in_words(entry: dict[str, Any]) -> str:
    if entry["row"] is None:
        return f"not run, {entry['reason']}"
    growth = f", {entry['growth']:.2f} x half the length" if entry["growth"] else ""
    return f"{1e3 * entry['row']['median_s']:.1f} ms{growth}, waste {entry['waste']:.2f}"


def loss_section(config: RunConfig, repeats: int, note: Callable[[str], None]) -> dict[str, Any]:
    """Loss and its gradients from chunks of logits, and from all logits of a micro-batch at once.

    Sizes, softcap and arithmetic are those of the configuration; ratios are of the naive way over
    the chunked one.
    """
    rows, size, dtype = (
        config.micro_rows,
        config.size,
        compute_dtype(config),
    )
    options = {"softcap": config.arch.softcap, "dtype": dtype}
    options["float8"] = config.arch.head_dtype == "float8"

    def naive(x, kernel, targets):
        return jnp.mean(token_loss(head_logits(x, kernel, **options), targets))

    losses = {"chunked": partial(head_loss, **options), "naive": naive}
    arguments = _loss_arguments(rows, config, np.random.default_rng(config.seed))
    programs = {}
    for name, loss in losses.items():
        both = jax.jit(jax.value_and_grad(lambda *args, loss=loss: loss(*args), argnums=(0, 1)))
        program = compile_program(both, *arguments)
        programs[name] = program._replace(call=_caller(program.call, *arguments))
    timed = time_in_turns({name: program.call for name, program in programs.items()}, repeats)
    temp = {name: program.memory["temp_bytes"] for name, program in programs.items()}
    ratio = paired_ratio(timed["naive"].seconds, timed["chunked"].seconds)
    memory_ratio = temp["naive"] / temp["chunked"]
    note(f"naive loss takes {ratio:.2f} x chunked, its temporaries {memory_ratio:.1f} x")
    (ours, our_grads), (theirs, their_grads) = (timed[name].result for name in losses)
    return {
        "tokens": rows * config.row,
        "width": size.n_embd,
        "vocab_size": size.vocab_size,
        "dtype": dtype.name,
        "float8": options["float8"],
        **{
            name: {
                "both_passes": spread(timed[name].seconds),
                "temp_bytes": temp[name],
                "compile_s": programs[name].compile_s,
            }
            for name in losses
        },
        "ratio": ratio,
        "memory_ratio": memory_ratio,
        "loss_difference": abs(float(ours) / float(theirs) - 1),
        "gradient_difference": max(map(relative_difference, our_grads, their_grads)),
    }


def _loss_arguments(rows: int, config: RunConfig, random: np.random.Generator):
    """x (B, T, D) as the last norm leaves it, a kernel (D, V) and targets (B, T), on the mesh."""
    mesh, size = make_mesh(rows), config.size
    x = random.standard_normal((rows, config.row, size.n_embd), dtype=np.float32)
    kernel = random.standard_normal((size.n_embd, size.vocab_size), dtype=np.float32)
    targets = random.integers(size.vocab_size, size=(rows, config.row), dtype=np.int32)
    return (
        place_rows(mesh, x, axis=0),
        jax.device_put(NOISE * kernel, replicated(mesh)),
        place_rows(mesh, targets, axis=0),
    )


def relative_difference(ours: jax.Array, reference: jax.Array) -> float:
    """Norm of the difference of two arrays over the norm of the second."""
    ours, reference = (np.asarray(each, np.float64) for each in (ours, reference))
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))
