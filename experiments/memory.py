"""Memory that a training step needs on a device, read off the compiled program.

Nothing runs. The plain step is judged or, with measured=true, the one that measures with all probes
as well: it holds the gradients of its samples, and the covariances.

    python -m experiments.memory rung=attnscale tier=d12 profile=paper
    python -m experiments.memory rung=attnscale tier=d12 profile=paper measured=true
    python -m experiments.memory rung=sparsev tier=d48 profile=paper size.long_row=24576
    python -m experiments.memory --help

A micro-batch is one long row in bfloat16, and a step one micro-batch unless accumulate= says
otherwise. State and batch are only shapes, so that a small machine can judge a large model. It
judges with its own compiler, though: one for CPUs multiplies bfloat16 as float32 and keeps some of
those copies, and it has attention=blocked where a GPU has kernels.

Printed are the bytes of arguments, outputs and temporaries (alias: outputs in the place of donated
arguments), the largest arrays of the optimized program, and whether any array in it, inside fused
loops too, holds all pairs of a row or all logits in float32. Every key of
`python -m experiments.train` that sizes a run is taken.
"""

import math
import re
import shlex
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any, NamedTuple

import chz

from experiments.config import RunConfig
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
LARGEST = 10
VALIDATION = ("data.val_tokens", "data.probe_offset")
DEFAULTS = {"compute_dtype": "bfloat16", "accumulate": "1"}
SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[(\d[\d,]*)\]")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\(")
FUSED = re.compile(r" fusion\(.*\bcalls=%?([\w.-]+)")
# XLA for CPUs removes the barriers of remat before it looks for what is computed twice, and keeps
# what was to be computed again; without this pass it does as told.
KEEP_BARRIERS = {"xla_disable_hlo_passes": "cse_barrier_expander"}
# Results of these are arrays that another instruction has made.
NOTHING_NEW = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call"}


class Array(NamedTuple):
    """Type and shape of an array in the text of a program, f32[65536,768] for instance."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """The number in the name of a type is the bits of an element; pred takes a byte."""
        bits = re.search(r"\d+", self.dtype)
        return self.size * int(bits[0]) // 8 if bits else self.size

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@chz.chz
class MemoryConfig:
    """The command's own keys, apart from the sizes, which are those of a RunConfig."""

    measured: bool = chz.field(
        default=False, doc="the step that measures with the probes, not the plain one"
    )
    out: str | None = chz.field(default=None, doc="file for a JSON document, beside the table")

    @chz.validate
    def _ranges(self):
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
    report |= measure(config, plan.measured)
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
            f"batch={words['batch']}: a micro-batch is one long row here; leave it out, or set "
            f"accumulate={words['batch']}"
        )
    words = DEFAULTS | words
    words["batch"] = words["accumulate"]
    if "size.long_row" in words:
        # no part of the step, but it must be a multiple of the row
        words = {key: words["size.long_row"] for key in VALIDATION} | words
    return plan, sized(words)


def measure(config: RunConfig, measured: bool = False) -> dict[str, Any]:
    """Compile the training step of a configuration for one device; returns the JSON document.

    measured: the one that measures too.
    """
    import jax

    from experiments.bench_steps import compile_program
    from experiments.setup import compute_dtype, make_model
    from models.attention import choose

    step, arguments = abstract_step(config, make_model(config))
    options = KEEP_BARRIERS if jax.default_backend() == "cpu" else None
    program = compile_program(step, *arguments, measure=measured, compiler_options=options)
    text = program.call.as_text()
    dtype, size = compute_dtype(config), config.size
    return {
        "device_kind": jax.devices()[0].device_kind,
        **{name: version(name) for name in ("jax", "jaxlib")},
        **{name: getattr(config, name) for name in ("rung", "tier", "profile", "remat")},
        "attention": choose(config.attention, config.arch.masked, dtype, size.head_dim),
        "compute_dtype": dtype.name,
        **{name: getattr(size, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")},
        "row": config.row,
        "rows": config.rows_per_step // config.accumulate,
        "accumulate": config.accumulate,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(arguments[0].params)),
        "measured": measured,
        "compile_s": program.compile_s,
        "memory": program.memory,
        "largest_arrays": [
            {"array": str(array), "bytes": array.bytes, "made_by": count}
            for array, count in largest(arrays_made(text))
        ],
        "pair_arrays": arrays_of_pairs(arrays_named(text), config),
        "float32_logit_arrays": arrays_of_logits(arrays_named(text), config),
    }


def abstract_step(config: RunConfig, model):
    """The jitted training step of a configuration, and shapes of its arguments."""
    import jax
    import jax.numpy as jnp

    from experiments.loss import make_loss
    from experiments.precision import full_precision
    from experiments.probe_set import run_lens
    from experiments.schedule import make_schedule
    from lens_jax.lens import split_windows
    from lens_jax.step import init_state, make_train_step
    from models.gpt import init_params
    from models.windows import widest_window
    from optim.groups import make_optimizer

    params = jax.eval_shape(lambda: init_params(model, config.seed))
    tx = make_optimizer(config.optim, make_schedule(config).horizon, params)
    state = jax.eval_shape(lambda: init_state(init_params(model, config.seed), tx))

    def batch(*rows, length):
        found = {"tokens": jax.ShapeDtypeStruct((*rows, length + 1), jnp.int32)}
        if widest_window(config.arch, config.size) is not None:
            found["window"] = jax.ShapeDtypeStruct(rows, jnp.int32)
        return found

    probes = config.probes
    micro_rows = config.rows_per_step // config.accumulate
    batches = batch(config.accumulate, micro_rows, length=config.row)
    probe_batch = jax.eval_shape(
        lambda windows: split_windows(windows, probes.gradient_windows, probes.chunk),
        batch(probes.windows, length=probes.window),
    )
    step = make_train_step(make_loss(model), tx, run_lens(config), probe_data=probes.data)
    return full_precision(step, model.dtype), (state, batches, probe_batch)


def arrays_named(text: str) -> set[Array]:
    """Every type with a shape anywhere in the text of a program."""
    return {Array(dtype, tuple(map(int, axes.split(",")))) for dtype, axes in SHAPE.findall(text)}


def arrays_made(text: str) -> Counter[Array]:
    """Arrays that an optimized program writes to memory, with how many instructions write one.

    Instructions inside a fusion write nothing; those that only pass arrays on are left out.
    """
    fused = set(FUSED.findall(text))
    made: Counter[Array] = Counter()
    inside = ""
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            inside = header[1]
        elif (found := INSTRUCTION.match(line)) and inside not in fused:
            result, operation = found.groups()
            if operation not in NOTHING_NEW:
                made.update(
                    Array(dtype, tuple(map(int, axes.split(","))))
                    for dtype, axes in SHAPE.findall(result)
                )
    return made


def largest(made: Counter[Array]) -> list[tuple[Array, int]]:
    """The largest arrays, and how many instructions make one; not all of them live at a time."""
    return sorted(made.items(), key=lambda item: -item[0].bytes)[:LARGEST]


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
    """Arrays of float32 with a logit of every word at every position of a micro-batch, or more."""
    vocab, tokens = config.size.vocab_size, config.tokens_per_step // config.accumulate
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
        "",
    ]
    for name, count in report["memory"].items():
        lines.append(f"{name.removesuffix('_bytes'):10s} {count / GIB:9.3f} GiB")
    lines += ["", "largest arrays        MiB each   made by"]
    for entry in report["largest_arrays"]:
        lines.append(f"{entry['array']:22s}{entry['bytes'] / MIB:8,.1f}   {entry['made_by']}")
    pairs, logits = report["pair_arrays"], report["float32_logit_arrays"]
    lines += ["", verdict("T x T", pairs), verdict("float32 T x V", logits)]
    return lines


def verdict(kind: str, found: list[str] | None) -> str:
    """One line on the arrays of a kind."""
    if found is None:
        return f"{kind} arrays: cannot tell, the row is as long as a width of the model"
    return f"{kind} arrays: {', '.join(found)}" if found else f"no {kind} array"


if __name__ == "__main__":
    run_command(main)
