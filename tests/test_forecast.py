"""The forecast as a command: rankings, calibration, files and one-line errors."""

import csv
import json
import subprocess
import sys
from itertools import groupby

import pytest
from synthetic_language_study import TARGET, make_study, name

from experiments.efficiency import crossing_tokens
from experiments.forecast import describe, forecast, main
from experiments.statistics import predict
from experiments.study_records import read_study
from models.command_line import UsageError

UNFINISHED = (name("flexwin", batch=4), name("flexwin", batch=16))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "half"
    rungs = ("muon", "untied", "flexwin")
    return make_study(
        folder, rungs=rungs, seed_cells=(), trials=(), kernels=(), unfinished=UNFINISHED
    )


def test_unfinished_members_are_ranked_and_finished_ones_calibrate(folder):
    found = forecast(read_study(folder), 2**16, (90, 200))
    assert len(found.rows) == 12
    flexwin = {row.batch: row for row in found.rows if row.rung == "flexwin"}
    assert flexwin[16].state == "not ended"
    assert sorted(row.alpha_place for row in flexwin.values()) == [1, 2, 3, 4]
    assert flexwin[8].alpha_place == 1  # planted
    assert [flexwin[batch].batch_place for batch in (4, 8, 16, 32)] == [1, 2, 3, 4]
    assert found.calibration.alpha.statistic == pytest.approx(1.0)
    text = describe(found)
    assert "at 65.5k tokens, last layer, ranks 90-200" in text
    assert "calibration on 12 members of 3 families" in text
    assert "flexwin-d12-b16-s0" in text


def test_places_follow_the_scores_within_each_family(folder):
    study = read_study(folder)
    runs = {(*run.cell, run.seed): run for run in study.chosen}
    rows = forecast(study, 2**16, (90, 200)).rows
    for _, family in groupby(rows, key=lambda row: (row.rung, row.tier)):
        family = list(family)
        for row in family:
            assert row.alpha_place == 1 + sum(other.alpha > row.alpha for other in family)
            assert row.loss_place == 1 + sum(other.loss < row.loss for other in family)
            assert row.batch_place == 1 + sum(other.batch < row.batch for other in family)
    for row in rows:
        run = runs[row.rung, row.tier, row.batch, row.seed]
        assert row.loss == run.val["loss"][run.val["tokens"] == 2**16][0]
        assert row.crossing_tokens == crossing_tokens(run, TARGET)


def young(folder, cut):
    """Four batches of muon of which none has ended; cut: tokens at which their metrics stop."""
    names = tuple(name("muon", batch=batch) for batch in (4, 8, 16, 32))
    make_study(folder, rungs=("muon",), seed_cells=(), trials=(), kernels=(), unfinished=names)
    for own in names:
        path = folder / "runs" / own / "metrics.jsonl"
        rows = [row for row in path.read_text().splitlines() if json.loads(row)["tokens"] <= cut]
        path.write_text("".join(row + "\n" for row in rows))
    return read_study(folder)


def test_a_study_without_an_end_is_ranked_and_has_no_calibration(tmp_path):
    found = forecast(young(tmp_path / "young", 2**17), 2**16, (90, 200))
    assert found.calibration is None
    assert "no calibration: it takes three members" in describe(found)
    assert {(row.state, row.crossing_tokens) for row in found.rows} == {("not ended", None)}
    assert sorted(row.alpha_place for row in found.rows) == [1, 2, 3, 4]


def test_a_budget_without_states_ranks_by_the_batch_alone(folder):
    found = forecast(read_study(folder), 2**30, (90, 200))
    assert found.calibration is None
    assert {(row.alpha, row.alpha_place, row.loss_place) for row in found.rows} == {(None,) * 3}
    assert {row.batch_place for row in found.rows} == {1, 2, 3, 4}
    assert "measured state near these tokens" in describe(found)


def test_the_first_of_one_is_no_forecast(tmp_path):
    one = make_study(
        tmp_path / "one", rungs=("muon",), batches=(8,), seed_cells=(), trials=(), kernels=()
    )
    (row,) = forecast(read_study(one), 2**16, (90, 200)).rows
    assert row.alpha is not None
    assert (row.alpha_place, row.loss_place, row.batch_place) == (None, None, None)


def test_runs_that_have_only_begun_stand_in_the_table(tmp_path):
    study = young(tmp_path / "begun", 2**17)
    bare = study.path / "runs" / name("muon", batch=4)
    (bare / "metrics.jsonl").unlink()
    for path in (bare / "spectra").iterdir():
        path.unlink()
    (study.path / "runs" / name("muon", batch=8) / "config.json").unlink()
    rows = forecast(read_study(study.path), 2**16, (90, 200)).rows
    assert (rows[0].batch, rows[0].alpha_place) == (4, None)
    assert sorted(row.alpha_place for row in rows[1:]) == [1, 2]


def test_rows_are_written_as_csv_and_json(folder, tmp_path, capsys):
    assert main([f"study={folder}", f"out={tmp_path / 'f.csv'}"]) == 0
    assert main([f"study={folder}", f"out={tmp_path / 'f.json'}", "tokens=32768"]) == 0
    capsys.readouterr()
    with open(tmp_path / "f.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    document = json.loads((tmp_path / "f.json").read_text())
    assert len(rows) == len(document["members"]) == 12
    assert document["tokens"] == 32768
    calibration = document["calibration"]
    # two of flexwin's four are not over, but their curves lie below the target already
    assert (calibration["members"], calibration["families"]) == (12, 3)
    assert set(calibration) == {"members", "families", "alpha", "loss", "batch"}
    assert 0 < calibration["alpha"]["p"] < calibration["alpha"]["p_stouffer"] < 0.05
    found = predict(read_study(folder), tokens=32768)
    for rule in ("alpha", "loss", "batch"):
        test = getattr(found, rule)
        assert (calibration[rule]["rho"], calibration[rule]["p"]) == (test.statistic, test.p)
    later = [row._asdict() for row in forecast(read_study(folder), 2**16, (90, 200)).rows]
    assert rows == [
        {key: "" if value is None else str(value) for key, value in row.items()} for row in later
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"f.csv", "f.json"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "study= is missing"),
        (["study=nowhere"], "nowhere"),
        (["study=x", "tokens=0"], "tokens=0"),
        (["study=x", "window=5,6"], "window="),
        (["study=x", "out=f.txt"], "ends in .csv or .json"),
        (["study=x", "token=5"], "did you mean tokens"),
    ],
)
def test_bad_words_end_in_one_line(words, said):
    with pytest.raises(UsageError, match=said) as caught:
        main(words)
    assert "\n" not in str(caught.value)


def test_a_forecast_needs_no_accelerator(folder):
    code = (
        "import sys\nfrom experiments.forecast import main\n"
        f"main(['study={folder}'])\nassert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
