"""The tests of the study on arrays with and without planted effects, and on a made-up folder."""

import numpy as np
import pytest
from synthetic_language_study import make_study

from experiments.efficiency import crossing_tokens
from experiments.pruning import early_scores, retrospective, select_survivors
from experiments.statistics import (
    family_prediction,
    finite_ranks,
    joint_tests,
    predict,
    seed_floor,
    seed_spread,
)
from experiments.study_records import Family, read_study
from lens_jax.multiplicity import benjamini_hochberg

BATCHES = (4, 8, 16, 32)
SIMULATIONS = 200


def simulated(rng, strength: float, families: int = 6):
    """Families whose efficiency is not monotone in the batch, alpha following it by `strength`."""
    found = []
    for place in range(families):
        efficiency = rng.normal(size=4)
        alpha = strength * efficiency + rng.normal(size=4)
        loss = rng.normal(size=4)
        family = Family(f"rung{place}", "d12")
        found.append(family_prediction(family, BATCHES, alpha, efficiency, loss))
    return found


def test_a_planted_effect_is_detected():
    # alpha and efficiency correlate at 3 / sqrt(10) = 0.95
    rng = np.random.default_rng(0)
    p = [joint_tests(simulated(rng, 3.0))[0].p for _ in range(SIMULATIONS)]
    assert np.mean(np.array(p) <= 0.05) > 0.97


def test_nothing_is_detected_where_nothing_is():
    # Six families of four members have 24^6 orders, so p has steps far below 0.05 and the test its
    # nominal size; of 200 simulations 5 % are 10, give or take 3.
    rng = np.random.default_rng(0)
    p = np.array([joint_tests(simulated(rng, 0.0))[0].p for _ in range(SIMULATIONS)])
    assert 0.03 <= np.mean(p <= 0.05) <= 0.07
    assert 0.45 < np.median(p) < 0.6


def test_few_families_make_the_test_cautious_and_never_bold():
    # the sums of three families' rho take few values, so the largest p up to 0.05 lies below it
    rng = np.random.default_rng(1)
    p = [joint_tests(simulated(rng, 0.0, families=3))[0].p for _ in range(300)]
    assert 0.01 < np.mean(np.array(p) <= 0.05) < 0.05


def test_a_batch_effect_makes_alpha_a_predictor_that_adds_nothing():
    rng = np.random.default_rng(2)
    batches = np.array([1, 2, 4, 8, 16, 32, 64])
    order = -np.log(batches)
    alpha = order + 0.01 * rng.normal(size=7)
    found = family_prediction(Family("untied", "d12"), batches, alpha, order, rng.normal(size=7))
    assert found.rho_alpha.statistic == found.rho_batch.statistic == 1
    assert not np.isfinite(found.partial.statistic)  # given the batch size nothing is left


def test_alpha_that_knows_more_than_the_batch_size_has_a_partial_correlation():
    rng = np.random.default_rng(3)
    batches = np.array([1, 2, 4, 8, 16, 32, 64])
    own = rng.permutation(7).astype(float)
    efficiency = -np.log(batches) + 1.5 * own
    found = family_prediction(Family("untied", "d12"), batches, own, efficiency, own)
    assert found.partial.statistic > 0.7


def test_four_members_are_too_few_for_a_partial_correlation():
    found = simulated(np.random.default_rng(0), 1.0)[0]
    assert not np.isfinite(found.partial.statistic)


def test_a_censored_member_ranks_last():
    np.testing.assert_array_equal(finite_ranks([-0.5, -np.inf, 0.0]), [-0.5, -1.5, 0.0])
    found = family_prediction(
        Family("untied", "d12"), BATCHES, [3, 2, 1, 0], [0.0, -0.2, -0.4, -np.inf], [1, 2, 3, 4]
    )
    assert found.rho_alpha.statistic == 1
    assert found.rho_alpha.p == pytest.approx(2 / 24)
    assert found.rho_loss.statistic == 1  # a low loss is a good sign


def test_members_without_an_exponent_take_part_in_no_correlation():
    nan = np.nan
    found = family_prediction(
        Family("untied", "d12"), BATCHES, [1, 2, 3, nan], [1, 2, 3, -9], [3, 2, 1, -9]
    )
    assert found.rho_alpha.statistic == found.rho_loss.statistic == 1
    assert found.rho_batch.statistic == -1


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "planted"
    cells = (("flexwin", "d12", 8, (0, 1, 2)),)
    rungs = ("muon", "flexwin")
    return read_study(make_study(folder, rungs=rungs, seed_cells=cells, trials=(), kernels=()))


def test_a_folder_gives_what_its_arrays_give(study):
    found = predict(study)
    assert [own.family.rung for own in found.families] == ["muon", "flexwin"]
    assert found.alpha.statistic == pytest.approx(1.0)
    assert found.batch.statistic == pytest.approx(0.8)
    assert found.alpha.p == pytest.approx(2 / 24**2)
    for own in found.families:
        assert own.tokens.tolist() == [2**16] * 4
        assert own.excess.min() == 0
        np.testing.assert_allclose(own.efficiency, -np.log1p(own.excess), atol=1e-12)


def test_seeds_of_a_cell_are_averaged(study):
    flexwin = next(own for own in predict(study).families if own.family.rung == "flexwin")
    first = next(own for own in predict(study, seed=0).families if own.family.rung == "flexwin")
    place = flexwin.batches.tolist().index(8)
    assert first.alpha_error[place] / flexwin.alpha_error[place] == pytest.approx(3**0.5, rel=0.6)
    runs = [run for run in study.of(flexwin.family) if run.batch == 8]
    mean = np.exp(np.mean([np.log(crossing_tokens(run, 4.5)) for run in runs]))
    other = next(run for run in study.of(flexwin.family) if run.batch == 4)
    ratio = (1 + flexwin.excess[0]) / (1 + flexwin.excess[place])
    assert ratio == pytest.approx(crossing_tokens(other, 4.5) / mean)


def test_alignment_by_progress_takes_each_runs_own_length(study):
    found = predict(study, progress=0.2)
    for own in found.families:
        targets = {run.batch: crossing_tokens(run, 4.5) for run in study.of(own.family, 0)}
        for batch, tokens in zip(own.batches, own.tokens, strict=True):
            assert abs(np.log(tokens / (0.2 * targets[batch]))) <= 0.40


def test_a_layer_that_is_not_there_has_no_exponent(study):
    assert not np.isfinite(predict(study, layer=7).alpha.statistic)
    assert np.isfinite(predict(study, layer=0).alpha.statistic)


def test_the_floor_of_seeds_lies_above_that_of_sampling(study):
    floor = seed_floor(study)
    assert floor.pairs == 3
    assert floor.sampling > 0
    assert 0 < floor.equal_tokens < 1e-3


def test_the_spread_over_seeds_is_the_pooled_one(study):
    numbers = {run.name: float(place) for place, run in enumerate(study.chosen)}
    found = seed_spread(study, lambda run: numbers[run.name])
    seeds = [numbers[run.name] for run in study.chosen if run.cell.name == "flexwin-d12-b8"]
    assert found.seeds == pytest.approx(np.std(seeds, ddof=1))
    assert found.cells == 1
    assert found.ratio == pytest.approx(found.batches / found.seeds)


# Giving up


def test_the_best_survive_and_those_without_a_score_do_not():
    scores = {"a": 1.0, "b": 3.0, "c": float("nan"), "d": 2.0}
    assert select_survivors(scores, 2) == {"b", "d"}
    assert select_survivors(scores, 4) == set(scores)
    with pytest.raises(ValueError, match="keep=0"):
        select_survivors(scores, 0)


def test_scores_are_larger_for_what_looks_better(study):
    runs = study.of(study.families[0])
    by_batch = early_scores(runs, "batch", 2**16, (90, 200))
    assert select_survivors(by_batch, 1) == {runs[0].name}
    losses = early_scores(runs, "loss", 2**16, (90, 200))
    best = min(runs, key=lambda run: run.val["loss"][run.val["tokens"] <= 2**16][-1])
    assert select_survivors(losses, 1) == {best.name}


def test_pruning_in_hindsight(study):
    found = {row.rule: row for row in retrospective(study, 1)}
    assert found["alpha"].regret == 0  # planted
    assert found["alpha"].kept_best == 1
    assert found["batch"].regret > 0.05
    assert found["chance"].kept_best == 0.25
    assert found["alpha"].regret <= found["batch"].regret <= 1
    assert 0 < found["alpha"].saved < 1


def test_chance_is_the_mean_over_all_choices(study):
    from itertools import combinations

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


# Many tests


def test_adjusted_p_values_are_the_published_ones():
    # the fifteen p values of Benjamini and Hochberg's example: four are below 0.05 after it
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459]
    p += [0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0]
    adjusted = benjamini_hochberg(p)
    assert np.sum(adjusted <= 0.05) == 4
    assert adjusted[3] == pytest.approx(0.0095 * 15 / 4)


def test_adjusting_keeps_order_and_places():
    rng = np.random.default_rng(0)
    p = rng.uniform(size=20)
    p[3] = np.nan
    adjusted = benjamini_hochberg(p)
    assert np.isnan(adjusted[3])
    kept = np.isfinite(p)
    assert np.all(adjusted[kept] >= p[kept])
    order = np.argsort(p[kept])
    assert np.all(np.diff(adjusted[kept][order]) >= 0)
    with pytest.raises(ValueError, match=r"p=1\.5"):
        benjamini_hochberg([0.5, 1.5])
