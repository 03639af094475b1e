"""Figures 2, 8 and 10: planted orders are found, what the batch explains is no finding."""

from itertools import permutations
from shutil import rmtree

import numpy as np
import pytest
from matplotlib.figure import Figure
from synthetic_language_study import BATCHES, make_study, name

from experiments.efficiency import crossing_tokens, early_row
from experiments.figures import prediction, prediction_curves
from experiments.figures.options import Options, of_tiers, resolved
from experiments.figures.prediction_tests import (
    alike_p,
    best_look_p,
    beyond_batch,
    least_p,
    members,
    side_by_side,
)
from experiments.statistics import predict
from experiments.study_records import ACTIVATION, read_study
from lens_jax.claims import Missing
from lens_jax.correlations import max_over_looks_p, spearman
from lens_jax.fits import fit_power_law

RUNGS = ("baseline", "muon", "flexwin")
SITES = ("h_6/resid_post", "h_11/resid_post")
SMALL = {"sites": SITES, "kernels": (), "groups": 2, "trials": (), "kinds": ("activation",)}


def made(tmp_path_factory, **keys):
    keys = {"rungs": RUNGS, "seed_cells": (), **SMALL, **keys}
    return read_study(make_study(tmp_path_factory.mktemp("p") / "s", **keys))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return made(tmp_path_factory, seed_cells=(("flexwin", "d12", 16, (0, 1, 2)),))


@pytest.fixture(scope="module")
def by_batch(tmp_path_factory):
    return made(tmp_path_factory, planted="batch")


@pytest.fixture(scope="module")
def nothing(tmp_path_factory):
    return made(tmp_path_factory, planted="nothing", noise=0.1, rng_seed=3)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    lost = (name("flexwin", "d36", 32),)
    return made(tmp_path_factory, rungs=("flexwin",), tiers=("d12", "d36"), censored=lost)


def drawn(function, study, **keys):
    figure = Figure(figsize=(7.2, 5), layout="constrained")
    return function(figure, study, resolved(study, Options(**keys))), figure


def caption_of(figure):
    return " ".join(figure._supxlabel.get_text().split())


def naive_rho(study, rung, tokens=None, share=None, window=(6, 12), site=SITES[-1]):
    """rho of alpha and efficiency of the first seeds of a family, by hand."""
    runs = [run for run in study.chosen if run.cell.rung == rung and run.seed == 0]
    alphas, spent = [], []
    for run in runs:
        row = early_row(run, tokens or share * crossing_tokens(run, 4.5))
        alphas.append(fit_power_law(row.array(ACTIVATION, site), *window).alpha if row else np.nan)
        spent.append(crossing_tokens(run, 4.5))
    return spearman(np.array(alphas), -np.array(spent))


# Figure 2


def test_a_planted_order_is_found_and_goes_beyond_the_batch(study):
    claims, figure = drawn(prediction.draw_2, study)
    order, beyond = claims
    assert (order.verdict, order.n, order.seeds, order.window) == ("held", 12, 1, "6-12")
    assert order.statistic == pytest.approx(1.0)
    assert order.p == pytest.approx(2 / 24**3)
    assert "mean rho of -log B 0.80" in order.control
    assert "all families: p = 0.083" in order.control
    assert beyond.statistic == pytest.approx(0.2)
    assert (beyond.p, beyond.verdict) == (0.25, "undecided")  # three families cannot
    assert len(figure.axes) == 3
    assert "no tier beyond" in figure.axes[1].texts[0].get_text()
    said = caption_of(figure)
    for words in ("n = 3 families (12 cells)", "1 to 3 seeds a cell", "ranks 6-12 (90-200 at"):
        assert words in said
    assert "65.5k tokens" in said


def test_points_of_figure_2_are_the_records(study):
    _, figure = drawn(prediction.draw_2, study)
    runs = [run for run in study.chosen if run.cell.rung == "muon"]
    alphas = [
        fit_power_law(early_row(run, 2**16).array(ACTIVATION, SITES[-1]), 6, 12).alpha
        for run in runs
    ]
    spent = np.array([crossing_tokens(run, 4.5) for run in runs])
    x = (np.array(alphas) - min(alphas)) / np.ptp(alphas)
    marks = figure.axes[0].collections[1]  # of the second family
    order = np.argsort(x)
    np.testing.assert_allclose(
        marks.get_offsets(), np.column_stack([x, 100 * (spent / spent.min() - 1)])[order]
    )
    names = [text.get_text() for text in figure.axes[2].get_yticklabels()]
    assert names == list(RUNGS)


def test_an_order_by_batch_alone_is_not_taken_for_more(by_batch):
    order, beyond = drawn(prediction.draw_2, by_batch)[0]
    assert order.statistic == pytest.approx(0.8)
    assert beyond.statistic == pytest.approx(0.0)
    assert beyond.verdict != "held"
    assert "no partial rho" in beyond.control


def test_nothing_planted_is_not_held(nothing):
    assert all(claim.verdict != "held" for claim in drawn(prediction.draw_2, nothing)[0])


def test_deeper_tiers_have_their_own_panel_and_window(deep):
    claims, figure = drawn(prediction.draw_2, deep)
    assert [claim.claim.partition(":")[0] for claim in claims] == ["d12"] * 2 + ["deeper tiers"] * 2
    assert claims[0].window == "6-12"
    assert claims[2].window == "42-83"  # ranks 200-400 at width 160
    assert "Target missed, ranked last and not drawn: flexwin-d36-b32" in caption_of(figure)
    names = [text.get_text() for text in figure.axes[2].get_yticklabels()]
    assert names == ["flexwin-d12", "flexwin-d36"]
    assert claims[2].n == 4


def test_two_batches_are_no_order(tmp_path_factory):
    small = made(tmp_path_factory, rungs=("muon",), batches=(4, 8))
    for function in (prediction.draw_2, prediction_curves.draw_8, prediction.draw_10):
        with pytest.raises(Missing, match=r"3 batches .*python -m experiments\.study preset=fig"):
            drawn(function, small)


def test_families_without_an_order_are_named_with_the_reason(tmp_path):
    lost = tuple(name("baseline", batch=batch) for batch in BATCHES)
    lost += tuple(name("muon", batch=batch) for batch in BATCHES[1:])
    folder = make_study(
        tmp_path / "s", rungs=("baseline", "muon", "flexwin"), seed_cells=(), censored=lost[:4],
        unfinished=lost[4:], **SMALL,
    )  # fmt: skip
    for run in lost[4:]:
        path = folder / "runs" / run / "metrics.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    study = read_study(folder)
    for function in (prediction.draw_2, prediction_curves.draw_8, prediction.draw_10):
        said = caption_of(drawn(function, study)[1])
        assert "Left out, no batch reached the target: baseline-d12." in said
        assert "run to the target: muon-d12." in said


def test_a_chosen_run_with_nothing_measured_yet_is_no_end_of_the_figure(tmp_path):
    folder = make_study(tmp_path / "s", rungs=("muon",), seed_cells=(), **SMALL)
    rmtree(folder / "runs" / name("muon", batch=32) / "spectra")
    claims, _ = drawn(prediction_curves.draw_8, read_study(folder))
    assert claims[0].n == 3
    for batch in BATCHES[:-1]:
        rmtree(folder / "runs" / name("muon", batch=batch) / "spectra")
    with pytest.raises(Missing, match="preset=fig8"):
        drawn(prediction_curves.draw_8, read_study(folder))


# The tests


def test_least_p_is_that_of_perfect_orders(study):
    families = predict(study, tokens=2**16).families
    assert least_p(families) == pytest.approx(2 / 24**3)
    assert least_p(families[:1]) == pytest.approx(2 / 24)
    assert least_p([]) == 1.0
    assert members(families) == 12


def test_beyond_batch_takes_either_direction_of_the_batch(study):
    families = predict(study, tokens=2**16).families
    test, least = beyond_batch(families)
    assert test.statistic == pytest.approx(0.2)
    assert least == 0.25
    turned = [f._replace(rho_batch=f.rho_batch._replace(statistic=-0.8)) for f in families]
    assert beyond_batch(turned)[0].statistic == pytest.approx(0.2)
    worse = [f._replace(rho_alpha=f.rho_alpha._replace(statistic=0.2)) for f in families]
    assert beyond_batch(worse)[0].statistic == pytest.approx(-0.6)
    assert np.isnan(beyond_batch([])[0].p)


def test_families_side_by_side(study):
    one, other = predict(study, tokens=2**16).families[:2]
    short = other._replace(batches=other.batches[1:], alpha=other.alpha[1:])
    table, batches = side_by_side([one, short], lambda family: family.alpha)
    assert list(batches) == list(BATCHES)
    np.testing.assert_array_equal(table[0], one.alpha)
    assert np.isnan(table[1, 0])
    np.testing.assert_array_equal(table[1, 1:], other.alpha[1:])


def test_alike_permutes_batches_in_all_families(study):
    families = predict(study, tokens=2**16).families
    alphas, spent = (np.array([getattr(f, k) for f in families]) for k in ("alpha", "efficiency"))
    observed = np.mean([spearman(a, e) for a, e in zip(alphas, spent, strict=True)])
    null = [
        np.mean([spearman(a, e[list(order)]) for a, e in zip(alphas, spent, strict=True)])
        for order in permutations(range(4))
    ]
    expected = np.mean(np.abs(null) >= abs(observed) - 1e-9)
    assert alike_p(families).p == pytest.approx(expected)


def test_the_best_look_counts_all_looks(study):
    looks = [predict(study, tokens=2**k).families for k in (14, 15, 16)]
    alphas = np.array([[f.alpha for f in look] for look in looks]).swapaxes(0, 1)
    spent = np.array([f.efficiency for f in looks[0]])
    assert best_look_p(looks).p == pytest.approx(max_over_looks_p(alphas, spent).p)
    assert np.isnan(best_look_p([looks[0], ()]).p)


def test_a_censored_run_is_last(deep):
    families = predict(
        of_tiers(deep, Options(), ("d36",)), tokens=2**16, window=(200, 400)
    ).families
    assert members(families) == 4
    assert list(families[0].batches)[int(np.argmin(families[0].efficiency))] == 32
    assert np.isfinite(alike_p(families).p)


# Figure 8


def test_curves_are_correlations_in_both_alignments(study):
    claims, figure = drawn(prediction_curves.draw_8, study)
    above, below = figure.subfigs
    assert len(above.axes) == len(below.axes) == 3
    main = [line for line in below.axes[1].lines if line.get_linewidth() == 1.8]
    for tokens, rho in zip(*main[0].get_data(), strict=True):
        expected = naive_rho(study, "muon", tokens)
        row_everywhere = all(
            early_row(run, tokens) for run in study.chosen if run.cell.rung == "muon"
        )
        if row_everywhere:
            assert rho == pytest.approx(expected, abs=1e-9)
        else:
            assert np.isnan(rho)
    main = [line for line in above.axes[0].lines if line.get_linewidth() == 1.8]
    assert main[0].get_ydata()[-1] == pytest.approx(naive_rho(study, "baseline", share=1.0))
    control = [line for line in above.axes[0].lines if line.get_linestyle() == (0, (4, 2))]
    assert all(line.get_ydata()[0] == pytest.approx(0.8) for line in control)
    assert [claim.figure for claim in claims] == ["8"] * 3
    assert "best of 30 looks" in claims[0].sentence
    assert claims[2].verdict == "held"
    said = caption_of(figure)
    for words in ("n = 3 families", "ranks of 10-40, 40-90, 90-200 at width 768", "R2"):
        assert words in said


@pytest.mark.parametrize("window", [(10, 40), (20, 60)])
def test_the_thick_line_is_that_of_the_main_window_in_its_place(study, window):
    """One of the figure's own windows, and one beside them."""
    _, figure = drawn(prediction_curves.draw_8, study, window=window)
    ax = figure.subfigs[1].axes[1]
    (main,) = [line for line in ax.lines if line.get_linewidth() == 1.8]
    others = [line for line in ax.lines if line.get_linewidth() == 1.0]
    assert main.get_color() == prediction_curves.COLOURS.get(window, prediction_curves.GREEN)
    assert len(others) == (2 if window in prediction_curves.WINDOWS else 3)
    at = list(main.get_xdata()).index(2**16)
    own = next(f for f in predict(study, window=window).families if f.family.rung == "muon")
    assert main.get_ydata()[at] == pytest.approx(own.rho_alpha.statistic)
    moved = prediction_curves.offsets((*prediction_curves.WINDOWS, window), window)
    assert moved[window] == 0
    assert len(set(moved.values())) == len(moved)


def test_saturation_is_not_found_where_nothing_is_planted(nothing):
    claims, _ = drawn(prediction_curves.draw_8, nothing)
    assert claims[2].verdict == "did not hold"


# Figure 10


def test_layers_and_the_tier_that_is_there(study):
    claims, figure = drawn(prediction.draw_10, study)
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["6", "11"]
    assert "The paper has d36; this study has d12." in caption_of(figure)
    line = next(line for line in figure.axes[0].lines if line.get_label() == "muon")
    expected = [naive_rho(study, "muon", 2**16, site=site) for site in SITES]
    np.testing.assert_allclose(line.get_ydata(), expected)
    (claim,) = claims
    assert (claim.n, claim.statistic) == (3, pytest.approx(0.0))
    assert claim.verdict == "undecided"


def test_the_deepest_tier_is_taken(deep):
    claims, figure = drawn(prediction.draw_10, deep)
    assert claims[0].claim.startswith("d36")
    assert "The paper has" not in caption_of(figure)


def test_late_layers_that_predict_better_have_their_sign(study):
    families = predict(study, tokens=2**16).families
    many = [
        f._replace(family=f.family._replace(rung=rung))
        for rung in ("baseline", "muon", "flexwin", "untied", "betterwin", "lswa")
        for f in families[:1]
    ]

    def look(rho):
        changed = [f._replace(rho_alpha=f.rho_alpha._replace(statistic=rho)) for f in many]
        return predict(study, tokens=2**16)._replace(families=tuple(changed))

    rising = prediction._layer_claim(study, [look(0.2), look(0.9)], ["6", "11"], "d12", 2**16)
    assert rising.statistic == pytest.approx(0.7)
    assert rising.verdict == "held"
    falling = prediction._layer_claim(study, [look(0.9), look(0.2)], ["6", "11"], "d12", 2**16)
    assert falling.verdict == "did not hold"


def test_tiers_are_kept_apart(deep):
    part = of_tiers(deep, Options(), ("d36",))
    assert {run.cell.tier for run in part.runs} == {"d36"}
    asked = of_tiers(deep, Options(target=3.0, tolerance=0.1), ("d12",))
    assert (asked.target_loss, asked.config["match_tolerance"]) == (3.0, 0.1)
    assert deep.target_loss == 4.5
