"""The theory command over a study: what it reads, prints and writes, and what it refuses."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lens_jax.records import write_step
from models.command_line import UsageError
from toy_modular.banded import step_law
from toy_modular.config import BandedConfig
from toy_modular.theory import main, medians, rows_text, study_rows
from toy_modular.theory_codes import (
    band_tables,
    constructed_rows,
    equivariant_table,
    next_state_code,
)
from toy_modular.theory_rows import BandTables, Row, row

ROOT = Path(__file__).parents[1]


def verdicts(rows: list[Row]) -> set[str]:
    return {row.verdict for row in rows}


def random_code(c: int, width: int, seed: int = 0) -> np.ndarray:
    """A code h (c, c, width) of state and step in which nothing is regular."""
    return np.random.default_rng(seed).normal(size=(c, c, width)) ** 3


def band_of(h, where: str = "code") -> BandTables:
    return band_tables(h, step_law(len(h), BandedConfig()), where)


def write_run(study: Path, name: str, bands: dict, step: int = 30, **meta) -> None:
    folder = study / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"stage": "untied", "batch": 32, "seed": 0}))
    arrays = {}
    for site, band in bands.items():
        kinds = {"current": band.current, "next": band.next, "covariance": band.covariance}
        kinds = {kind: array.astype(np.float32) for kind, array in kinds.items()}
        arrays |= {f"{kind}/{site}": array for kind, array in (kinds | {"law": band.law}).items()}
    write_step(folder / "features", step, arrays, {"tokens": 10 * step, "val_loss": 2.0} | meta)


@pytest.fixture
def study(tmp_path) -> Path:
    """Two runs: one at two steps and with eigenvectors, one with a band that has no spread."""
    rng = np.random.default_rng(7)
    code = band_of(next_state_code(equivariant_table(13, [0, 0, 0, 0, 1, 9], 16, rng)))
    h = next_state_code(code.next) + 0.1 * random_code(13, 16)
    other, flat = band_of(0.01 * random_code(12, 16)), band_of(np.ones((5, 5, 16)))
    folder = tmp_path / "study"
    write_run(folder, "untied-b32-s0", {"13_4": other._replace(covariance=np.eye(16))}, step=10)
    write_run(folder, "untied-b32-s0", {"13_4": band_of(h)})
    leading = {"act_cov_eigenvectors/final_norm/last": np.eye(16)[:, :4].astype(np.float32)}
    spectra = folder / "runs/untied-b32-s0/spectra"
    write_step(spectra, 30, leading, {"tokens": 300, "val_loss": 2.0})
    write_run(folder, "untied-b32-s1", {"13_4": code, "12_0": other, "5_0": flat})
    (folder / "runs/untied-b32-s2").mkdir()
    return folder


def test_study_is_read_at_the_last_step(study):
    rows = study_rows(study)
    places = {row.where for row in rows}
    assert places == {
        "untied-b32-s0 13:4 step 30",
        "untied-b32-s1 12:0 step 30",
        "untied-b32-s1 13:4 step 30",
    }
    exact = [row for row in rows if row.where == "untied-b32-s1 13:4 step 30"]
    assert {row.link for row in exact} == {1, 2, 3, 5}
    by_claim = {(row.claim, row.table): row for row in exact}
    assert by_claim["energy unlike kappa_r times the next table", "current"].verdict == "held"
    assert by_claim["frequency of the peak is 1/2, c prime", "next"].verdict == "held"
    # what holds of every code holds of float32 records
    unconditional = [row for row in rows if row.relation in ("<=", ">=")]
    assert verdicts(unconditional) == {"held"}
    assert sum("training" in row.claim for row in rows) == 2


def test_medians_count_the_bands(study):
    found = medians(study_rows(study))
    one = next(r for r in found if r.claim == "sum E_r / tr Sb" and r.table == "next")
    assert (one.where, one.verdict) == ("3 bands", "3 held")
    crossed = [r for r in study_rows(study) if r.claim == "share of crossed modes"]
    middle = next(r for r in found if r.claim == "share of crossed modes" and r.table == "next")
    values = sorted(r.measured for r in crossed if r.table == "next")
    assert middle.measured == values[1]
    assert [r.link for r in found] == sorted(r.link for r in found)


def test_command_writes_every_row(study, tmp_path, capsys):
    for name in ("links.csv", "links.json"):
        assert main([f"study={study}", f"out={tmp_path / name}"]) == 0
    printed = capsys.readouterr().out
    assert "medians over bands" in printed
    assert "equivariant code, c=97" in printed
    with open(tmp_path / "links.csv", newline="") as file:
        table = list(csv.DictReader(file))
    listed = json.loads((tmp_path / "links.json").read_text())
    assert len(table) == len(listed) == len(constructed_rows()) + len(study_rows(study))
    assert list(table[0]) == list(listed[0]) == list(Row._fields)
    assert float(table[0]["measured"]) == listed[0]["measured"]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_numbers_that_are_missing_are_empty():
    rows = [row(1, "code", "next", "claim", math.nan, "=", 1.0, 0.1)]
    assert json.loads(rows_text(rows, ".json"))[0]["measured"] is None
    assert rows_text(rows, ".csv").splitlines()[1] == "1,code,next,claim,,1.0,=,0.1,undecided"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("stdy=x", "unknown key stdy=x; did you mean study?"),
        ("study", "'study' is not key=value"),
        ("study={tmp}/none", "study={tmp}/none: no such folder"),
        ("study={tmp}", "study={tmp}: no study (no folder runs/ in it)"),
        ("study={tmp}/empty", "no run has band tables"),
        ("study={tmp}/damaged", "step_00000030.npz: damaged"),
        ("study={tmp}/lacking", "no array next/13_4"),
        ("study={tmp}/unlike", "the arrays of band 13_4 do not fit one another"),
        ("out=links.txt", "out=links.txt: end the name in .csv or .json"),
        ("out={tmp}/none/links.csv", "its folder does not exist"),
    ],
)
def test_bad_input_ends_in_one_line(words, said, tmp_path):
    band = band_of(random_code(13, 4))
    (tmp_path / "empty/runs/one").mkdir(parents=True)
    config = json.dumps({"stage": "untied", "batch": 32, "seed": 0})
    (tmp_path / "empty/runs/one/config.json").write_text(config)
    write_run(tmp_path / "unlike", "one", {"13_4": band._replace(covariance=np.eye(5))})
    for name in ("damaged", "lacking"):
        write_run(tmp_path / name, "one", {"13_4": band})
    path = tmp_path / "damaged/runs/one/features/step_00000030.npz"
    path.write_bytes(path.read_bytes()[:-30])
    arrays = {"current/13_4": band.current}
    meta = {"tokens": 1, "val_loss": 1.0}
    write_step(tmp_path / "lacking/runs/one/features", 30, arrays, meta)
    with pytest.raises(UsageError) as raised:
        main([words.replace("{tmp}", str(tmp_path))])
    assert said.replace("{tmp}", str(tmp_path)) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_help_needs_nothing_slow():
    code = (
        "import sys, toy_modular.theory as t; assert t.main(['--help']) == 0; "
        "print(*({'jax', 'flax', 'optax', 'rich', 'matplotlib'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    assert "study=none" in shown.stdout
    assert shown.stdout.splitlines()[-1] == ""
