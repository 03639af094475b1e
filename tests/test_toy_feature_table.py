"""features.csv: every band of every run at its end, against the functions it names."""

import csv
import io

import numpy as np
import pytest
from synthetic_study import make_study

from toy_modular.edit_names import EDIT_NAMES
from toy_modular.feature_table import feature_rows, features_csv
from toy_modular.features import gini, h_peak, mode_shares, pair_masses
from toy_modular.figures import FigureConfig, run_figures
from toy_modular.mode_tables import chance_peaks
from toy_modular.pack import pack
from toy_modular.records import read_study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "whole"
    return read_study(make_study(folder, batches=(32, 64, 128), seeds=(0,), groups=4))


def test_a_row_has_the_scores_of_its_table_and_their_nulls(study):
    rows = list(feature_rows(study.runs, k=2))
    finished = [run for run in study.runs if run.finished]
    assert len(rows) == 2 * sum(len(run.bands) for run in finished)
    found = next(row for row in rows if row["table"] == "next")
    last = next(run for run in finished if run.name == found["name"]).features[-1]
    site = found["band"].replace(":", "_")
    table = last.array("next", site)
    assert found["h_peak"] == h_peak(table).share
    assert found["frequency"] == h_peak(table).mode / len(table)
    assert found["gini"] == gini(pair_masses(mode_shares(table)))
    chance = chance_peaks(last, "next", site)
    assert found["null_current_upper"] == chance["current"].upper
    assert found["null_next"] == chance["next"].mean
    assert "base_loss" not in found  # no edits were recorded


class Probed:
    """The last row of a run in which the edits of one band were recorded."""

    step = 70

    def __init__(self, row):
        self._row = row

    def has(self, kind, site):
        return kind == "edits" or self._row.has(kind, site)

    def array(self, kind, site):
        if kind != "edits":
            return self._row.array(kind, site)
        return np.arange(len(EDIT_NAMES), dtype=float)


def test_edits_stand_in_the_row_of_their_table(study):
    whole = next(run for run in study.runs if run.finished)
    run = type("Run", (), {
        "finished": True, "features": [Probed(whole.features[-1])], "bands": whole.bands[:1],
        "name": "muon", "stage": "muon", "batch": 8, "seed": 0, "config": {},
    })()  # fmt: skip
    current, following = feature_rows([run], k=2)
    at = EDIT_NAMES.index
    assert current["modes_key_keep"] == at("current_modes_key_keep")
    assert following["components_drop_advantage"] == at("next_components_drop_advantage")
    assert current["embedding_key_keep"] == at("embedding_key_keep")
    assert "embedding_key_keep" not in following
    assert not [name for name in current if name.endswith("_diluted")]
    rows = list(csv.DictReader(io.StringIO(features_csv([current, following]))))
    assert rows[1]["embedding_key_keep"] == ""
    assert float(rows[0]["base_loss"]) == at("base_loss")


def test_a_pack_gives_the_same_table(study, tmp_path):
    pack(study, tmp_path / "packed")
    found = []
    for name, folder in (("whole", study.path), ("of_pack", tmp_path / "packed")):
        told: list[str] = []
        out = tmp_path / name
        run_figures(FigureConfig(study=str(folder), out=str(out)), told.append)
        assert f"features: {out / 'features.csv'}" in told
        with open(out / "features.csv", newline="") as file:
            found.append(list(csv.DictReader(file)))
    whole, packed = found
    assert len(whole) == len(packed) > 20
    for one, other in zip(whole, packed, strict=True):
        assert one.keys() == other.keys()
        assert (one["name"], one["band"], one["mode"]) == (
            other["name"], other["band"], other["mode"],
        )  # fmt: skip
        assert float(one["h_peak"]) == pytest.approx(float(other["h_peak"]), rel=1e-4)
