"""metrics.jsonl: round trips, lines cut anywhere, and the rows a resumed run keeps."""

import errno
import json
import math
import os
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.metrics import MetricsFile, read_metrics
from models.command_line import UsageError

ROWS = [
    {"kind": "val", "step": 0, "loss": 10.8, "seconds": 0.5},
    {"kind": "train", "step": 0, "loss": 10.8, "grad_norm": math.inf, "window_blocks": None},
    {"kind": "train", "step": 1, "loss": 9.123456789012345, "window_blocks": 3},
    {"kind": "val", "step": 2, "loss": -math.inf, "note": "é\n"},
]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def write_rows(path, rows):
    with MetricsFile(path) as metrics:
        for row in rows:
            metrics.append(row)


def test_rows_come_back_and_every_line_is_strict_json(path):
    write_rows(path, ROWS)
    assert read_metrics(path) == ROWS

    def refuse(name):
        raise AssertionError(name)

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_numpy_numbers_and_nan_come_back_as_floats(path):
    row = {"kind": "train", "step": np.int64(3).item(), "a": np.float32(0.1), "b": np.int32(4)}
    write_rows(path, [row | {"c": np.float32("nan"), "d": float("nan"), "e": -np.inf}])
    [got] = read_metrics(path)
    assert got["a"] == float(np.float32(0.1))
    assert (type(got["b"]), got["b"]) == (int, 4)
    assert math.isnan(got["c"])
    assert math.isnan(got["d"])
    assert got["e"] == -math.inf


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"kind": "train"}, ValueError),
        ({"step": 1}, ValueError),
        ({"kind": "train", "step": 1.5}, ValueError),
        ({"kind": "train", "step": 1, "x": "nan"}, ValueError),
        ({"kind": "train", "step": 1, "x": [1]}, TypeError),
        ({"kind": "train", "step": 1, "x": np.ones(2)}, TypeError),
    ],
)
def test_rows_that_would_not_come_back_are_refused(path, row, error):
    with MetricsFile(path) as metrics:
        metrics.append(ROWS[0])
        with pytest.raises(error):
            metrics.append(row)
    assert read_metrics(path) == ROWS[:1]


def test_a_line_cut_at_any_byte_is_dropped_and_not_glued_to_the_next(path):
    write_rows(path, ROWS)
    whole = path.read_bytes()
    last = whole[:-1].rindex(b"\n") + 1
    for cut in range(last, len(whole)):
        path.write_bytes(whole[:cut])
        complete = cut == len(whole) - 1  # only the newline is missing
        kept = ROWS if complete else ROWS[:-1]
        assert read_metrics(path) == kept
        write_rows(path, [ROWS[1]])
        assert read_metrics(path) == [*kept, ROWS[1]]


@pytest.mark.parametrize(
    "line",
    [
        '{"kind": "tra',
        "",
        "[1]",
        '{"step": 1}',
        '{"kind": "train", "step": 1, "loss": NaN}',
        "\0\0",
    ],
)
def test_a_damaged_line_before_the_last_is_named(path, line):
    write_rows(path, ROWS)
    lines = path.read_text().splitlines()
    lines.insert(1, line)
    path.write_text("\n".join(lines) + "\n")
    for read in (read_metrics, MetricsFile):
        with pytest.raises(UsageError) as excinfo:
            read(path)
        assert str(excinfo.value) == f"{path}: line 2 is damaged; delete or mend that line"


def test_a_missing_file_or_folder_is_named(path):
    with pytest.raises(UsageError, match=r"cannot read .*No such file"):
        read_metrics(path)
    with pytest.raises(UsageError, match=r"cannot open .*No such file"):
        MetricsFile(path.parent / "absent" / "metrics.jsonl")


def test_a_full_disk_leaves_the_rows_before(path, monkeypatch):
    real = os.write

    def full(handle, data):
        if len(data) > 10:
            return real(handle, data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with MetricsFile(path) as metrics:
        metrics.append(ROWS[0])
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(UsageError, match="No space left on device; free some space"):
                metrics.append(ROWS[1])
        metrics.append(ROWS[2])
    assert read_metrics(path) == [ROWS[0], ROWS[2]]


def test_short_writes_are_completed(path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:3]))
    write_rows(path, ROWS)
    assert read_metrics(path) == ROWS


def test_truncation_keeps_what_came_before_the_checkpoint(path):
    rows = [{"kind": kind, "step": step} for step in range(4) for kind in ("val", "train")]
    write_rows(path, rows)
    with MetricsFile(path) as metrics:
        kept = metrics.truncate_from(2)
        assert kept == rows[:5]  # val 0, train 0, val 1, train 1, val 2
        metrics.append(rows[5])
    assert read_metrics(path) == rows[:6]
    with MetricsFile(path) as metrics:
        assert metrics.truncate_from(3) == rows[:6]  # nothing to drop


class Killed(Exception):
    pass


def run_loop(path, checkpoint, num_steps, val_every, checkpoint_every, kill_after):
    """The order of work of a training loop: val s, checkpoint s, update s.

    Returns the steps of the checkpoints it saved; raises Killed at the row `kill_after`.
    """
    written = 0

    def write(kind, step):
        nonlocal written
        if written == kill_after:
            raise Killed
        metrics.append({"kind": kind, "step": step, "loss": 1 / (1 + step)})
        written += 1

    start = checkpoint[-1] if checkpoint else 0
    with MetricsFile(path) as metrics:
        kept = metrics.truncate_from(start)
        evaluated = {row["step"] for row in kept if row["kind"] == "val"}
        for step in range(start, num_steps + 1):
            if step % val_every == 0 and step not in evaluated:
                write("val", step)
            if step % checkpoint_every == 0 and step not in checkpoint:
                checkpoint.append(step)
            if step < num_steps:
                write("train", step)


@settings(max_examples=60)
@given(
    num_steps=st.integers(1, 12),
    val_every=st.integers(1, 4),
    checkpoint_every=st.integers(1, 5),
    kills=st.lists(st.integers(0, 15), max_size=4),
    lost=st.integers(0, 1),
    seed=st.integers(0, 1000),
)
def test_a_run_killed_anywhere_ends_with_the_rows_of_an_unbroken_one(
    tmp_path_factory, num_steps, val_every, checkpoint_every, kills, lost, seed
):
    folder = tmp_path_factory.mktemp("run")
    cut = random.Random(seed)  # noqa: S311
    loop = (num_steps, val_every, checkpoint_every)
    run_loop(folder / "unbroken", [], *loop, kill_after=-1)
    path, checkpoints = folder / "killed", []
    for kill_after in kills:
        try:
            run_loop(path, checkpoints, *loop, kill_after=kill_after)
        except Killed:
            # The kill may cut the line under way, and the save under way never appears.
            with open(path, "ab") as file:
                file.write(b'{"kind": "train", "step": 12345, "loss": 1.0}'[: cut.randrange(45)])
            del checkpoints[len(checkpoints) - lost :]
    run_loop(path, checkpoints, *loop, kill_after=-1)
    assert path.read_bytes() == (folder / "unbroken").read_bytes()
