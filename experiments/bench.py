"""Time the training step, the lens inside it, three routes to per-sample gradients, and kernels.

    python -m experiments.bench tier=d12 profile=laptop
    python -m experiments.bench sections=gradients probes.gradient_windows=32 probes.chunk=32
    python -m experiments.bench sections=attention lengths=4096,8192,16384
    python -m experiments.bench peer=torch
    python -m experiments.bench --help

Progress goes to stderr, one JSON document to stdout and to out=FILE. Variants are timed in turns,
so the ratios within a document hold also where the machine is noisy; every key of
`python -m experiments.train` that sizes a run is taken too. Tokens are random, cut into documents
whose lengths follow the published law, and windows are at their widest. The sections:

  train      tokens per second of the plain compiled step of each rung
  probes     the step with each probe alone and with all, on the fixed probe set and on the batch
  gradients  one backward pass against vmap(grad) and against a loop over samples and matrices
  paper      the released procedure, a pass a layer and matrix and a sample at a time, against what
             all probes add to a step
  memory     bytes of the compiled programs, per device

and, where they are named,

  attention  each implementation on one row of each of lengths=: time, growth, memory, waste
  loss       the chunked loss and its gradients against the same from all logits at once
  muon       Newton-Schulz by shape against a call a matrix
  scatter    four ways to sum the gradient of an embedding table

peer=torch times PyTorch's step beside ours, and alone where no sections are named.
"""

import json
import os
import platform
import shlex
import sys
from importlib.metadata import version
from typing import Any, Literal

import chz

from experiments.config import PROBES, RunConfig, probed_layers
from experiments.resolve import own_words, resolve_somewhere, sized
from models.command_line import (
    Layer,
    UsageError,
    build,
    check_report,
    flatten,
    help_page,
    run_command,
)
from models.ladder import ALL_RUNGS, DEFAULT_RUNG

SECTIONS = ("train", "probes", "gradients", "paper", "memory")
KERNELS = ("attention", "loss", "muon", "scatter")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
VARIED = ("probes.names", "probes.data")
EOT = 0  # token that opens a document


@chz.chz
class BenchConfig:
    """What a benchmark run times, apart from the sizes, which are those of a RunConfig."""

    sections: tuple[str, ...] = chz.field(default=SECTIONS, doc="what to time")
    rungs: tuple[str, ...] = chz.field(
        default=("baseline", "untied", "attnscale"), doc="rungs of the section train"
    )
    rung: Literal[ALL_RUNGS] = chz.field(default=DEFAULT_RUNG, doc="rung of the other sections")
    peer: Literal["none", "torch"] = chz.field(
        default="none", doc="time another library's training step beside ours"
    )
    repeats: int = chz.field(default=5, doc="timed calls of every variant, after one untimed")
    loop_layers: int | None = chz.field(
        default=None, doc="layers that the loop over samples visits, then scaled; none: all probed"
    )
    lengths: tuple[int, ...] = chz.field(
        default=(2048, 4096, 8192, 16_384), doc="tokens of a row in the section attention"
    )
    out: str | None = chz.field(default=None, doc="file for the JSON document, beside stdout")

    @chz.validate
    def _ranges(self):
        for name in self.sections:
            if name not in (*SECTIONS, *KERNELS):
                known = ", ".join((*SECTIONS, *KERNELS))
                raise ValueError(f"sections={name}: choose among {known}")
        if not (self.sections or self.peer != "none") or not self.rungs:
            raise ValueError("sections= and rungs= need at least one name each")
        for name in self.rungs:
            if name not in ALL_RUNGS:
                raise ValueError(f"rungs={name}: choose among {', '.join(ALL_RUNGS)}")
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats}: give at least 1")
        if self.loop_layers is not None and self.loop_layers < 1:
            raise ValueError(f"loop_layers={self.loop_layers}: give at least 1, or none")
        if not self.lengths or min(self.lengths) < 2:
            raise ValueError(f"lengths={','.join(map(str, self.lengths))}: give at least 2 tokens")
        if self.out is not None:
            check_report(self.out)


def main(argv: list[str]) -> int:
    """The command; returns its exit code."""
    wants_help = any(word in ("-h", "--help") for word in argv)
    plan, words = parse_bench([word for word in argv if word not in ("-h", "--help")])
    if wants_help:
        print(help_page(__doc__, BenchConfig, {}, flatten(plan)))
        print("  and every key of a run, with its meaning in python -m experiments.train --help")
        return 0
    report = run_bench(plan, words, argv)
    print(json.dumps(report, indent=2, allow_nan=False))
    if plan.out is not None:
        from models.atomic_files import write_json

        write_json(plan.out, report)
    return 0


def parse_bench(argv: list[str]) -> tuple[BenchConfig, dict[str, str]]:
    """The benchmark's own keys as a BenchConfig, and the words that are left for the run.

    Every rung is resolved once, so that a mistake is answered at once. Raises UsageError.
    """
    values, words = own_words(BenchConfig, argv)
    for key in VARIED:
        if key in words:
            raise UsageError(f"{key}={words[key]} is what the benchmark varies; leave it out")
    if values.get("peer", "none") != "none":
        values = {"sections": ()} | values
    plan, _ = build(BenchConfig, [Layer("typed", values)])
    for rung in (plan.rung, *(plan.rungs if "train" in plan.sections else ())):
        resolve_somewhere(words | {"rung": rung})
    return plan, words


def resolve_rung(words: dict[str, str], rung: str) -> RunConfig:
    """The configuration of one rung on these devices, with all probes, sized for its data."""
    from experiments.devices import settled

    return settled(sized(words | {"rung": rung, "probes.names": ",".join(PROBES)}))


def run_bench(plan: BenchConfig, words: dict[str, str], argv: list[str]) -> dict[str, Any]:
    """Run the chosen sections; returns the JSON document."""
    from experiments.devices import split_cpu

    load = os.getloadavg()  # before this process adds its own
    split_cpu()
    config = resolve_rung(words, plan.rung)
    report = {"environment": environment(plan, config, argv, load)}
    for section in KERNELS:
        if section in plan.sections:
            note(f"section {section}")
            report[section] = run_kernels(section, config, plan)
    if set(SECTIONS) & set(plan.sections):
        report |= run_steps(plan, words, config)
    if plan.peer != "none":
        note("section peer")
        report["peer"] = run_peer(words, plan.repeats)
    return report


def run_kernels(section: str, config: RunConfig, plan: BenchConfig) -> dict[str, Any]:
    """One of the sections that need no training step."""
    from experiments import bench_kernels, bench_updates

    if section == "attention":
        return bench_kernels.attention_section(config, plan.lengths, plan.repeats, note)
    sections = {
        "loss": bench_kernels.loss_section,
        "muon": bench_updates.muon_section,
        "scatter": bench_updates.scatter_section,
    }
    return sections[section](config, plan.repeats, note)


def run_steps(plan: BenchConfig, words: dict[str, str], config: RunConfig) -> dict[str, Any]:
    """The sections about the training step and its probes."""
    from experiments.bench_gradients import GradientRoutes, gradient_memory, gradients_section
    from experiments.bench_paper import paper_section
    from experiments.bench_steps import Bench, probes_section, step_memory, train_section

    report: dict[str, Any] = {}
    bench = Bench(config, note)
    if "train" in plan.sections:
        note("section train")
        benches = {
            rung: bench if rung == plan.rung else Bench(resolve_rung(words, rung), note)
            for rung in plan.rungs
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
    if "paper" in plan.sections:
        note("section paper")
        report["paper"] = paper_section(bench, plan.repeats, plan.loop_layers)
    if "memory" in plan.sections:
        note("section memory")
        report["memory"] = step_memory(bench) | gradient_memory(routes)
    return report


def run_peer(words: dict[str, str], repeats: int) -> dict[str, Any]:
    """The step of another library beside ours, for the rungs that it has."""
    from experiments.bench_peer import PEER_RUNGS, load_torch, peer_section
    from experiments.bench_steps import Bench

    load_torch()  # where it is missing nothing need be compiled to say so
    benches = {rung: Bench(resolve_rung(words, rung), note) for rung in PEER_RUNGS}
    return peer_section(benches, repeats, note)


def note(line: str) -> None:
    """A progress line."""
    print(line, file=sys.stderr, flush=True)


def environment(plan: BenchConfig, config: RunConfig, argv: list[str], load) -> dict[str, Any]:
    """On what, with which versions and at which sizes the times were taken."""
    import jax

    from experiments.devices import make_mesh
    from experiments.setup import compute_dtype

    mesh = make_mesh(config.micro_rows)
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
            "compute_dtype": compute_dtype(config).name,
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
