"""The forecast as a command: rankings, calibration, files and one-line errors."""

import csv
import json
import subprocess
import sys

import pytest
from synthetic_language_study import make_study, name

from experiments.forecast import describe, forecast, main
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
    assert "calibration on" in text
    assert "flexwin-d12-b16-s0" in text


def test_a_study_without_an_end_has_no_calibration(tmp_path):
    rungs = ("muon",)
    names = tuple(name("muon", batch=batch) for batch in (4, 8, 16, 32))
    folder = make_study(
        tmp_path / "young", rungs=rungs, seed_cells=(), trials=(), kernels=(), unfinished=names
    )
    found = forecast(read_study(folder), 2**16, (90, 200))
    # the curves lie below the target already, but nothing says that the runs are over
    assert len(found.rows) == 4
    assert {row.state for row in found.rows} == {"not ended"}


def test_rows_are_written_as_csv_and_json(folder, tmp_path, capsys):
    assert main([f"study={folder}", f"out={tmp_path / 'f.csv'}"]) == 0
    assert main([f"study={folder}", f"out={tmp_path / 'f.json'}", "tokens=32768"]) == 0
    capsys.readouterr()
    with open(tmp_path / "f.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    document = json.loads((tmp_path / "f.json").read_text())
    assert len(rows) == len(document["members"]) == 12
    assert document["tokens"] == 32768
    assert set(document["calibration"]) == {"alpha", "loss", "batch"}
    assert rows[0]["rung"] == document["members"][0]["rung"]


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
