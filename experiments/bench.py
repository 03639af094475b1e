"""Time the training step, what each probe adds to it, and three routes to per-sample gradients.

    python -m experiments.bench tier=d12 profile=laptop
    python -m experiments.bench sections=gradients probes.gradient_windows=32 loop_layers=1
    python -m experiments.bench --help

Progress goes to stderr, one JSON document to stdout and to out=FILE. Variants are timed in turns,
so the ratios within a document hold also where the machine is noisy; every key of
`python -m experiments.train` that sizes a run is taken too. The sections:

  train      tokens per second of the plain compiled step of each rung
  probes     the step with each probe alone and with all, on the fixed probe set and on the batch
  gradients  one backward pass against vmap(grad) and against a loop over samples and matrices
  memory     bytes of the compiled programs, per device
"""

import json
import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import chz

from experiments.config import PROBES, RunConfig, probed_layers
from experiments.resolve import ALIASES, resolve
from models.command_line import (
    Layer,
    UsageError,
    build,
    cast_words,
    check_path,
    flatten,
    help_page,
    leaves,
    parse_words,
    run_command,
)
from models.ladder import RUNGS, rung_values

SECTIONS = ("train", "probes", "gradients", "memory")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
VARIED = ("probes.names", "probes.data")


@chz.chz
class BenchConfig:
    """What a benchmark run times, apart from the sizes, which are those of a RunConfig."""

    sections: tuple[str, ...] = chz.field(default=SECTIONS, doc="what to time")
    rungs: tuple[str, ...] = chz.field(default=RUNGS, doc="rungs of the section train")
    rung: Literal[RUNGS] = chz.field(default="untied", doc="rung of the other sections")
    repeats: int = chz.field(default=5, doc="timed calls of every variant, after one untimed")
    loop_layers: int | None = chz.field(
        default=None, doc="layers that the loop over samples visits, then scaled; none: all probed"
    )
    out: str | None = chz.field(default=None, doc="file for the JSON document, beside stdout")

    @chz.validate
    def _ranges(self):
        for name in self.sections:
            if name not in SECTIONS:
                raise ValueError(f"sections={name}: choose among {', '.join(SECTIONS)}")
        if not self.sections or not self.rungs:
            raise ValueError("sections= and rungs= need at least one name each")
        for name in self.rungs:
            rung_values(name)  # names the rungs that are built
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats}: give at least 1")
        if self.loop_layers is not None and self.loop_layers < 1:
            raise ValueError(f"loop_layers={self.loop_layers}: give at least 1, or none")
        if self.out is not None:
            check_path("out", self.out)
        if self.out is not None and not Path(self.out).absolute().parent.is_dir():
            raise ValueError(f"out={self.out}: its folder does not exist; make it, or choose one")


def main(argv: list[str]) -> int:
    """The command; returns its exit code."""
    wants_help = any(word in ("-h", "--help") for word in argv)
    plan, words = parse_bench([word for word in argv if word not in ("-h", "--help")])
    if wants_help:
        print(help_page(__doc__, BenchConfig, {}, flatten(plan)))
        print("  and every key of a run, with its meaning in python -m experiments.train --help")
        return 0
    configs = {rung: resolve_rung(words, rung) for rung in dict.fromkeys((*plan.rungs, plan.rung))}
    report = run_bench(plan, configs, argv)
    print(json.dumps(report, indent=2, allow_nan=False))
    if plan.out is not None:
        from experiments.atomic_files import write_json

        write_json(plan.out, report)
    return 0


def parse_bench(argv: list[str]) -> tuple[BenchConfig, dict[str, str]]:
    """The benchmark's own keys as a BenchConfig, and the words that are left for the run.

    Every value is cast and every rung resolved once, so that a mistake is answered at once.
    Raises UsageError.
    """
    words = parse_words(argv, ALIASES)
    own = leaves(BenchConfig)
    typed = cast_words(RunConfig, words, leaves(RunConfig) | own)
    for key in VARIED:
        if key in words:
            raise UsageError(f"{key}={words[key]} is what the benchmark varies; leave it out")
    values = {key: value for key, value in typed.items() if key in own}
    plan, _ = build(BenchConfig, [Layer("typed", values)])
    words = {key: text for key, text in words.items() if key not in own}
    for rung in (*plan.rungs, plan.rung):
        resolve(words | {"rung": rung}, "laptop")
    return plan, words


def resolve_rung(words: dict[str, str], rung: str) -> RunConfig:
    """The configuration of one rung, with all probes and a vocabulary."""
    auto = "laptop"
    if words.get("profile", "auto") == "auto":
        from experiments.devices import auto_profile

        auto, _ = auto_profile()
    config, _ = resolve(words | {"rung": rung, "probes.names": ",".join(PROBES)}, auto)
    if config.size.vocab_size is None:
        size = chz.replace(config.size, vocab_size=config.data.corpus_vocab)
        config = chz.replace(config, size=size)
    return config


def run_bench(plan: BenchConfig, configs: dict[str, RunConfig], argv: list[str]) -> dict[str, Any]:
    """Run the chosen sections; returns the JSON document."""
    from experiments.devices import split_cpu

    load = os.getloadavg()  # before this process adds its own
    split_cpu()
    from experiments.bench_gradients import GradientRoutes, gradient_memory, gradients_section
    from experiments.bench_steps import Bench, probes_section, step_memory, train_section

    bench = Bench(configs[plan.rung], note)
    report = {"environment": environment(plan, bench, argv, load)}
    if "train" in plan.sections:
        note("section train")
        benches = {
            rung: bench if rung == plan.rung else Bench(configs[rung], note) for rung in plan.rungs
        }
        report["train"] = train_section(benches, plan.repeats)
        del benches  # the other rungs' states
    if "probes" in plan.sections:
        note("section probes")
        report["probes"] = probes_section(bench, plan.repeats)
    if {"gradients", "memory"} & set(plan.sections):
        routes = GradientRoutes(bench, plan.loop_layers)
    if "gradients" in plan.sections:
        note("section gradients")
        report["gradients"] = gradients_section(routes, plan.repeats)
    if "memory" in plan.sections:
        note("section memory")
        report["memory"] = step_memory(bench) | gradient_memory(routes)
    return report


def note(line: str) -> None:
    """A progress line."""
    print(line, file=sys.stderr, flush=True)


def environment(plan: BenchConfig, bench, argv: list[str], load) -> dict[str, Any]:
    """On what, with which versions and at which sizes the times were taken."""
    import jax

    config, mesh = bench.config, bench.plain_run.mesh
    return {
        "command": shlex.join(["python", "-m", "experiments.bench", *argv]),
        "device_kind": mesh.devices.flat[0].device_kind,
        "device_count": mesh.size,
        "cores": len(os.sched_getaffinity(0)),
        "load_average_before": [round(value, 2) for value in load],
        "compilation_cache": bool(jax.config.jax_compilation_cache_dir),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "tier": config.tier,
        "profile": config.profile,
        "rung": config.rung,
        "repeats": plan.repeats,
        "sizes": {
            **{name: getattr(config.size, name) for name in ("n_layer", "n_head", "n_embd")},
            "vocab_size": config.size.vocab_size,
            "row": config.row,
            "rows_per_step": config.rows_per_step,
            "accumulate": config.accumulate,
            "tokens_per_step": config.tokens_per_step,
            "compute_dtype": bench.plain_run.facts["dtype"],
            "probe_window": config.probes.window,
            "probe_windows": config.probes.windows,
            "gradient_windows": config.probes.gradient_windows,
            "probed_layers": list(probed_layers(config)),
            "probed_matrices": list(config.probes.matrices),
            "eigen": config.probes.eigen,
        },
    }


if __name__ == "__main__":
    run_command(main)
