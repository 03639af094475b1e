"""The records in docs/laptop_study: small, and figures and claims follow from them alone."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.figures.catalogue import FIGURES, TOY
from experiments.study.grid import resolve_study
from experiments.study_records import read_study

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "docs" / "laptop_study"
DRAWN = ("figures", "report.html")
MEGABYTES = 40


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp("figures") / "all"
    done = subprocess.run(
        [sys.executable, "-m", "experiments.figures", "fig=all", f"study={RECORDS}", f"out={out}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_figure_is_drawn_from_the_records(drawn):
    names = {name for number in FIGURES for name in TOY.get(number, (str(number),))}
    found = {path.stem.removeprefix("figure_") for path in drawn.glob("figure_*.png")}
    assert found == names


def test_the_claims_beside_the_records_are_those_they_give(drawn):
    new, kept = (_claims(folder / "claims.csv") for folder in (drawn, RECORDS / "figures"))
    assert [(row["figure"], row["claim"], row["verdict"]) for row in new] == [
        (row["figure"], row["claim"], row["verdict"]) for row in kept
    ]
    for key in ("statistic", "p"):
        one, other = ([float(row[key] or "nan") for row in rows] for rows in (new, kept))
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6, err_msg=key)


def test_the_records_are_small_and_hold_no_weights():
    files = [
        path
        for path in RECORDS.rglob("*")
        if path.is_file() and path.relative_to(RECORDS).parts[0] not in DRAWN
    ]
    assert sum(path.stat().st_size for path in files) < MEGABYTES * 2**20
    assert not [path for path in files if "checkpoints" in path.parts]


def test_the_grid_is_the_declared_one():
    study = read_study(RECORDS)
    assert study.config["preset"] == "laptop"
    assert len({run.cell for run in study.chosen}) == 24
    assert len({run.cell.rung for run in study.chosen}) == 6
    seeds: dict = {}
    for run in study.chosen:
        seeds.setdefault(run.cell, []).append(run.seed)
    assert all(sorted(own) == [0, 1, 2] for own in seeds.values())


def _claims(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_that_made_the_records_finds_them():
    """A key that is added to the configuration must not give all earlier runs other names."""
    study = resolve_study(["preset=laptop"])
    cells = {(cell.rung, cell.batch): cell for cell in study.cells}
    runs = read_study(RECORDS).runs
    assert len(runs) > 100
    for run in runs:
        cell = cells[run.config["rung"], run.config["batch"]]
        name = study.run_name(cell, run.config["seed"], run.config["optim.lr_scale"])
        assert name == run.name
