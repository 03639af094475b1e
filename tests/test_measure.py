"""`python -m experiments.measure` on a tiny run: the run's own records again, and new ones."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
from tiny_models import quick_compiler

from experiments import measure as command
from experiments.checkpoints import Checkpoints
from experiments.paper_probe import COLUMNS
from experiments.resolve import read_stored
from lens_jax.records import read_step
from models.command_line import UsageError
from models.published import save_published

STEPS, LAST = 8, "step_00000008.npz"
FROM_DATA = ("val_loss", "unigram_entropy")  # facts that only a training run has, or had


@pytest.fixture(scope="module", autouse=True)
def _quick_compiler():
    with quick_compiler():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A finished run of a windowed rung with checkpoints at steps 0, 4 and 8."""
    folder = tmp_path_factory.mktemp("measure")
    out = folder / "run"
    changed = {"rung": "flexwin", "size__n_layer": 2, "probes__layers": "1", "out": str(out)}
    words = tiny_runs.make_words(tiny_runs.make_data(folder), STEPS, **changed)
    code, _, err = tiny_runs.train(words, folder / "cache", JAX_NUM_CPU_DEVICES="1")
    assert code == 0, err
    return out


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy to write to."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(autouse=True)
def _devices_as_they_are(monkeypatch):
    monkeypatch.setattr("experiments.devices.split_cpu", lambda: None)


def go(capsys, *words: str, **own) -> str:
    """The command in this process; what it printed."""
    assert command.main([*words, *(f"{key}={value}" for key, value in own.items())]) == 0
    return capsys.readouterr().out


def test_a_checkpoint_measured_later_has_the_record_of_training(run, trained, capsys):
    for name in ("step_00000004.npz", LAST):
        (run / "spectra" / name).unlink()
    out = go(capsys, run=run)
    assert "1 of 3 are measured already" in out
    assert "summary.png" in out
    for name in ("step_00000004.npz", LAST):
        (meta, arrays), (own_meta, own) = (
            read_step(folder / "spectra" / name) for folder in (run, trained)
        )
        tiny_runs.assert_same_arrays(arrays, own)
        assert {k: v for k, v in meta.items() if k not in FROM_DATA} == {
            k: v for k, v in own_meta.items() if k not in FROM_DATA
        }
        assert meta["val_loss"] == own_meta["val_loss"]
    assert "3 of 3 are measured already" in go(capsys, run=run)


def test_other_layers_are_added_to_the_same_record(run, trained, capsys):
    go(capsys, "probes.layers=0", run=run, tokens=STEPS * tiny_runs.TOKENS_PER_STEP)
    before, after = (read_step(folder / "spectra" / LAST)[1] for folder in (trained, run))
    added = after.keys() - before.keys()
    assert before.keys() < after.keys()
    assert "grad_singular_values/h_0/mlp/c_proj/kernel" in added
    assert all("/h_0/" in name for name in added)
    tiny_runs.assert_same_arrays({name: after[name] for name in before}, before)


def test_another_probe_set_needs_records_of_its_own(run, capsys):
    words = ("probes.windows=16",)
    with pytest.raises(UsageError, match=r"measured with probe_hash=\w+, not \w+; give name="):
        go(capsys, *words, run=run)
    go(capsys, *words, run=run, name="large", tokens=0)
    assert [path.name for path in (run / "spectra_large").iterdir()] == ["step_00000000.npz"]
    meta, _ = read_step(run / "spectra_large" / "step_00000000.npz")
    assert meta["act_windows"] == 16


def test_the_published_protocol_has_its_windows_and_its_csv(run, capsys):
    go(capsys, run=run, probe="paper", tokens=STEPS * tiny_runs.TOKENS_PER_STEP)
    meta, arrays = read_step(run / "spectra_paper" / LAST)
    assert meta["sample_tokens"] == 64  # the long row of this run, from the first token on
    assert meta["gradient_samples"] == 4_000 // 65
    with open(run / "spectra_paper" / "summary_step_00000008.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [(row["layer"], row["matrix"]) for row in rows] == [
        ("1", name) for name in ("attn.c_proj", "attn.c_q", "attn.c_v", "mlp.c_proj")
    ]
    values = arrays["grad_singular_values/h_1/attn/c_q/kernel"]
    ranks = np.arange(30, len(values) + 1)
    slope = np.polyfit(np.log(ranks), np.log(values[29:]), 1)[0]
    assert float(rows[1]["grad_alpha"]) == pytest.approx(-slope)


def test_a_published_file_is_measured_like_the_run_it_came_from(run, tmp_path, capsys):
    config = json.loads((run / "config.json").read_text())
    stored = read_stored(run)
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        params = checkpoints.restore_numpy(STEPS, "params")
    save_published(tmp_path / "weights.safetensors", params, stored.arch)
    meta, expected = read_step(run / "spectra" / LAST)
    keys = ("rung", "profile", "data.source")
    sections = ("size.", "probes.", "data.val", "data.probe", "batch")
    words = [
        f"{key}={','.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in config.items()
        if key in keys or key.startswith(sections)
    ]
    plan = {
        "checkpoint": tmp_path / "weights.safetensors",
        "step": STEPS,
        "tokens": meta["tokens"],
        "window": meta["window_tokens"],
    }
    go(capsys, *words, f"out={tmp_path / 'out'}", **plan)
    found_meta, found = read_step(tmp_path / "out" / "spectra" / LAST)
    tiny_runs.assert_same_arrays(found, expected)
    assert found_meta["probe_hash"] == meta["probe_hash"]
    assert found_meta["checkpoint"] == str(plan["checkpoint"])
    assert (tmp_path / "out" / "summary.png").exists()
    with pytest.raises(UsageError, match="holds records of rung flexwin at d12; choose another"):
        go(capsys, *words, f"out={tmp_path / 'out'}", "arch.softcap=20.0", **plan)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give run=FOLDER or checkpoint=FILE, one of the two"),
        (["run=a", "checkpoint=b"], "give run=FOLDER or checkpoint=FILE, one of the two"),
        (["run=no/such"], "no/such: cannot read config.json (No such file or directory)"),
        (["run=RUN", "rung=muon"], "rung=muon: a run keeps its own; only probes.*"),
        (["run=RUN", "step=4"], "step=4: a run's checkpoints have their own"),
        (["run=RUN", "probe=papers"], "probe=papers: give one of canonical, paper"),
        (["run=RUN", "name=a/b"], "name=a/b: give letters, digits and '_'"),
        (["run=RUN", "probes.windows=4000"], "probes.windows=4000 windows of 33 tokens: 3,488"),
        (["run=RUN", "data=OTHER"], "was trained on measure0, not on other; bring that data"),
        (["checkpoint=x.npz", "out=o"], "checkpoint=x.npz needs rung="),
        (["checkpoint=x.npz", "rung=muon"], "checkpoint=x.npz needs out="),
        (["checkpoint=x.npz", "rung=muon", "out=o", "tokens=1,2"], "tokens= of a file is one"),
    ],
)
def test_bad_words_end_in_one_line(words, said, trained, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    places = {"RUN": str(trained), "OTHER": tiny_runs.make_data(other)}
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    with pytest.raises(UsageError) as caught:
        command.main(words)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_help_names_the_keys(capsys):
    assert command.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "python -m experiments.measure run=runs/NAME" in out
    assert "checkpoint=" in out
