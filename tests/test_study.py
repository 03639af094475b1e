"""Tiny studies by the real command: killed, stopped, with a run that fails, and pruned.

LENS_JAX_KILLS=10 kills ten times instead of twice.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import ROOT, TOKENS_PER_STEP, WORDS, assert_same_run, make_data

from experiments.pack import pack
from experiments.pruning import early_scores
from experiments.study.outcome import is_in_use, outcome_of
from experiments.study.pool import Task
from experiments.study_records import read_study

KILLS = int(os.environ.get("LENS_JAX_KILLS", "2"))
STEPS = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def words_of(data, **changed) -> list[str]:
    """A study of 6 runs: two cells with two trials each, one of them with two more seeds."""
    words = {key: value for key, value in WORDS.items() if key not in ("rung", "batch")}
    words |= {
        "data": data,
        "max_tokens": STEPS * TOKENS_PER_STEP,
        "val_every": 2 * TOKENS_PER_STEP,
        "target_loss": 2.5,
        "rungs": "untied",
        "batches": "2,4",
        "more": "untied-d12-b4-s1,untied-d12-b4-s2",
        "transfer": "sqrt",
        "factors": "1,2",
        "lr_base": "untied:1",
        "rung_tokens": 4 * TOKENS_PER_STEP,
        "beyond": 0,
        "early_tokens": 4 * TOKENS_PER_STEP,
        "figures": "false",
        "workers": 2,
    }
    words |= {key.replace("__", "."): value for key, value in changed.items()}
    return [f"{key}={value}" for key, value in words.items() if value is not None]


def begin(words: list[str], cache: Path) -> subprocess.Popen:
    settings = {
        "JAX_COMPILATION_CACHE_DIR": f"{cache}/xla",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "LENS_JAX_CACHE": str(cache),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.study", *words],
        cwd=ROOT,
        env=settings | os.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(words: list[str], cache: Path, timeout=400) -> tuple[int, str]:
    process = begin(words, cache)
    out, _ = process.communicate(timeout=timeout)
    return process.returncode, out


@pytest.fixture(scope="module")
def unbroken(data, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies") / "unbroken"
    code, out = run(words_of(data, out=folder), cache)
    assert code == 0, out
    return folder


def test_the_winner_of_a_search_goes_on_and_the_others_stay_where_they_are(unbroken):
    study = read_study(unbroken)
    assert len(study.runs) == 6
    assert [run.cell.batch for run in study.chosen] == [2, 4, 4, 4]
    assert [run.seed for run in study.chosen] == [0, 0, 1, 2]
    assert study.unfinished == ()
    for loser in study.trials:
        assert loser.val["tokens"][-1] == 4 * TOKENS_PER_STEP
        assert not loser.finished
    for cell, selection in study.selected.items():
        losses = {trial["lr_scale"]: trial["val_loss"] for trial in selection["trials"]}
        assert selection["lr_scale"] == min(losses, key=losses.get), cell
        assert selection["edge"]  # the better of two rates always lies at an end


def test_the_table_has_a_row_a_chosen_run(unbroken):
    with open(unbroken / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    for row, member in zip(rows, read_study(unbroken).chosen, strict=True):
        assert row["run"] == member.name
        assert float(row["val_loss"]) == member.result["val_loss"]
        if row["reason"] == "target":
            assert float(row["crossing_tokens"]) <= float(row["tokens"])


def test_a_finished_study_trains_nothing_again(unbroken, data, cache):
    changed = {path: path.stat().st_mtime_ns for path in (unbroken / "runs").rglob("*")}
    code, out = run(words_of(data, out=unbroken), cache)
    assert code == 0, out
    assert {path: path.stat().st_mtime_ns for path in (unbroken / "runs").rglob("*")} == changed


def test_a_study_goes_on_from_its_pack(unbroken, data, cache, tmp_path):
    out, whole = tmp_path / "pack", read_study(unbroken)
    pack(whole, out, rows=200)
    assert not [path for path in out.rglob("*.json") if str(unbroken) in path.read_text()]
    *ended, open_one = whole.chosen
    (out / "runs" / open_one.name / "result.json").unlink()
    results = [out / "runs" / run_.name / "result.json" for run_ in ended]
    written = [path.stat().st_mtime_ns for path in results]
    code, said = run(words_of(data, out=out), cache)
    assert code == 0, said
    assert_same_run(out / "runs" / open_one.name, open_one.path)
    assert [path.stat().st_mtime_ns for path in results] == written
    assert [run_.name for run_ in read_study(out).runs] == [run_.name for run_ in whole.runs]


def test_a_killed_study_ends_with_the_records_of_an_unbroken_one(unbroken, data, cache, tmp_path):
    moments = np.random.default_rng()
    words = words_of(data, out=tmp_path / "killed")
    for _ in range(KILLS):
        process = begin(words, cache)
        time.sleep(moments.uniform(1.0, 12.0))
        process.kill()
        process.communicate()
    code, out = run(words, cache)
    assert code == 0, out
    assert_same_study(tmp_path / "killed", unbroken)


def assert_same_study(got: Path, expected: Path) -> None:
    for name in ("selected.json", "config.json"):
        one, other = (json.loads((path / name).read_text()) for path in (got, expected))
        assert {k: v for k, v in one.items() if k != "out"} == {
            k: v for k, v in other.items() if k != "out"
        }
    names = sorted(path.name for path in (expected / "runs").iterdir())
    assert sorted(path.name for path in (got / "runs").iterdir()) == names
    for run_ in read_study(expected).chosen:
        assert_same_run(got / "runs" / run_.name, run_.path)


def test_a_stopped_study_lets_its_runs_save(data, cache, tmp_path):
    folder = tmp_path / "stopped"
    process = begin(words_of(data, out=folder, rung_tokens=STEPS * TOKENS_PER_STEP), cache)
    deadline = time.monotonic() + 120
    while not list(folder.glob("runs/*/metrics.jsonl")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command goes on" in out
    runs = list((folder / "runs").iterdir())
    assert runs
    assert not any(is_in_use(path) for path in runs)


def test_a_run_that_fails_does_not_stop_the_others(data, cache, tmp_path):
    folder = tmp_path / "failing"
    words = words_of(data, out=folder, lr=1.0, more="untied-d12-b4-s1")
    study_names = run_names(words)
    blocked = folder / "runs" / study_names[0]
    blocked.mkdir(parents=True)
    (blocked / "something.txt").write_text("not a run")
    code, out = run(words, cache)
    assert code == 2
    assert "1 runs failed" in out
    log = (folder / "logs" / f"{study_names[0]}.log").read_text()
    assert "is not the folder of a run" in log
    finished = [path.parent.name for path in folder.glob("runs/*/result.json")]
    assert sorted(finished) == sorted(study_names[1:])


def test_runs_that_all_break_off_before_they_begin_are_told_of(data, cache, tmp_path):
    words = words_of(data, out=tmp_path / "s", lr=1.0, batches="2", more="", figures="true")
    (name,) = run_names(words)
    blocked = tmp_path / "s" / "runs" / name
    blocked.mkdir(parents=True)
    (blocked / "something.txt").write_text("not a run")
    code, out = run(words, cache)
    assert code == 2
    assert "1 runs failed" in out
    assert (tmp_path / "s" / "table.csv").read_text().startswith("rung,")


def run_names(words: list[str]) -> list[str]:
    from experiments.study.grid import resolve_study

    study = resolve_study(words)
    return [study.run_name(*member, 1.0) for member in study.members]


def test_another_study_is_refused_and_more_members_are_not(unbroken, data, cache):
    code, out = run(words_of(data, out=unbroken, early_tokens=999), cache)
    assert code == 2
    assert "early_tokens was 1024, now 999" in out
    code, out = run(words_of(data, out=unbroken, target_loss=2.0), cache)
    assert code == 2
    assert "belongs to another study" in out


def test_members_are_pruned_by_the_spectrum_at_the_early_tokens(data, cache, tmp_path):
    folder = tmp_path / "pruned"
    words = words_of(data, out=folder, lr=1.0, more="", prune="alpha", keep=1, window="90,400")
    code, out = run(words, cache)
    assert code == 0, out
    study = read_study(folder)
    (decision,) = json.loads((folder / "pruned.json").read_text()).values()
    assert len(decision["kept"]) == 1
    (score,) = decision["given_up"].values()
    scores = early_scores(study.chosen, "alpha", 1024, (90, 400))
    assert np.isfinite(list(scores.values())).all()
    assert score == min(scores.values())


def test_a_search_is_pruned_at_the_early_tokens(data, cache, tmp_path):
    folder = tmp_path / "pruned"
    words = words_of(data, out=folder, lr=1.0, more="", batches="1,2,4", prune="loss", keep=1)
    code, out = run(words, cache)
    assert code == 0, out
    study = read_study(folder)
    (decision,) = json.loads((folder / "pruned.json").read_text()).values()
    assert len(decision["kept"]) == 1
    assert len(decision["given_up"]) == 2
    ended = [run_.name for run_ in study.chosen if run_.finished]
    assert ended == decision["kept"]
    early = {run_.name: run_.val["loss"][run_.val["tokens"] <= 1024][-1] for run_ in study.chosen}
    assert min(early, key=early.get) == decision["kept"][0]


def test_where_a_run_stood_at_its_pause_whatever_became_of_it(tmp_path):
    rows = [
        {"kind": "val", "step": step, "tokens": 100 * step, "loss": 6.0 - step} for step in range(5)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert outcome_of(tmp_path, until=150).reason == "new"  # no checkpoint to go on from
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    assert outcome_of(tmp_path, until=150) == ("paused", 200, 4.0)
    assert outcome_of(tmp_path, until=350) == ("paused", 300, 3.0)
    (tmp_path / "nonfinite.json").write_text(json.dumps({"step": 4, "tokens": 450}))
    assert outcome_of(tmp_path, until=150) == ("paused", 200, 4.0)
    assert outcome_of(tmp_path, until=500).reason == "diverged"
    (tmp_path / "nonfinite.json").unlink()
    result = {"reason": "target", "tokens": 200, "val_loss": 4.0}
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert outcome_of(tmp_path, until=150).reason == "target"
    assert outcome_of(tmp_path, until=100) == ("paused", 100, 5.0)


def test_where_a_run_stands(tmp_path):
    assert outcome_of(tmp_path / "none").reason == "new"
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (run_folder / "nonfinite.json").write_text(json.dumps({"step": 3, "tokens": 300}))
    there = outcome_of(run_folder)
    assert (there.reason, there.tokens, there.ended) == ("diverged", 300, True)
    task = Task("one", {}, run_folder, until=1000)
    assert task.is_done()
    (run_folder / "nonfinite.json").write_text("{")
    with pytest.raises(ValueError, match=r"nonfinite\.json is damaged"):
        outcome_of(run_folder)
