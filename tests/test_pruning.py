"""Members given up early: who survives, and what it would have saved and cost."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_language_study import TARGET, make_study, name

from experiments.efficiency import crossing_tokens
from experiments.pruning import early_scores, retrospective, select_survivors
from experiments.study_records import Family, read_study

FAMILY = Family("muon", "d12")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "planted"
    rungs = ("muon", "flexwin")
    return read_study(make_study(folder, rungs=rungs, seed_cells=(), trials=(), kernels=()))


def test_the_best_survive_and_those_without_a_score_do_not():
    scores = {"a": 1.0, "b": 3.0, "c": float("nan"), "d": 2.0}
    assert select_survivors(scores, 2) == {"b", "d"}
    assert select_survivors(scores, 4) == set(scores)
    assert select_survivors(scores | {"e": float("inf")}, 1) == {"e"}
    with pytest.raises(ValueError, match="keep=0"):
        select_survivors(scores, 0)


def test_scores_are_larger_for_what_looks_better(study):
    runs = study.of(study.families[0])
    by_batch = early_scores(runs, "batch", 2**16, (90, 200))
    assert select_survivors(by_batch, 1) == {runs[0].name}
    losses = early_scores(runs, "loss", 2**16, (90, 200))
    best = min(runs, key=lambda run: run.val["loss"][run.val["tokens"] <= 2**16][-1])
    assert select_survivors(losses, 1) == {best.name}


@given(st.dictionaries(st.text(max_size=3), st.floats(), min_size=1), st.integers(1, 9))
def test_no_survivor_is_beaten_by_one_that_is_given_up(scores, keep):
    kept = select_survivors(scores, keep)
    assert len(kept) == min(keep, len(scores))
    gone = [scores[own] for own in scores.keys() - kept]
    worst = min((scores[own] for own in kept if not np.isnan(scores[own])), default=-np.inf)
    assert all(own <= worst for own in gone if not np.isnan(own))
    if any(np.isnan(scores[own]) for own in kept):
        assert np.all(np.isnan(gone))


def test_a_rule_that_is_none_is_named(study):
    with pytest.raises(ValueError, match="rule=beta"):
        early_scores(study.chosen, "beta", 2**16, (90, 200))


def test_a_run_that_is_not_at_the_budget_has_no_score(study):
    for rule in ("alpha", "loss"):
        scores = early_scores(study.chosen, rule, 2**30, (90, 200))
        assert np.all(np.isnan(list(scores.values())))


def test_pruning_in_hindsight(study):
    found = {row.rule: row for row in retrospective(study, 1)}
    assert found["alpha"].regret == 0  # planted
    assert found["alpha"].kept_best == 1
    assert found["batch"].regret > 0.05
    assert found["chance"].kept_best == 0.25
    assert found["alpha"].regret <= found["batch"].regret <= 1
    assert 0 < found["alpha"].saved < 1


def test_hindsight_is_the_mean_over_seeds_each_by_itself(tmp_path):
    many = {"seeds": (0, 1, 2), "planted": "nothing", "noise": 0.3, "rng_seed": 2}
    folder = make_study(tmp_path / "s", rungs=("muon",), seed_cells=(), trials=(), **many)
    study = read_study(folder)
    apart = [
        {
            own.rule: own
            for own in retrospective(replace(study, runs=tuple(study.of(FAMILY, seed))), 1)
        }
        for seed in many["seeds"]
    ]
    assert len({seed["alpha"].regret for seed in apart}) > 1  # else any one seed would do
    for own in retrospective(study, 1):
        same = [seed[own.rule] for seed in apart]
        assert (own.families, own.cases) == (1, 3)
        assert own.regret == pytest.approx(np.mean([one.regret for one in same]))
        assert own.kept_best == pytest.approx(np.mean([one.kept_best for one in same]))


def test_chance_is_the_mean_over_all_choices(study):
    (chance,) = (row for row in retrospective(study, 2) if row.rule == "chance")
    regrets, saved, total = [], [], 0.0
    for family in study.families:
        spent = [crossing_tokens(run, 4.5) for run in study.of(family, 0)]
        total += sum(spent)
        choices = list(combinations(spent, 2))
        regrets.append(np.mean([min(kept) / min(spent) - 1 for kept in choices]))
        saved.append(
            np.mean([sum(s - 2**16 for s in spent) - sum(k - 2**16 for k in c) for c in choices])
        )
    assert chance.regret == pytest.approx(np.mean(regrets))
    assert chance.saved == pytest.approx(sum(saved) / total)


def test_who_keeps_a_run_that_never_arrives_trains_the_best_on_top(tmp_path):
    broken = name("muon", batch=4)
    folder = make_study(
        tmp_path / "one",
        rungs=("muon",),
        seed_cells=(),
        trials=(),
        kernels=(),
        diverged=(broken,),
        censored=(name("muon", batch=16),),
    )
    study = read_study(folder)
    found = {row.rule: row for row in retrospective(study, 1)}
    runs = {run.batch: run for run in study.chosen}
    best = crossing_tokens(runs[8], TARGET)
    assert found["batch"].regret == pytest.approx(runs[4].result["tokens"] / best)
    assert found["batch"].regret > 0
    assert found["batch"].kept_best == 0
    # chance by its choices: one arrives at once, one late, two never do
    wasted = [runs[batch].result["tokens"] / best for batch in (4, 16)]
    late = crossing_tokens(runs[32], TARGET) / best - 1
    assert found["chance"].regret == pytest.approx(np.mean([0, late, *wasted]))
    two = next(row for row in retrospective(study, 2) if row.rule == "chance")
    assert two.regret == pytest.approx((3 * 0 + 2 * late + min(wasted)) / 6)


def test_a_budget_after_the_best_has_arrived_judges_nothing(study):
    assert retrospective(study, 1, tokens=2**22) == []
    assert retrospective(study, 4) == []


def test_what_a_rule_saves_is_what_those_given_up_train_after_the_budget(study):
    found = {row.rule: row for row in retrospective(study, 1)}
    costs = [[crossing_tokens(r, TARGET) for r in study.of(f, 0)] for f in study.families]
    after = sum(sum(own) - min(own) - 3 * 2**16 for own in costs)  # alpha keeps the best, planted
    assert found["alpha"].saved == pytest.approx(after / sum(map(sum, costs)))


def test_runs_that_are_not_measured_cannot_be_judged_by_their_spectra():
    from experiments.resolve import resolve
    from experiments.study.pruning import early_pause
    from models.command_line import UsageError

    config, _ = resolve({"probes.names": ""}, "laptop")
    assert early_pause(config, "loss", 65_536) == 65_536
    with pytest.raises(UsageError, match=r"prune=alpha: runs at batch \d+ are not measured"):
        early_pause(config, "alpha", 65_536)
