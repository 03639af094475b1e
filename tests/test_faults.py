"""Kills, signals, numbers that are not finite and wrong restarts, against the real command.

LENS_JAX_KILLS=20 kills 20 times instead of 3; JAX_DISABLE_MOST_OPTIMIZATIONS=0 takes the programs
that a real run compiles.
"""

import json
import os
import random
import shutil
import signal
import time
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import chz
import jax
import numpy as np
import pytest
from tiny_runs import (
    TOKENS_PER_STEP,
    VOCAB,
    assert_same_run,
    final_state,
    finish,
    make_data,
    make_words,
    numbers,
    start,
    train,
)

from experiments import setup
from experiments.checkpoints import Checkpoints
from experiments.checksums import leaves_by_path
from experiments.resolve import parse_command, resolve
from experiments.train import main
from models.gpt import GPT, init_params

KILLS = int(os.environ.get("LENS_JAX_KILLS", "3"))
STEPS = 24 * KILLS  # a budget that is not used up: the target is met halfway
CHECKPOINT_STEPS = 4


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def words(data):
    # slower learning, so that the target is as far away as there are kills
    return make_words(data, STEPS, target_loss=2.95, optim__lr_scale=3 / KILLS)


@pytest.fixture(scope="module")
def unbroken(words, cache, tmp_path_factory):
    """A run to its target loss that was left in peace."""
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    code, _, err = train([*words, f"out={run}"], cache)
    assert (code, err) == (0, "")
    return run


# Kills and signals


def wait_for(process, condition, seconds=120.0):
    """Returns as soon as the condition holds for a run that is still going on."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended too soon"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def strike(process, run, kind, number, rng, last_record):
    """Sends a signal at a random moment of one kind; returns what the process said in the end.

    kind: "start" is imports, restoring and compiling; "step" between a few steps; "save" while a
    checkpoint is being written; "figure" after the last record, in drawing and tidying up.
    """
    metrics, checkpoints = run / "metrics.jsonl", run / "checkpoints"
    if kind == "start":
        time.sleep(rng.uniform(0.1, 6.0))
    elif kind == "step":
        wait_for(process, metrics.exists)
        before = metrics.stat().st_size
        # opening the folder for a resumed run cuts the file: wait for it to grow again
        rows = rng.randint(1, 2 * CHECKPOINT_STEPS)
        wait_for(process, lambda: (metrics.stat().st_size - before) > 300 * rows)
        time.sleep(rng.uniform(0, 0.03))
    elif kind == "save":
        wait_for(process, lambda: any(checkpoints.glob("*.orbax-checkpoint-tmp*")))
        time.sleep(rng.uniform(0, 0.03))
    else:
        wait_for(process, last_record.exists)
        time.sleep(rng.uniform(0, 2.0))
    assert process.poll() is None, f"the run ended before the {kind} signal"
    process.send_signal(number)
    return finish(process)


def test_a_run_killed_and_stopped_over_and_over_equals_an_unbroken_one(
    words, cache, unbroken, tmp_path
):
    rng = random.Random(0)  # noqa: S311
    run = tmp_path / "run"
    last_record = sorted((unbroken / "spectra").iterdir())[-1].name
    kinds = [*islice(cycle(("step", "save", "start")), KILLS - 1), "figure"]
    blows = [(kind, signal.SIGKILL) for kind in kinds]
    blows[1:1] = [("step", signal.SIGTERM)]
    blows[-1:-1] = [("step", signal.SIGINT)]
    for kind, number in blows:
        process = start([*words, f"out={run}"], cache)
        code, out, err = strike(process, run, kind, number, rng, run / "spectra" / last_record)
        if number == signal.SIGKILL:
            assert code == -number
        else:
            assert (code, err) == (128 + number, "")
            said = out.splitlines()[-1]
            assert said.startswith(f"stopped by {number.name} after step ")
            assert f"out={run}" in said
            saved, _ = final_state(run)
            assert f"after step {saved}," in said
    over = (run / "result.json").exists()  # the last blow may have met the process on its way out
    code, out, err = train([*words, f"out={run}"], cache)
    assert (code, err) == (0, "")
    assert ("this run is finished" if over else "resumed at step") in out
    assert_same_run(run, unbroken)


def test_the_unbroken_run_met_its_target_and_left_everything(unbroken):
    result = json.loads((unbroken / "result.json").read_text())
    assert result["reason"] == "target"
    assert 0 < result["step"] < STEPS
    rows = numbers(unbroken)
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps == list(range(result["step"]))  # the update after the target was dropped
    values = {row["step"]: row["loss"] for row in rows if row["kind"] == "val"}
    assert [step for step, loss in values.items() if loss < result["target_loss"]] == [
        result["step"]
    ]
    assert final_state(unbroken)[0] == result["step"]
    assert (unbroken / "spectra" / f"step_{result['step']:08d}.npz").exists()
    assert (unbroken / "summary.png").stat().st_size > 10_000
    assert not list(unbroken.rglob("*tmp*"))


def test_step_zero_is_saved_before_any_update(words, unbroken):
    config, _ = resolve(parse_command(words), "laptop")
    model = GPT(config.arch, chz.replace(config.size, vocab_size=VOCAB))
    wanted = leaves_by_path(jax.jit(partial(init_params, model, config.seed))())
    with Checkpoints(unbroken / "checkpoints", read_only=True) as checkpoints:
        state = checkpoints.restore_numpy(0)
        assert checkpoints.read_meta(0)["sample_index"] == 0
    assert state["step"] == 0
    got = leaves_by_path(state["params"])
    assert got.keys() == wanted.keys()
    for path, array in wanted.items():
        np.testing.assert_allclose(got[path], array, rtol=1e-6, atol=1e-7, err_msg=path)


# Starting again


def test_a_finished_run_is_only_reported(words, cache, unbroken):
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*.*") if path.is_file()}
    code, out, err = train([*words, f"out={unbroken}"], cache)
    assert (code, err) == (0, "")
    assert "this run is finished" in out
    after = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*.*") if path.is_file()}
    assert after == before


@pytest.fixture
def stopped(unbroken, tmp_path):
    """A copy of the unbroken run as if it had been killed after its last checkpoint."""
    run = Path(shutil.copytree(unbroken, tmp_path / "stopped"))
    for name in ("result.json", "summary.png"):
        (run / name).unlink()
    return run


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"optim__matrix_lr": 0.5}, "optim.matrix_lr was 0.02, now 0.5"),
        ({"size__n_embd": 64}, "size.n_embd was 32, now 64"),
        ({"resume": "never"}, "resume=never"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_a_wrong_restart_is_refused_in_one_line(data, cache, stopped, changed, told):
    kept = {"target_loss": 2.95, "optim__lr_scale": 3 / KILLS, "out": stopped}
    code, _, err = train(make_words(data, STEPS, **(kept | changed)), cache)
    assert code == 2
    assert told in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_resume_must_wants_a_checkpoint(words, cache, tmp_path):
    code, _, err = train([*words, "resume=must", f"out={tmp_path / 'new'}"], cache)
    assert code == 2
    assert "has no checkpoint" in err
    assert not (tmp_path / "new").exists()


def test_one_folder_takes_one_run(words, cache, tmp_path):
    run = tmp_path / "run"
    first = start([*words, f"out={run}"], cache)
    try:
        wait_for(first, (run / "config.json").exists)
        code, _, err = train([*words, f"out={run}"], cache)
    finally:
        first.kill()
        finish(first)
    assert code == 2
    assert f"in use by another run (pid {first.pid} " in err
    assert err.count("\n") == 1


# Numbers that are not finite


def test_a_loss_that_is_not_finite_stops_before_the_update(data, cache, tmp_path):
    run = tmp_path / "run"
    words = make_words(data, 40, optim__lr_scale=1e15, probes__every=1, val_every=10**6)
    code, _, err = train([*words, f"out={run}"], cache)
    assert code == 1
    assert err.startswith("error: not finite at training step ")
    assert err.count("\n") == 1
    report = json.loads((run / "nonfinite.json").read_text())
    step = report["step"]
    assert report["kind"] == "training"
    assert report["tokens"] == step * TOKENS_PER_STEP
    norms = [float(report[name]) for name in ("grad_norm", "update_norm", "param_norm")]
    assert not np.isfinite([float(report["loss"]), *norms]).all()
    assert len(set(report["window_indices"])) == 8
    assert [row["step"] for row in numbers(run) if row["kind"] == "train"] == list(range(step))
    assert [path.name for path in sorted((run / "spectra").iterdir())] == [
        f"step_{each:08d}.npz" for each in range(step)
    ]
    saved, arrays = final_state(run)
    assert report["last_checkpoint"] == saved
    assert all(np.isfinite(array).all() for array in arrays.values())


def test_an_update_that_is_not_finite_is_not_made(data, cache, tmp_path):
    run = tmp_path / "run"
    words = make_words(data, 40, optim__lr_scale=1e39, val_every=10**6)
    code, _, err = train([*words, f"out={run}"], cache)
    assert code == 1
    assert "at training step 0: " in err
    report = json.loads((run / "nonfinite.json").read_text())
    assert np.isfinite(float(report["loss"]))
    assert report["update_norm"] in ("inf", "nan")


def test_a_validation_loss_that_is_not_finite_saves_nothing_after_it(
    data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")  # this process has its devices already
    losses = iter([4.0, float("nan")])
    monkeypatch.setattr(setup, "_make_evaluate", lambda *_: lambda params, window: next(losses))
    run = tmp_path / "run"
    words = make_words(data, 1, probes="")
    assert main([*words, f"out={run}"]) == 1
    assert capsys.readouterr().err.startswith("error: not finite at validation step 1: loss nan")
    report = json.loads((run / "nonfinite.json").read_text())
    assert (report["kind"], report["step"], report["last_checkpoint"]) == ("validation", 1, 0)
    assert report["window_indices"] is None
    assert not (run / "result.json").exists()
