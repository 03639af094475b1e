"""The study folder as tables, and the rows that are compared, against what was planted in it."""

import json
import shutil

import numpy as np
import pytest
from synthetic_study import COST, STAGE_COST, make_study

from lens_jax.alignment import at_loss, at_tokens, common_loss, equal_losses
from lens_jax.claims import Claim, claims_csv, claims_json, sign_flip_test, verdict
from lens_jax.fits import fit_power_law, rankme
from lens_jax.jackknife import alpha_error
from lens_jax.records import read_step
from toy_modular.alignment import (
    alpha,
    at_progress,
    effective_rank,
    token_efficiency,
    tokens_to_target,
    toy_window,
)
from toy_modular.config import is_prime
from toy_modular.records import LAST, SPECTRUM, Row, band_numbers, read_study
from toy_modular.sweeps import Missing, chosen_bands, pairs, shared_batch, sweep

SMALL = {"stages": ("muon", "untied"), "batches": (32, 64, 128), "seeds": (0, 1), "width": 24}
UNFINISHED, CENSORED = "muon-b128-s1", "muon-b32-s0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = make_study(
        tmp_path_factory.mktemp("study") / "s", **SMALL, unfinished=(UNFINISHED,),
        censored=(CENSORED,),
    )  # fmt: skip
    (made / "runs" / "rope-b32-s0").mkdir()  # begun, nothing written yet
    return made


@pytest.fixture
def study(folder):
    return read_study(folder)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def run_of(study, name):
    return next(run for run in study.runs if run.name == name)


def test_runs_are_read_in_order_and_the_unfinished_reported(study):
    assert [run.name for run in study.stage("untied")] == [
        f"untied-b{batch}-s{seed}" for batch in (32, 64, 128) for seed in (0, 1)
    ]
    assert len(study.runs) == 12
    assert study.unfinished == (
        "muon-b128-s1: has no result.json yet",
        "rope-b32-s0: has no config.json yet",
    )
    assert UNFINISHED not in [run.name for run in study.stage("muon")]
    assert study.edges("untied") == [32]


def test_rows_and_metrics_are_those_of_the_files(study):
    run = run_of(study, "untied-b64-s1")
    for rows, kind in ((run.spectra, "spectra"), (run.features, "features")):
        files = sorted((run.path / kind).glob("step_*.npz"))
        assert [row.path for row in rows] == files
        meta, arrays = read_step(files[-1])
        assert (rows[-1].step, rows[-1].tokens) == (meta["step"], meta["tokens"])
        assert rows[-1].val_loss == meta["val_loss"]
        assert rows[-1].names == set(arrays)
    _, arrays = read_step(run.spectra[3].path)
    np.testing.assert_array_equal(
        run.spectra[3].array(SPECTRUM, LAST), arrays[f"{SPECTRUM}/{LAST}"]
    )
    assert run.val["step"].tolist() == [row.step for row in run.spectra]
    assert run.train["loss"].tolist() == [row.val_loss for row in run.spectra]
    assert run.bands == ["23_4", "24_4"]
    assert band_numbers("23_4") == (23, 4)


def test_a_row_reads_only_the_array_that_is_asked_for(study, monkeypatch):
    row = run_of(study, "untied-b64-s1").spectra[0]
    read = []
    original = np.lib.npyio.NpzFile.__getitem__
    monkeypatch.setattr(
        np.lib.npyio.NpzFile,
        "__getitem__",
        lambda self, key: read.append(key) or original(self, key),
    )
    row.array(SPECTRUM, LAST)
    assert read == [f"{SPECTRUM}/{LAST}"]


def test_damage_is_told_in_one_line_with_the_file(copy):
    run = copy / "runs" / "untied-b64-s1"
    step = next((run / "spectra").glob("step_*.npz"))
    step.write_bytes(step.read_bytes()[:2000])
    for change, words in [
        (lambda: read_study(copy / "nowhere"), "no such folder"),
        (lambda: read_study(run), r"no study \(no folder runs/ in it\)"),
        (lambda: run_of(read_study(copy), "untied-b64-s1").spectra, f"{step.name}: damaged"),
        (lambda: _with(run / "metrics.jsonl", "{}\n"), r"metrics\.jsonl: line 1 is no metrics"),
        (lambda: _with(run / "result.json", '{"step": 3}'), r"result\.json: lacks step, tokens or"),
        (lambda: _with(run / "config.json", '{"stage": "a"}'), r"config\.json: no batch in it"),
        (lambda: _with(run / "config.json", "{"), r"config\.json: not JSON"),
    ]:
        with pytest.raises(ValueError, match=words) as error:
            change()
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"no array current/9_9 in it"):
        Row(step, 0, 0, 0.0, frozenset()).array("current", "9_9")


def _with(path, text):
    """The run of a file after it was overwritten; the file is put back."""
    before = path.read_text()
    path.write_text(text)
    try:
        run = run_of(read_study(path.parents[2]), path.parent.name)
        assert run.val
        return run
    finally:
        path.write_text(before)


def test_a_cut_last_metrics_line_is_left_out(copy):
    path = copy / "runs" / "untied-b64-s1" / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-9])
    run = run_of(read_study(copy), "untied-b64-s1")
    assert run.val["loss"].size == len(run.spectra) - 1


def rows_at(*losses):
    return [Row(None, i, 1000 * (i + 1), loss, frozenset()) for i, loss in enumerate(losses)]


def test_matched_rows_are_the_nearest_within_the_tolerance():
    rows = rows_at(6.0, 3.0, 2.52, 2.03, 1.99, float("nan"))
    assert at_loss(rows, 2.0).row.val_loss == 1.99
    assert at_loss(rows, 2.0).off == pytest.approx(-0.01)
    assert at_loss(rows, 2.5).off == pytest.approx(0.02)
    assert at_loss(rows, 2.5, 0.01) is None
    assert at_loss(rows, 2.3) is None
    assert at_loss([], 2.0) is None


def test_a_common_loss_serves_most_runs_and_then_is_the_lowest():
    runs = [rows_at(5.0, 3.0, 2.0), rows_at(5.01, 3.01, 2.2), rows_at(5.0, 2.99, 2.01)]
    assert common_loss(runs) == (2.99, 3)
    assert common_loss([*runs, rows_at(2.0)]) == (2.0, 3)  # of two with three runs
    assert common_loss([runs[0], runs[2]])[0] == 2.0
    assert common_loss([])[1] == 0


def test_rows_of_equal_loss_are_nearest_to_each_other():
    one, other = rows_at(9.0, 4.0, 3.0, 2.0), rows_at(5.0, 3.01, 3.005, 2.03, 1.99)
    found = [(a.val_loss, b.val_loss) for a, b in equal_losses(one, other)]
    assert found == [(3.0, 3.005), (2.0, 1.99)]
    assert len(equal_losses(one, other, 0.001)) == 0
    assert equal_losses(one, []) == []


def test_progress_and_tokens_take_near_rows_and_no_endpoint_for_an_early_value(study):
    run = run_of(study, "untied-b64-s1")
    last = run.result["step"]
    half = at_progress(run, run.spectra, 0.5)
    assert half.row.step == min(run.spectra, key=lambda row: abs(row.step - last / 2)).step
    assert at_progress(run, run.spectra, 1.0).row.step == last
    assert at_progress(run, run.spectra, 0.5 * 2**-0.25, tolerance=0.1) is None
    assert at_progress(run_of(study, UNFINISHED), run.spectra, 0.5) is None
    end = run.spectra[-1].tokens
    assert at_tokens(run.spectra, 1.1 * end).row.tokens == end
    assert at_tokens(run.spectra, 1.1 * end).off == pytest.approx(-np.log(1.1))
    assert at_tokens(run.spectra, 1.3 * end) is None


@pytest.mark.parametrize(
    ("window", "width", "expected"),
    [
        ((10, 40), 128, (10, 40)),
        ((50, 200), 128, (50, 128)),
        ((10, 40), 64, (5, 20)),
        ((50, 200), 64, (25, 64)),
        ((1, 10), 16, (1, 3)),
        ((10, 40), 256, (20, 80)),
    ],
)
def test_windows_follow_the_width(window, width, expected):
    assert toy_window(*window, width) == expected


def test_bad_windows():
    with pytest.raises(ValueError, match="width=2"):
        toy_window(1, 10, 2)
    with pytest.raises(ValueError, match="ranks 5-4"):
        toy_window(5, 4, 64)


def test_exponents_are_those_of_the_fits(study):
    row = run_of(study, "untied-b64-s1").spectra[-1]
    values = row.array(SPECTRUM, LAST)
    found = alpha(row, (10, 40))
    fit = fit_power_law(values, *toy_window(10, 40, 24))
    assert found[:2] == (fit.alpha, fit.r2)
    left_out = row.array(f"{SPECTRUM}_left_out", LAST)
    assert found.error == alpha_error(left_out, found.first, found.last)
    assert effective_rank(row) == rankme(values)


def test_tokens_to_target_and_efficiency(study):
    runs = [run for run in study.runs if run.stage == "muon"]
    efficiency = token_efficiency(runs)
    assert tokens_to_target(run_of(study, CENSORED)) == np.inf
    assert np.isnan(tokens_to_target(run_of(study, UNFINISHED)))
    assert efficiency[CENSORED] == 0.0
    assert np.isnan(efficiency[UNFINISHED])
    assert efficiency["muon-b64-s0"] == 1.0
    own = run_of(study, "muon-b128-s0").result["crossing_tokens"]
    best = run_of(study, "muon-b64-s0").result["crossing_tokens"]
    assert efficiency["muon-b128-s0"] == best / own == pytest.approx(COST[64] / COST[128], rel=0.15)
    assert own == pytest.approx(1e6 * STAGE_COST["muon"] * COST[128], rel=0.1)
    assert np.isnan(token_efficiency([run_of(study, CENSORED)])[CENSORED])


def test_a_sweep_is_a_table_by_seed_and_batch(study):
    found = sweep(study, "muon")
    assert (found.batches, found.seeds) == ((32, 64, 128), (0, 1))
    assert [[run and run.name for run in row] for row in found.runs][1] == [
        "muon-b32-s1", "muon-b64-s1", None
    ]  # fmt: skip
    assert np.isnan(found.efficiency[1, 2])
    assert found.censored() == [CENSORED]
    np.testing.assert_allclose(found.small_batch, -np.log([32, 64, 128]))
    with pytest.raises(Missing, match=r"stage rope has finished runs of 0 .*found none"):
        sweep(study, "rope")
    with pytest.raises(Missing, match=r"4 are needed .*unfinished: muon-b128-s1"):
        sweep(study, "muon", least_batches=4)


def test_runs_are_paired_by_batch_and_seed(study):
    found = list(pairs(study, "muon", "untied"))
    assert len(found) == 5
    assert all((a.batch, a.seed) == (b.batch, b.seed) for a, b in found)
    assert shared_batch(study, ("muon", "untied")) == 32
    with pytest.raises(Missing, match="no finished run of rope"):
        shared_batch(study, ("rope", "untied"))
    with pytest.raises(Missing, match="batch=512: no finished run of muon, untied"):
        shared_batch(study, ("muon", "untied"), 512)


def test_bands_of_prime_modulus_are_chosen(study):
    runs = study.stage("untied")
    assert chosen_bands(runs, ()) == ["23_4"]
    assert chosen_bands(runs, ("24:4",)) == ["24_4"]
    with pytest.raises(Missing, match=r"band 97:200 was not probed in all runs.*23:4, 24:4"):
        chosen_bands(runs, ("97:200",))
    assert [c for c in range(14) if is_prime(c)] == [2, 3, 5, 7, 11, 13]


def test_verdicts_follow_the_rule():
    assert verdict(0.9, 0.02, 0.017) == "held"
    assert verdict(0.9, 0.20, 0.017) == "undecided"
    assert verdict(-0.1, 0.90, 0.017) == "undecided"  # no more than +0.1 would be
    assert verdict(-0.9, 0.02, 0.017) == "did not hold"
    assert verdict(0.0, 0.02, 0.017) == "undecided"
    assert verdict(1.0, 0.08, 0.083) == "undecided"
    assert verdict(-1.0, 0.08, 0.083) == "undecided"
    assert verdict(float("nan"), 0.01, 0.017) == "undecided"


def test_sign_flips_against_a_loop():
    values = np.array([0.5, 0.1, -0.2, 0.4, float("nan")])
    kept = values[:4]
    sums = [abs(((2 * np.array(signs)) - 1) @ kept) for signs in np.ndindex(2, 2, 2, 2)]
    found = sign_flip_test(values)
    assert found.p == np.mean(np.array(sums) >= abs(kept.sum()) - 1e-12)
    assert (found.arrangements, found.exact) == (16, True)
    assert sign_flip_test([1.0] * 6).p == 2 / 64
    many = sign_flip_test([1.0] * 20)
    assert (many.exact, many.p) == (False, pytest.approx(1 / 20_000))
    assert np.isnan(sign_flip_test([]).p)


def test_claims_are_strict_json_and_csv():
    claim = Claim("4a", "a, b", 5, 3, "10-40", 0.5, float("nan"), "c", "held", "Held: yes.")
    row = json.loads(claims_json([claim]), parse_constant=lambda name: pytest.fail(name))[0]
    assert row["p"] is None
    assert row["statistic"] == 0.5
    head, line, end = claims_csv([claim]).split("\n")
    assert head == "figure,claim,n,seeds,window,statistic,p,control,verdict,sentence"
    assert (line, end) == ('4a,"a, b",5,3,10-40,0.5,,c,held,Held: yes.', "")
