"""Figure 6 on made-up gradients of four matrices with exponents of their own."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from synthetic_language_study import make_study, name

from experiments.figures.__main__ import Task, main, run_task
from experiments.figures.matrices import draw_6
from experiments.figures.options import Options
from experiments.study_records import GRADIENT, read_study
from lens_jax.fits import GRAM_FLOOR, rankme


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "made"
    rungs = ("baseline", "muon", "untied", "flexwin", "betterwin", "attnscale")
    kernels = tuple(
        f"h_11/{matrix}/kernel" for matrix in ("attn/c_q", "attn/c_v", "attn/c_proj", "mlp/c_proj")
    )
    cells = (("betterwin", "d12", 8, (0, 1)),)
    return make_study(
        folder, rungs=rungs, batches=(8,), seed_cells=cells, trials=(), kernels=kernels
    )


def test_matrices_with_exponents_of_their_own_are_told_apart(study, tmp_path):
    drawn = run_task(Task(study=str(study), fig=6, out=str(tmp_path)), Options())
    (claim,) = drawn.claims
    assert claim.verdict == "held"
    assert claim.statistic < 0  # the steepest spectrum fills the fewest directions
    assert claim.p == pytest.approx(2 / 2**6)
    assert "betterwin-d12: W_Q" in claim.sentence
    assert "one seed" not in claim.control
    assert (claim.n, claim.seeds) == (6, 1)


def test_the_seeds_of_a_cell_are_averaged_before_the_test(study, tmp_path):
    drawn = run_task(Task(study=str(study), fig=6, out=str(tmp_path)), Options())
    gaps = {}
    for run in read_study(study).chosen:
        values = [
            rankme(run.steps[-1].array(GRADIENT, f"h_11/{matrix}/kernel"), GRAM_FLOOR)
            for matrix in ("mlp/c_proj", "attn/c_proj")
        ]
        gaps.setdefault(run.cell.rung, []).append(values[0] - values[1])
    assert [len(own) for own in gaps.values()].count(2) == 1
    assert gaps["betterwin"][0] != gaps["betterwin"][1]
    expected = np.mean([np.mean(own) for own in gaps.values()])
    assert drawn.claims[0].statistic == pytest.approx(expected)


def test_the_thick_line_is_the_mean_of_the_seeds(study):
    figure = Figure(layout="constrained")
    draw_6(figure, read_study(study), Options())
    lines = figure.axes[2].lines
    thick = [line for line in lines if line.get_linewidth() > 1]
    thin = [line for line in lines if line.get_linewidth() < 1]
    assert (len(thick), len(thin)) == (4, 8)
    two = [dict(zip(*line.get_data(), strict=True)) for line in thin[:2]]
    for tokens, value in zip(*thick[0].get_data(), strict=True):
        assert value == pytest.approx(np.mean([own[tokens] for own in two]))


def test_a_rung_of_ones_own_and_one_that_is_not_there(study, tmp_path, capsys):
    assert main([f"study={study}", "fig=6", "rung=untied", f"out={tmp_path}"]) == 0
    assert "untied-d12: W_Q" in capsys.readouterr().out
    assert main([f"study={study}", "fig=6", "rung=lswa", f"out={tmp_path}"]) == 1
    assert "rung=lswa" in capsys.readouterr().out


def test_families_that_missed_the_target_are_left_out_of_the_test_and_named(tmp_path):
    study = make_study(
        tmp_path / "s", rungs=("baseline", "muon", "betterwin"), batches=(8,), seed_cells=(),
        censored=(name("baseline"),), trials=(),
        kernels=("h_11/attn/c_proj/kernel", "h_11/mlp/c_proj/kernel"),
    )  # fmt: skip
    drawn = run_task(Task(study=str(study), fig=6, out=str(tmp_path)), Options())
    (claim,) = drawn.claims
    assert claim.n == 2
    assert "mean over 2 families" in claim.sentence
    assert claim.sentence.endswith("Left out: target not reached or run not ended: baseline-d12.")
    figure = Figure(layout="constrained")
    draw_6(figure, read_study(study), Options(rung="baseline"))
    said = " ".join(figure._supxlabel.get_text().split())
    assert "batch 8 (of the lowest last loss, target not reached)" in said
