"""The first GPU measurement, rehearsed at tiny sizes: its document, its budget, its failures."""

import importlib
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import quick_compiler

from experiments.bench_timing import spread
from models.command_line import UsageError, leaves

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("attention_check", "float8", "scatter", "scatter_ftz", "attention_time")
SECTIONS += ("steps", "gemm", "eigen", "probe")
ABSENT = "not on this device"
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


@pytest.fixture(scope="module", autouse=True)
def _quick_compiler():
    with quick_compiler():
        yield


@pytest.fixture(scope="module")
def modules():
    """The files of benchmarks/, which is a folder of scripts and no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        names = ("first_gpu", "gpu_job", "gpu_attention", "gpu_parts")
        found = {name: importlib.import_module(name) for name in names}
        yield SimpleNamespace(**{name.removeprefix("gpu_"): found[name] for name in names})


@pytest.fixture
def here(modules, monkeypatch):
    """Sections that would get a process each run in this one, as the same command."""
    main = modules.first_gpu.main
    monkeypatch.setattr(modules.first_gpu, "launch", lambda words, share, cache: str(main(words)))
    return modules


def measure(modules, out: Path, *words: str) -> tuple[int, dict]:
    code = modules.first_gpu.main([f"out={out}", "size=tiny", *words])
    return code, json.loads(out.read_text())


def run_python(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        capture_output=True,
        text=True,
    )


def job(modules, size: str = "tiny"):
    return modules.job.Job(size, 60.0, ("sparsev",), lambda: None)


# The whole command


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """Code and document of all sections, the lines they printed and the files they left.

    In a process of its own for the sake of flags with which XLA compiles twice as fast.
    """
    out = tmp_path_factory.mktemp("first") / "report.json"
    code = (
        "import sys, jax; sys.path.insert(0, 'benchmarks'); import first_gpu\n"
        "jax.config.update('jax_numpy_rank_promotion', 'raise')\n"
        "first_gpu.launch = lambda words, share, cache: str(first_gpu.main(words))\n"
        "sys.exit(first_gpu.main(sys.argv[1:]))"
    )
    words = f"out={out}", "size=tiny", "rungs=sparsev"
    done = run_python("-c", code, *words, XLA_FLAGS=QUICK, JAX_PLATFORMS="cpu")
    assert done.returncode in (0, 1), done.stderr
    document = json.loads(out.read_text())
    return done.returncode, document, done.stdout.splitlines(), sorted(out.parent.iterdir())


def test_every_section_runs_and_is_in_one_document(rehearsal):
    code, document, lines, files = rehearsal
    assert (code, document["failed"], document["skipped"]) == (0, [], [])
    assert tuple(document["results"]) == SECTIONS
    assert document["command"].endswith("report.json size=tiny rungs=sparsev")
    assert document["environment"]["jax"] == jax.__version__
    for name, found in document["results"].items():
        assert found["entries"], name
        assert found["failures"] == found["skipped"] == []
        assert isinstance(found["seconds"], float)
        assert found["goals"] == {}  # tiny sizes are held against nothing
        assert f"section {name}: {len(found['entries'])} entries, 0 failures" in lines
    assert [path.name for path in files] == ["report.json"]


def test_what_needs_a_gpu_says_so(rehearsal):
    found = {name: part["entries"] for name, part in rehearsal[1]["results"].items()}
    assert found["scatter_ftz"] == {"all": ABSENT}
    assert found["attention_check"]["cudnn bfloat16, causal"] == ABSENT
    assert found["attention_time"]["cudnn, 8 rows of 32, causal"] == ABSENT
    assert found["float8"]["float8, chunks of 64"]["native_products"] == ABSENT
    assert found["steps"]["sparsev d12 x 8"]["mfu"] == ABSENT


def test_steps_of_every_length_and_window(rehearsal):
    entries = rehearsal[1]["results"]["steps"]["entries"]
    tokens = {"sparsev d12 x 8": 256, "sparsev d36 x 16": 512, "sparsev d12 x 1": 32}
    assert {name: entry["tokens_per_step"] for name, entry in entries.items()} == tokens
    for name, entry in entries.items():
        rate = entry["tokens_per_step"] / entry["step"]["median_s"]
        assert entry["tokens_per_s"] == pytest.approx(rate)
        assert entry["s_per_524288"] == pytest.approx(524_288 / rate)
        assert entry["window"] == 14 * 8
        assert ("average" in entry) == (not name.endswith("x 1"))
    whole = entries["sparsev d12 x 8"]
    assert whole["average"]["window"] == 40
    assert whole["flop_per_token"] >= whole["average"]["flop_per_token"]
    assert entries["sparsev d36 x 16"]["remat"] is True
    (probe,) = rehearsal[1]["results"]["probe"]["entries"].values()
    assert probe["measured"]["peak_bytes"] > probe["plain"]["peak_bytes"]


def test_a_section_that_fails_is_recorded_and_the_others_run(here, monkeypatch, tmp_path):
    def broken(job):
        job.measure("first", lambda: {"ms": 1.0})
        job.measure("second", lambda: 1 / 0)
        raise RuntimeError("the device\nis gone")

    monkeypatch.setitem(here.parts.PARTS, "scatter", broken)
    code, document = measure(here, tmp_path / "report.json", "sections=scatter,gemm,eigen")
    assert (code, document["failed"]) == (1, ["scatter"])
    found = document["results"]["scatter"]
    assert found["entries"]["first"] == {"ms": 1.0}
    assert found["entries"]["second"] == {"error": "ZeroDivisionError: division by zero"}
    assert found["failures"] == ["second: ZeroDivisionError: division by zero"]
    assert found["error"] == "RuntimeError: the device"
    for name in ("gemm", "eigen"):
        assert len(document["results"][name]["entries"]) >= 3


def test_a_process_that_dies_leaves_what_it_had_saved(modules, monkeypatch, tmp_path):
    def launch(words, share, cache):
        out = dict(word.split("=") for word in words)["out"]
        if "gemm" in out:
            part = {"entries": {"a": {"ms": 1.0}}, "failures": []}
            Path(out).write_text(json.dumps({"environment": {"x": 1}, "results": {"gemm": part}}))
        return "ended with code -9"

    monkeypatch.setattr(modules.first_gpu, "launch", launch)
    _, document = measure(modules, tmp_path / "report.json", "sections=gemm,eigen")
    assert document["failed"] == ["gemm", "eigen"]
    assert document["results"]["gemm"]["entries"] == {"a": {"ms": 1.0}}
    for found in document["results"].values():
        assert found["error"] == "ended with code -9"


def test_the_document_is_saved_after_every_entry(modules, monkeypatch, tmp_path):
    out, seen = tmp_path / "report.json", []

    def section(job):
        for name in "abc":
            job.measure(name, lambda: {"ms": 1.0})
            seen.append(list(json.loads(out.read_text())["results"]["gemm"]["entries"]))

    monkeypatch.setitem(modules.parts.PARTS, "gemm", section)
    measure(modules, out, "sections=gemm")
    assert seen == [["a"], ["a", "b"], ["a", "b", "c"]]


def test_sections_beyond_the_budget_are_skipped_and_named(here, monkeypatch, tmp_path):
    monkeypatch.setitem(here.parts.PARTS, "gemm", lambda job: time.sleep(0.25))
    words = "sections=gemm,eigen,scatter", "budget_s=0.2"
    code, document = measure(here, tmp_path / "report.json", *words)
    assert (code, document["skipped"]) == (0, ["eigen", "scatter"])
    assert list(document["results"]) == ["gemm"]


def test_shares_of_a_budget_pass_on_what_is_left(modules, monkeypatch, tmp_path):
    shares = []
    monkeypatch.setattr(modules.first_gpu, "launch", lambda *given: shares.append(given[1]) or "")
    measure(modules, tmp_path / "report.json", "sections=gemm,eigen,float8", "budget_s=130")
    assert shares == pytest.approx([20, 60, 130], abs=1)


def test_processes_are_real_and_tell_how_they_ended(tmp_path):
    out = tmp_path / "report.json"
    words = "benchmarks/first_gpu.py", f"out={out}", "size=tiny", "sections=gemm,eigen"
    done = run_python(*words, JAX_PLATFORMS="nothing")
    document = json.loads(out.read_text())
    assert done.returncode == 1
    assert document["failed"] == ["gemm", "eigen"]
    for found in document["results"].values():
        assert found["error"].startswith("ended with code 1: ")
        assert "nothing" in found["error"]
    assert "failed: gemm, eigen" in done.stdout


# Words


def test_help_lists_the_keys(modules, capsys):
    assert modules.first_gpu.main(["--help", "budget_s=5"]) == 0
    shown = capsys.readouterr().out
    assert "budget_s=5.0" in shown
    for key in leaves(modules.first_gpu.FirstConfig):
        assert f"  {key}=" in shown
    for name, seconds in modules.first_gpu.SECONDS.items():
        assert any(line.split()[:2] == [name, str(seconds)] for line in shown.splitlines()), name


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("section=gemm", "unknown key section=gemm; did you mean sections?"),
        ("sections=speed", "sections=speed: choose among attention_check, float8"),
        ("sections=", "sections=: name at least one, and none twice"),
        ("sections=gemm,gemm", "sections=gemm,gemm: name at least one, and none twice"),
        ("rungs=nonet", "rungs=nonet: choose among baseline"),
        ("size=large", "size=large: give one of paper, tiny"),
        ("budget_s=0", "budget_s=0.0: give a positive number of seconds"),
        ("out=/nowhere/at/all.json", "out=/nowhere/at/all.json: its folder does not exist"),
    ],
)
def test_mistakes_are_answered_in_one_line(modules, word, complaint):
    with pytest.raises(UsageError) as caught:
        modules.first_gpu.main([word])
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_driver_decides_what_jax_is_told(modules, monkeypatch):
    env = {"XLA_FLAGS": "--a"}
    monkeypatch.setattr(modules.first_gpu.os, "environ", env)
    monkeypatch.setattr(modules.first_gpu.shutil, "which", lambda name: None)
    modules.first_gpu.prepare("scatter_ftz")
    assert env == {"XLA_FLAGS": "--a"}
    monkeypatch.setattr(modules.first_gpu.shutil, "which", lambda name: name)
    modules.first_gpu.prepare("scatter_ftz")
    assert env["XLA_FLAGS"] == "--a --xla_backend_extra_options=-nvptx-allow-ftz-atomics"
    assert env["XLA_PYTHON_CLIENT_MEM_FRACTION"] == ".92"


def test_published_sizes_are_refused_without_a_gpu(modules, monkeypatch, tmp_path):
    monkeypatch.setattr(modules.first_gpu, "environment", lambda: {"platform": "cpu"})
    with pytest.raises(UsageError, match="size=paper: there is no GPU here; give size=tiny"):
        modules.first_gpu.main([f"out={tmp_path / 'x.json'}", "sections=gemm"])


# Parts


def test_entries_beyond_the_budget_are_named_but_for_the_first(modules, tmp_path):
    _, document = measure(modules, tmp_path / "x.json", "sections=eigen", "budget_s=1e-9")
    found = document["results"]["eigen"]
    assert (list(found["entries"]), found["skipped"]) == (["16"], ["24", "2 x 16"])
    assert document["skipped"] == ["eigen: 24", "eigen: 2 x 16"]


def test_a_wrong_entry_is_kept_and_fails(modules):
    found = job(modules)
    found.measure("a", lambda: {"ms": np.float32(np.nan), "n": np.int64(3), "wrong": "off by 2"})
    assert found.found["entries"]["a"] == {"ms": "nan", "n": 3, "wrong": "off by 2"}
    assert found.found["failures"] == ["a: off by 2"]


def test_goals_of_steps_take_what_was_measured(modules):
    paper = job(modules, "paper")
    paper.found["entries"] = {
        "softcap d12 x 8": {"s_per_524288": 1.2, "average": {"s_per_524288": 1.1}},
        "fp8head d12 x 8": {"s_per_524288": 1.08},
        "untied d12 x 8": {"error": "RuntimeError: no"},
        "untied d12 x 1": {"s_per_524288": 1.2, "ms": 150.0},
    }
    modules.parts._step_goals(paper)
    verdicts = {name: goal["verdict"] for name, goal in paper.found["goals"].items()}
    assert verdicts == {
        "G1 softcap, widest window, s per 524,288 tokens": "missed",
        "G1 softcap, average window, s per 524,288 tokens": "must",
        "G1 fp8head, widest window, s per 524,288 tokens": "must",
        "G2 untied, ms of 65,536 tokens": "missed",
        "G14 fp8head over softcap": "goal",
    }


def test_wrong_attention_is_found_out(modules):
    attention, shapes = modules.attention, modules.job.TINY
    row = attention.make_row(shapes, 1, 32, "float32")
    compare = partial(attention._compare, row, lambda arrays, visible: arrays, 1e-5)
    mask = row.mask(None, "none", 1)

    def slightly_off(arrays):
        return (*arrays[:3], arrays[3].at[0, 5].add(1e-2))

    def not_a_number(arrays):
        return (arrays[0].at[0, 0].set(jnp.nan), *arrays[1:])

    assert "wrong" not in compare(lambda arrays: arrays, mask)
    for program in (slightly_off, not_a_number):
        assert compare(program, mask)["wrong"].startswith("relative errors above 1e-05: out ")


def test_a_wrong_sum_is_found_out(modules):
    ids, rows = np.array([0, 1, 1], np.int32), np.ones((3, 2), np.float32)

    def overwrite(ids, rows, vocab):
        return jnp.zeros((vocab, 2)).at[ids].set(rows)

    entry = modules.parts._time_scatter(modules.job.TINY._replace(vocab=4), overwrite, ids, rows)
    assert entry["wrong"].startswith("sums off by ")


def test_a_float8_head_without_float8_products_is_a_failure(modules, monkeypatch):
    monkeypatch.setattr(modules.parts, "has_native_float8", lambda: True)
    shapes = modules.job.TINY
    arguments = jnp.ones((1, 8, 16)), jnp.ones((16, 32)), jnp.zeros((1, 8), jnp.int32)
    entry = modules.parts._time_head(shapes, arguments, 8, True, {})
    assert entry["native_products"] == 0
    assert entry["wrong"] == "no product of the compiled head is in float8"


def test_short_calls_are_timed_together_and_very_long_ones_once(modules, monkeypatch):
    calls = []

    def call():
        calls.append(1)
        return len(calls)

    # a clock that only calls move, by 1/512 s each: whatever the machine does meanwhile
    monkeypatch.setattr(time, "perf_counter", lambda: len(calls) / 512)
    shapes = modules.job.TINY._replace(batch_s=10 / 512, repeats=2)
    times, result = modules.parts.time_calls(call, shapes)
    assert times == spread([1 / 512])
    assert result == len(calls) == 2 + 3 * 10  # alone; then ten together, untimed once
    calls.clear()
    times, result = modules.parts.time_calls(call, shapes._replace(call_limit_s=1e-4))
    assert result == len(calls) == 2
    assert times == spread([1 / 512])
