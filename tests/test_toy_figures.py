"""Figures of the toy study: what was planted is found, what is missing is named."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from synthetic_study import CELLS, CORE, make_study, planted_mode, planted_strength

from lens_jax.claims import Missing
from lens_jax.correlations import spearman
from lens_jax.fits import fit_power_law, jsd
from models.command_line import UsageError
from toy_modular import figures_factorial, figures_modes, figures_prediction, figures_spectra
from toy_modular.alignment import at_progress, toy_window
from toy_modular.figures import FIGURES, FigureConfig, draw_figures, main, run_figures
from toy_modular.mode_tables import (
    chance_peaks,
    fixed_modes,
    mean_beyond,
    null_peak,
    null_scores,
    peak,
    scores,
)
from toy_modular.nulls import next_code_null, white_null
from toy_modular.records import LAST, SPECTRUM, read_study
from toy_modular.sweeps import sweep

SMALL = {"width": 24, "bands": ("23_4", "24_4"), "groups": 4}
BAND = "23_4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("study") / "s"
    return make_study(made, batches=(32, 64, 128, 256, 512), seeds=(0, 1), **SMALL)


@pytest.fixture(scope="module")
def study(folder):
    return read_study(folder)


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    made = tmp_path_factory.mktemp("cells") / "s"
    return make_study(made, stages=CELLS, batches=(128,), seeds=(0, 1), **SMALL)


def drawn(function, study, **keys):
    figure = Figure(figsize=(7, 4), layout="constrained")
    return function(figure, study, FigureConfig(**keys)), figure


def panels(figure):
    return [ax for sub in figure.subfigs for ax in sub.axes]


def claim_of(claims, words):
    return next(claim for claim in claims if words in claim.claim)


# 4a


def test_a_planted_order_is_found_and_goes_beyond_the_batch_size(study):
    claims, figure = drawn(figures_prediction.draw, study)
    order = claim_of(claims, "higher token efficiency")
    assert (order.verdict, order.n, order.seeds) == ("held", 5, 2)
    assert order.window == "2-8"  # ranks 10-40 at width 24
    assert order.statistic == pytest.approx(1.0)
    assert order.p == pytest.approx(2 / 120)
    assert "rho(-log B, efficiency) = 0.70" in order.control
    assert claim_of(claims, "batch size does").verdict == "held"
    assert claim_of(claims, "reaches 1").verdict == "held"
    note = " ".join(figure.subfigs[1].texts[0].get_text().split())
    for words in (
        "n = 5 batch sizes",
        "2 seeds",
        "alike",
        "Max over 4 windows and 20 looks",
        "Held",
    ):
        assert words in note


def test_curves_of_4a_are_correlations_of_the_fits(study):
    runs = sweep(study, "muon")
    _, figure = drawn(figures_prediction.draw, study)
    lines = [line for line in panels(figure)[0].lines if len(line.get_xdata()) == 20]
    assert len(lines) == 3  # two seeds and their mean
    look = 3  # 20 %
    for line, row, efficiency in zip(lines, runs.runs, runs.efficiency, strict=False):
        alphas = []
        for run in row:
            values = at_progress(run, run.spectra, 0.2).row.array(SPECTRUM, LAST)
            alphas.append(fit_power_law(values, *toy_window(10, 40, 24)).alpha)
        assert line.get_ydata()[look] == pytest.approx(spearman(alphas, efficiency))
    mean = np.mean([line.get_ydata() for line in lines[:2]], axis=0)
    np.testing.assert_allclose(lines[2].get_ydata(), mean)


def test_an_order_by_batch_size_alone_is_not_taken_for_more(tmp_path):
    made = make_study(
        tmp_path / "s", stages=("muon",), batches=(32, 64, 128, 256, 512), seeds=(0, 1),
        planted="batch", **SMALL,
    )  # fmt: skip
    claims, _ = drawn(figures_prediction.draw, read_study(made))
    order = claim_of(claims, "higher token efficiency")
    assert order.statistic == pytest.approx(0.7)
    assert order.verdict == "undecided"
    assert claim_of(claims, "batch size does").verdict != "held"


def test_few_batch_sizes_decide_nothing(tmp_path):
    made = make_study(
        tmp_path / "s", stages=("muon",), batches=(32, 64, 128), seeds=(0, 1, 2), **SMALL
    )
    claims, figure = drawn(figures_prediction.draw, read_study(made))
    assert claim_of(claims, "higher token efficiency").verdict == "undecided"
    assert claim_of(claims, "reaches 1").verdict == "undecided"
    note = " ".join(figure.subfigs[1].texts[0].get_text().split())
    assert "no rho has p of 0.05 or below" in note


def test_batch_sizes_without_a_spectrum_at_the_look_do_not_count(study):
    runs = sweep(study, "muon")
    progress = np.random.default_rng(0).normal(size=(4, 2, 20, 5))
    whole = figures_prediction.tests(runs, progress, 3)
    assert (whole.members, whole.least_p) == (5, pytest.approx(2 / 120))
    progress[0, :, 3, :2] = np.nan
    part = figures_prediction.tests(runs, progress, 3)
    assert (part.members, part.least_p) == (3, pytest.approx(2 / 6))
    assert part.alike.p > 0.05


# 4b, 11b, factorial


def test_planted_modes_and_their_nulls(study):
    row = next(run for run in study.stage("untied") if run.batch == 64).features[-1]
    law = row.array("law", BAND)
    mode, strength = planted_mode(23), planted_strength("untied")
    fixed = fixed_modes(row, BAND, 2, "current")
    assert fixed[0] == mode
    found = scores(row, "current", BAND, fixed, 2)
    assert found.peak == pytest.approx(strength / 2, abs=0.03)
    assert found.dominant == pytest.approx(2 * found.peak)
    assert found.greatest == pytest.approx(found.fixed)  # the set was taken from this table
    null = null_scores(row, "current", BAND, fixed, 2)
    assert null.peak == next_code_null(23, law).share == null_peak(row, "current", BAND)
    assert null.dominant == pytest.approx(2 * null.peak)
    assert null_scores(row, "next", BAND, fixed, 2) == pytest.approx(
        (white_null(23), 2 / 22, 4 / 22, 4 / 22)
    )
    assert peak(row, "current", BAND) == found.peak
    chance = chance_peaks(row, "current", BAND)
    assert found.peak > chance["next"].upper > null.peak
    flat = null_scores(row, "current", BAND, fixed, 2, "current")
    assert flat == pytest.approx((white_null(23), 2 / 22, 4 / 22, 4 / 22))
    assert null.peak > chance["current"].upper > flat.peak == null_peak(row, "next", BAND)
    seen = null_scores(row, "next", BAND, fixed, 2, "current")
    assert seen == null  # the kernel of one state in the table by the other is the same both ways
    beyond = found.peak - null.peak
    assert mean_beyond(row, "current", [BAND]) == pytest.approx(beyond)
    start = next(run for run in study.stage("baseline") if run.batch == 64).features[0]
    low = peak(start, "current", BAND) - null_peak(start, "current", BAND)
    assert mean_beyond(start, "current", [BAND]) == max(low, 0.0)


def test_curves_of_4b_end_at_the_scores_of_the_last_tables(study):
    claims, figure = drawn(figures_modes.draw_curves, study, band="23:4")
    axes = panels(figure)
    assert len(axes) == 8
    ends = [line.get_ydata()[-1] for line in axes[0].lines if len(line.get_xdata()) > 2]
    last = [run.features[-1] for stage in CORE for run in study.stage(stage) if run.batch == 32]
    np.testing.assert_allclose(ends, [peak(row, "current", BAND) for row in last])
    assert claims[0].window == "band 23:4"
    assert claims[0].verdict == "undecided"  # two seeds
    assert "the largest in 2" in claims[0].sentence
    assert drawn(figures_modes.draw_curves, study, x="tokens", batch=512)[0][0].n == 2


def test_bars_are_means_of_pairs(study):
    claims, figure = drawn(figures_modes.draw_bars, study)
    last = [
        peak(after.features[-1], "current", BAND) - peak(before.features[-1], "current", BAND)
        for before, after in zip(study.stage("muon"), study.stage("untied"), strict=True)
    ]
    claim = claim_of(claims, "muon to untied")
    assert (claim.n, claim.verdict) == (10, "held")
    assert claim.statistic == pytest.approx(np.mean(last))
    assert claim.p == pytest.approx(2 / 1024)
    heights = [bar.get_height() for bar in panels(figure)[0].patches]
    assert np.any(np.isclose(heights, np.mean(last)))
    numbers = [text.get_text() for text in panels(figure)[0].texts]
    assert numbers == ["10"] * 9


def test_bars_at_steps_leave_out_runs_that_ended_before(study):
    steps = (max(run.result["step"] for run in study.stage("untied")) + 1,)
    claims, figure = drawn(figures_modes.draw_bars, study, align="steps", steps=steps)
    numbers = [text.get_text() for text in panels(figure)[0].texts]
    longer = [run for run in study.stage("rope") if run.result["step"] >= steps[0]]
    assert 0 < int(numbers[0]) <= len(longer)
    assert numbers[2] == "none"
    assert claims[2].verdict == "undecided"
    with pytest.raises(Missing, match="probed at the same places; give a larger ratio="):
        drawn(figures_modes.draw_bars, study, align="steps", steps=(10**6,))


def test_effects_are_those_planted(cells):
    study = read_study(cells)
    claims, figure = drawn(figures_factorial.draw, study)
    found = {claim.claim.rpartition(":")[0]: claim for claim in claims if "H_peak" in claim.claim}
    assert [claim.n for claim in found.values()] == [4, 8, 4, 4, 12, 8, 4]
    assert found["small embedding, untied head"].seeds == 2
    peaks = {
        head: np.mean([
            peak(run.features[-1], "current", BAND)
            for run in study.runs
            if run.stage.startswith(f"cell-{head}-std1") and run.stage.endswith("random")
        ])
        for head in ("tied", "untied")
    }  # fmt: skip
    head = found["untied head, embedding of std 1"]
    assert head.verdict == "undecided"  # four pairs cannot decide
    assert head.statistic == pytest.approx(peaks["untied"] - peaks["tied"])
    assert found["untied head, small embedding"].statistic > 0.1  # 0.35 / 2 is planted
    assert abs(found["norm after embedding"].statistic) < 0.06
    tokens = [claim for claim in claims if "tokens" in claim.claim]
    assert [claim.n for claim in tokens] == [claim.n for claim in found.values()]
    assert len(panels(figure)) == 3


def test_an_effect_is_taken_at_one_level_of_the_other_factor():
    values = {
        "tied-std1-nonorm-random": 1.0, "tied-std.09-nonorm-random": 5.0,
        "untied-std1-nonorm-random": 2.0, "untied-std.09-nonorm-random": 3.5,
        "untied-std1-nonorm-zero": 2.25,
    }  # fmt: skip
    runs = [
        type("Run", (), {"stage": f"cell-{cell}", "name": cell, "batch": 8, "seed": 0})
        for cell in values
    ]
    found = {e.name: e.differences.tolist() for e in figures_factorial.effects(runs, values)}
    assert list(found.values()) == [[4.0], [1.5], [1.0], [-1.5], [], [0.25], [2.5]]
    no_end = figures_factorial.effects(runs, values | {"tied-std.09-nonorm-random": np.nan})
    assert [e.differences.tolist() for e in no_end] == [[], [1.5], [1.0], [], [], [0.25], []]


def test_cells_have_names_of_four_levels():
    with pytest.raises(ValueError, match="stage cell-tied-loud: give cell-HEAD-STD-NORM-START"):
        figures_factorial.levels(type("Run", (), {"stage": "cell-tied-loud"}))


# 11a, 11c


def test_deep_tails_are_ordered_by_batch_size(study):
    claims, figure = drawn(figures_spectra.draw_spectra, study)
    deep = claim_of(claims, "ranks 9-24")
    assert (deep.verdict, deep.statistic) == ("held", pytest.approx(1.0))
    assert deep.p == pytest.approx(2 / 120)
    legend = [text.get_text() for text in panels(figure)[2].get_legend().get_texts()]
    assert [text.partition(":")[0] for text in legend] == [f"B = {2**k}" for k in range(5, 10)]
    run = study.stage("untied")[0]
    values = run.spectra[-1].array(SPECTRUM, LAST)
    np.testing.assert_allclose(panels(figure)[2].lines[0].get_ydata(), values / values.sum())


def test_no_row_near_the_asked_loss_is_told(study):
    with pytest.raises(Missing, match=r"loss 0\.500 .* of 0 batch sizes, 3 are needed"):
        drawn(figures_spectra.draw_spectra, study, loss=0.5)


def test_divergences_are_those_of_matched_rows(study):
    claims, _ = drawn(figures_spectra.draw_divergence, study)
    assert [claim.n for claim in claims] == [10, 10, 10]
    assert "seed floor 0.0" in claims[-1].control
    assert {claim.seeds for claim in claims} == {len({run.seed for run in study.runs})}
    one = figures_spectra.Divergence(0.010, 5, 0.001, 0)
    for seeds, verdict in (([], "undecided"), ([0.003], "held"), ([0.004], "did not hold")):
        assert figures_spectra.divergence_claim(("a", "b"), [one], seeds).verdict == verdict
    noisy = one._replace(floor=0.004)  # sampling counts where it is the higher floor
    assert figures_spectra.divergence_claim(("a", "b"), [noisy], [0.0]).verdict == "did not hold"
    before, after = study.stage("rope")[0], study.stage("muon")[0]
    found = figures_spectra.divergence(before, after, 0.02)
    pairs = [
        jsd(a.array(SPECTRUM, LAST), b.array(SPECTRUM, LAST))
        for a in before.spectra
        for b in after.spectra
        if abs(a.val_loss - b.val_loss) <= 0.02
    ]
    assert min(pairs) <= found.jsd <= max(pairs)
    assert 0 < found.floor < found.jsd
    same = figures_spectra.divergence(before, before, 0.02)
    assert (same.jsd, same.losses) == (0.0, len(before.spectra))
    assert figures_spectra.divergence(before, after, 0.2).losses >= found.losses


# The command


def test_the_command_writes_every_figure_and_the_claims(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([f"study={folder}", f"out={out}"]) == 0
    printed = capsys.readouterr().out
    assert "factorial: not drawn: no finished run of a stage cell-..." in printed
    names = [name for name in FIGURES if name != "factorial"]
    expected = {f"figure_{name}.{kind}" for name in names for kind in ("png", "pdf")}
    expected |= {"claims.csv", "claims.json", "features.csv"}
    assert {path.name for path in out.iterdir()} == expected
    assert (out / "figure_4a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (out / "figure_4b.pdf").read_bytes()[:5] == b"%PDF-"
    rows = list(csv.DictReader((out / "claims.csv").open()))
    assert [row["figure"] for row in rows] == [
        claim["figure"] for claim in json.loads((out / "claims.json").read_text())
    ]
    assert {row["figure"] for row in rows} == set(names)
    assert {row["verdict"] for row in rows} <= {"held", "did not hold", "undecided"}
    assert all(row["sentence"] in printed for row in rows)


def test_missing_stages_are_named_and_the_rest_is_drawn(tmp_path):
    made = make_study(
        tmp_path / "s", stages=("muon",), batches=(32, 64, 128), seeds=(0,), **SMALL,
        unfinished=("muon-b128-s0",),
    )  # fmt: skip
    told = []
    assert run_figures(FigureConfig(study=str(made)), told.append) == []
    text = "\n".join(told)
    assert "unfinished: muon-b128-s0: has no result.json yet" in text
    assert "4a: not drawn: stage muon has finished runs of 2 batch sizes and 3 are needed" in text
    assert "4b: not drawn: no finished run of baseline, rope, untied" in text
    assert "11a: not drawn: stage untied has finished runs of 0 batch sizes" in text
    assert "11b: not drawn: no two consecutive stages" in text
    assert draw_figures(made, made / "figures") == told
    assert [path.name for path in (made / "figures").iterdir()] == ["features.csv"]
    assert main([f"study={made}"]) == 1


def test_one_figure_keeps_the_claims_of_others(cells, tmp_path):
    out = tmp_path / "out"
    config = FigureConfig(study=str(cells), fig="factorial", out=str(out))
    assert len(run_figures(config, lambda line: None)) == 14
    assert {path.name for path in out.iterdir()} == {
        "figure_factorial.png", "figure_factorial.pdf",
        "claims_factorial.csv", "claims_factorial.json",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "study= is missing"),
        (["study=nowhere"], "study=nowhere: no such folder"),
        (["study=nowhere", "fig=4c"], "fig=4c: give one of all, 4a, 4b"),
        (["study=nowhere", "windw=1,2"], "did you mean window?"),
        (["study=nowhere", "window=10,11"], "window=10,11: give FIRST,LAST"),
        (["study=nowhere", "bands=97_200"], "band 97_200: give modulus:offset"),
        (["study=nowhere", "tolerance=0"], "tolerance=0.0: give a positive number"),
        (["study=nowhere", "at=2"], "at=2.0: give a share"),
        (["study={folder}", "out=no/where"], "out=no/where: its folder does not exist"),
    ],
)
def test_bad_words_are_answered_in_one_line(folder, words, part):
    with pytest.raises(UsageError) as error:
        main([word.format(folder=folder) for word in words])
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_help_loads_no_matplotlib_and_figures_no_jax(folder, tmp_path):
    code = (
        "import sys; from toy_modular.figures import main; assert main(['--help']) == 0\n"
        "print('loaded', *({'jax', 'flax', 'matplotlib'} & set(sys.modules)))\n"
        f"assert main(['study={folder}', 'fig=11b', 'out={tmp_path / 'o'}']) == 0\n"
        "print('loaded', *({'jax', 'flax', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("loaded")] == [
        "loaded"
    ] * 2
