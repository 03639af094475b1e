"""The toy study as a command: search, engines, what is kept, what is refused."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_models import quick_compiler
from tiny_toy import WORDS, record_dispatches, tiny_member, tiny_study

from models.command_line import UsageError
from toy_modular import search
from toy_modular.search import rank_key, survivors
from toy_modular.study import main, run_study
from toy_modular.study_config import Kind, resolve
from toy_modular.training import train_members
from toy_modular.workers import Failed, Job, run_jobs

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def words(**given) -> list[str]:
    """The tiny study as typed words."""
    typed = {key.replace("__", "."): value for key, value in given.items()}
    return [f"{key}={value}" for key, value in (WORDS | typed).items()]


# Search


def trial(reason="paused", loss=3.0, tokens=None, step=8) -> dict:
    return {
        "reason": reason,
        "step": step,
        "tokens": step,
        "val_loss": loss,
        "tokens_to_target": tokens,
        "crossing_tokens": tokens,
    }


def test_the_better_half_goes_on_and_a_hit_ends_the_search():
    trials = {
        1.0: trial(loss=3.0),
        2.0: trial(loss=2.5),
        4.0: trial(loss=4.0),
        8.0: trial("diverged"),
    }
    assert survivors(trials, [1.0, 2.0, 4.0, 8.0]) == [1.0, 2.0]
    assert survivors(trials, [2.0]) == [2.0]
    assert survivors(trials, [1.0, 2.0, 4.0]) == [1.0, 2.0]
    assert survivors(trials | {4.0: trial("target", 2.0, 90)}, [1.0, 2.0, 4.0]) == []


def test_trials_rank_by_tokens_to_the_target_then_loss_and_nan_is_last():
    found = [trial("target", 1.9, 90), trial("target", 2.0, 80), trial(loss=2.1), trial("diverged")]
    order = sorted(range(4), key=lambda i: rank_key(found[i]))
    assert order == [1, 0, 2, 3]


def test_candidates_go_on_and_a_hit_ends_the_search(tmp_path, monkeypatch):
    """Rungs of one candidate are at growing steps of one folder."""
    asked = []

    def jobs(given, engine, note, compiled):
        for job in given:
            (config,) = job.configs
            asked.append((job.folders[0].name, job.until))
            assert config.measure.per_doubling == 0
            # the highest rate has the least loss, and the second hits at step 40
            hit = config.lr == 4e-3 and job.until >= 40
            yield job, [trial("target", 2.0, 40.0, 40) if hit else trial(loss=3 - config.lr)]

    monkeypatch.setattr(search, "run_jobs", jobs)
    study = tiny_study(
        tmp_path, rates="search", stages="untied", multipliers="1,2,4,8", max_steps=100,
        base_rate=1e-3 * 8**0.5, target_loss=2.0,
    )  # fmt: skip
    kind = Kind("untied", 4)
    found = search.search(study, [kind], tmp_path, "sequential", lambda text: None)[kind]
    first = [(f"untied-b4-lr{lr}", 12) for lr in ("0.001", "0.002", "0.004", "0.008")]
    assert asked == [*first, *((f"untied-b4-lr{lr}", 50) for lr in ("0.004", "0.008"))]
    assert (found.lr, found.edge) == (4e-3, False)


def test_an_edge_is_moved_outwards(tmp_path, monkeypatch):
    def jobs(given, engine, note, compiled):
        for job in given:
            yield job, [trial("max_steps", 3 - job.configs[0].lr)]

    monkeypatch.setattr(search, "run_jobs", jobs)
    study = tiny_study(
        tmp_path, rates="search", stages="untied", multipliers="1,2", base_rate=1e-3 * 8**0.5
    )
    found = search.search(study, [Kind("untied", 4)], tmp_path, "sequential", print)
    (selection,) = found.values()
    assert sorted(selection.trials) == [0.001, 0.002, 0.004, 0.008]
    assert (selection.lr, selection.edge) == (0.008, True)


# The study


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """A study of one stage with a search, in worker processes."""
    out = tmp_path_factory.mktemp("study") / "toy"
    given = words(
        out=out, stages="untied", rates="search", multipliers="0.5,1", engine="processes",
        figures="false", base_rate=1e-2, seeds="0,1",
        measure__bands="12:3", measure__bands_every=9,
    )  # fmt: skip
    shown = subprocess.run(
        [sys.executable, "-m", "toy_modular.study", *given],
        capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    return out, given, shown.stdout


def test_a_study_leaves_runs_a_table_and_what_was_selected(studied):
    out, _, printed = studied
    runs = sorted(path.name for path in (out / "runs").iterdir())
    assert runs == ["untied-b4-s0", "untied-b4-s1"]
    for name in runs:
        assert (
            json.loads((out / "runs" / name / "result.json").read_text())["reason"] == "max_steps"
        )
        assert (out / "runs" / name / "spectra" / "step_00000000.npz").exists()
        assert (out / "runs" / name / "features" / "step_00000008.npz").exists()
    selected = json.loads((out / "selected.json").read_text())
    config = json.loads((out / "runs" / "untied-b4-s1" / "config.json").read_text())
    assert config["lr"] == selected["untied-b4"]["lr"]
    assert len((out / "table.csv").read_text().splitlines()) == 3
    assert "untied-b4: lr" in printed


def test_the_same_command_repeats_nothing(studied):
    out, given, _ = studied
    before = {path: path.stat().st_mtime_ns for path in out.rglob("state.npz")}
    assert main(given) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("state.npz")} == before


def test_another_study_in_its_folder_is_refused(studied):
    _, given, _ = studied
    with pytest.raises(UsageError, match=r"another study: base_rate was 0.01, now 0.02"):
        main([*(word for word in given if "base_rate" not in word), "base_rate=0.02"])


def test_a_failed_member_does_not_stop_the_others(tmp_path):
    plain = {"measure__per_doubling": 0}
    good, other = tiny_member(**plain), tiny_member(seed=1, **plain)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text('{"seed": 7}')
    jobs = [Job((other,), (tmp_path / "bad",), 2), Job((good,), (tmp_path / "good",), 2)]
    found = {job.folders[0].name: r for job, r in run_jobs(jobs, "processes", lambda text: None)}
    assert isinstance(found["bad"], Failed)
    assert "another configuration" in found["bad"].error
    assert found["good"][0]["step"] == 2


def test_a_killed_study_goes_on(tmp_path, monkeypatch):
    dispatched = record_dispatches(monkeypatch)
    given = words(
        out=tmp_path, stages="untied", figures="false", max_steps=4000, engine="processes",
        measure__per_doubling=0,
    )  # fmt: skip
    command = [sys.executable, "-m", "toy_modular.study", *given]
    study = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, start_new_session=True
    )
    curve = tmp_path / "runs" / "untied-b4-s0" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (curve.exists() and curve.stat().st_size > 2000):
        time.sleep(0.05)
    study.kill()  # its worker has to end by itself
    study.wait()
    time.sleep(1)
    size = curve.stat().st_size
    time.sleep(1)
    assert curve.stat().st_size == size
    steps = [json.loads(line)["step"] for line in curve.read_text().splitlines()]
    assert 4 < steps[-1] < 4000
    config = resolve(dict(word.split("=", 1) for word in given)).member(Kind("untied", 4), 0, 1e-3)
    (result,) = train_members([config], [curve.parent], until=steps[-1] + 2)
    seen = [json.loads(line) for line in curve.read_text().splitlines()]
    assert result["step"] == steps[-1] + 2
    # the curve is written before the state, so the last dispatch of it may be made once more
    assert dispatched in ([steps[-1] + 2], [steps[-1], steps[-1] + 2])
    vals = [row["step"] for row in seen if row["kind"] == "val"]
    assert vals == list(range(0, steps[-1] + 3, 2))


def test_seeds_train_together_and_again_there_is_nothing_to_do(tmp_path):
    given = words(out=tmp_path / "toy", stages="untied", figures="false", engine="together",
                  seeds="0,1", measure__per_doubling=0)  # fmt: skip
    with quick_compiler():
        assert main(given) == 0
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
        assert len(before) == 2
        assert main(given) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")} == before


def test_a_member_that_has_gone_on_is_told_as_it_was(tmp_path, monkeypatch):
    """A search that is begun again sees what it saw the first time."""
    dispatched = record_dispatches(monkeypatch)
    config = tiny_member(measure__per_doubling=0)
    with quick_compiler():
        (early,) = train_members([config], [tmp_path / "run"], until=4)
        (end,) = train_members([config], [tmp_path / "run"])
    assert (early["reason"], early["step"], end["reason"]) == ("paused", 4, "max_steps")
    assert train_members([config], [tmp_path / "run"], until=4) == [early]
    assert dispatched == [2, 4, 6, 8]  # no step was made twice


def test_no_worker_starts_after_the_end(tmp_path):
    jobs = [Job((tiny_member(seed=i),), (tmp_path / str(i),), 2) for i in range(6)]
    results = run_jobs(jobs, "processes", lambda text: None)
    next(results)
    results.close()
    time.sleep(0.5)
    begun = sorted(path.name for path in tmp_path.iterdir())
    time.sleep(1.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == begun != [str(i) for i in range(6)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"measure.bands": "97:200"}, "measure.bands=97:200: the band leaves the vocabulary of 64"),
        ({"measure.bands": "97"}, "'97' is no band; give modulus:offset, 97:200"),
        ({"measure.walks": "7"}, "measure.walks=7: band 12:3 has 12 phases; give as many"),
        ({"batches": "257"}, "batch=257 is larger than the 256 training sequences"),
        ({"batches": "0"}, "batches=.*: give at least 1 sequence"),
        ({"max_steps": "9"}, "max_steps=9 is no multiple of eval_every=2"),
        ({"stages": "cellar"}, "stages=cellar: no such stage"),
        ({"rates": "-1"}, "rates=-1.0"),
        ({"rates": "fast"}, "rates=fast: give one of search, published or a number"),
        ({"rates": "published"}, "rates=published: none is for stage untied at batch 4"),
        ({"seeds": "-1"}, "give 0 or more"),
        ({"stagess": "muon"}, "unknown key stagess=muon; did you mean stages"),
        ({"target_accuracy": "0.9"}, "target_accuracy=0.9 with task=banded: only task=grok"),
        ({"target_loss": "0"}, "target_loss=0.0: give a positive loss, or none"),
        ({"banded.c_min": "70"}, "c_min=70 is above vocab_size=64"),
        ({"grok.p": "13"}, "grok.p=13 with task=banded: it is a key of task=grok"),
        ({"measure.rows": "512", "measure.chunk": "8"}, "measure.rows=512 is more than the 256"),
    ],
)
def test_bad_input_ends_in_one_line(given, message):
    with pytest.raises(UsageError, match=message) as caught:
        resolve({"stages": "untied"} | WORDS | given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"grok.train_fraction": "1.2"}, "train_fraction=1.2 of 9409 pairs: give a share between"),
        ({"grok.train_fraction": "0"}, "train_fraction=0.0 of 9409 pairs"),
        ({"grok.p": "1"}, "p=1: give at least 2"),
        (
            {"stages": "muon"},
            "stages=muon with task=grok: it is a key of task=banded; leave it out",
        ),
        (
            {"measure.bands": "97:0"},
            "measure.bands=97:0 with task=grok: it is a key",
        ),
        ({"banded.train": "9"}, "banded.train=9 with task=grok: it is a key of task=banded"),
        ({"rates": "search"}, "rates=search with task=grok: give a number, or leave it out"),
        ({"measure.rows": "3000", "measure.chunk": "8"}, "measure.rows=3000 is more than the 2822"),
    ],
)
def test_bad_input_of_grokking_ends_in_one_line(given, message):
    with pytest.raises(UsageError, match=message) as caught:
        resolve({"task": "grok"} | given)
    assert "\n" not in str(caught.value)


def test_a_grokking_study_ends_in_a_figure_and_a_sentence(tmp_path, capsys):
    given = {
        "task": "grok", "grok.p": 11, "out": tmp_path / "toy", "size.n_embd": 16, "max_steps": 40,
        "eval_every": 20, "measure.rows": 16, "measure.samples": 4, "measure.chunk": 4,
        "measure.per_doubling": 1, "engine": "sequential",
    }  # fmt: skip
    with quick_compiler():
        assert main([f"{key}={value}" for key, value in given.items()]) == 0
    assert (tmp_path / "toy" / "figures" / "figure_grokking_grok-s0.png").stat().st_size > 10_000
    claims = json.loads((tmp_path / "toy" / "figures" / "claims.json").read_text())
    assert [claim["figure"] for claim in claims] == ["grokking"]
    assert "add modulo 11" in capsys.readouterr().out


def test_a_place_that_is_no_study_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is no study: no config"):
        run_study(tiny_study(tmp_path), print)


@pytest.mark.parametrize(
    ("task", "own"),
    [
        ("banded", ("stages=muon,untied", "measure.bands=37:60", "banded.vocab_size=256")),
        ("grok", ("grok.p=97",)),
        ("rff", ("rff.track=A",)),
    ],
)
def test_help_says_every_key_of_a_task_and_none_of_another(capsys, task, own):
    assert main(["--help", f"task={task}"]) == 0
    shown = capsys.readouterr().out
    for key in ("profile=laptop", "seeds=", "engine=auto", *own):
        assert f"\n  {key}" in shown
    for key, of in (("stages", "banded"), ("banded", "banded"), ("grok.", "grok"), ("rff.", "rff")):
        assert (f"\n  {key}" in shown) == (of == task)


@pytest.mark.parametrize(("word", "code"), [("--help", 0), ("first", 2)])
def test_a_worker_asked_for_help_says_one_line(word, code):
    done = subprocess.run(
        [sys.executable, "-m", "toy_modular.worker", word], capture_output=True, text=True
    )
    assert done.returncode == code
    assert (done.stdout + done.stderr).count("\n") == 1
    assert "run toy_modular.study instead" in done.stdout + done.stderr
