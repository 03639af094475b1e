"""Figure 18: the rule that calls phases, its null, and what it says of studies."""

import json
from math import factorial

import numpy as np
import pytest
from matplotlib.figure import Figure
from synthetic_language_study import WIDTH, make_study

from experiments.figures.page import Options
from experiments.figures.phase_rule import (
    Phase,
    chance_of_phases,
    clearness,
    phases,
    sequence,
    smooth,
)
from experiments.figures.phases import (
    Trajectory,
    Variant,
    draw_18,
    middle_test,
    read_variant,
    seed_sd,
    trajectory,
)
from experiments.study_records import ACTIVATION, Run, read_study
from lens_jax.claims import Missing
from lens_jax.fits import rankme
from lens_jax.records import read_step, write_step

SMALL = {"sites": ("h_11/resid_post",), "kernels": (), "trials": (), "groups": 2}
SMALL |= {"kinds": ("activation",)}


# The rule


def test_smoothing_is_the_mean_of_three_and_keeps_the_ends():
    values = np.random.default_rng(0).normal(size=9)
    twin = [values[0], *(values[i - 1 : i + 2].mean() for i in range(1, 8)), values[8]]
    np.testing.assert_allclose(smooth(values), twin)
    for short in ([], [1.0], [1.0, 5.0]):
        np.testing.assert_array_equal(smooth(short), short)


def test_a_fall_a_rise_and_a_fall_are_three_phases():
    values = [9, 6, 3, 0, 3, 6, 9, 6, 3, 0]
    found = phases(values, 2.0)
    assert sequence(found) == "fall, rise, fall"
    assert [(p.first, p.last) for p in found] == [(0, 3), (3, 6), (6, 9)]
    # the turns are means of three: (3 + 0 + 3) / 3 and (6 + 9 + 6) / 3
    np.testing.assert_allclose([p.change for p in found], [-7, 5, -7])
    assert clearness(found) == pytest.approx(5)


def test_only_changes_above_the_threshold_count():
    values = [9, 6, 3, 0, 3, 6, 9, 6, 3, 0]
    assert sequence(phases(values, 5.5)) == "fall"  # both falls, with no rise between them
    assert sequence(phases(values, 7.0)) == "none"
    assert sequence(phases(values, float("nan"))) == "none"
    assert sequence(phases([1.0], 0.0)) == sequence(phases([], 0.0)) == "none"


def test_runs_of_one_direction_with_less_between_them_are_one_phase():
    values = [0, 3, 6, 5.5, 5, 8, 11, 14]
    (only,) = phases(values, 2.0)
    assert (only.first, only.last, only.change) == (0, 7, 14)


def test_equal_values_turn_nothing():
    (only,) = phases([0, 0, 0, 4, 4, 4, 4, 8, 8, 8], 1.0)
    assert only.change == 8


@pytest.mark.parametrize("seed", range(20))
def test_phases_are_those_of_a_plain_search(seed):
    """Twin: every stretch of the smoothed series that no longer monotone stretch contains."""
    values = np.random.default_rng(seed).normal(size=14).cumsum()
    smoothed, twin = smooth(values), []
    for first in range(14):
        for last in range(first + 1, 14):
            steps = np.diff(smoothed[max(first - 1, 0) : last + 2])
            inner = np.diff(smoothed[first : last + 1])
            whole = np.all(inner > 0) or np.all(inner < 0)
            left = first == 0 or steps[0] * inner[0] < 0
            right = last == 13 or steps[-1] * inner[-1] < 0
            change = smoothed[last] - smoothed[first]
            if whole and left and right and abs(change) > 0.8:
                twin.append(np.sign(change))
    merged = [sign for i, sign in enumerate(twin) if i == 0 or sign != twin[i - 1]]
    assert [np.sign(p.change) for p in phases(values, 0.8)] == merged


def test_clearness_is_the_least_change_of_the_best_triple():
    fall, rise = Phase(0, 1, -3.0), Phase(1, 2, 2.0)
    assert clearness([fall, rise]) == 0
    assert clearness([rise, fall, rise]) == 0  # begins with a rise
    assert clearness([fall, rise, Phase(2, 3, -1.0), Phase(3, 4, 5.0), Phase(4, 5, -4.0)]) == 1
    assert clearness([Phase(0, 1, -1.0), rise, fall]) == 1


def test_noise_alone_seldom_makes_a_phase_whatever_its_size():
    noise = 7.0 * np.random.default_rng(1).normal(size=(1500, 10))
    direct = np.mean([sequence(phases(row, 21.0)) != "none" for row in noise])
    assert 0.005 < direct < 0.1
    assert chance_of_phases(10) == pytest.approx(direct, abs=0.02)


# Its threshold and its test


def made(values, *, batch=8, seed=0, rung="muon", steps=None):
    """A trajectory without files."""
    config = {"rung": rung, "tier": "d12", "batch": batch, "seed": seed}
    steps = np.arange(len(values)) if steps is None else np.array(steps)
    run = Run(None, config, {"reason": "target"})
    return Trajectory(run, 1000 * steps, steps, np.asarray(values, np.float64), [])


def test_seed_sd_pools_cells_of_three_seeds_over_their_common_steps():
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(3, 6)), rng.normal(size=(4, 6))
    found = [made(v, seed=s) for s, v in enumerate(one)]
    found += [made(v, batch=16, seed=s) for s, v in enumerate(two)]
    found[0] = made(np.append(one[0], 99.0), steps=range(7))  # its own last step is left out
    found += [made([0, 50, 0], batch=4, seed=s) for s in (0, 1)]  # two seeds are too few
    variances = np.concatenate([one.var(axis=0, ddof=1), two.var(axis=0, ddof=1)])
    sd, runs = seed_sd(found)
    assert (sd, runs) == (pytest.approx(np.sqrt(variances.mean())), 7)
    assert np.isnan(seed_sd(found[-2:])[0])


def test_noise_of_one_family_hides_nothing_in_another(monkeypatch):
    rng = np.random.default_rng(3)
    shape = np.repeat([2.0, 0.0, 1.0], 4)
    quiet = [made(shape + 0.02 * rng.normal(size=12), seed=s) for s in range(3)]
    loud = [made(3.0 * rng.normal(size=12), rung="baseline", seed=s) for s in range(3)]
    alone = made(shape, rung="untied")
    everything = [*quiet, *loud, alone]
    monkeypatch.setattr("experiments.figures.phases.trajectory", lambda own, kind: own)
    study = type("Study", (), {"chosen": everything})
    found = read_variant(study, ACTIVATION, "all tokens")
    assert {sequence(own.phases) for own in found.all[:3]} == {"fall, rise"}
    assert found.sds[alone.run.family] == seed_sd(everything)[0]  # no seeds of its own: pooled
    assert found.sds[alone.run.family] > 10 * found.sds[quiet[0].run.family]
    assert found.seed_runs == 6
    assert found.called


def three(size):
    return [Phase(0, 1, -size), Phase(1, 2, size), Phase(2, 3, -size)] if size else []


def variant(*families):
    """One of families whose clearness by batch is given."""
    rungs = ("baseline", "muon", "untied")
    found = [
        made([0], batch=2**k, rung=rung)._replace(phases=three(size))
        for rung, sizes in zip(rungs, families, strict=False)
        for k, size in enumerate(sizes)
    ]
    return Variant("all tokens", found, {own.run.family: 1.0 for own in found}, 3)


def test_clearest_in_the_middle_is_found_and_its_p_is_exact():
    test, least, count = middle_test(variant((1, 5, 6, 2), (0, 3, 3, 0)))
    assert count == 2
    # rho is at its most where the two middle batches are the two clearest: 4 of 24 orders
    assert test.p == pytest.approx(2 / 36)
    assert least == pytest.approx(2 / 36)
    assert test.statistic > 0.8
    assert middle_test(variant((5, 1, 2, 6)))[0].statistic < 0


def test_families_that_do_not_show_it_or_have_two_batches_take_no_part():
    test, least, count = middle_test(variant((0, 0, 0, 0), (1, 2)))
    assert count == 0
    assert least == 1
    assert np.isnan(test.p)
    assert middle_test(variant((1, 5, 6, 2), (0, 0, 0, 0)))[2] == 1


def test_least_p_is_what_the_families_own_values_can_come_to():
    # one clear batch of four: near has two middle places, so half of all orders are as good
    test, least, count = middle_test(variant((0, 5, 0, 0), (0, 0, 3, 0)))
    assert count == 2
    assert test.p == least == pytest.approx(1 / 2)
    assert middle_test(variant((5, 0, 0, 0), (0, 0, 0, 3)))[1] == pytest.approx(1 / 2)


def test_seeds_of_a_batch_count_once():
    seeds = [made([0], batch=2, seed=s)._replace(phases=three(9)) for s in range(3)]
    more = variant((1, 5, 6, 2))
    with_seeds = more._replace(all=more.all + seeds)
    assert middle_test(with_seeds)[0] == middle_test(more)[0]


# On studies


def shape(folder, alphas):
    """Gives the activations of a study exponents alphas(batch, log tokens), so RankMe moves."""
    rng = np.random.default_rng(0)
    ranks = np.arange(1, WIDTH + 1)
    for run in sorted((folder / "runs").iterdir()):
        batch = json.loads((run / "config.json").read_text())["batch"]
        for path in sorted((run / "spectra").glob("*.npz")):
            meta, arrays = read_step(path)
            alpha = alphas(batch, np.log2(1 + meta["tokens"] / 2**13))
            for kind in (ACTIVATION, "act_last_cov_eigenvalues"):
                noise = np.exp(0.01 * rng.normal(size=WIDTH))
                arrays[f"{kind}/h_11/resid_post"] = -np.sort(-(ranks**-alpha) * noise)
            write_step(run / "spectra", meta["step"], arrays, meta)
    return folder


@pytest.fixture(scope="module")
def waved(tmp_path_factory):
    """Phases in the middle batches alone: RankMe falls, rises and falls with alpha's wave."""
    folder = make_study(
        tmp_path_factory.mktemp("waved") / "s", rungs=("muon", "untied", "flexwin"), **SMALL
    )
    height = {4: 0.0, 8: 0.8, 16: 0.6, 32: 0.0}
    return read_study(shape(folder, lambda b, x: 1 + height[b] * np.sin(np.pi * x / 2.2)))


def drawn(study, **keys):
    figure = Figure(figsize=(7.2, 8), layout="constrained")
    return draw_18(figure, study, Options(**keys)), figure


def test_trajectory_is_ln_rankme_of_every_measured_step(waved):
    run = waved.chosen[0]
    found = trajectory(run, ACTIVATION)
    twin = [np.log(rankme(row.array(ACTIVATION, "h_11/resid_post"))) for row in run.steps]
    np.testing.assert_allclose(found.values, twin)
    assert found.tokens.tolist() == [row.tokens for row in run.steps]


def test_planted_phases_are_found_in_both_variants(waved):
    claims, figure = drawn(waved)
    assert [claim.verdict for claim in claims] == ["held"] * 4
    occurs, middle = claims[:2]
    assert (occurs.n, occurs.seeds) == (14, 1)  # 3 rungs x 4 batches, two more seeds in one
    assert occurs.statistic == pytest.approx(8 / 14)
    assert "fall, rise, fall in 8 of 14 runs" in occurs.sentence
    assert (middle.n, middle.p) == (3, pytest.approx(2 / 6**3))
    assert len(figure.axes) == 9
    caption = " ".join(figure._supxlabel.get_text().split())
    for words in ("n = 14 runs", "3 families", "1 to 3 seeds a cell", "3 seed sd"):
        assert words in caption


def test_a_steady_fall_is_no_sequence(tmp_path):
    folder = make_study(tmp_path / "s", rungs=("flexwin",), **SMALL)
    claims, _ = drawn(read_study(shape(folder, lambda b, x: 1 + 0.1 * x)))
    assert claims[0].verdict == "did not hold"
    assert "fall: 6" in claims[0].sentence
    assert claims[1].verdict == "undecided"


def test_without_three_seeds_no_phase_is_called(tmp_path):
    study = read_study(make_study(tmp_path / "s", rungs=("muon",), **SMALL))
    claims, figure = drawn(study)
    assert {claim.verdict for claim in claims} == {"undecided"}
    assert "3 seeds" in claims[0].sentence
    assert "no cell with 3 seeds" in figure.axes[2].texts[0].get_text()
    assert len(figure.axes[0].lines) == 4  # what there is, is drawn


def test_runs_that_go_on_or_diverged_decide_nothing(tmp_path):
    names = ("flexwin-d12-b4-s0-x1", "flexwin-d12-b8-s0-x1")
    study = read_study(
        make_study(
            tmp_path / "s", rungs=("flexwin",), unfinished=names[:1], diverged=names[1:], **SMALL
        )
    )
    claims, figure = drawn(study)
    assert claims[0].n == 4
    assert len(figure.axes[0].lines) == 6


def test_a_study_without_spectra_names_the_command(tmp_path):
    empty = SMALL | {"kinds": (), "sites": ()}
    study = read_study(make_study(tmp_path / "s", rungs=("muon",), **empty))
    with pytest.raises(Missing, match="preset=fig18"):
        drawn(study)


def test_least_p_of_one_family_is_no_decision():
    _, least, _ = middle_test(variant((1, 5, 6, 2)))
    assert least == pytest.approx(2 * 4 / factorial(4))  # so `verdict` cannot call it held
