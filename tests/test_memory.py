"""The memory command: its report on a tiny model, and its reading of a program's text."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tiny_models import quick_compiler

from experiments.bench_steps import compile_program
from experiments.memory import (
    KEEP_BARRIERS,
    MemoryConfig,
    arrays_of_logits,
    arrays_of_pairs,
    main,
    measure,
    parse_memory,
    verdict,
)
from experiments.program_text import Array, arrays_named
from models.command_line import UsageError, leaves
from models.gpt import token_loss

ROOT = Path(__file__).resolve().parents[1]
ROW, WIDTH, VOCAB = 64, 24, 8192  # the loss takes the row in two chunks
TINY = {
    "profile": "laptop",
    "rung": "attnscale",
    "size.n_layer": 2,
    "size.n_head": 2,
    "size.n_embd": WIDTH,
    "size.block": 16,
    "size.short_row": 16,
    "size.long_row": ROW,
    "size.vocab_size": VOCAB,
    "probes.window": 16,
}


def tiny_words(**changed) -> list[str]:
    """The words of a tiny model; in the names of `changed` keys two underscores are a dot."""
    words = TINY | {key.replace("__", "."): value for key, value in changed.items()}
    return [f"{key}={value}" for key, value in words.items()]


def tiny_config(**changed):
    return parse_memory(tiny_words(**changed))[1]


@pytest.fixture(scope="module", autouse=True)
def _quick_compiler():
    with quick_compiler():
        yield


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What the command prints, and its JSON document."""
    out = tmp_path_factory.mktemp("memory") / "report.json"
    gc.collect()  # arrays of earlier tests, or the count below would be of their garbage
    before = len(jax.live_arrays())
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda text: lines.append(text))
        assert main(tiny_words(out=out)) == 0
    gc.collect()
    assert len(jax.live_arrays()) == before
    return "\n".join(lines), json.loads(out.read_text())


def test_the_report_is_of_one_long_row_in_half_precision(printed):
    _, report = printed
    assert (report["rows"], report["row"], report["accumulate"]) == (1, ROW, 1)
    assert report["compute_dtype"] == "bfloat16"
    assert report["attention"] == "blocked"
    assert (report["rung"], report["tier"], report["profile"]) == ("attnscale", "d12", "laptop")
    assert report["command"].startswith("python -m experiments.memory profile=laptop")


def test_arguments_are_the_state_and_the_batch(printed):
    _, report = printed
    memory = report["memory"]
    weights = 4 * report["parameters"]
    # master weights, one momentum of the matrices and two of all others
    assert 2 * weights < memory["argument_bytes"] < 3 * weights + 4096
    assert memory["alias_bytes"] > 2 * weights
    peak = memory["argument_bytes"] + memory["output_bytes"] + memory["temp_bytes"]
    assert memory["peak_bytes"] == peak - memory["alias_bytes"]
    assert report["compile_s"] > 0


def test_the_largest_arrays_come_first(printed):
    sizes = [entry["bytes"] for entry in printed[1]["largest_arrays"]]
    assert len(sizes) == 10
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] < printed[1]["memory"]["peak_bytes"]


def test_a_step_holds_neither_pairs_nor_logits(printed):
    text, report = printed
    assert report["pair_arrays"] == []
    assert "\nno T x T array\n" in text
    assert report["float32_logit_arrays"] == []
    assert text.endswith("\nno float32 T x V array")


def test_the_table_names_bytes_and_arrays(printed):
    text, report = printed
    peak = report["memory"]["peak_bytes"] / 2**30
    assert f"peak       {peak:9.3f} GiB" in text
    for entry in report["largest_arrays"]:
        assert entry["array"] in text


def test_dense_attention_is_found_out():
    report = measure(tiny_config(attention="dense", rung="rope", arch__row="long", size__n_layer=1))
    assert report["pair_arrays"]
    assert all(f"{ROW},{ROW}" in array for array in report["pair_arrays"])
    assert verdict("T x T", report["pair_arrays"]).startswith("T x T arrays: ")


def test_all_logits_at_once_are_found_out():
    config = tiny_config()

    def loss(x, kernel):
        return token_loss(x @ kernel, jnp.zeros((1, ROW), jnp.int32)).mean()

    shapes = (1, ROW, WIDTH), (WIDTH, VOCAB)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    text = jax.jit(jax.grad(loss)).lower(*shapes).compile().as_text()
    assert arrays_of_logits(arrays_named(text), config)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a flag of the compiler for CPUs")
def test_a_measuring_step_holds_the_gradients_of_its_samples_and_sweeps_hold_fewer():
    probes = {"probes__windows": 128, "probes__gradient_windows": 128, "probes__chunk": 16}
    words = {"size__vocab_size": 64, "probes__matrices": "mlp.c_fc,mlp.c_proj"} | probes
    temp = {}
    for sweeps in (1, 4):
        report = measure(tiny_config(**words, probes__sweeps=sweeps), measured=True)
        assert report["measured"]
        temp[sweeps] = report["memory"]["temp_bytes"]
    rows = 4 * 128 * 4 * WIDTH**2  # of one kernel, in float32
    assert temp[1] > 4 * rows
    assert temp[4] < temp[1] - 2 * rows


def test_the_compiler_does_not_undo_remat():
    def loss(kernels, x, wrap):
        block = wrap(lambda x, kernel: jnp.sin(jnp.sin(x @ kernel) @ kernel.T))
        for kernel in kernels:
            x = x + block(x, kernel)
        return jnp.sum(x)

    def temp_bytes(wrap):
        kernels, x = jnp.zeros((8, 16, 64)), jnp.zeros((1024, 16))
        gradient = jax.jit(jax.grad(lambda kernels, x: loss(kernels, x, wrap)))
        program = compile_program(gradient, kernels, x, compiler_options=KEEP_BARRIERS)
        return program.memory["temp_bytes"]

    jax.config.update("jax_disable_most_optimizations", False)
    kept, again = temp_bytes(lambda block: block), temp_bytes(jax.checkpoint)
    jax.config.update("jax_disable_most_optimizations", True)
    assert again < 0.7 * kept


def test_several_micro_batches_are_still_of_one_row():
    config = tiny_config(accumulate=4)
    assert (config.batch, config.rows_per_step, config.accumulate) == (4, 4, 4)


def test_a_row_that_divides_no_validation_is_taken():
    _, config = parse_memory(["tier=d48", "profile=paper", "size.long_row=24576"])
    assert config.row == 24_576
    assert config.size.n_layer == 48


@pytest.mark.parametrize(
    ("shape", "guilty"),
    [
        ((ROW, ROW), True),
        ((1, 2, ROW, ROW), True),
        ((2 * ROW, ROW), True),  # heads folded into one of the axes
        ((ROW, WIDTH), False),
        ((ROW, 4 * WIDTH), False),
        ((ROW, VOCAB), False),
        ((4, ROW // 4, ROW), False),
    ],
)
def test_pairs_are_two_axes_as_long_as_the_row(shape, guilty):
    config = tiny_config()
    assert bool(arrays_of_pairs({Array("bf16", shape)}, config)) == guilty


def test_no_verdict_where_a_width_is_as_long_as_the_row():
    config = tiny_config(size__n_embd=ROW)
    assert arrays_of_pairs({Array("f32", (ROW, ROW))}, config) is None
    assert verdict("T x T", None).startswith("T x T arrays: cannot tell")


@pytest.mark.parametrize(
    ("array", "guilty"),
    [
        (Array("f32", (1, ROW, VOCAB)), True),
        (Array("f32", (4, ROW // 4, VOCAB)), True),  # the chunks of a loop, stacked
        (Array("f32", (VOCAB, ROW)), True),
        (Array("bf16", (ROW, VOCAB)), False),
        (Array("f32", (ROW // 4, VOCAB)), False),
        (Array("f32", (WIDTH, VOCAB)), False),
    ],
)
def test_logits_are_a_float32_word_by_position(array, guilty):
    config = tiny_config()
    assert bool(arrays_of_logits({array}, config)) == guilty


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("batch=8", "batch=8: a micro-batch is one long row a device here; leave it out, or set"),
        ("remat=maybe", "remat=maybe: give true or false"),
        ("outs=a", "unknown key outs=a; did you mean out?"),
        ("out=/nowhere/at/all.json", "out=/nowhere/at/all.json: its folder does not exist"),
        ("devices=0", "devices=0: give at least 1"),
        ("accumulate=two", "accumulate=two: give a whole number"),
        ("size.long_row=1000", "size.long_row=1000 is not a multiple of"),
    ],
)
def test_mistakes_are_answered_in_one_line(word, complaint):
    with pytest.raises(UsageError) as caught:
        parse_memory([word])
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_attention_that_cannot_run_here_is_a_mistake():
    with pytest.raises(UsageError, match="attention=pallas needs a GPU"):
        measure(tiny_config(attention="pallas"))


def test_more_devices_than_there_are_is_a_mistake():
    there = jax.device_count()
    _, config = parse_memory(tiny_words(devices=there + 1))
    with pytest.raises(UsageError, match=f"devices={there + 1}: there are {there} here; give at"):
        measure(config, devices=there + 1)


def test_several_devices_share_a_state_that_is_cut(tmp_path):
    found = {}
    for fsdp in ("false", "true"):
        out = tmp_path / f"{fsdp}.json"
        words = tiny_words(devices=4, fsdp=fsdp, out=out, size__n_embd=64, size__vocab_size=256)
        done = subprocess.run(
            [sys.executable, "-m", "experiments.memory", *words],
            cwd=ROOT,
            env={key: os.environ[key] for key in os.environ if "DEVICE" not in key},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found[fsdp] = json.loads(out.read_text())
        assert "\nof one of 4 devices; weights and optimizer state are c" in done.stdout
        for kind, talk in found[fsdp]["talk"].items():
            assert f"\n{kind:22s}{talk['count']:6d} " in done.stdout
    copied, cut = found["false"], found["true"]
    assert (copied["rows"], copied["devices"]) == (4, 4)
    assert set(copied["talk"]) == {"all-reduce", "all-gather"}
    weights = 4 * copied["parameters"]
    assert copied["memory"]["argument_bytes"] > 2 * weights
    assert cut["memory"]["argument_bytes"] < 0.3 * copied["memory"]["argument_bytes"]


def test_help_needs_no_jax():
    code = (
        "import sys; from experiments import memory; assert memory.main(['--help']) == 0\n"
        "assert 'jax' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for key in leaves(MemoryConfig):
        assert f"  {key}=" in done.stdout
