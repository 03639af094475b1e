"""Figures 12 to 17: curves are the numbers of the records, and claims are those of their tests."""

import json
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from synthetic_language_study import TARGET, WIDTH, make_study, name

from experiments.figures import atlas, curves, weights
from experiments.figures.page import Options
from experiments.figures.trajectories import (
    ALPHAS,
    RANKMES,
    follow,
    late_tokens,
    span_text,
    token_best,
    trajectory_rho,
)
from experiments.study_records import ACTIVATION, GRADIENT, WEIGHT, Family, read_study
from lens_jax.claims import Missing
from lens_jax.correlations import spearman
from lens_jax.fits import fit_power_law, rankme
from lens_jax.records import read_step, write_step

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
    return function(figure, study, Options(**keys)), figure


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


# 17


def scale_heads(folder, heads, moved=None):
    """Gives the weights of a study head exponents {(rung, matrix): alpha}.

    moved: by rung how much more it is in each further seed.
    """
    ranks = np.arange(1, WIDTH + 1)
    for run in sorted((folder / "runs").iterdir()):
        config = json.loads((run / "config.json").read_text())
        rung, seed = config["rung"], config["seed"]
        more = seed * (moved or {}).get(rung, 0.0)
        for path in sorted((run / "spectra").glob("*.npz")):
            meta, arrays = read_step(path)
            for kernel, matrix in zip(KERNELS, ("output", "mlp"), strict=True):
                arrays[f"{WEIGHT}/{kernel}"] = ranks ** -(heads[rung, matrix] + more)
            write_step(run / "spectra", meta["step"], arrays, meta)
    return read_study(folder)


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """Five rungs whose MLP outputs differ three times as much as their W_O."""
    rungs = ("baseline", "rope", "muon", "untied", "flexwin")
    folder = tmp_path_factory.mktemp("heads") / "s"
    make_study(folder, rungs=rungs, **ONE_BATCH, **(SMALL | {"kinds": ("weight",)}))
    order = (0, 2, 1, 3, 4)
    heads = {(r, "output"): 0.4 + 0.01 * place for r, place in zip(rungs, order, strict=True)}
    heads |= {(rung, "mlp"): 0.3 + 0.03 * place for place, rung in enumerate(rungs)}
    return scale_heads(folder, heads)


def test_mlp_outputs_that_differ_more_are_found(spread):
    claims, figure = drawn(weights.draw_17, spread)
    end, equal = claims  # no run came near step 1600
    output, mlp = 0.01 * np.array([0, 2, 1, 3, 4]), 0.03 * np.arange(5)
    assert f"MLP out {np.std(mlp, ddof=1):.3f}, W_O {np.std(output, ddof=1):.3f}" in end.sentence
    rho = spearman(mlp + output, mlp - output)
    orders = [spearman(mlp + output, order) for order in permutations(mlp - output)]
    assert end.statistic == equal.statistic == pytest.approx(rho)
    assert end.p == pytest.approx(np.mean(np.abs(orders) >= rho - 1e-9))
    assert (end.n, end.seeds, end.window, end.verdict) == (5, 1, "1-10", "held")
    assert "near step 1600" in caption_of(figure)
    left, right = figure.axes[2:4]
    assert left.get_xlim() == right.get_xlim()
    heads = [line.get_xdata()[0] for line in right.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(heads, 0.3 + mlp)


def test_the_other_way_round_does_not_hold(spread):
    members = [token_best(spread, family, Options()) for family in spread.families]
    look = weights.find_looks(members)[0]
    test, output, mlp = weights.separation(members, look)
    assert mlp > 2 * output
    swapped = [*weights.MATRICES][::-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "MATRICES", tuple(swapped))
        assert weights.separation(members, look)[0].statistic == pytest.approx(-test.statistic)


def test_seeds_are_averaged_and_their_range_is_that_of_the_variants_compared(tmp_path):
    """The variant of the widest range missed the target, so it says nothing of the others."""
    rungs, seeds = ("baseline", "muon", "untied", "flexwin"), (0, 1)
    cells = tuple((rung, "d12", 8, seeds) for rung in rungs)
    folder = make_study(
        tmp_path / "s", rungs=rungs, batches=(8,), seed_cells=cells,
        censored=tuple(name("baseline", seed=seed) for seed in seeds),
        **(SMALL | {"kinds": ("weight",)}),
    )  # fmt: skip
    heads = {(rung, m): 0.5 + 0.1 * k for k, rung in enumerate(rungs) for m in ("output", "mlp")}
    moved = {"baseline": 0.4, "muon": 0.02, "untied": 0.01, "flexwin": 0.0}
    study = scale_heads(folder, heads, moved)
    (end, _), figure = drawn(weights.draw_17, study)
    assert (end.n, end.seeds) == (3, 2)
    assert end.control.endswith("there: W_O 0.020, MLP out 0.020")
    means = [0.6 + 0.01, 0.7 + 0.005, 0.8]
    assert f"W_O {np.std(means, ddof=1):.3f}" in end.sentence
    marks = [line.get_xdata()[0] for line in figure.axes[3].lines if line.get_marker() == "o"]
    np.testing.assert_allclose(marks, means)


def test_looks_at_equal_tokens_take_rows_of_equal_tokens(study):
    members = [token_best(study, family, Options()) for family in study.families]
    end, equal = weights.find_looks(members)
    shortest = min(row.tokens for row in end.rows.values())
    # planted: measured at doublings and at each run's own end, which no other run has
    assert {row.tokens for row in equal.rows.values()} == {2 ** int(np.log2(shortest))}
    assert equal.name == "at 262k tokens"
    assert len(end.present(members)) == 4
    assert end.rows[members[0].first.name].tokens > 2 * shortest


def at(tokens):
    return SimpleNamespace(tokens=tokens)


def test_equal_tokens_are_the_same_tokens_where_runs_share_any():
    runs = [[at(n) for n in own] for own in ((0, 100, 200, 400), (0, 200, 390), (200, 410))]
    assert late_tokens(runs) == 200  # though within 18 % all have a row at 400
    apart = [[at(0), at(400)], [at(390)], [at(200), at(410)]]
    assert late_tokens(apart) == 410
    assert late_tokens([[at(0), at(100)], [at(0), at(200)]]) is None
    assert (span_text([390, 410, 400]), span_text([400, 400])) == ("390 to 410", "400")


def test_variants_that_missed_the_target_are_named_and_are_not_at_its_end(tmp_path):
    rungs = ("baseline", "muon", "untied", "flexwin")
    lost = (name("baseline"),)
    study = read_study(
        make_study(tmp_path / "s", rungs=rungs, censored=lost, **ONE_BATCH,
                   **(SMALL | {"kinds": ("weight",)}))
    )  # fmt: skip
    (end, equal), figure = drawn(weights.draw_17, study)
    assert (end.n, equal.n) == (3, 4)
    said = caption_of(figure)
    assert "n = 3 variants at the batch that needed the fewest tokens (muon 8, untied 8," in said
    assert "Target not reached or run not ended: baseline-d12." in said


def test_weights_that_were_not_measured_are_named(tmp_path):
    none = SMALL | {"kinds": ("activation",)}
    study = read_study(make_study(tmp_path / "s", rungs=("muon",), **ONE_BATCH, **none))
    with pytest.raises(Missing, match="preset=fig17"):
        drawn(weights.draw_17, study)
