"""Figures 1 and 3: kinds of gain by their rules, shifts in seed floors, and the sheets."""

import json
from itertools import combinations, pairwise
from math import log
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from synthetic_language_study import TARGET, make_study, name

from experiments.figures import operational, tricks
from experiments.figures.options import Options, resolved
from experiments.figures.speed import steady_throughput, timings_text
from experiments.figures.taxonomy import (
    ACTIVATION,
    SPECTRA,
    Matched,
    direction,
    interval,
    kind_of,
    led_by,
    log_gain,
    transitions,
)
from experiments.study_records import Run, read_study
from lens_jax.claims import Missing
from lens_jax.fits import fit_power_law, jsd

LAST = "h_11/resid_post"
KERNELS = ("h_11/attn/c_proj/kernel", "h_11/mlp/c_proj/kernel")
SMALL = {"sites": (LAST,), "kernels": KERNELS, "groups": 2, "trials": ()}
RUNGS = ("baseline", "muon", "untied", "flexwin")
OPTIONS = Options(tolerance=0.08)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    made = tmp_path_factory.mktemp("tricks") / "s"
    return read_study(
        make_study(
            made, rungs=RUNGS, batches=(4, 8, 16), seed_cells=(("muon", "d12", 8, (0, 1, 2)),),
            **SMALL,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One seed only, and a rung that missed its target."""
    made = tmp_path_factory.mktemp("alone") / "s"
    lost = [name("untied", batch=batch) for batch in (8, 16)]
    return read_study(
        make_study(made, rungs=RUNGS, batches=(8, 16), seed_cells=(), censored=lost, **SMALL)
    )


def drawn(function, study, options=OPTIONS):
    figure = Figure(figsize=(7.2, 5), layout="constrained")
    return function(figure, study, resolved(study, options)), figure


def caption_of(figure):
    return " ".join(figure._supxlabel.get_text().split())


def naive_crossing(run):
    """Tokens at the target by the two validations around it."""
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    rows = [(row["tokens"], row["loss"]) for row in rows if row["kind"] == "val"]
    for (n0, l0), (n1, l1) in pairwise(rows):
        if l1 < TARGET:
            return n0 * (n1 / n0) ** ((l0 - TARGET) / (l0 - l1))
    return float("inf")


# The rules


@pytest.mark.parametrize(
    ("tokens", "speed", "kind"),
    [
        (0.10, 0.01, "learning-side"),
        (0.10, -0.02, "learning-side"),
        (0.01, 0.10, "throughput-side"),
        (0.10, 0.10, "joint"),
        (0.10, -0.10, "tradeoff"),
        (-0.10, 0.10, "tradeoff"),
        (0.02, 0.02, "null"),
        (-0.10, -0.10, "null"),
        (-0.10, 0.0, "null"),
        (float("nan"), 0.1, "not measured"),
    ],
)
def test_kinds(tokens, speed, kind):
    assert kind_of(tokens, speed) == kind


def test_a_gain_within_its_noise_is_none():
    assert kind_of(0.10, 0.0, (0.075, 0.0)) == "null"


def test_a_gain_is_held_against_its_error_as_a_logarithm():
    error = log(1.5) / 2  # so 50 % more is just within it, and so are 33 % less
    assert direction(0.51, error) == 1
    assert direction(0.49, error) == 0  # though more than 2 * error = 0.41
    assert direction(-0.34, error) == -1  # though less than that
    assert direction(-0.33, error) == 0
    low, high = interval(0.5, error)
    assert (low, high) == (pytest.approx(0.0), pytest.approx(1.25))
    assert interval(0.5, float("nan")) == (pytest.approx(0.5), pytest.approx(0.5))


@pytest.mark.parametrize(
    ("activation", "gradient", "led"),
    [
        (9.0, 2.0, "activation-led"),
        (2.0, 9.0, "gradient-led"),
        (9.0, 8.0, "mixed"),
        (8.0, 9.0, "mixed"),
        (2.9, 2.9, "unresolved"),
        (3.0, 2.4, "activation-led"),
        (9.0, float("nan"), "unresolved"),
    ],
)
def test_what_led(activation, gradient, led):
    assert led_by(activation, gradient) == led


def timed_run(folder, rows):
    """A run whose training rows are (step time or None, window or None)."""
    folder.mkdir()
    lines = [
        {"kind": "train", "step": step, "tokens": step, "loss": 1.0, "step_time_s": seconds,
         "window_blocks": window}
        for step, (seconds, window) in enumerate(rows)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return Run(folder, {"batch": 8, "size.long_row": 512}, {})


def test_a_run_none_of_whose_steps_was_timed_has_no_speed(tmp_path):
    run = timed_run(tmp_path / "r", [(None, 1.0)] * 30)
    assert "step_time_s" not in run.train
    assert np.isnan(steady_throughput(run))
    assert timings_text([("lswa", [run])]) == (
        "Timed steps (window in blocks): too few: lswa 0 (1)."
    )


def test_few_timed_steps_are_no_speed_and_the_caption_says_what_there_is(tmp_path):
    steps = {count: [(3.0, None)] * 20 + [(2.0, 4.0)] * count for count in (4, 5)}
    few, enough = (timed_run(tmp_path / f"{count}", rows) for count, rows in steps.items())
    assert np.isnan(steady_throughput(few))
    assert steady_throughput(enough) == 8 * 512 / 2.0
    plain = timed_run(tmp_path / "plain", [(1.0, None)] * 25)
    assert timings_text([("baseline", [plain]), ("lswa", [enough]), ("untied", [enough, few])]) == (
        "Timed steps (window in blocks): baseline 15, lswa 5 (4); too few: untied 4 (4)."
    )


def test_throughput_is_of_the_widest_window_after_compiling(tmp_path):
    rows = [(step, 5.0 if step < 10 else 2.0 if step < 20 else 4.0) for step in range(30)]
    lines = [
        {"kind": "train", "step": s, "tokens": s, "loss": 1.0, "step_time_s": t,
         "window_blocks": 1.0 if s < 20 else 14.0}
        for s, t in rows
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    run = Run(tmp_path, {"batch": 8, "size.long_row": 512}, {})
    assert steady_throughput(run) == 8 * 512 / 4.0
    few = "".join(json.dumps({**row, "window_blocks": None}) + "\n" for row in lines[:5])
    (tmp_path / "metrics.jsonl").write_text(few)
    short = Run(tmp_path, {"batch": 8, "size.long_row": 512}, {})
    assert steady_throughput(short) == 8 * 512 / 5.0
    (tmp_path / "metrics.jsonl").write_text("")
    assert np.isnan(steady_throughput(Run(tmp_path, {"batch": 8, "size.long_row": 512}, {})))


def test_a_log_gain_is_a_mean_of_logarithms():
    assert log_gain([1.0, 4.0], [8.0]) == pytest.approx(log(4))
    assert np.isnan(log_gain([1.0], [np.inf]))


def test_a_transition_is_judged_where_all_of_it_is_known(study):
    first = transitions(study, OPTIONS)[0][0]
    assert first.judged
    assert not first._replace(throughput=float("nan")).judged
    lost = {key: float("nan") for key in first.shifts}
    assert not first._replace(shifts=lost).judged


# Transitions


def test_untimed_steps_leave_the_rest_of_the_figure(tmp_path):
    """At the largest batches a validation comes before every step, so no step has a time."""
    folder = make_study(tmp_path / "s", rungs=("baseline", "muon"), batches=(8,), **SMALL)
    for path in folder.glob("runs/*/metrics.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [row | {"step_time_s": None} if row["kind"] == "train" else row for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    claims, figure = drawn(tricks.draw_3, read_study(folder))
    assert "1 not measured" in claims[0].sentence
    assert "too few: baseline 0 (2), muon 0 (2)" in caption_of(figure)


def test_gains_are_those_of_the_token_best_batches(study):
    made, noise, left_out = transitions(study, OPTIONS)
    assert [own.name for own in made] == [f"{a} \u2192 {b}" for a, b in pairwise(RUNGS)]
    assert left_out == []
    assert noise.runs == 3
    first = made[0]
    assert first.before.first.batch == first.after.first.batch == 8  # where COST is least
    assert len(first.after.runs) == 3
    before = naive_crossing(first.before.first)
    after = np.exp(np.mean([np.log(naive_crossing(run)) for run in first.after.runs]))
    assert first.tokens == pytest.approx(before / after - 1)
    assert first.equal_batch == pytest.approx(first.tokens)
    assert first.throughput == pytest.approx(0.0)
    assert first.time == pytest.approx(first.tokens)
    sd = np.std([np.log(naive_crossing(run)) for run in first.after.runs], ddof=1)
    assert first.errors[0] == pytest.approx(sd * np.sqrt(1 + 1 / 3))
    assert first.kind == "learning-side"


def test_shifts_are_divergences_in_seed_floors(study):
    made, noise, _ = transitions(study, OPTIONS)
    first = made[0]
    finals = [
        [run.steps[-1].array(ACTIVATION, LAST) for run in member.runs]
        for member in (first.before, first.after)
    ]
    floor = np.median([jsd(*pair) for pair in combinations(finals[1], 2)])
    moved = np.mean([jsd(finals[0][0], b) for b in finals[1][1:]])  # of unlike seeds
    assert noise.floors[SPECTRA[0]] == pytest.approx(floor)
    assert first.shifts[SPECTRA[0]] == pytest.approx(moved / floor)
    heads = [[fit_power_law(v, 1, 10).alpha for v in own] for own in finals]
    change = np.mean(heads[1]) - np.mean(heads[0])
    assert first.changes["activation head"] == pytest.approx(change)


def test_a_rung_that_missed_the_target_is_stepped_over(alone):
    made, noise, left_out = transitions(alone, OPTIONS)
    assert [own.name for own in made] == ["baseline \u2192 muon", "muon \u2192 flexwin"]
    assert left_out == ["untied"]
    assert noise.runs == 0
    assert np.isnan(noise.tokens.seeds)
    assert np.isnan(made[0].errors).all()
    assert made[0].led == "unresolved"


def test_spectra_at_another_loss_are_not_compared(study):
    matched = Matched(study, Options(tolerance=1e-9))
    run = study.chosen[0]
    assert matched.spectrum(run, ACTIVATION, None) is None
    assert matched.divergence([(run, run)], ACTIVATION, None) == []


# The sheets


def test_figure_3(study):
    claims, figure = drawn(tricks.draw_3, study)
    assert len(figure.axes) == 5
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == [f"{a} \u2192 {b}" for a, b in pairwise(RUNGS)]
    kinds = [text.get_text().partition("\n")[0] for text in figure.axes[0].texts]
    made, _, _ = transitions(study, OPTIONS)
    assert kinds == [own.kind for own in made]
    said = caption_of(figure)
    assert "3 transitions between the 4 rungs of this study, of 15" in said
    assert "from 3 runs in cells with several seeds" in said
    assert "Timed steps (window in blocks): baseline" in said
    bars = figure.axes[0].containers[0].lines[2][0].get_segments()
    ends = 100 * np.array([interval(own.tokens, own.errors[0]) for own in made])
    np.testing.assert_allclose([segment[:, 0] for segment in bars], ends)
    gains, prefix = claims
    ends = made[0].before.runs, made[-1].after.runs
    total = sum(np.log1p(own.tokens) for own in made)
    sd = np.std([np.log(naive_crossing(run)) for run in made[0].after.runs], ddof=1)
    assert [len(runs) for runs in ends] == [1, 1]
    assert gains.statistic == pytest.approx(total / (sd * 2**0.5))
    assert gains.p == pytest.approx(1 - 1 / (1 + 2 / gains.statistic**2) ** 0.5)  # t of 2 degrees
    assert "from baseline to flexwin, each at its best batch" in gains.sentence
    assert "seed floors" in prefix.control


def test_figure_3_without_seeds_says_so(alone):
    claims, figure = drawn(tricks.draw_3, alone)
    said = caption_of(figure)
    assert "No cell has several seeds" in said
    assert "Left out, for no run reached the target: untied." in said
    assert claims[1].verdict == "undecided"
    assert "no floor" in claims[1].control


def test_figure_3_without_spectra_at_the_loss_has_gains(study):
    _, figure = drawn(tricks.draw_3, study, Options(tolerance=1e-9))
    notes = [text.get_text() for ax in figure.axes[1:] for text in ax.texts]
    assert notes == ["not measured\nat this loss"] * 4


def test_late_rungs_are_asked_for_speed(study, monkeypatch):
    made, _, _ = transitions(study, OPTIONS)
    assert tricks._speed_claim(made, 1) == []
    pair = [SimpleNamespace(family=SimpleNamespace(rung=rung)) for rung in ("softcap", "fp8head")]
    late = made[0]._replace(before=pair[0], after=pair[1], throughput=0.2, tokens=0.01)
    (claim,) = tricks._speed_claim([late], 1)
    assert (claim.verdict, claim.n) == ("held", 1)
    (claim,) = tricks._speed_claim([late._replace(tokens=0.001, throughput=0.002)], 1)
    assert claim.verdict == "undecided"  # neither counts
    (claim,) = tricks._speed_claim([late._replace(tokens=0.3)], 1)
    assert claim.verdict == "did not hold"
    (claim,) = tricks._speed_claim([late._replace(throughput=float("nan"))], 1)
    assert claim.verdict == "undecided"


def test_figure_1(study):
    claims, figure = drawn(operational.draw_1, study)
    assert len(figure.axes) == 3
    solid = [line for line in figure.axes[0].lines if line.get_linestyle() == "-"]
    dashed = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert len(solid) == len(dashed) == 3
    assert [text.get_text() for text in figure.axes[1].texts] == ["B 4", "B 8", "B 16"]
    said = caption_of(figure)
    for part in ("n = 3 batches of flexwin-d12", "The paper has flexwin-d36", "ranks 6-12 (90-200"):
        assert part in said
    apart, order = claims
    assert apart.verdict == "held"
    assert order.statistic == pytest.approx(1.0)
    assert order.verdict == "undecided"  # three batches cannot decide
    assert "rho of -log B alone 0.50" in order.sentence


def test_batches_are_held_apart_by_pairs_of_unlike_seeds_as_the_floor_is(study):
    family = next(own for own in study.families if own.rung == "muon")
    finals = {}
    for run in study.of(family):
        finals.setdefault(run.batch, []).append(run.steps[-1].array(ACTIVATION, LAST))
    assert [len(finals[batch]) for batch in (4, 8, 16)] == [1, 3, 1]
    found = operational.separations(study, family, Matched(study, OPTIONS))
    unlike = [[jsd(finals[batch][0], own) for own in finals[8][1:]] for batch in (4, 16)]
    alone = jsd(finals[4][0], finals[16][0])  # one seed each, and the same
    assert found == pytest.approx([np.median(unlike[0]), alone, np.median(unlike[1])])


def test_figure_1_of_another_rung_and_without_early_rows(study):
    options = Options(tolerance=0.08, rung="muon", tokens=2**30)
    claims, figure = drawn(operational.draw_1, study, options)
    assert "n = 3 batches of muon-d12, 1 to 3 seeds a cell" in caption_of(figure)
    assert "no run measured" in figure.axes[1].texts[0].get_text()
    assert claims[1].verdict == "undecided"


def test_a_fitted_line_lies_on_a_power_law():
    ranks = np.arange(1, 41, dtype=float)
    ends, line = operational.fitted_line(3.0 * ranks**-1.7, 6, 12)
    np.testing.assert_allclose(line, 3.0 * ends**-1.7)
    assert tuple(ends) == (4.0, 18.0)


def test_what_is_missing_is_named(study):
    for function in (tricks.draw_3, operational.draw_1):
        with pytest.raises(Missing, match=r"python -m experiments\.study preset=fig"):
            drawn(function, study, Options(target=0.1))
