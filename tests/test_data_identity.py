"""Runs whose data changed under them, and runs begun before that was noticed."""

import json

import numpy as np
import pytest
from tiny_models import quick_compiler
from tiny_runs import VOCAB, make_data, make_words

from experiments.data import HeldOut, resolve_source
from experiments.data_identity import data_change, data_identity, keep_identity
from experiments.shards import open_shard, write_shard
from experiments.train import main
from models.command_line import UsageError


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    return make_data(tmp_path / "data")


def identity_of(data, val=0, probe=0):
    files = resolve_source(type("Source", (), {"source": data})())
    held = HeldOut(np.full((2, 3), val, np.int32), np.full((1, 5), probe, np.int32), 0)
    return data_identity(files, held)


def test_what_changed_is_named(data, tmp_path):
    before = identity_of(data)
    keep_identity(tmp_path, before)
    assert data_change(tmp_path, before) is None
    assert "the held-out validation tokens are others" in data_change(
        tmp_path, identity_of(data, val=1)
    )
    assert "the held-out probe tokens are others" in data_change(
        tmp_path, identity_of(data, probe=1)
    )
    write_shard(tmp_path / "data/tiny_train_1.bin", np.zeros(9, np.int64))
    line = data_change(tmp_path, identity_of(data))
    assert "there were 1 training shards, now 2; bring the old data back" in line
    write_shard(tmp_path / "data/tiny_train_0.bin", np.zeros(9, np.int64))
    line = data_change(tmp_path, identity_of(data))
    assert "tiny_train_0.bin had 30,000 tokens, now tiny_train_0.bin has 9;" in line


def test_a_damaged_file_is_told_in_one_line(data, tmp_path):
    for text in ("", "[]", '{"train": 3}'):
        (tmp_path / "data.json").write_text(text)
        with pytest.raises(UsageError, match=r"data\.json is damaged \(\w+\); delete it"):
            data_change(tmp_path, identity_of(data))


def test_a_run_notices_other_data_and_an_older_run_goes_on(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")  # jax of this process runs already
    monkeypatch.setenv("LENS_JAX_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    words = [*make_words(data, 2, probes="", val_every=256), f"out={run}"]
    shard = tmp_path / "data/tiny_val_0.bin"
    tokens = np.array(open_shard(shard))
    with quick_compiler():
        assert main([*words, "pause_tokens=1"]) == 0
        write_shard(shard, (tokens + 1) % VOCAB)
        with pytest.raises(UsageError, match="the held-out validation tokens are others"):
            main(words)
        write_shard(shard, tokens)
        assert main(words) == 0
        assert "resumed at step" in capsys.readouterr().out
        write_shard(shard, tokens[:-1])
        with pytest.raises(UsageError, match=r"had 4,000 tokens, now .* has 3,999"):
            main(words)  # before it is called finished
        (run / "data.json").unlink()  # as a run begun earlier
        assert main(words) == 0
        assert "this run is finished" in capsys.readouterr().out
        (run / "result.json").unlink()
        assert main(words) == 0
        assert "resumed at step 2" in capsys.readouterr().out
    assert not (run / "data.json").exists()
    assert json.loads((run / "result.json").read_text())["step"] == 2
