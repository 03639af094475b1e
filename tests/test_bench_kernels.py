"""The parts of the benchmark that need no training step: attention, loss, Muon, scatter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from tiny_models import quick_compiler

from experiments import bench_kernels, bench_updates
from experiments.bench import resolve_rung
from models.blocked_attention import blocked_attention, computed_pairs
from models.masks import visible_pairs

SIZES = {
    "profile": "laptop",
    "size.n_layer": "2",
    "size.n_head": "2",
    "size.n_embd": "32",
    "size.block": "8",
    "size.short_row": "16",
    "size.long_row": "32",
    "size.vocab_size": "64",
    "batch": "4",
    "data.val_tokens": "32",
    "probes.window": "16",
}


def tiny_rung(rung: str):
    return resolve_rung(SIZES, rung)


@pytest.fixture(scope="module", autouse=True)
def _quick_compiler():
    with quick_compiler():
        yield


def assert_times(times):
    assert 0 < times["min_s"] <= times["median_s"] <= times["max_s"]


def test_attention_on_rows_of_growing_length(monkeypatch):
    config = tiny_rung("attnscale")
    monkeypatch.setattr(bench_kernels, "MOST_SCORES", 4 * 2 * 128**2)
    section = bench_kernels.attention_section(config, (256, 128), 1, print)
    assert (section["rule"], section["block"], section["window"]) == ("block", 128, 14 * 128)
    assert list(section["lengths"]) == ["128", "256"]
    for length, entry in section["lengths"].items():
        exact = entry["mean_keys"] * int(length)
        assert entry["dense"]["waste"] == pytest.approx(int(length) ** 2 / exact)
        assert 1 < entry["blocked"]["waste"] < entry["dense"]["waste"]
        assert_times(entry["blocked"]["row"])
        assert entry["blocked"]["temp_bytes"] > 0
        assert "attention=pallas needs a GPU" in entry["pallas"]["reason"]
        assert entry["pallas"]["row"] is None
        assert entry["pallas"]["waste"] >= 1
    half, whole = section["lengths"].values()
    assert half["blocked"]["growth"] is None
    assert whole["blocked"]["growth"] == pytest.approx(
        whole["blocked"]["row"]["median_s"] / half["blocked"]["row"]["median_s"], rel=0.05
    )
    assert_times(half["dense"]["row"])
    assert whole["dense"]["row"] is whole["dense"]["growth"] is None
    assert whole["dense"]["reason"] == "its scores take 524,288 bytes, more than 131,072"


def test_exact_pairs_are_those_of_the_mask():
    config = tiny_rung("attnscale")
    row = bench_kernels._make_row(config, 4096, np.random.default_rng(0))
    pairs = visible_pairs((1, 4096), **row.mask)
    assert row.exact_pairs == int(np.count_nonzero(pairs))
    assert row.documents == len(np.unique(row.mask["documents"])) > 1


def exponentials(jaxpr) -> int:
    """Elements of all exponentials that a program computes, loops multiplied out."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "exp":
            total += equation.outvars[0].aval.size
        repeats = equation.params.get("length", 1)
        for inner in jaxprs_in_params(equation.params):
            total += repeats * exponentials(inner)
    return total


@pytest.mark.parametrize("length", [100, 600, 1025, 2048])
@pytest.mark.parametrize("reach", [None, 512, 5000])
def test_blocked_pairs_are_those_of_the_program(length, reach):
    q = jnp.zeros((1, length, 1, 4))
    first = jnp.zeros((1, length), jnp.int32)
    program = jax.make_jaxpr(lambda q: blocked_attention(q, q, q, first, 1.0, reach))(q)
    assert computed_pairs(length, reach) == exponentials(program.jaxpr)


@pytest.mark.parametrize("rung", ["baseline", "softcap", "attnscale"])
def test_both_losses_and_their_gradients_agree(rung):
    config = tiny_rung(rung)
    section = bench_kernels.loss_section(config, 1, print)
    assert (section["tokens"], section["width"], section["vocab_size"]) == (128, 32, 64)
    assert section["float8"] == (rung == "attnscale")
    assert section["loss_difference"] < 1e-6
    # a slope next to a tie may fall to either of two float8 numbers, a quarter apart
    assert section["gradient_difference"] < (1e-2 if section["float8"] else 1e-4)
    assert section["ratio"] > 0
    chunked, naive = section["chunked"]["temp_bytes"], section["naive"]["temp_bytes"]
    assert section["memory_ratio"] == naive / chunked


def test_muon_by_shape_and_by_matrix_make_the_same_update():
    section = bench_updates.muon_section(tiny_rung("attnscale"), 1, print)
    # the second layer of two has no attention
    assert section["matrices"] == {"32x32": 4, "32x128": 2, "128x32": 2}
    assert section["largest_relative_difference"] < 1e-2  # bfloat16
    for name in ("batched", "one_by_one"):
        assert_times(section[name]["time"])
    assert section["compile_ratio"] == pytest.approx(
        section["one_by_one"]["compile_s"] / section["batched"]["compile_s"]
    )


@pytest.mark.parametrize("name", bench_updates.SCATTERS)
def test_every_way_to_scatter_sums_the_rows_of_a_token(name):
    random = np.random.default_rng(0)
    ids = bench_updates.zipf_tokens(random, 500, 300)
    cotangent = random.normal(size=(500, 3)).astype(np.float32)
    expected = np.zeros((300, 3))
    np.add.at(expected, ids, cotangent.astype(np.float64))
    got = jax.jit(bench_updates.SCATTERS[name], static_argnums=2)(ids, cotangent, 300)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert got.dtype == jnp.float32


def test_scatter_section_has_ratios_to_the_plain_scatter():
    section = bench_updates.scatter_section(tiny_rung("attnscale"), 1, print)
    assert section["tokens"] == 128
    assert 0 < section["distinct_tokens"] <= 64
    assert section["ways"].keys() == bench_updates.SCATTERS.keys()
    assert section["ways"]["plain"]["ratio"] == 1
    assert max(entry["difference"] for entry in section["ways"].values()) < 1e-6
    assert section["fastest"] in section["ways"]


def test_token_frequencies_fall_as_one_over_the_rank():
    counts = np.bincount(bench_updates.zipf_tokens(np.random.default_rng(0), 100_000, 50))
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.1)
