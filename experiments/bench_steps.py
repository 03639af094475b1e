"""Benchmark of the compiled training step: each rung's throughput, each probe's cost, memory."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import chz
import jax
import numpy as np

from experiments.bench_documents import random_documents
from experiments.bench_timing import paired_ratio, spread, time_in_turns
from experiments.config import PROBES, RunConfig
from experiments.data import HeldOut
from experiments.devices import place_rows
from experiments.probe_set import probe_at, with_window
from experiments.schedule import make_schedule
from experiments.setup import make_run
from lens_jax.probes import spectra
from models.command_line import UsageError
from models.windows import widest_window

NOISE = 0.02  # scale of what is added to fresh weights
SELECTIONS = {name: (name,) for name in PROBES} | {"all": PROBES}
PROBE_DATA = ("fixed", "batch")


class Program(NamedTuple):
    """A compiled program, the seconds that took, and the bytes one device needs to run it."""

    call: Callable
    compile_s: float
    memory: dict[str, int]


def compile_program(function, *arguments, compiler_options=None, **static) -> Program:
    """Lower and compile a jitted function for these arguments."""
    began = time.perf_counter()
    compiled = function.lower(*arguments, **static).compile(compiler_options)
    seconds = time.perf_counter() - began
    stats = compiled.memory_analysis()
    memory = {
        "argument_bytes": stats.argument_size_in_bytes,
        "output_bytes": stats.output_size_in_bytes,
        "temp_bytes": stats.temp_size_in_bytes,
        "alias_bytes": stats.alias_size_in_bytes,
    }
    memory["peak_bytes"] = (
        memory["argument_bytes"]
        + memory["output_bytes"]
        + memory["temp_bytes"]
        - memory["alias_bytes"]  # donated arguments hold outputs
    )
    return Program(compiled, seconds, memory)


class Bench:
    """One rung: its training steps with and without probes, compiled once each, and a state.

    `config` has a vocabulary and a token for documents. Tokens are random, since no time depends on
    what they say; windows are at their widest.
    """

    def __init__(self, config: RunConfig, note: Callable[[str], None]):
        self.config, self.note = config, note
        self.window = widest_window(config.arch, config.size)
        self.random = np.random.default_rng(config.seed)
        # validation is never run; one micro-batch stands in for its rows
        self.held = HeldOut(
            val=self._tokens(config.micro_rows, config.row),
            probe=self._tokens(config.probes.windows, config.probes.window),
            exclude=0,
        )
        self.plain_run = self.make_run((), "fixed")
        mesh = self.plain_run.mesh
        rows = self._tokens(config.rows_per_step, config.row)
        rows = rows.reshape(config.accumulate, -1, config.row + 1)
        self.batches = with_window({"tokens": place_rows(mesh, rows, axis=1)}, mesh, self.window)
        sharding = jax.tree.map(lambda leaf: leaf.sharding, self.plain_run.shapes)
        self.state = jax.jit(self._noisy_state, out_shardings=sharding)()
        self._programs: dict[tuple, Program] = {}

    def _tokens(self, rows: int, window: int) -> np.ndarray:
        size = self.config.size
        shape = rows, window + 1
        return random_documents(self.random, shape, size.vocab_size, size.eot_token, size.block)

    def _noisy_state(self):
        """A fresh state with noise on every parameter.

        Rungs start heads and projections at zero, and behind those every gradient is zero.
        """
        state = self.plain_run.fresh_state()
        leaves, structure = jax.tree.flatten(state.params)
        keys = jax.random.split(jax.random.key(self.config.seed), len(leaves))
        noisy = [
            leaf + NOISE * jax.random.normal(key, leaf.shape)
            for leaf, key in zip(leaves, keys, strict=True)
        ]
        return state._replace(params=jax.tree.unflatten(structure, noisy))

    def make_run(self, probes: tuple[str, ...], probe_data: str):
        """The run that training with these probes would build, on the same mesh.

        Its probe set carries the window.
        """
        chosen = chz.replace(self.config.probes, names=probes, data=probe_data)
        config = chz.replace(self.config, probes=chosen)
        run = make_run(config, make_schedule(config), self.held)
        return run._replace(probe_batch=probe_at(run.probe_batch, run.mesh, self.window))

    def program(self, probes: tuple[str, ...] = (), probe_data: str = "fixed") -> Program:
        """The compiled step that measures with these probes; none: the plain training step."""
        if probes == ("weight",):
            probe_data = "fixed"  # it reads no data, so one program serves both
        key = (probes, probe_data)
        if key not in self._programs:
            run = self.make_run(probes, probe_data)
            arguments = (self.state, self.batches, run.probe_batch)
            program = compile_program(run.step, *arguments, measure=bool(probes))
            self.note(f"compiled {self.label(*key)} in {program.compile_s:.1f} s")
            self._programs[key] = program._replace(call=self._stepper(program.call, run))
        return self._programs[key]

    def label(self, probes: tuple[str, ...], probe_data: str) -> str:
        """A program in the words of a progress line."""
        what = f"{'+'.join(probes)} on {probe_data}" if probes else "plain step"
        return f"{self.config.rung}: {what}"

    def _stepper(self, compiled: Callable, run) -> Callable[[], dict[str, Any]]:
        def step():
            # the state is donated, so every program steps on from where the last one ended
            stepped = compiled(self.state, self.batches, run.probe_batch)
            self.state, metrics, measured = jax.block_until_ready(stepped)
            self.metrics = metrics
            return measured

        return step

    def check_finite(self) -> None:
        """Refuse times of steps that computed with NaN; raises UsageError."""
        if not self.metrics["finite"]:
            raise UsageError(
                f"rung={self.config.rung}: the loss on random tokens is {self.metrics['loss']}; "
                f"times of such steps mean nothing, lower optim.lr_scale"
            )


def train_section(benches: dict[str, Bench], repeats: int) -> dict[str, Any]:
    """Throughput of every rung's plain step, all rungs stepping in turns."""
    programs = {rung: bench.program() for rung, bench in benches.items()}
    timed = time_in_turns({rung: program.call for rung, program in programs.items()}, repeats)
    reference = next(iter(benches))
    rungs = {}
    for rung, bench in benches.items():
        bench.check_finite()
        times = spread(timed[rung].seconds)
        rungs[rung] = {
            "step": times,
            "tokens_per_s": bench.config.tokens_per_step / times["median_s"],
            "speed_ratio": 1 / paired_ratio(timed[rung].seconds, timed[reference].seconds),
            "compile_s": programs[rung].compile_s,
            "parameters": bench.plain_run.num_params,
        }
        bench.note(f"{rung}: {rungs[rung]['tokens_per_s']:,.0f} tokens/s")
    return {"speed_ratio_to": reference, "rungs": rungs}


def probes_section(bench: Bench, repeats: int) -> dict[str, Any]:
    """What each probe adds to a step, on the fixed probe set and on the batch, in turns."""
    programs = {
        (data, name): bench.program(probes, data)
        for data in PROBE_DATA
        for name, probes in SELECTIONS.items()
    }
    variants = {"plain": bench.program().call}
    variants |= {"/".join(key): program.call for key, program in programs.items()}
    timed = time_in_turns(variants, repeats)
    bench.check_finite()
    plain = timed["plain"].seconds
    report: dict[str, Any] = {"plain": spread(plain)}
    for (data, name), program in programs.items():
        result = timed[f"{data}/{name}"]
        ratio = paired_ratio(result.seconds, plain)
        entry = {
            "step": spread(result.seconds),
            "ratio": ratio,
            "share": ratio - 1,
            "compile_s": program.compile_s,
            **_host_eigen(bench.config, result.result, repeats),
        }
        tokens = _own_tokens(bench.config, name) if data == "fixed" else 0
        if tokens:
            equal_steps = tokens / bench.config.tokens_per_step
            entry["probe_tokens"] = tokens
            entry["share_of_equal_tokens"] = entry["share"] / equal_steps
        report.setdefault(data, {})[name] = entry
        bench.note(f"{name} on {data}: step x {ratio:.3f}")
    return report


def _own_tokens(config: RunConfig, name: str) -> int:
    """Tokens of the probe set that a selection of probes runs the model on."""
    windows = {"weight": 0, "gradient": config.probes.gradient_windows}
    return windows.get(name, config.probes.windows) * config.probes.window


def _host_eigen(config: RunConfig, measured: dict, repeats: int) -> dict[str, Any]:
    """Seconds of the float64 eigenvalues, which a run computes beside its next steps."""
    if config.probes.eigen != "host":
        return {}
    timed = time_in_turns({"host": lambda: spectra(jax.device_get(measured), np)}, repeats)
    return {"host_eigen": spread(timed["host"].seconds)}


def step_memory(bench: Bench) -> dict[str, dict[str, int]]:
    """Bytes of the plain step and of every measured step."""
    memory = {"plain step": bench.program().memory}
    for data in PROBE_DATA:
        for name, probes in SELECTIONS.items():
            memory[f"{name} on {data}"] = bench.program(probes, data).memory
    return memory
