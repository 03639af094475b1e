"""Figures 12 to 16: curves are the numbers of the records, and claims are those of their tests."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from synthetic_language_study import TARGET, make_study, name

from experiments.figures import atlas, curves
from experiments.figures.options import Options, resolved
from experiments.figures.trajectories import (
    ALPHAS,
    RANKMES,
    follow,
    token_best,
    trajectory_rho,
)
from experiments.study_records import ACTIVATION, GRADIENT, Family, read_study
from lens_jax.claims import Missing
from lens_jax.correlations import spearman
from lens_jax.fits import fit_power_law, rankme

LAST = "h_11/resid_post"
KERNELS = ("h_11/attn/c_proj/kernel", "h_11/mlp/c_proj/kernel")
SMALL = {"sites": (LAST,), "kernels": KERNELS, "groups": 2, "trials": ()}
ONE_BATCH = {"batches": (8,), "seed_cells": (), "planted": "nothing"}
MUON = Family("muon", "d12")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("atlas") / "s"
    return make_study(
        made, rungs=("baseline", "muon", "untied", "flexwin"), batches=(4, 8, 16),
        seed_cells=(("muon", "d12", 8, (0, 1)),), **SMALL,
    )  # fmt: skip


@pytest.fixture(scope="module")
def study(folder):
    return read_study(folder)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    made = tmp_path_factory.mktemp("deep") / "s"
    tiers = ("d12", "d36")
    return read_study(make_study(made, rungs=("flexwin",), tiers=tiers, **ONE_BATCH, **SMALL))


def drawn(function, study, **keys):
    figure = Figure(figsize=(7.2, 6), layout="constrained")
    return function(figure, study, resolved(study, Options(**keys))), figure


def caption_of(figure):
    return " ".join(figure._supxlabel.get_text().split())


def spectrum_lines(ax):
    return [line for line in ax.lines if len(line.get_xdata()) > 12]


# Which runs stand for a family


def test_a_family_is_shown_at_the_batch_of_the_fewest_tokens(study):
    member = token_best(study, MUON, Options())
    assert (member.first.batch, [run.seed for run in member.runs]) == (8, [0, 1])
    # planted: loss = TARGET + 0.6 ln(T / tokens), so T follows from any validation
    val = member.first.val
    planted = np.exp((val["loss"][-1] - TARGET) / 0.6) * val["tokens"][-1]
    assert member.tokens == pytest.approx(planted, rel=0.15)  # the mean over seeds
    assert token_best(study, MUON, Options(batch=16)).first.batch == 16
    assert token_best(study, MUON, Options(batch=64)) is None


def test_a_batch_that_missed_the_target_or_goes_on_comes_last(tmp_path):
    study = read_study(
        make_study(
            tmp_path / "s", rungs=("muon",), seed_cells=(),
            censored=(name("muon", batch=8), name("muon", batch=4)),
            unfinished=(name("muon", batch=16),), **(SMALL | {"kinds": ()}),
        )
    )  # fmt: skip
    assert token_best(study, MUON, Options()).first.batch in (16, 32)
    chosen = token_best(study, MUON, Options(target=1.0))  # out of reach of all
    assert chosen.first.batch != 16
    assert not np.isfinite(chosen.tokens)


# 13 to 15


def test_atlas_rows_are_the_rungs_of_the_study_and_the_others_are_named(study):
    claims, figure = drawn(atlas.draw_13, study)
    axes = figure.axes[:12]  # 3 rungs x 4 columns
    labels = [ax.get_ylabel() for ax in axes[::4]]
    assert [label.split("-")[0] for label in labels] == ["baseline", "muon", "untied"]
    assert "B 8 (4.1k tokens)" in labels[1]
    for column in range(4):
        assert len({ax.get_ylim() for ax in axes[column::4]}) == 1
    text = caption_of(figure)
    for part in (
        "n = 3 rungs", "1 to 2 seeds a cell", "6-12 (90-200 at width 768)",
        "shaded; gradients: ranks 2-9.", "32 samples of 128 tokens", "Not in the study: rope",
    ):  # fmt: skip
        assert part in text
    assert [claim.figure for claim in claims] == ["13", "13"]


def test_spectra_are_shares_and_zero_gradients_are_left_out(study):
    _, figure = drawn(atlas.draw_13, study)
    run = token_best(study, MUON, Options()).first
    activation, gradient = figure.axes[4], figure.axes[5]
    values = run.steps[-1].array(ACTIVATION, LAST)
    np.testing.assert_allclose(spectrum_lines(activation)[-1].get_ydata(), values / values.sum())
    values = run.steps[-1].array(GRADIENT, KERNELS[0])
    np.testing.assert_allclose(spectrum_lines(gradient)[-1].get_ydata(), values / values.sum())
    rows = len(token_best(study, Family("untied", "d12"), Options()).first.steps)
    assert len(spectrum_lines(figure.axes[9])) == rows - 1  # none before training: a zero head


def test_trajectories_are_the_statistics_of_the_records(study):
    _, figure = drawn(atlas.draw_13, study)
    run = token_best(study, MUON, Options()).first
    tokens = [row.tokens for row in run.steps]
    ranks, alphas = figure.axes[6].lines, figure.axes[7].lines
    assert len(ranks) == len(alphas) == 4  # activations and gradients, two seeds
    spectra = [row.array(ACTIVATION, LAST) for row in run.steps]
    gradients = [row.array(GRADIENT, KERNELS[0]) for row in run.steps]
    np.testing.assert_allclose(ranks[0].get_xdata(), tokens)
    np.testing.assert_allclose(ranks[0].get_ydata(), [rankme(s) for s in spectra])
    np.testing.assert_allclose(ranks[2].get_ydata(), [rankme(s) for s in gradients])
    slopes = [-np.polyfit(np.log(np.arange(6, 13)), np.log(s[5:12]), 1)[0] for s in spectra]
    np.testing.assert_allclose(alphas[0].get_ydata(), slopes)
    # N = 32 samples: ranks 30-150 of 512 are 2-9, and sigma has half the exponent of sigma^2
    twin = [2 * fit_power_law(s, 2, 9).alpha for s in gradients]
    np.testing.assert_allclose(alphas[2].get_ydata(), twin)


def test_change_claims_count_a_rung_once_and_cannot_decide_with_three(study):
    (tail, directions), _ = drawn(atlas.draw_13, study)
    assert (tail.n, tail.seeds, tail.window) == (3, 1, "6-12 (90-200 at width 768)")
    changes = []
    for rung in ("baseline", "muon", "untied"):
        member = token_best(study, Family(rung, "d12"), Options())
        own = []
        for run in member.runs:
            tokens, values = follow(run, ALPHAS[0], (90, 200))
            own.append(values[-1] - values[list(tokens).index(2**16)])
        changes.append(np.mean(own))
    assert tail.statistic == pytest.approx(np.mean(changes))
    assert tail.statistic > 0 > directions.statistic
    assert tail.p == directions.p == pytest.approx(0.25)  # 2 of 2^3 choices of sign
    assert tail.verdict == directions.verdict == "undecided"
    assert "baseline to untied" in tail.claim


def test_other_atlases_draw_theirs_and_name_the_command_where_there_is_none(study):
    claims, figure = drawn(atlas.draw_14, study)
    assert [ax.get_ylabel().split("-")[0] for ax in figure.axes[:4:4]] == ["flexwin"]
    assert "Not in the study: valuemix, unet, fixedwin, vte, betterwin" in caption_of(figure)
    assert claims[0].n == 1
    with pytest.raises(Missing, match=r"sparsev.*preset=fig15"):
        drawn(atlas.draw_15, study)
    with pytest.raises(Missing, match=r"d36 or d48.*preset=fig16"):
        drawn(atlas.draw_16, study)


# 16


def test_deep_trajectories_are_correlated_with_those_of_d12(deep):
    (claim,), figure = drawn(atlas.draw_16, deep)
    shallow, below = (run for run in deep.chosen)
    assert (shallow.cell.tier, below.cell.tier) == ("d12", "d36")
    rhos = []
    for statistic in (*RANKMES, *ALPHAS):
        one, two = (dict(zip(*follow(r, statistic, w), strict=True))
                    for r, w in ((shallow, (90, 200)), (below, (200, 400))))  # fmt: skip
        shared = [t for t in one if t in two and t > 0]
        assert len(shared) >= 5
        rho = spearman([one[t] for t in shared], [two[t] for t in shared])
        assert trajectory_rho(shallow, below, statistic, (90, 200)) == pytest.approx(rho, abs=0.2)
        rhos.append(trajectory_rho(shallow, below, statistic, (90, 200)))
    assert rhos[0] == rhos[2] == 1  # activations follow one law at both depths
    assert claim.statistic == pytest.approx(np.mean(rhos))
    assert (claim.n, claim.p, claim.verdict) == (1, 1.0, "undecided")
    assert "Not in the study: betterwin-d36, sparsev-d36, betterwin-d48" in caption_of(figure)
    assert "1.00" in figure.axes[2].texts[0].get_text()


# 12


def edit_metrics(folder, run, change):
    path = folder / "runs" / run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in map(change, rows) if row]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def uneven(tmp_path):
    """A run that missed the target, one whose rate decays early, one without validations."""
    folder = make_study(
        tmp_path / "s", rungs=("muon", "untied"), batches=(4, 8, 16), seed_cells=(),
        censored=(name("muon", batch=16),), **(SMALL | {"kinds": ()}),
    )  # fmt: skip
    half = {"lr_matrix": 0.02}
    late = lambda row: row | half if row["kind"] == "train" and row["tokens"] > 2**17 else row  # noqa: E731
    edit_metrics(folder, name("muon", batch=4), late)
    for batch in (4, 8, 16):
        edit_metrics(
            folder, name("untied", batch=batch), lambda row: row if row["kind"] == "train" else None
        )
    return read_study(folder)


def test_crossings_are_marked_where_the_target_is_crossed(uneven):
    (reached, decay), figure = drawn(curves.draw_12, uneven)
    marks = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 1]
    assert len(marks) == 2  # the third missed it
    for mark, batch in zip(marks, (4, 8), strict=True):
        run = next(run for run in uneven.chosen if run.name == name("muon", batch=batch))
        val = run.val  # the planted loss is linear in ln tokens, so any two rows give T
        planted = np.exp((val["loss"][-1] - TARGET) / 0.6) * val["tokens"][-1]
        assert mark.get_xdata()[0] == pytest.approx(planted, rel=1e-6)
        assert mark.get_ydata()[0] == TARGET
    assert (reached.n, reached.verdict) == (3, "did not hold")
    assert reached.statistic == pytest.approx(2 / 3)
    assert name("muon", batch=16) in reached.sentence
    assert (decay.n, decay.verdict) == (2, "did not hold")
    assert decay.statistic == pytest.approx(1 / 2)
    assert "compare with reserve" in decay.sentence


def test_curves_are_dashed_from_the_decay_on_and_training_losses_stand_apart(uneven):
    _, figure = drawn(curves.draw_12, uneven)
    muon, untied, crossings = figure.axes[:3]
    assert [ax.get_ylabel() for ax in (muon, untied)] == [
        "validation loss", "training loss, smoothed",
    ]  # fmt: skip
    dashed = [line for line in muon.lines if len(line.get_xdata()) > 1 and line.is_dashed()]
    decayed = next(line for line in dashed if line.get_xdata()[-1] > 2**17)
    assert decayed.get_xdata()[0] == 2**17
    assert curves.decay_tokens(uneven.of(MUON)[0]) == 2**17
    assert curves.decay_tokens(uneven.of(MUON)[1]) == np.inf
    assert "of untied-d12" in caption_of(figure)
    np.testing.assert_allclose(crossings.lines[0].get_xdata(), [4 * 512, 8 * 512])


def test_a_run_without_rates_is_no_evidence_of_when_they_decay(uneven):
    def without_rate(row):
        return {key: value for key, value in row.items() if key != "lr_matrix"}

    for batch in (4, 8):
        edit_metrics(uneven.path, name("muon", batch=batch), without_rate)
        (_, decay), figure = drawn(curves.draw_12, read_study(uneven.path))
        assert (decay.n, decay.verdict) == ((1, "held") if batch == 4 else (0, "undecided"))
        assert "compare with reserve" not in decay.sentence  # none is on the other side
    assert "2 more crossed and logged no rate" in decay.sentence
    solid = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 2]
    assert all(not line.is_dashed() for line in solid)
    assert len(solid) == 3


def test_seeds_of_a_claim_are_the_fewest_of_a_cell(study):
    claims, _ = drawn(curves.draw_12, study)
    assert [claim.seeds for claim in claims] == [1, 1]


def test_curves_need_a_loss(tmp_path):
    folder = make_study(tmp_path / "s", rungs=("muon",), **ONE_BATCH, **(SMALL | {"kinds": ()}))
    edit_metrics(folder, name("muon", batch=8), lambda row: None)
    with pytest.raises(Missing, match="preset=fig12"):
        drawn(curves.draw_12, read_study(folder))
