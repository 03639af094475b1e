"""The top rung trained by the command: a growing window, and a resumed run that goes on with it."""

import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest
from tiny_runs import assert_same_run, finish, make_data, make_words, numbers, start, train

from lens_jax.records import read_step

STEPS = 12
RUNG = {
    "rung": "attnscale",
    "size__n_layer": 4,
    "arch__window_blocks": 4,
    "arch__window_steps": 80,  # a tenth of it, at twice the batch: 16 steps
    "time_scale": 0.1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(data, cache, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    code, _, err = train([*make_words(data, STEPS, **RUNG), f"out={run}"], cache)
    assert code == 0, err
    return run


def test_the_window_grows_and_is_recorded(whole):
    rows = numbers(whole)
    windows = {row["step"]: row["window_blocks"] for row in rows if row["kind"] == "train"}
    assert len(windows) == STEPS
    # ceil of 3.5 s / 16 blocks, at least one
    assert list(windows.values()) == [max(1, -(-7 * step // 32)) for step in range(STEPS)]
    assert all(now <= later for now, later in pairwise(windows.values()))
    for row in (row for row in rows if row["kind"] == "val"):
        assert row["window_blocks"] <= 4
        assert abs(row["loss"] - row["loss_widest_window"]) < 0.5
    assert rows[0]["loss"] == pytest.approx(rows[0]["loss_widest_window"])  # a head of zeros
    for path in sorted((whole / "spectra").iterdir()):
        meta, arrays = read_step(path)
        assert meta["window_tokens"] == 16 * max(1, -(-7 * meta["step"] // 32))
        # layer 3 has no attention, so nothing of it is there
        assert "grad_singular_values/h_3/mlp/c_proj/kernel" in arrays
        assert "grad_singular_values/h_3/attn/c_q/kernel" not in arrays


def test_it_learns(whole):
    losses = [row["loss"] for row in numbers(whole) if row["kind"] == "val"]
    assert losses[-1] < losses[0] - 0.2


def test_a_stopped_run_goes_on_bit_by_bit(whole, data, cache, tmp_path):
    words = [*make_words(data, STEPS, **RUNG), f"out={tmp_path / 'run'}"]
    process, metrics = start(words, cache), tmp_path / "run/metrics.jsonl"
    while process.poll() is None and (
        not metrics.exists() or metrics.read_bytes().count(b"\n") < 5
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code in (0, 128 + signal.SIGTERM), err
    assert train(words, cache)[0] == 0
    assert_same_run(tmp_path / "run", whole)
