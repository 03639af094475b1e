"""Memory that a training step needs on a device, read off the compiled program.

Nothing runs. The plain step is judged or, with measured=true, the one that measures with all probes
as well: it holds the gradients of its samples, and the covariances.

    python -m experiments.memory rung=attnscale tier=d12 profile=paper
    python -m experiments.memory rung=attnscale tier=d12 profile=paper measured=true
    python -m experiments.memory rung=sparsev tier=d48 profile=paper size.long_row=24576
    python -m experiments.memory rung=vte tier=d36 profile=paper devices=8 fsdp=true
    python -m experiments.memory --help

A micro-batch is one long row a device in bfloat16, and a step one micro-batch unless accumulate=
says otherwise. State and batch are only shapes, so that a small machine can judge a large model. It
judges with its own compiler, though: one for CPUs multiplies bfloat16 as float32 and keeps some of
those copies, and it has attention=blocked where a GPU has kernels.

Printed are the bytes of arguments, outputs and temporaries (alias: outputs in the place of donated
arguments), the largest arrays of the optimized program, and whether any array in it, inside fused
loops too, holds all pairs of a row or all logits in float32; of several devices, what one of them
needs, and what they send each other. Every key of `python -m experiments.train` that sizes a run is
taken.
"""

import shlex
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import chz

from experiments.config import RunConfig
from experiments.program_text import (
    Array,
    arrays_made,
    arrays_named,
    largest,
    talk_between_devices,
)
from experiments.resolve import own_words, sized
from models.command_line import (
    Layer,
    UsageError,
    build,
    check_report,
    flatten,
    help_page,
    run_command,
)

GIB, MIB = 2**30, 2**20
VALIDATION = ("data.val_tokens", "data.probe_offset")
DEFAULTS = {"compute_dtype": "bfloat16", "accumulate": "1"}
# XLA for CPUs removes the barriers of remat before it looks for what is computed twice, and keeps
# what was to be computed again; without this pass it does as told.
KEEP_BARRIERS = {"xla_disable_hlo_passes": "cse_barrier_expander"}


@chz.chz
class MemoryConfig:
    """The command's own keys, apart from the sizes, which are those of a RunConfig."""

    measured: bool = chz.field(
        default=False, doc="the step that measures with the probes, not the plain one"
    )
    devices: int = chz.field(
        default=1, doc="devices that share the step; a CPU passes for as many as are asked for"
    )
    out: str | None = chz.field(default=None, doc="file for a JSON document, beside the table")

    @chz.validate
    def _ranges(self):
        if self.devices < 1:
            raise ValueError(f"devices={self.devices}: give at least 1")
        if self.out is not None:
            check_report(self.out)


def main(argv: list[str]) -> int:
    """The command; returns its exit code."""
    wants_help = any(word in ("-h", "--help") for word in argv)
    plan, config = parse_memory([word for word in argv if word not in ("-h", "--help")])
    if wants_help:
        print(help_page(__doc__, MemoryConfig, {}, flatten(plan)))
        print("  and every key of a run, with its meaning in python -m experiments.train --help")
        return 0
    report = {"command": shlex.join(["python", "-m", "experiments.memory", *argv])}
    if plan.devices > 1:
        from experiments.devices import split_cpu

        split_cpu(plan.devices)
    report |= measure(config, plan.measured, plan.devices)
    print("\n".join(table(report)))
    if plan.out is not None:
        from models.atomic_files import write_json

        write_json(plan.out, report)
    return 0


def parse_memory(argv: list[str]) -> tuple[MemoryConfig, RunConfig]:
    """The command's own keys, and the run whose step is looked at; raises UsageError."""
    values, words = own_words(MemoryConfig, argv)
    plan, _ = build(MemoryConfig, [Layer("typed", values)])
    if "batch" in words:
        raise UsageError(
            f"batch={words['batch']}: a micro-batch is one long row a device here; leave it out, "
            f"or set accumulate={words['batch']}"
        )
    words = DEFAULTS | words
    accumulate = words["accumulate"]
    if not accumulate.isdecimal() or int(accumulate) < 1:
        raise UsageError(f"accumulate={accumulate}: give a whole number from 1 on")
    words["batch"] = str(int(accumulate) * plan.devices)
    if "size.long_row" in words:
        # no part of the step, but it must be a multiple of the row
        words = {key: words["size.long_row"] for key in VALIDATION} | words
    return plan, sized(words)


def measure(config: RunConfig, measured: bool = False, devices: int = 1) -> dict[str, Any]:
    """Compile the training step of a configuration for some devices; returns the JSON document.

    measured: the one that measures too. Raises UsageError where there are not so many devices.
    """
    import jax

    from experiments.bench_steps import compile_program
    from experiments.devices import make_mesh
    from experiments.setup import compute_dtype
    from models.attention import choose

    mesh = make_mesh(config.micro_rows, most=devices)
    if mesh.size != devices:
        raise UsageError(
            f"devices={devices}: there are {jax.device_count()} here; give at most that"
        )
    step, arguments = abstract_step(config, mesh)
    options = KEEP_BARRIERS if jax.default_backend() == "cpu" else None
    program = compile_program(step, *arguments, measure=measured, compiler_options=options)
    text = program.call.as_text()
    dtype, size = compute_dtype(config), config.size
    return {
        "device_kind": jax.devices()[0].device_kind,
        **{name: version(name) for name in ("jax", "jaxlib")},
        **{name: getattr(config, name) for name in ("rung", "tier", "profile", "remat", "fsdp")},
        "devices": devices,
        "attention": choose(config.attention, config.arch.masked, dtype, size.head_dim),
        "compute_dtype": dtype.name,
        **{name: getattr(size, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")},
        "row": config.row,
        "rows": config.micro_rows,
        "accumulate": config.accumulate,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(arguments[0].params)),
        "measured": measured,
        "compile_s": program.compile_s,
        "memory": program.memory,
        "largest_arrays": [
            {"array": str(array), "bytes": array.bytes, "made_by": count}
            for array, count in largest(arrays_made(text))
        ],
        "talk": {kind: talk._asdict() for kind, talk in talk_between_devices(text).items()},
        "pair_arrays": arrays_of_pairs(arrays_named(text), config),
        "float32_logit_arrays": arrays_of_logits(arrays_named(text), config),
    }


def abstract_step(config: RunConfig, mesh):
    """The jitted training step of a configuration on a mesh, and shapes of its arguments."""
    import jax
    import jax.numpy as jnp

    from experiments.devices import rows_sharding
    from experiments.schedule import make_schedule
    from experiments.setup import make_functions
    from lens_jax.lens import ProbeBatch, split_windows
    from models.windows import widest_window

    def batch(*rows, length):
        found = {"tokens": jax.ShapeDtypeStruct((*rows, length + 1), jnp.int32)}
        if widest_window(config.arch, config.size) is not None:
            found["window"] = jax.ShapeDtypeStruct(rows, jnp.int32)
        return found

    def placed(batch, axis):
        return jax.tree.map(
            lambda leaf: leaf.update(sharding=rows_sharding(mesh, leaf.shape, axis)), batch
        )

    functions = make_functions(config, make_schedule(config), mesh)
    probes = config.probes
    batches = batch(config.accumulate, config.micro_rows, length=config.row)
    samples, more = jax.eval_shape(
        lambda windows: split_windows(windows, probes.gradient_windows, probes.chunk),
        batch(probes.windows, length=probes.window),
    )
    probe_batch = ProbeBatch(placed(samples, 0), None if more is None else placed(more, 1))
    return functions.step, (functions.shapes, placed(batches, 1), probe_batch)


def arrays_of_pairs(arrays: Iterable[Array], config: RunConfig) -> list[str] | None:
    """Arrays of which two axes are the row or multiples of it; None where a width is as long."""
    size, row = config.size, config.row
    widths = {size.n_embd, size.mlp_width, size.vocab_size}
    if row in widths:
        return None
    found = [
        array
        for array in arrays
        if sum(axis % row == 0 and axis not in widths for axis in array.shape) >= 2
    ]
    return sorted(map(str, found))


def arrays_of_logits(arrays: Iterable[Array], config: RunConfig) -> list[str]:
    """Arrays of float32 with a logit of every word at every position of a long row, or more."""
    vocab, tokens = config.size.vocab_size, config.size.long_row
    found = [
        array
        for array in arrays
        if array.dtype in ("f32", "f64")
        and vocab in array.shape
        and array.size // vocab % tokens == 0
    ]
    return sorted(map(str, found))


def table(report: dict[str, Any]) -> list[str]:
    """The report in lines of text."""
    lines = [
        f"{report['rung']} {report['tier']} {report['profile']}: {report['n_layer']} layers of "
        f"{report['n_embd']}, {report['parameters']:,} parameters, {report['rows']} x "
        f"{report['row']} tokens a micro-batch, {report['accumulate']} a step"
        + (", measuring" if report["measured"] else ""),
        f"{report['device_kind']}, {report['compute_dtype']}, attention {report['attention']}, "
        f"remat {report['remat']}, compiled in {report['compile_s']:.1f} s",
        *([of_devices(report)] if report["devices"] > 1 else []),
        "",
    ]
    for name, count in report["memory"].items():
        lines.append(f"{name.removesuffix('_bytes'):10s} {count / GIB:9.3f} GiB")
    lines += ["", "largest arrays        MiB each   made by"]
    for entry in report["largest_arrays"]:
        lines.append(f"{entry['array']:22s}{entry['bytes'] / MIB:8,.1f}   {entry['made_by']}")
    if report["talk"]:
        lines += ["", "between devices       number      MiB of one device"]
    for kind, talk in report["talk"].items():
        lines.append(f"{kind:22s}{talk['count']:6d}{talk['bytes'] / MIB:12,.1f}")
    pairs, logits = report["pair_arrays"], report["float32_logit_arrays"]
    lines += ["", verdict("T x T", pairs), verdict("float32 T x V", logits)]
    return lines


def of_devices(report: dict[str, Any]) -> str:
    """One line on how the state lies on several devices."""
    how = "cut among" if report["fsdp"] else "copied to"
    return f"of one of {report['devices']} devices; weights and optimizer state are {how} them"


def verdict(kind: str, found: list[str] | None) -> str:
    """One line on the arrays of a kind."""
    if found is None:
        return f"{kind} arrays: cannot tell, the row is as long as a width of the model"
    return f"{kind} arrays: {', '.join(found)}" if found else f"no {kind} array"


if __name__ == "__main__":
    run_command(main)
