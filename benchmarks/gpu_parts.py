"""Sections of the first GPU measurement apart from attention: products, sums, steps.

Shapes: N tokens, D width, V vocabulary.
"""

import gc
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_job import ABSENT, Job, Shapes, say

from experiments.bench_kernels import relative_difference
from experiments.bench_steps import Bench, Program, compile_program
from experiments.bench_timing import paired_ratio, spread, time_in_turns
from experiments.bench_updates import SCATTERS, zipf_tokens
from experiments.config import PROBES
from experiments.devices import peak_flops
from experiments.probe_set import with_window
from experiments.resolve import sized
from models.float8 import has_native_float8, native_float8_products
from models.flops import flops_per_token
from models.head import head_loss

MOST_CALLS = 100  # timed as one
LARGEST_SUM_ERROR = 1e-5  # of float32 sums, relative
LARGEST_EIGEN_ERROR = 1e-4  # of float32 eigenvalues, relative to the largest
LARGEST_FLOAT8_ERROR = 0.2  # of the head's gradients, relative to bfloat16's
SOFTCAP = 15.0
NOISE, RANK_SHARE = 0.1, 4  # of a covariance: white noise beside directions, one in four widths
STEP_TOKENS = 2**19  # of a published step
DEEP = ("sparsev", "d36", 16)  # rung, tier, micro-batches a step
DEEP_ROW = "32768"
DEEP_BYTES = 120e9  # of a device, below which the deep step computes its blocks again
PROBED = ("untied", "sparsev")


def on_gpu() -> bool:
    """Whether jax runs on a GPU."""
    return jax.default_backend() == "gpu"


def time_calls(call: Callable[[], Any], shapes: Shapes) -> tuple[dict[str, float], Any]:
    """Spread of the seconds of a call after an untimed one, and what the last call returned.

    Short calls are queued without waiting for each, so that the device and not Python is timed.
    """
    jax.block_until_ready(call())
    began = time.perf_counter()
    result = jax.block_until_ready(call())
    once = time.perf_counter() - began
    if once > shapes.call_limit_s:
        return spread([once]), result
    calls = max(1, min(MOST_CALLS, int(shapes.batch_s / once)))

    def batch():
        for _ in range(calls):
            result = call()
        return jax.block_until_ready(result)

    repeats = repeats_within(shapes.call_limit_s, calls * once, shapes)
    timed = time_in_turns({"batch": batch}, repeats)["batch"]
    return spread([each / calls for each in timed.seconds]), timed.result


def repeats_within(limit_s: float, once: float, shapes: Shapes) -> int:
    """How often to time what takes `once` seconds, at least twice."""
    return max(2, min(shapes.repeats, int(limit_s / once)))


def normal(seed: int, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Normal numbers made on the device."""
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def gemm_section(job: Job) -> None:
    """Products (M, K) by (K, N) in bfloat16: the roof, and what the shapes of d12 reach of it."""
    s = job.shapes
    inner = [(s.width, s.width), (s.width, 4 * s.width), (4 * s.width, s.width), (s.width, s.vocab)]
    for m, k, n in [(s.cube,) * 3, *((s.tokens, *pair) for pair in inner)]:
        job.measure(f"{m} x {k} x {n}", _time_product, s, m, k, n)


def _time_product(shapes: Shapes, m: int, k: int, n: int) -> dict[str, Any]:
    a, b = normal(0, (m, k), jnp.bfloat16), normal(1, (k, n), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    times, _ = time_calls(lambda: product(a, b), shapes)
    return {"ms": 1e3 * times["median_s"], "tflops": tera(2 * m * k * n, times), "time": times}


def tera(flop: float, times: dict[str, float]) -> float:
    """TFLOP/s at the median time."""
    return flop / times["median_s"] / 1e12


def scatter_section(job: Job) -> None:
    """The sum of float32 cotangents (N, D) of every token, tokens by Zipf's law, into (V, D).

    The plain scatter comes last, since it may be a thousand times slower than it should be.
    """
    s, random = job.shapes, np.random.default_rng(0)
    ids = zipf_tokens(random, s.tokens, s.vocab)
    cotangent = random.standard_normal((s.tokens, s.width), dtype=np.float32)
    job.found |= {
        "ftz_workaround": "-nvptx-allow-ftz-atomics" in os.environ.get("XLA_FLAGS", ""),
        "distinct_tokens": len(np.unique(ids)),
        "most_frequent": int(np.bincount(ids).max()),
    }
    for name in sorted(SCATTERS, key=lambda name: name == "plain"):
        job.measure(name, _time_scatter, s, SCATTERS[name], ids, cotangent)


def scatter_ftz_section(job: Job) -> None:
    """The same in a process whose XLA_FLAGS allow float32 atomics to flush to zero."""
    if on_gpu():
        scatter_section(job)
    else:
        job.measure("all", lambda: ABSENT)


def _time_scatter(shapes: Shapes, way: Callable, ids, cotangent) -> dict[str, Any]:
    arguments = jnp.asarray(ids), jnp.asarray(cotangent)
    gradient = jax.jit(way, static_argnums=2)
    times, table = time_calls(lambda: gradient(*arguments, shapes.vocab), shapes)
    difference = relative_difference(table, sum_rows(ids, cotangent, shapes.vocab))
    entry = {"ms": 1e3 * times["median_s"], "difference": difference, "time": times}
    if not difference < LARGEST_SUM_ERROR:
        entry["wrong"] = f"sums off by {difference:.1e}"
    return entry


def sum_rows(ids: np.ndarray, cotangent: np.ndarray, vocab: int) -> np.ndarray:
    """The same sums in float64 on the host."""
    order = np.argsort(ids, kind="stable")
    found, starts = np.unique(ids[order], return_index=True)
    table = np.zeros((vocab, cotangent.shape[1]))
    table[found] = np.add.reduceat(cotangent[order].astype(np.float64), starts)
    return table


def eigen_section(job: Job) -> None:
    """Eigenvalues of covariances in float32 on the device, and in float64 on the host."""
    s = job.shapes
    for n in s.eigen:
        job.measure(f"{n}", _time_eigen, s, (n,))
    job.measure(" x ".join(map(str, s.eigen_batch)), _time_eigen, s, s.eigen_batch)


def covariance(n: int, seed: int) -> jax.Array:
    """Second moments (n, n) of samples in n / 4 directions of falling strength, and white noise."""
    samples, rank = 4 * n, n // RANK_SHARE
    strength = jnp.arange(1, rank + 1, dtype=jnp.float32) ** -0.5
    directions = normal(seed, (rank, n)) * strength[:, None]
    x = normal(seed + 1, (samples, rank)) @ directions + NOISE * normal(seed + 2, (samples, n))
    return jnp.matmul(x.T, x, precision="highest") / samples


def _time_eigen(shapes: Shapes, size: tuple[int, ...]) -> dict[str, Any]:
    *batch, n = size
    stack = jnp.stack([covariance(n, 3 * i) for i in range(batch[0] if batch else 1)])
    matrices = stack if batch else stack[0]
    device = jax.jit(jnp.linalg.eigvalsh)
    times, found = time_calls(lambda: device(matrices), shapes)
    exact = np.asarray(matrices, np.float64)
    host = time_in_turns({"host": lambda: np.linalg.eigvalsh(exact)}, 2)["host"]
    error = float(np.max(np.abs(np.asarray(found, np.float64) - host.result)) / host.result.max())
    entry = {
        "device_ms": 1e3 * times["median_s"],
        "host_ms": 1e3 * min(host.seconds),
        "error_over_largest": error,
        "device": times,
    }
    return entry if error < LARGEST_EIGEN_ERROR else entry | {"wrong": f"off by {error:.1e}"}


def float8_section(job: Job) -> None:
    """Loss of the head with gradients, by chunk: bfloat16, then float8 against it."""
    s = job.shapes
    x, kernel = normal(0, (1, s.tokens, s.width)), 0.02 * normal(1, (s.width, s.vocab))
    targets = jax.random.randint(jax.random.key(2), (1, s.tokens), 0, s.vocab)
    reference: dict[str, Any] = {}
    for chunk in s.chunks:
        for name in ("bfloat16", "float8"):
            run = partial(_time_head, s, (x, kernel, targets), chunk, name == "float8", reference)
            job.measure(f"{name}, chunks of {chunk}", run)


def _time_head(shapes: Shapes, arguments, chunk: int, float8: bool, reference) -> dict[str, Any]:
    """reference: the bfloat16 seconds of every chunk, and gradients, as they become known."""
    loss = partial(head_loss, softcap=SOFTCAP, dtype=jnp.bfloat16, float8=float8, chunk=chunk)
    program = compile_program(jax.jit(jax.value_and_grad(loss, argnums=(0, 1))), *arguments)
    times, (value, gradients) = time_calls(lambda: program.call(*arguments), shapes)
    entry = {
        "ms": 1e3 * times["median_s"],
        "tflops": tera(6 * shapes.tokens * shapes.width * shapes.vocab, times),
        "loss": float(value),
        "temp_bytes": program.memory["temp_bytes"],
        "compile_s": program.compile_s,
        "time": times,
    }
    if not float8:
        reference |= {chunk: times["median_s"], "gradients": gradients}
        return entry
    entry["native_products"] = ABSENT
    if has_native_float8():
        entry["native_products"] = native_float8_products(program.call.as_text())
        if not entry["native_products"]:
            entry["wrong"] = "no product of the compiled head is in float8"
    if chunk in reference:
        entry["ratio"] = times["median_s"] / reference[chunk]
    if "gradients" in reference:
        errors = map(relative_difference, gradients, reference["gradients"])
        entry["gradient_difference"] = float(np.max([*errors]))  # max() may pass over a NaN
        if not entry["gradient_difference"] < LARGEST_FLOAT8_ERROR:
            entry["wrong"] = f"gradients off by {entry['gradient_difference']:.1e}"
    return entry


def steps_section(job: Job) -> None:
    """Whole steps at published sizes, of as many tokens as published and of a micro-batch."""
    cases = [(rung, "d12", 8) for rung in job.rungs]
    cases += [DEEP] if DEEP[0] in job.rungs else []
    cases += [(rung, "d12", 1) for rung in job.rungs]
    for case in cases:
        job.measure(case_name(*case), _time_steps, job.shapes, *case)
    _step_goals(job)


def case_name(rung: str, tier: str, accumulate: int) -> str:
    """The name of an entry."""
    return f"{rung} {tier} x {accumulate}"


def _make_bench(shapes: Shapes, rung: str, tier: str, accumulate: int) -> Bench:
    gc.collect()  # the state before lies in a cycle
    words = {"rung": rung, "tier": tier, "batch": str(accumulate), "accumulate": str(accumulate)}
    if tier == DEEP[1]:
        limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)
        words |= {"size.long_row": DEEP_ROW, "remat": str(limit < DEEP_BYTES)}
    return Bench(sized(words | shapes.run), lambda line: say(f"  {line}"))


def _time_steps(shapes: Shapes, rung: str, tier: str, accumulate: int) -> dict[str, Any]:
    """The step at the widest window and, of a whole step with a ramp, at one in its middle."""
    bench = _make_bench(shapes, rung, tier, accumulate)
    config, program = bench.config, bench.program()
    entry = _time_window(shapes, bench, program, bench.window)
    if config.arch.window_ramp != "none" and accumulate > 1:
        entry["average"] = _time_window(shapes, bench, program, shapes.average_window)
    bench.check_finite()
    stats = jax.devices()[0].memory_stats() or {}
    return entry | {
        "compile_s": program.compile_s,
        "row": config.row,
        "tokens_per_step": config.tokens_per_step,
        "remat": config.remat,
        "parameters": bench.plain_run.num_params,
        "program_peak_bytes": program.memory["peak_bytes"],
        # the allocator's peak cannot be set back: it is that of all entries so far
        "device_peak_bytes": stats.get("peak_bytes_in_use", ABSENT),
    }


def _time_window(shapes: Shapes, bench: Bench, program: Program, window) -> dict[str, Any]:
    """Throughput and MFU of a compiled step at an attention window in tokens, or none."""
    config, mesh = bench.config, bench.plain_run.mesh
    bench.batches = with_window({"tokens": bench.batches["tokens"]}, mesh, window)
    program.call()
    began = time.perf_counter()
    program.call()
    repeats = repeats_within(shapes.step_limit_s, time.perf_counter() - began, shapes)
    seconds = time_in_turns({"step": program.call}, repeats)["step"].seconds
    step = spread(seconds)
    rate = config.tokens_per_step / step["median_s"]
    rows = np.asarray(bench.batches["tokens"])[..., :-1].reshape(-1, config.row)
    flop, peak = flops_per_token(config.arch, config.size, rows, window), peak_flops(mesh)
    return {
        "ms": 1e3 * step["median_s"],
        "tokens_per_s": rate,
        "s_per_524288": STEP_TOKENS / rate,
        "mfu": ABSENT if peak is None else rate * flop / peak,
        "flop_per_token": flop,
        "window": window,
        "steps_timed": len(seconds),
        "step": step,
    }


def _step_goals(job: Job) -> None:
    def found(*case, key: str = "s_per_524288", window: str = "widest") -> float | None:
        entry = job.found["entries"].get(case_name(*case), {})
        entry = entry.get("average", {}) if window == "average" else entry
        return entry.get(key)

    for rung in ("sparsev", "softcap", "fp8head", "attnscale"):
        for window in ("widest", "average"):
            name = f"G1 {rung}, {window} window, s per 524,288 tokens"
            job.goal(name, found(rung, "d12", 8, window=window), 1.15, 1.05)
    job.goal("G2 untied, s per 524,288 tokens", found("untied", "d12", 8), 1.20, 1.10)
    job.goal("G2 untied, ms of 65,536 tokens", found("untied", "d12", 1, key="ms"), 140, 140)
    job.goal("G5 sparsev d36, s per 524,288 tokens", found(*DEEP), 6.5, 5.9)
    float8, plain = found("fp8head", "d12", 8), found("softcap", "d12", 8)
    job.goal("G14 fp8head over softcap", float8 and plain and float8 / plain, 0.97, 0.93)


def probe_section(job: Job) -> None:
    """The step with all probes on its own batch against the plain step, in turns."""
    for rung in filter(job.rungs.__contains__, PROBED):
        job.measure(case_name(rung, "d12", 8), _time_probe, job.shapes, rung)


def _time_probe(shapes: Shapes, rung: str) -> dict[str, Any]:
    bench = _make_bench(shapes, rung, "d12", 8)
    programs = {"plain": bench.program(), "measured": bench.program(PROBES, "batch")}
    calls = {name: program.call for name, program in programs.items()}
    timed = time_in_turns(calls, max(2, shapes.repeats // 2))
    bench.check_finite()
    return {
        "ratio": paired_ratio(timed["measured"].seconds, timed["plain"].seconds),
        "compile_s": programs["measured"].compile_s,
        **{
            name: spread(timed[name].seconds) | {"peak_bytes": program.memory["peak_bytes"]}
            for name, program in programs.items()
        },
    }


PARTS: dict[str, Callable[[Job], None]] = {
    "gemm": gemm_section,
    "scatter": scatter_section,
    "scatter_ftz": scatter_ftz_section,
    "eigen": eigen_section,
    "float8": float8_section,
    "steps": steps_section,
    "probe": probe_section,
}
