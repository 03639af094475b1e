"""Figures 7 and 9: optimizers by how far batches lie apart, and seeds against batches."""

from itertools import combinations
from shutil import rmtree
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from synthetic_language_study import make_study, name

from experiments.efficiency import early_row
from experiments.figures import optimizers, seeds
from experiments.figures.options import Options, resolved
from experiments.seed_spread import Spread
from experiments.study_records import ACTIVATION, read_study
from lens_jax.claims import Missing
from lens_jax.fits import fit_power_law, jsd
from lens_jax.records import read_step, write_step

LAST = "h_11/resid_post"
KERNELS = ("h_11/attn/c_proj/kernel", "h_11/mlp/c_proj/kernel")
SMALL = {"sites": (LAST,), "kernels": KERNELS, "groups": 2, "trials": ()}
OPTIONS = Options(tolerance=0.08)
SEEDS = (("flexwin", "d12", 16, (0, 1, 2)),)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    made = tmp_path_factory.mktemp("pair") / "s"
    rungs = ("muon", "lswa", "lswa_adam")
    return read_study(
        make_study(made, rungs=rungs, batches=(4, 8, 32), seed_cells=(), kinds=("activation",),
                   **SMALL)
    )  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    made = tmp_path_factory.mktemp("seeds") / "s"
    return read_study(
        make_study(made, rungs=("rope", "muon", "flexwin"), batches=(4, 8, 16, 32),
                   seed_cells=SEEDS, **SMALL)
    )  # fmt: skip


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """Batches that differ by the noise of a seed."""
    made = tmp_path_factory.mktemp("flat") / "s"
    return read_study(
        make_study(made, rungs=("flexwin",), batches=(4, 8, 16, 32), seed_cells=SEEDS,
                   planted="nothing", noise=0.1, **SMALL)
    )  # fmt: skip


def drawn(function, study, options=OPTIONS):
    figure = Figure(figsize=(7.2, 5), layout="constrained")
    return function(figure, study, resolved(study, options)), figure


def caption_of(figure):
    return " ".join(figure._supxlabel.get_text().split())


# Figure 7


def test_the_published_contrast_is_taken_where_it_is(pair):
    claims, figure = drawn(optimizers.draw_7, pair)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["(a) Muon (lswa)", "(b) Adam (lswa_adam)", "(c) separation"]
    assert "Not measured" not in caption_of(figure)
    assert "no floor" in caption_of(figure)
    assert "in more than this" not in claims[0].sentence
    assert claims[0].n == 2


def test_another_contrast_says_what_it_is(study):
    claims, figure = drawn(optimizers.draw_7, study)
    assert "(a) Muon (muon)" in figure.axes[0].get_title()
    assert "Not measured: lswa against lswa_adam" in caption_of(figure)
    assert "muon against rope; the rungs differ in more than this" in claims[0].sentence
    assert (claims[0].n, claims[0].verdict) == (3, "undecided")
    assert claims[0].p >= 0.25
    assert any(line.get_label() == "seed floor" for line in figure.axes[2].lines)


def test_separation_is_per_doubling(pair):
    matched = optimizers.Matched(pair, OPTIONS)
    side = optimizers._contrast(pair, matched)[0]
    found = optimizers.separations(side, matched)
    last = {batch: runs[0].steps[-1].array(ACTIVATION, LAST) for batch, runs in side.runs.items()}
    assert list(found) == [(4, 8), (8, 32)]
    assert found[4, 8] == pytest.approx(jsd(last[4], last[8]))
    assert found[8, 32] == pytest.approx(jsd(last[8], last[32]) / 4)


def test_jsd_of_even_shifts_is_even_per_doubling():
    ranks = np.arange(1, 49)
    law = [ranks ** -(1.2 + 0.01 * k) for k in range(4)]
    assert jsd(law[0], law[3]) / 9 == pytest.approx(jsd(law[0], law[1]), rel=0.02)


def test_a_planted_separation_has_its_sign(pair):
    matched = optimizers.Matched(pair, OPTIONS)
    sides = optimizers._contrast(pair, matched)
    pairs = {(2**k, 2 ** (k + 1)): 0.01 for k in range(7)}
    wide = {key: 0.03 for key in pairs}
    assert optimizers._claim(sides, [wide, pairs], 1e-3).verdict == "held"
    assert optimizers._claim(sides, [pairs, wide], 1e-3).verdict == "did not hold"


# Figure 9


def test_seeds_and_batches_are_compared(study):
    claims, figure = drawn(seeds.draw_9, study)
    assert len(figure.axes) == 4
    assert len(figure.axes[0].lines) == 3
    early, late = claims
    assert early.verdict == late.verdict == "held"
    assert (early.n, early.seeds, early.window) == (4, 3, "6-12")
    cell = [run for run in study.chosen if len(study.of(run.family)) > 4 and run.batch == 16]
    rows = [early_row(run, 2**16) for run in cell]
    alphas = [fit_power_law(row.array(ACTIVATION, LAST), 6, 12).alpha for row in rows]
    over = [
        fit_power_law(early_row(run, 2**16).array(ACTIVATION, LAST), 6, 12).alpha
        for run in study.of(cell[0].family, 0)
    ]
    over[2] = np.mean(alphas)  # of the batch with three seeds
    every = [alphas, *([own] for place, own in enumerate(over) if place != 2)]
    grand = np.mean(np.concatenate(every))
    between = sum(len(own) * (np.mean(own) - grand) ** 2 for own in every) / 3
    assert early.statistic == pytest.approx(between / np.var(alphas, ddof=1))
    marks = [line for line in figure.axes[3].lines if line.get_marker() == "o"]
    assert marks[0].get_xdata()[0] == pytest.approx(early.statistic**0.5)
    assert marks[0].get_markerfacecolor() != "white"  # held
    said = caption_of(figure)
    assert "aligned by tokens (early rows at 65.5k, late rows at 262k)" in said
    names = [text.get_text() for text in figure.axes[3].get_yticklabels()]
    assert "gradient alpha 2-9" in names  # of 32 samples
    assert "n = 3 seeds (weights and data order) of flexwin-d12-b16, 4 batches" in said
    floor = np.median([
        jsd(*two) for two in combinations(
            [early_row(run, late_tokens(claims)).array(ACTIVATION, LAST) for run in cell], 2)
    ])  # fmt: skip
    assert f"seeds {floor:.2g}" in said


def late_tokens(claims):
    """The grid point that all runs share last: of doublings, 2^18."""
    assert "at 262k tokens" in claims[1].claim
    return 2**18


def test_rows_that_are_only_near_are_named_with_their_range(tmp_path):
    made = make_study(tmp_path / "s", rungs=("flexwin",), batches=(8, 16), seed_cells=SEEDS,
                      kinds=("activation",), **SMALL)  # fmt: skip
    for path in made.glob("runs/*-b8-*/spectra/*.npz"):
        meta, arrays = read_step(path)
        meta["tokens"] = int(meta["tokens"] * 0.9)  # a grid of its own
        write_step(path.parent, meta["step"], arrays, meta)
    claims, figure = drawn(seeds.draw_9, read_study(made))
    assert "early rows at 59k to 65.5k" in caption_of(figure)
    assert "at 59k to 65.5k tokens" in claims[0].claim


def test_seeds_and_batches_without_spectra_are_no_degrees_of_freedom(tmp_path):
    """A chosen run that has just begun has a config.json and nothing measured."""
    cells = (("flexwin", "d12", 16, (0, 1, 2, 3)), ("flexwin", "d12", 8, (0, 1)))
    made = make_study(tmp_path / "s", rungs=("flexwin",), batches=(4, 8, 16, 32), seed_cells=cells,
                      kinds=("activation",), **SMALL)  # fmt: skip
    for run in (name("flexwin", batch=8, seed=1), name("flexwin", batch=16, seed=3)):
        rmtree(made / "runs" / run / "spectra")
    early = drawn(seeds.draw_9, read_study(made))[0][0]
    assert "with 2 degrees of freedom" in early.control
    rmtree(made / "runs" / name("flexwin", batch=4) / "spectra")
    early = drawn(seeds.draw_9, read_study(made))[0][0]
    assert early.n == 3


def test_batches_within_the_noise_of_seeds_do_not_hold(flat):
    claims, _ = drawn(seeds.draw_9, flat)
    assert all(claim.verdict != "held" for claim in claims)
    assert all(claim.p > 0.05 for claim in claims)


@pytest.mark.parametrize(
    ("f", "verdict"), [(5.0, "held"), (1.0, "undecided"), (0.3, "did not hold")]
)
def test_a_claim_fails_by_a_test_only(study, f, verdict):
    """Over 4 batches and 3 seeds F is 4.76 at p 0.05; below 0.45 an effect as large as seeds' has
    a p below 0.05."""
    options = resolved(study, OPTIONS)
    cell, runs = seeds._cell(study, options)
    look = seeds._looks(study, runs, runs, options)[0]
    spread = Spread(0.1, 0.1, 0.1 * (f / 3) ** 0.5, f, 4, 6, 3, 3.0, True)
    fixed = SimpleNamespace(spread=lambda _: spread, span=look.span, seeds=runs)
    claim = seeds._claim(cell, fixed, seeds.statistics_of(runs[0], options)[0])
    assert claim.verdict == verdict
    assert f"F {f:.2f}" in claim.sentence


def test_another_cell_can_be_asked_for(study):
    with pytest.raises(Missing, match="preset=fig9"):
        drawn(seeds.draw_9, study, Options(rung="muon"))
    claims, _ = drawn(seeds.draw_9, study, Options(batch=16, tokens=2**15))
    assert "at 32.8k tokens" in claims[0].claim


def test_missing_runs_are_named(flat):
    with pytest.raises(Missing, match=r"lswa_adam.*preset=fig7"):
        drawn(optimizers.draw_7, flat)
