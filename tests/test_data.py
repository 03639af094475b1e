"""Windows, orders and held-out tokens against literal twins; one integer is the whole state."""

import hashlib
import re
import struct
from collections import Counter
from dataclasses import dataclass
from itertools import islice

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from experiments import data
from experiments.data import (
    SequentialOrder,
    TokenFiles,
    TrainWindows,
    held_out,
    make_train_stream,
    resolve_source,
    sample_indices,
    token_hash,
)
from experiments.shards import write_shard
from models.command_line import UsageError

ROW = 4


@dataclass
class Source:
    """What the data layer reads of a configuration."""

    source: str = "auto"
    folder: str = "data/fineweb10B"
    corpus_vocab: int = 300


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LENS_JAX_CACHE", str(tmp_path / "cache"))


def make_files(folder, train, val=(), vocab_size=65_536) -> TokenFiles:
    """Shards of the given lengths in which every token id occurs once: 0, 1, 2, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, next_id = {"train": [], "val": []}, 0
    for split, lengths in (("train", train), ("val", val)):
        for number, length in enumerate(lengths):
            paths[split].append(folder / f"x_{split}_{number:06d}.bin")
            write_shard(paths[split][-1], np.arange(next_id, next_id + length))
            next_id += length
    return TokenFiles(tuple(paths["train"]), tuple(paths["val"]), vocab_size, 0, "x")


def read(windows, count, *, start=0, rows=3, seed=0, order="shuffled", **more) -> np.ndarray:
    """The first `count` batches of a stream, (count, rows, row + 1)."""
    stream = make_train_stream(windows, order=order, seed=seed, rows=rows, start=start, **more)
    return np.stack(list(islice(stream, count)))


@pytest.fixture
def windows(tmp_path):
    return TrainWindows(make_files(tmp_path / "x", [22, 4, 5, 31]), row=ROW)


def test_windows_tile_every_shard(windows):
    # shard 0 has tokens 0..21, shard 1 is too short, shard 2 is 26..30, shard 3 is 31..61
    starts = [0, 4, 8, 12, 16, 26, 31, 35, 39, 43, 47, 51, 55]
    assert len(windows) == len(starts)
    for index, start in enumerate(starts):
        np.testing.assert_array_equal(windows[index], np.arange(start, start + ROW + 1))
    assert windows[0].dtype == np.int32
    for index in (-1, len(windows)):
        with pytest.raises(IndexError):
            windows[index]


def test_excluded_tail_is_in_no_window(tmp_path):
    files = make_files(tmp_path / "x", [22, 31])
    for exclude in range(31):
        windows = TrainWindows(files, row=ROW, exclude=exclude)
        seen = {int(token) for index in range(len(windows)) for token in windows[index]}
        assert max(seen) < 22 + 31 - exclude


def test_shuffled_epochs_are_permutations_of_all_windows(windows):
    epochs = read(windows, 4, rows=len(windows))
    every = sorted(int(windows[index][0]) for index in range(len(windows)))
    firsts = [batch[:, 0].tolist() for batch in epochs]
    assert all(sorted(epoch) == every for epoch in firsts)
    assert len({tuple(epoch) for epoch in firsts}) == 4


def test_stream_is_its_seed(windows):
    assert read(windows, 9).dtype == np.int32
    np.testing.assert_array_equal(read(windows, 9, seed=5), read(windows, 9, seed=5))
    streams = {read(windows, 9, seed=seed).tobytes() for seed in range(6)}
    assert len(streams) == 6


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_resumed_stream_equals_the_unbroken_one(windows, order):
    unbroken = read(windows, 30, order=order, chunk_rows=1)  # 90 rows: seven epochs of 13
    for step in (0, 1, 4, 5, 8, 13, 21, 26):
        resumed = read(windows, 4, order=order, start=3 * step, chunk_rows=1)
        np.testing.assert_array_equal(resumed, unbroken[step : step + 4])
    flat = unbroken.reshape(-1, ROW + 1)
    for start, rows in ((1, 1), (12, 5), (13, 4), (37, 7)):  # also at another batch size
        resumed = read(windows, 3, order=order, start=start, rows=rows, chunk_rows=1)
        np.testing.assert_array_equal(resumed.reshape(-1, ROW + 1), flat[start : start + 3 * rows])
    far = 3 * 10**9 + 1
    np.testing.assert_array_equal(
        read(windows, 1, order=order, start=far + 3, chunk_rows=1)[0],
        read(windows, 2, order=order, start=far, chunk_rows=1)[1],
    )


@pytest.mark.parametrize("threads", [0, 2, 16])
def test_threads_do_not_matter(windows, threads):
    np.testing.assert_array_equal(read(windows, 20, threads=threads), read(windows, 20, threads=1))


def test_slices_of_hosts_make_the_batch(windows):
    """Every host reads the global batch, so its slice does not depend on the number of hosts."""
    batch = read(windows, 1, rows=8)[0]
    slices = [read(windows, 1, rows=8)[0][4 * host : 4 * host + 4] for host in range(2)]
    np.testing.assert_array_equal(np.concatenate(slices), batch)


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_sample_indices_are_the_rows_of_a_step(windows, order):
    stream = read(windows, 12, order=order, chunk_rows=2)
    for step in (0, 3, 11):
        indices = sample_indices(step, windows, order=order, seed=0, rows=3, chunk_rows=2)
        np.testing.assert_array_equal([windows[index] for index in indices], stream[step])


def test_one_window_is_enough(tmp_path):
    windows = TrainWindows(make_files(tmp_path / "x", [ROW + 1]), row=ROW)
    np.testing.assert_array_equal(read(windows, 2, rows=2), np.tile(np.arange(5), (2, 2, 1)))


def published_loader(lengths, chunk, count):
    """First tokens of the chunks that the published loader reads (ladder spec 6), step by step."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    shard, position, starts = 0, 0, []
    while len(starts) < count:
        if position + chunk + 1 >= lengths[shard]:
            shard, position = (shard + 1) % len(lengths), 0
            continue
        starts.append(int(offsets[shard]) + position)
        position += chunk
    return starts


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=5),
    st.integers(1, 5),
    st.integers(1, 3),
)
def test_sequential_order_is_the_published_one(tmp_path_factory, lengths, row, chunk_rows):
    files = make_files(tmp_path_factory.mktemp("x"), [*lengths, 40])
    windows = TrainWindows(files, row=row)
    order = SequentialOrder(windows, chunk_rows)
    starts = published_loader([*lengths, 40], chunk_rows * row, 2 * len(order))
    chunks = [windows[order[k % len(order)]][0] for k in range(0, 2 * len(order), chunk_rows)]
    assert chunks == starts[: len(chunks)]
    for k in range(len(order)):  # rows follow one another inside a chunk
        assert windows[order[k]][0] == starts[k // chunk_rows] + k % chunk_rows * row


def test_sequential_batches_are_contiguous_and_wrap(tmp_path):
    windows = TrainWindows(make_files(tmp_path / "x", [40, 30]), row=ROW)
    batches = read(windows, 20, order="sequential", rows=4, chunk_rows=2)
    starts = published_loader([40, 30], 2 * ROW, 40)
    expected = [np.arange(start + r, start + r + ROW + 1) for start in starts for r in (0, ROW)]
    np.testing.assert_array_equal(batches.reshape(-1, ROW + 1), expected)


def test_unknown_order_and_useless_chunk_are_refused(windows):
    with pytest.raises(UsageError, match=r"data\.order=sequential: no shard is longer"):
        read(windows, 1, order="sequential", chunk_rows=8)
    with pytest.raises(ValueError, match="order=random"):
        read(windows, 1, order="random")


HELD = {"row": ROW, "val_tokens": 8, "probe_offset": 11, "probe_windows": 3, "probe_window": 5}


def test_held_out_is_the_start_of_the_validation_shards(tmp_path):
    held = held_out(make_files(tmp_path / "x", [50], [17, 100]), **HELD)
    np.testing.assert_array_equal(held.val - 50, [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]])
    np.testing.assert_array_equal(held.probe - 50, np.arange(11, 29).reshape(3, 6))
    assert held.exclude == 0
    assert held.val.dtype == held.probe.dtype == np.int32


def test_a_spread_probe_set_reaches_to_the_end_of_the_validation_shards(tmp_path):
    held = held_out(make_files(tmp_path / "x", [50], [17, 100]), **HELD, probe_spread=True)
    starts = 11 + 35 * np.arange(3)[:, None]  # 106 tokens behind the offset
    np.testing.assert_array_equal(held.probe - 50, starts + np.arange(6))


@settings(max_examples=30)
@given(
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 9),
    st.integers(0, 3),
    st.booleans(),
    st.booleans(),
)
def test_held_out_tokens_are_apart(
    tmp_path_factory, row, rows, gap, probe_windows, has_val, spread
):
    val = [90] if has_val else []
    files = make_files(tmp_path_factory.mktemp("x"), [30, 120], val)
    held = held_out(
        files,
        row=row,
        val_tokens=rows * row,
        probe_offset=rows * row + gap,
        probe_windows=probe_windows,
        probe_window=7,
        probe_spread=spread,
    )
    assert held.val.shape == (rows, row + 1)
    assert held.probe.shape == (probe_windows, 8)
    assert bool(held.exclude) is not has_val
    windows = TrainWindows(files, row=row, exclude=held.exclude)
    trained = {int(token) for index in range(len(windows)) for token in windows[index]}
    assert not trained & {*held.val.ravel().tolist(), *held.probe.ravel().tolist()}
    predicted = Counter(held.val[:, 1:].ravel().tolist() + held.probe[:, 1:].ravel().tolist())
    assert set(predicted.values()) == {1}


def test_held_out_tail_ends_the_last_shard(tmp_path):
    files = make_files(tmp_path / "x", [10, 60])
    held = held_out(files, **HELD)
    assert held.exclude == 11 + 3 * 6
    assert held.probe[-1, -1] == 69
    assert held.val[0, 0] == 70 - held.exclude


@pytest.mark.parametrize(("train", "val", "have"), [([500], [28], "28"), ([500, 28], [], "28")])
def test_too_few_held_out_tokens_name_the_keys(tmp_path, train, val, have):
    with pytest.raises(UsageError, match=rf"{have} tokens but 29") as caught:
        held_out(make_files(tmp_path / "x", train, val), **HELD)
    for key in ("data.val_tokens=8", "data.probe_offset=11", "probes.windows=3"):
        assert key in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_left_to_train_on_is_refused(tmp_path):
    files = make_files(tmp_path / "x", [33])
    with pytest.raises(UsageError, match="hold no row of 4 tokens"):
        TrainWindows(files, row=ROW, exclude=held_out(files, **HELD).exclude)


@pytest.mark.parametrize("wrong", [{"val_tokens": 6}, {"val_tokens": 0}, {"probe_offset": 7}])
def test_held_out_arguments_are_checked(tmp_path, wrong):
    with pytest.raises(UsageError, match=r"data\.val_tokens"):
        held_out(make_files(tmp_path / "x", [50], [50]), **HELD | wrong)


def test_token_hash_is_sha256_of_uint32():
    tokens = np.array([[1, 70_000], [3, 4]])
    expected = hashlib.sha256(struct.pack("<4I", 1, 70_000, 3, 4)).hexdigest()[:16]
    assert token_hash(tokens) == token_hash(tokens.astype(np.int32)) == expected
    assert token_hash(np.asfortranarray(tokens)) == expected
    assert token_hash(tokens.T) != expected


def test_damaged_and_foreign_shards_are_refused_when_opened(tmp_path):
    files = make_files(tmp_path / "x", [50, 60], [90])
    small = files._replace(vocab_size=100)  # ids go to 199
    with pytest.raises(UsageError, match="x_train_000001"):
        TrainWindows(small, row=ROW)
    with pytest.raises(UsageError, match="x_val_000000"):
        held_out(small, **HELD)
    files.train[0].write_bytes(files.train[0].read_bytes()[:-2])
    with pytest.raises(UsageError, match=r"x_train_000000\.bin: is truncated"):
        TrainWindows(files, row=ROW)


def test_auto_takes_fineweb_where_it_is(tmp_path, monkeypatch):
    for name in ("train_000002", "train_000001", "val_000000"):
        write_shard(tmp_path / f"fineweb_{name}.bin", np.arange(9))
    write_shard(tmp_path / "other.bin", np.arange(9))
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    files = resolve_source(Source(folder=str(tmp_path)))
    assert resolve_source(Source(folder=f"~/{tmp_path.name}")) == files
    assert [path.name for path in files.train] == [
        "fineweb_train_000001.bin",
        "fineweb_train_000002.bin",
    ]
    assert [path.name for path in files.val] == ["fineweb_val_000000.bin"]
    assert files[2:] == (50_304, 50_256, "fineweb10B")


@pytest.mark.parametrize("source", ["auto", "corpus"])
def test_corpus_is_taken_otherwise(tmp_path, monkeypatch, source):
    folder = tmp_path / "corpus-x"
    folder.mkdir()
    for name in ("train_000002", "train_000001", "val_000000"):
        write_shard(folder / f"corpus_{name}.bin", np.arange(9))
    (folder / "meta.json").write_text('{"vocab_size": 300, "eot_token": 0}')
    monkeypatch.setattr(data, "build_corpus", {300: folder}.get)
    monkeypatch.chdir(tmp_path)  # where the default folder is not
    files = resolve_source(Source(source=source))
    assert [len(files.train), len(files.val)] == [2, 1]
    assert files[2:] == (300, 0, "corpus-x")


def test_glob_splits_by_name_and_reads_meta(tmp_path):
    files = make_files(tmp_path / "mine", [20, 20], [20])
    found = resolve_source(Source(source=str(tmp_path / "mine/*.bin")))
    assert found == files._replace(vocab_size=50_304, eot_token=50_256, name="mine")
    (tmp_path / "mine/meta.json").write_text('{"vocab_size": 70, "eot_token": 3}')
    found = resolve_source(Source(source=str(tmp_path / "**/*_train_*.bin")))
    assert found == files._replace(val=(), vocab_size=70, eot_token=3, name="mine")


def make_half_download(folder):
    write_shard(folder / "fineweb_val_000000.bin", np.arange(9))
    return Source(folder=str(folder))


def make_nothing(folder):
    return Source(folder=str(folder / "none"))


def make_two_vocabularies(folder):
    for name in ("a", "b"):
        make_files(folder / name, [20])
    (folder / "a/meta.json").write_text('{"vocab_size": 70, "eot_token": 3}')
    return Source(source=f"{folder}/*/*.bin")


def make_only_validation(folder):
    make_files(folder, [], [20])
    return Source(source=f"{folder}/*.bin")


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda folder: Source(source=f"{folder}/*.bin"), "matches no file"),
        (lambda folder: Source(source="corpsu"), "data=corpsu matches no file"),
        (lambda folder: Source(source=str(folder)), "is a folder"),
        (make_only_validation, "only validation shards"),
        (make_half_download, "no fineweb_train_"),
        (make_nothing, "/none has no fineweb_train_"),
        (make_two_vocabularies, "(70, 3)"),
    ],
)
def test_source_without_training_shards_is_refused(tmp_path, make, found):
    with pytest.raises(UsageError, match=re.escape(found)) as caught:
        resolve_source(make(tmp_path))
    assert "\n" not in str(caught.value)
