"""Figure 17: head exponents are those of the records, means over seeds, at looks that compare."""

import json
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from synthetic_language_study import WIDTH, make_study, name

from experiments.figures import weights
from experiments.figures.options import Options, resolved
from experiments.figures.trajectories import late_tokens, span_text, token_best
from experiments.study_records import WEIGHT, read_study
from lens_jax.claims import Missing
from lens_jax.correlations import spearman
from lens_jax.records import read_step, write_step

KERNELS = ("h_11/attn/c_proj/kernel", "h_11/mlp/c_proj/kernel")
SMALL = {"kernels": KERNELS, "groups": 2, "trials": (), "kinds": ("weight",)}
ONE_BATCH = {"batches": (8,), "seed_cells": (), "planted": "nothing"}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    made = tmp_path_factory.mktemp("weights") / "s"
    return read_study(
        make_study(made, rungs=("baseline", "muon", "untied", "flexwin"), batches=(4, 8, 16),
                   seed_cells=(("muon", "d12", 8, (0, 1)),), **SMALL)
    )  # fmt: skip


def drawn(function, study, **keys):
    figure = Figure(figsize=(7.2, 6), layout="constrained")
    return function(figure, study, resolved(study, Options(**keys))), figure


def caption_of(figure):
    return " ".join(figure._supxlabel.get_text().split())


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
    make_study(folder, rungs=rungs, **ONE_BATCH, **SMALL)
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
        **SMALL,
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
                   **SMALL)
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
