"""Benchmark of Newton-Schulz batched by shape, and of ways to sum an embedding's gradient."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench_kernels import relative_difference
from experiments.bench_steps import Program, compile_program
from experiments.bench_timing import paired_ratio, spread, time_in_turns
from experiments.config import RunConfig
from experiments.setup import make_model
from lens_jax.taps import parameter_paths
from models.embedding import scan_rows, scatter_rows, take_rows
from models.gpt import init_params
from optim.groups import group_of
from optim.muon import newton_schulz, scale_by_muon

MOMENTUM = 0.95


def muon_section(config: RunConfig, repeats: int, note: Callable[[str], None]) -> dict[str, Any]:
    """Muon's update of all matrices of a rung, a product a shape against a product a matrix.

    Ratios are of one by one over batched; both include the momentum.
    """
    grads = _random_matrices(config)
    options = {"ns_steps": config.optim.ns_steps, "ns_dtype": config.optim.ns_dtype}
    batched = scale_by_muon(MOMENTUM, **options)
    buffers = jax.tree.map(jnp.zeros_like, grads)

    def one_by_one(grads, buffers):
        buffers = jax.tree.map(lambda g, b: MOMENTUM * b + g, grads, buffers)
        nesterov = jax.tree.map(lambda g, b: g + MOMENTUM * b, grads, buffers)
        return [_orthogonalise(matrix, config) for matrix in nesterov], buffers

    programs = {
        "batched": compile_program(jax.jit(batched.update), grads, batched.init(grads)),
        "one_by_one": compile_program(jax.jit(one_by_one), grads, buffers),
    }
    states = {"batched": batched.init(grads), "one_by_one": buffers}
    calls = {
        name: lambda name=name: jax.block_until_ready(programs[name].call(grads, states[name]))
        for name in programs
    }
    timed = time_in_turns(calls, repeats)
    ratio = paired_ratio(timed["one_by_one"].seconds, timed["batched"].seconds)
    compile_ratio = programs["one_by_one"].compile_s / programs["batched"].compile_s
    note(f"one by one takes {ratio:.2f} x batched, to compile {compile_ratio:.1f} x")
    shapes = [grad.shape for grad in grads]
    directions = [timed[name].result[0] for name in ("batched", "one_by_one")]
    return {
        "matrices": {"x".join(map(str, s)): shapes.count(s) for s in dict.fromkeys(shapes)},
        **options,
        **_entries(programs, timed),
        "ratio": ratio,
        "compile_ratio": compile_ratio,
        "largest_relative_difference": max(map(relative_difference, *directions)),
    }


def _random_matrices(config: RunConfig) -> list[jax.Array]:
    """A normal array for every matrix of the blocks of a rung."""
    model = make_model(config)
    shapes = jax.eval_shape(lambda: init_params(model, config.seed))
    leaves = zip(parameter_paths(shapes), jax.tree.leaves(shapes), strict=True)
    random = np.random.default_rng(config.seed)
    return [
        jnp.asarray(random.standard_normal(leaf.shape, dtype=np.float32))
        for path, leaf in leaves
        if group_of(path, leaf.ndim) == "matrix"
    ]


def _orthogonalise(matrix: jax.Array, config: RunConfig) -> jax.Array:
    fan_in, fan_out = matrix.shape
    direction = newton_schulz(matrix, config.optim.ns_steps, config.optim.ns_dtype)
    return max(1.0, fan_out / fan_in) ** 0.5 * direction


def scatter_section(config: RunConfig, repeats: int, note: Callable[[str], None]) -> dict[str, Any]:
    """The gradient (V, D) of an embedding table from those of a micro-batch of its rows, in turns.

    Token frequencies fall as one over the rank. Ratios are over the plain scatter; `model` is what
    `models.embedding` does.
    """
    random, size = np.random.default_rng(config.seed), config.size
    tokens = config.tokens_per_step // config.accumulate
    ids = zipf_tokens(random, tokens, size.vocab_size)
    cotangent = random.standard_normal((tokens, size.n_embd), dtype=np.float32)
    arguments = jnp.asarray(ids), jnp.asarray(cotangent)
    programs = {}
    for name, gradient in SCATTERS.items():
        function = jax.jit(gradient, static_argnums=2)
        programs[name] = compile_program(function, *arguments, size.vocab_size)
    calls = {
        name: lambda name=name: jax.block_until_ready(programs[name].call(*arguments))
        for name in programs
    }
    timed = time_in_turns(calls, repeats)
    plain = timed["plain"]
    entries = _entries(programs, timed)
    for name, entry in entries.items():
        entry["ratio"] = paired_ratio(timed[name].seconds, plain.seconds)
        entry["difference"] = relative_difference(timed[name].result, plain.result)
        note(f"{name}: {1e3 * entry['time']['median_s']:.2f} ms, {entry['ratio']:.2f} x plain")
    return {
        "tokens": tokens,
        "distinct_tokens": len(np.unique(ids)),
        "most_frequent": int(np.bincount(ids).max()),
        "width": size.n_embd,
        "vocab_size": size.vocab_size,
        "ways": entries,
        "fastest": min(entries, key=lambda name: entries[name]["time"]["median_s"]),
    }


def _entries(programs: dict[str, Program], timed: dict) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "time": spread(timed[name].seconds),
            "temp_bytes": program.memory["temp_bytes"],
            "compile_s": program.compile_s,
        }
        for name, program in programs.items()
    }


def zipf_tokens(random: np.random.Generator, count: int, vocab: int) -> np.ndarray:
    """Tokens (count,) int32, token n with a frequency proportional to 1 / (n + 1)."""
    weights = 1 / np.arange(1, vocab + 1)
    return random.choice(vocab, size=count, p=weights / weights.sum()).astype(np.int32)


# Ways from ids (N,) and cotangents (N, D) to the sum of cotangents of every id, (V, D).


def sorted_scatter(ids: jax.Array, cotangent: jax.Array, vocab: int) -> jax.Array:
    """A scatter-add in the order of the ids, which the compiler is told of."""
    order = jnp.argsort(ids)
    return jax.ops.segment_sum(cotangent[order], ids[order], vocab, indices_are_sorted=True)


def model_gradient(ids: jax.Array, cotangent: jax.Array, vocab: int) -> jax.Array:
    """The gradient of the lookup that the models use."""
    table = jnp.zeros((vocab, cotangent.shape[1]), cotangent.dtype)
    _, pull_back = jax.vjp(lambda table: take_rows(table, ids[None, :])[0], table)
    return pull_back(cotangent)[0]


SCATTERS: dict[str, Callable] = {
    "plain": scatter_rows,
    "sorted": sorted_scatter,
    "scanned": scan_rows,
    "model": model_gradient,
}
