"""A running study gives up whole batches, by the mean over their seeds, and its readers say so."""

import json

import numpy as np
import pytest
from synthetic_language_study import make_study, name

from experiments.efficiency import crossing_tokens
from experiments.figures.__main__ import Task, run_task
from experiments.figures.options import Options
from experiments.figures.report import page
from experiments.forecast import forecast
from experiments.pruning import batch_scores, early_scores
from experiments.study.folder import StudyFolder
from experiments.study.grid import resolve_study
from experiments.study.pruning import members_to_give_up
from experiments.study.table import describe, table_rows
from experiments.study_records import Family, read_study

SMALL = {"seed_cells": (), "trials": (), "kernels": ()}
RUNGS, SEEDS = ("muon", "flexwin"), (0, 1, 2)
WORDS = ["batches=4,8,16,32", "more=", "prune=alpha"]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Exponents that are nothing but noise, so that seeds of a batch differ more than batches."""
    folder = tmp_path_factory.mktemp("study") / "s"
    noisy = {"planted": "nothing", "noise": 0.3, "rng_seed": 1, "seeds": SEEDS}
    going = [
        name(rung, batch=batch, seed=seed)
        for rung in RUNGS
        for batch in (4, 8, 16, 32)
        for seed in SEEDS
    ]
    return read_study(make_study(folder, rungs=RUNGS, unfinished=going, **noisy, **SMALL))


@pytest.fixture
def give_up(study, tmp_path):
    """Gives up members of a running study that has the planted runs, of some seeds."""

    def decide(*words, seeds=SEEDS):
        running = resolve_study(
            ["rungs=muon,flexwin", *WORDS, *words, f"out={tmp_path / 'running'}"]
        )
        with StudyFolder(running) as folder:
            if not folder.runs.is_symlink():
                folder.runs.rmdir()
                folder.runs.symlink_to(study.path / "runs")
            names = {run.name: run.name for run in study.chosen if run.seed in seeds}
            gone = members_to_give_up(folder, running.config, names)
            assert gone == members_to_give_up(folder, running.config, names)
            return gone, folder.pruned

    return decide


def test_all_seeds_of_the_best_batches_are_kept(study, give_up):
    gone, decided = give_up("early_tokens=65536", "keep=2")
    assert len(gone) == 2 * 2 * len(SEEDS)
    for family in study.families:
        runs = study.of(family)
        scores = early_scores(runs, "alpha", 2**16, (90, 200))
        means = {
            batch: np.mean([scores[run.name] for run in runs if run.batch == batch])
            for batch in (4, 8, 16, 32)
        }
        best = sorted(means, key=means.get)[2:]
        assert decided[family.name]["kept"] == sorted(r.name for r in runs if r.batch in best)
        alone = sorted(scores, key=scores.get)[-2:]  # best runs, as if each stood for itself
        assert {run.batch for run in runs if run.name in alone} != set(best)


def test_seeds_that_come_later_go_the_way_of_their_batch(study, give_up):
    _, first = give_up("early_tokens=65536", "keep=1", seeds=(0,))
    gone, then = give_up("early_tokens=65536", "keep=1")
    for family in study.families:
        (kept,) = first[family.name]["kept"]
        assert then[family.name]["kept"] == [kept]
        batch = next(run.batch for run in study.of(family) if run.name == kept)
        others = {run.name for run in study.of(family) if run.batch != batch}
        assert set(then[family.name]["given_up"]) == others  # and not the kept one's later seeds
    assert set(gone) == {own for family in then.values() for own in family["given_up"]}


def test_seeds_that_not_all_batches_have_do_not_count(study):
    runs = [run for run in study.of(Family("muon", "d12")) if run.seed == 0 or run.batch == 8]
    scores = {run.name: float(run.seed) for run in runs}
    assert batch_scores(runs, scores) == {4: 0.0, 8: 0.0, 16: 0.0, 32: 0.0}
    apart = [run for run in runs if (run.batch == 8) == (run.seed > 0)]
    assert batch_scores(apart, scores) == {4: 0.0, 8: 1.5, 16: 0.0, 32: 0.0}


def test_a_member_without_a_score_is_given_up_and_written_down(give_up):
    # nothing was measured near so early a budget, so that no member has an exponent
    gone, decided = give_up("early_tokens=3", "keep=1", seeds=(0,))
    assert len(gone) == 6
    for own in decided.values():
        assert set(own["given_up"].values()) == {None}


# Readers


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """One batch given up, and one that is still going."""
    lost = [name("muon", batch=batch) for batch in (16, 32)]
    folder = tmp_path_factory.mktemp("pruned") / "s"
    make_study(folder, rungs=("muon",), unfinished=lost, **SMALL)
    decided = {"rule": "alpha", "kept": [], "given_up": {lost[0]: 1.0, name("muon", batch=4): 0.5}}
    (folder / "pruned.json").write_text(json.dumps({"muon-d12": decided}))
    return folder


def test_runs_given_up_are_told_from_those_that_go_on(pruned):
    study = read_study(pruned)
    states = {run.batch: run.state for run in study.chosen}
    # one that came to its end all the same has it
    assert states == {4: "target", 8: "target", 16: "given up", 32: "not ended"}
    assert study.unfinished == (f"{name('muon', batch=32)}: has no result.json yet",)
    (gone,) = study.given_up
    assert (gone.batch, gone.finished) == (16, False)
    assert np.isnan(crossing_tokens(gone, 4.0))  # of unknown cost, no failure


def test_tables_forecast_figures_and_report_say_given_up(pruned, tmp_path):
    study = read_study(pruned)
    assert {row["batch"]: row["reason"] for row in table_rows(study)}[16] == "given up"
    assert describe(pruned).count("given up") == 1
    assert {row.batch: row.state for row in forecast(study, 2**16, (90, 200)).rows}[16] == (
        "given up"
    )
    lines = []
    drawn = run_task(Task(study=str(pruned), fig=12, out=str(tmp_path)), Options(), lines.append)
    assert f"given up early: {name('muon', batch=16)}: by prune=alpha" in lines
    assert not any(line.startswith(f"unfinished: {name('muon', batch=16)}") for line in lines)
    text = page(study, drawn.claims, drawn.images, "x")
    assert "4 runs, 2 ended, 1 given up early, and 0 trials" in text
    going, _, gone = text.partition("Not ended when this was written")[2].partition("Given up")
    assert name("muon", batch=32) in going
    assert name("muon", batch=16) not in going
    assert f"{name('muon', batch=16)}: by prune=alpha" in gone


def test_a_damaged_record_of_it_is_named(tmp_path):
    folder = make_study(tmp_path / "s", rungs=("muon",), **SMALL | {"kinds": ()})
    for text in ('{"muon-d12": 3}', '{"muon-d12": {"rule": "alpha"}}', "[1]", "{"):
        (folder / "pruned.json").write_text(text)
        with pytest.raises(ValueError, match=r"pruned\.json: ") as caught:
            read_study(folder)
        assert "\n" not in str(caught.value)
