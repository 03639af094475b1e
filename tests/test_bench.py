"""The benchmark command: its JSON document at a tiny size, its keys, and its parts."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_models import quick_compiler

from experiments import bench_peer, bench_steps
from experiments.bench import BenchConfig, main, parse_bench, resolve_rung, run_peer
from experiments.bench_documents import random_documents
from experiments.bench_timing import paired_ratio, spread, time_in_turns
from models.command_line import UsageError, leaves
from models.ladder import RUNGS

ROOT = Path(__file__).resolve().parents[1]
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
    "probes.window": "16",
    "probes.windows": "16",
    "probes.gradient_windows": "8",
    "probes.chunk": "8",
    "probes.matrices": "mlp.c_proj",
    "data.val_tokens": "32",
}
TINY = [f"{key}={value}" for key, value in SIZES.items()]
TINY += ["rung=baseline", "rungs=baseline,attnscale", "loop_layers=1", "repeats=1"]
QUICK_COMPILER = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
SELECTIONS = ("activation", "gradient", "weight", "all")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "experiments.bench", *TINY, f"out={out}"],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": QUICK_COMPILER, "JAX_NUM_CPU_DEVICES": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)  # nothing but the document is on stdout
    assert printed == json.loads(out.read_text())
    return printed


def assert_times(times):
    assert 0 < times["min_s"] <= times["median_s"] <= times["max_s"]


def test_environment_says_on_what_and_how_large(report):
    found = report["environment"]
    assert found["command"].startswith("python -m experiments.bench profile=laptop")
    assert (found["device_kind"], found["device_count"]) == ("cpu", 2)
    assert (found["tier"], found["profile"], found["rung"]) == ("d12", "laptop", "baseline")
    assert found["sizes"]["tokens_per_step"] == 128
    assert found["sizes"]["gradient_windows"] == 8
    assert {"jax", "jaxlib", "flax", "python", "cores"} <= found.keys()


def test_train_has_throughput_of_every_rung(report):
    section = report["train"]
    assert set(section["rungs"]) == {"baseline", "attnscale"}
    for entry in section["rungs"].values():
        assert_times(entry["step"])
        assert entry["tokens_per_s"] == pytest.approx(128 / entry["step"]["median_s"])
        assert entry["compile_s"] > 0
    assert section["rungs"]["baseline"]["speed_ratio"] == 1


@pytest.mark.parametrize("data", ["fixed", "batch"])
@pytest.mark.parametrize("name", SELECTIONS)
def test_probes_are_ratios_to_the_plain_step(report, data, name):
    entry = report["probes"][data][name]
    plain = report["probes"]["plain"]
    assert_times(entry["step"])
    assert_times(entry["host_eigen"])
    assert entry["ratio"] == pytest.approx(
        entry["step"]["median_s"] / plain["median_s"],
        rel=1e-2,  # seconds are rounded
    )
    assert math.isfinite(entry["ratio"])
    assert entry["share"] == pytest.approx(entry["ratio"] - 1)


def test_fixed_probe_costs_are_related_to_their_tokens(report):
    tokens = {"activation": 256, "gradient": 128, "all": 256}
    for name, count in tokens.items():
        entry = report["probes"]["fixed"][name]
        assert entry["probe_tokens"] == count
        assert entry["share_of_equal_tokens"] == pytest.approx(entry["share"] * 128 / count)
    assert "probe_tokens" not in report["probes"]["fixed"]["weight"]
    assert "probe_tokens" not in report["probes"]["batch"]["all"]


@pytest.mark.parametrize("data", ["fixed", "batch"])
def test_the_released_procedure_is_timed_beside_the_step(report, data):
    entry = report["paper"][data]
    for name in ("plain", "all", "paper"):
        assert_times(entry[name])
    assert entry["timed_fraction"] == 0.5
    assert entry["samples"] == 8  # eight rows of 16 tokens a step, eight windows of 16
    assert entry["activation_windows"] == {"fixed": 16, "batch": 8}[data]
    assert entry["gradients_on_host_bytes"] == 8 * 4 * 32 * 32 * 4
    assert entry["all_over_plain"] > 0
    assert math.isfinite(entry["paper_over_extra"])


def test_three_gradient_routes_agree(report):
    section = report["gradients"]
    assert section["samples"] == 8
    assert section["matrices"] == ["h_0/mlp/c_proj/kernel", "h_1/mlp/c_proj/kernel"]
    assert max(section["largest_relative_difference"].values()) < 1e-4
    routes = section["routes"]
    for name in ("one_backward", "vmap_grad", "loop"):
        assert_times(routes[name])
        assert 0 < routes[name]["ratio"] < math.inf
        assert routes[name]["host_s"] > 0
    assert routes["loop"]["timed_fraction"] == 0.5  # loop_layers=1 of two


def test_memory_of_every_program(report):
    steps = {f"{name} on {data}" for name in SELECTIONS for data in ("fixed", "batch")}
    routes = {"one_backward", "vmap_grad", "loop, one sample"}
    assert set(report["memory"]) == {"plain step"} | steps | routes
    for entry in report["memory"].values():
        peak = entry["argument_bytes"] + entry["output_bytes"] + entry["temp_bytes"]
        assert entry["peak_bytes"] == peak - entry["alias_bytes"] > 0


def test_help_lists_the_keys(capsys):
    assert main(["--help", "repeats=3"]) == 0
    shown = capsys.readouterr().out
    assert "repeats=3" in shown
    for key in leaves(BenchConfig):
        assert f"  {key}=" in shown


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("repeat=3", "unknown key repeat=3; did you mean repeats?"),
        ("repeats=0", "repeats=0: give at least 1"),
        ("sections=speed", "sections=speed: choose among train, probes, gradients, paper, memory"),
        ("sections=", "sections= and rungs= need at least one name each"),
        ("rungs=nonet", "rungs=nonet: choose among baseline, rope, muon"),
        ("peer=tf", "peer=tf: give one of none, torch"),
        ("lengths=1", "lengths=1: give at least 2 tokens"),
        ("probes=weight", "probes.names=weight is what the benchmark varies"),
        ("loop_layers=0", "loop_layers=0: give at least 1, or none"),
        ("out=/nowhere/at/all.json", "out=/nowhere/at/all.json: its folder does not exist"),
        ("size.n_head=7", "size.n_head=7 does not divide"),
    ],
)
def test_mistakes_are_answered_in_one_line_before_anything_is_built(word, complaint):
    with pytest.raises(UsageError) as caught:
        parse_bench([word])
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_key_exits_with_2_and_needs_no_jax():
    code = (
        "import sys; from experiments import bench; from models.command_line import run_command\n"
        "try: run_command(bench.main)\n"
        "except SystemExit as end: assert 'jax' not in sys.modules; raise"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "repeat=3"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown key repeat=3; did you mean repeats?\n"


def test_the_kernels_are_timed_only_where_they_are_named():
    assert parse_bench([])[0].sections == ("train", "probes", "gradients", "paper", "memory")
    assert parse_bench(["sections=muon"])[0].sections == ("muon",)
    assert parse_bench(["peer=torch"])[0].sections == ()
    assert parse_bench(["peer=torch", "sections=loss"])[0].sections == ("loss",)


def test_a_rung_that_is_not_timed_need_not_be_on_the_ladder():
    parse_bench(["ladder=clean", "rung=attnscale", "sections=muon"])


@pytest.mark.parametrize("rung", RUNGS)
def test_every_rung_resolves_with_all_probes_and_a_vocabulary(rung):
    config = resolve_rung({"profile": "laptop"}, rung)
    assert config.rung == rung
    assert config.probes.names == ("activation", "gradient", "weight")
    assert config.size.vocab_size == config.data.corpus_vocab
    assert config.size.eot_token == 0


def test_variants_are_timed_in_turns_after_one_untimed_call_each():
    calls = []
    variants = {name: lambda name=name: calls.append(name) or len(calls) for name in "abc"}
    timed = time_in_turns(variants, 3)
    assert "".join(calls) == "abc" * 4
    assert [timed[name].result for name in "abc"] == [10, 11, 12]
    assert all(len(timed[name].seconds) == 3 for name in "abc")


def test_spread_is_the_median_and_the_range():
    assert spread([3.0, 1.0, 2.5]) == {"median_s": 2.5, "min_s": 1.0, "max_s": 3.0}


def test_a_ratio_pairs_the_calls_of_a_turn():
    # a machine ten times slower in the second turn does not move the ratio
    assert paired_ratio([2.0, 20.0, 3.0], [1.0, 10.0, 1.5]) == 2.0


def test_layers_of_the_loop_are_spread_evenly():
    from experiments.bench_paper import spread_layers

    paths = tuple(f"h_{layer}/{name}/kernel" for layer in (0, 3, 6, 9, 11) for name in "ab")
    assert spread_layers(paths, None) == spread_layers(paths, 9) == paths
    assert spread_layers(paths, 1) == ("h_6/a/kernel", "h_6/b/kernel")
    assert {path[2] for path in spread_layers(paths, 3)} == {"0", "6", "1"}


def test_differences_count_only_large_singular_values():
    from experiments.bench_gradients import largest_difference

    exact = {"a": np.array([10.0, 1.0, 1e-6]), "b": np.array([2.0])}
    ours = {"a": np.array([10.0, 1.01, 5e-6]), "b": np.array([2.0]), "c": np.array([1.0])}
    assert largest_difference(ours, exact) == pytest.approx(0.01)


def test_documents_are_as_long_as_published():
    tokens = random_documents(np.random.default_rng(0), (40, 100_000), 50, 7, 128)
    assert tokens.dtype == np.int32
    assert set(np.unique(tokens)) == set(range(50))
    lengths = np.diff(np.flatnonzero(tokens == 7))
    assert np.median(lengths) == pytest.approx(403, rel=0.05)
    assert lengths.mean() == pytest.approx(690, rel=0.05)


def test_documents_shrink_with_the_mask_block():
    tokens = random_documents(np.random.default_rng(0), (10, 100_000), 50, 0, 16)
    lengths = np.diff(np.flatnonzero(tokens == 0))
    assert lengths.mean() == pytest.approx(690 / 8, rel=0.05)


def test_batches_have_documents_and_the_widest_window():
    config = resolve_rung(SIZES, "attnscale")
    with quick_compiler():
        bench = bench_steps.Bench(config, print)
        run = bench.make_run(("activation",), "fixed")
    widest = 14 * config.size.block
    assert set(np.asarray(bench.batches["window"]).flat) == {widest}
    assert bench.batches["window"].shape == bench.batches["tokens"].shape[:2]
    for batch in run.probe_batch:
        assert set(np.asarray(batch["window"]).flat) == {widest}
        assert batch["window"].shape == batch["tokens"].shape[:-1]
    assert 0 < np.count_nonzero(np.asarray(bench.batches["tokens"]) == 0) < 40


def test_a_rung_without_windows_gets_none():
    with quick_compiler():
        bench = bench_steps.Bench(resolve_rung(SIZES, "baseline"), print)
    assert set(bench.batches) == {"tokens"}


def test_the_peer_gets_a_benchmark_of_each_of_its_rungs(monkeypatch):
    monkeypatch.setattr(bench_peer, "load_torch", lambda: None)
    monkeypatch.setattr(bench_peer, "peer_section", lambda *arguments: arguments)
    monkeypatch.setattr(bench_steps, "Bench", lambda config, note: config.rung)
    benches, repeats, note = run_peer({"profile": "laptop"}, 7)
    assert benches == {"untied": "untied", "attnscale": "attnscale"}
    assert (repeats, note.__name__) == (7, "note")
