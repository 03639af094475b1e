"""Figure 6 on made-up gradients of four matrices with exponents of their own."""

import pytest
from matplotlib.figure import Figure
from synthetic_language_study import make_study, name

from experiments.figures.__main__ import Task, main, run_task
from experiments.figures.matrices import draw_6
from experiments.figures.options import Options
from experiments.study_records import read_study


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
