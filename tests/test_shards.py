"""Shards: the format bit for bit, every damage refused in one line, writes whole or not at all."""

import json
import os
import re
import struct
import tempfile
from itertools import pairwise
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from experiments.shards import (
    ShardWriter,
    cache_folder,
    open_shard,
    publish_folder,
    read_vocabulary,
    write_shard,
)
from models.command_line import UsageError

PUBLISHED = Path(__file__).parents[2] / "shared/data/openmix_gpt2"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LENS_JAX_CACHE", str(tmp_path / "cache"))


def literal_shard(tokens, magic=20240520, version=1, count=None) -> bytes:
    """The format written out with struct alone."""
    count = len(tokens) if count is None else count
    header = struct.pack("<256i", magic, version, count, *[0] * 253)
    return header + struct.pack(f"<{len(tokens)}H", *tokens)


def refusal(path, vocab_size=None) -> str:
    """The one line with which a file is refused; it names the file."""
    with pytest.raises(UsageError, match=re.escape(str(path))) as caught:
        open_shard(path, vocab_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@settings(max_examples=20)
@given(st.lists(st.integers(0, 65_535), min_size=1, max_size=60))
def test_shard_is_the_literal_format_and_reads_back(tokens):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.bin")
        write_shard(path, np.array(tokens))
        assert path.read_bytes() == literal_shard(tokens)
        read = open_shard(path)
        assert read.dtype == np.uint16
        assert read.tolist() == tokens
        assert os.listdir(folder) == ["a.bin"]


def test_published_shards_open():
    if not PUBLISHED.is_dir():
        pytest.skip("no published shards beside the repository")
    assert len(open_shard(PUBLISHED / "openmix_val_000000.bin", 50_304)) == 817_586


GOOD = literal_shard([1, 2, 3, 4])


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "0 bytes"),
        (GOOD[:1000], "1000 bytes"),
        (literal_shard([1], magic=20240801), "20240801"),
        (np.arange(600, dtype="<u2").tobytes(), "magic"),
        (literal_shard([1], version=2), "version 2"),
        (literal_shard([], count=0), "0 tokens"),
        (literal_shard([1], count=-1), "-1 tokens"),
        (GOOD[:-2], "truncated"),
        (GOOD[:-1], "truncated"),
        (GOOD + b"\0", "after its end"),
        (GOOD + b"\0\0", "after its end"),
        (GOOD[:1024] + struct.pack("<4I", 1, 2, 3, 4), "4 bytes each"),
    ],
)
def test_damaged_shard_is_refused(tmp_path, content, found):
    path = tmp_path / "bad.bin"
    path.write_bytes(content)
    assert found in refusal(path)


def test_missing_shard_and_folder_are_refused(tmp_path):
    assert "No such file" in refusal(tmp_path / "none.bin")
    assert "directory" in refusal(tmp_path)


def test_token_outside_vocabulary_is_refused(tmp_path):
    path = tmp_path / "a.bin"
    write_shard(path, np.array([0, 9, 3]))
    assert len(open_shard(path, 10)) == 3
    assert "token id 9" in refusal(path, 9)
    assert "token id 9" in refusal(path, 9)  # from the cache


@pytest.mark.parametrize("tokens", [[-1], [65_536], [], [[1, 2]], [1.0]])
def test_what_is_no_shard_is_not_written(tmp_path, tokens):
    with pytest.raises(UsageError, match=r"x\.bin"):
        write_shard(tmp_path / "x.bin", np.array(tokens))
    assert os.listdir(tmp_path) == []


def test_largest_token_is_looked_for_once(tmp_path, monkeypatch):
    path, store = tmp_path / "a.bin", tmp_path / "cache/largest_token.json"
    write_shard(path, np.array([0, 9, 3]))
    open_shard(path, 10)
    known = json.loads(store.read_text())
    known[str(path)]["largest"] = 77  # seen again only if the file is not read again
    known[str(tmp_path / "gone.bin")] = known[str(path)]
    store.write_text(json.dumps(known))
    assert "77" in refusal(path, 10)
    write_shard(path, np.array([0, 9, 3, 11]))
    assert "11" in refusal(path, 10)
    assert list(json.loads(store.read_text())) == [str(path)]  # what is gone is forgotten
    monkeypatch.chdir(tmp_path)
    assert len(open_shard("a.bin", 12)) == 4
    assert list(json.loads(store.read_text())) == [str(path)]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"PATH": 3}', '{"PATH": {"largest": "9"}}'])
def test_broken_cache_is_rebuilt(tmp_path, content):
    path, store = tmp_path / "a.bin", tmp_path / "cache/largest_token.json"
    write_shard(path, np.array([0, 9, 3]))
    store.parent.mkdir()
    store.write_text(content.replace("PATH", str(path)))
    assert len(open_shard(path, 10)) == 3
    assert json.loads(store.read_text())[str(path)]["largest"] == 9


def test_cache_that_cannot_be_written_is_only_slower(tmp_path):
    write_shard(tmp_path / "a.bin", np.array([0, 9, 3]))
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="LENS_JAX_CACHE"):
        assert len(open_shard(tmp_path / "a.bin", 10)) == 3


def test_failed_write_leaves_the_old_shard(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    write_shard(path, np.array([1, 2]))

    def disk_full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(UsageError, match="No space"):
        write_shard(path, np.array([3, 4, 5]))
    assert open_shard(path).tolist() == [1, 2]
    assert os.listdir(tmp_path) == ["a.bin"]


@settings(max_examples=20)
@given(st.lists(st.integers(1, 25), min_size=1, max_size=12), st.integers(1, 20))
def test_shard_writer_cuts_at_documents(lengths, limit):
    documents = [np.full(n, i, np.uint16) for i, n in enumerate(lengths)]
    with tempfile.TemporaryDirectory() as folder:
        writer = ShardWriter(Path(folder), "x_train", 1, shard_tokens=limit)
        for document in documents:
            writer.add(document)
        assert writer.close() == sum(lengths)
        names = sorted(os.listdir(folder))
        assert names == [f"x_train_{i:06d}.bin" for i in range(1, len(names) + 1)]
        read = [np.array(open_shard(Path(folder, name))) for name in names]
    assert max(map(len, read)) <= limit
    np.testing.assert_array_equal(np.concatenate(read), np.concatenate(documents))
    for before, after in pairwise(read):
        if before[-1] == after[0]:  # only a document that fits no shard is cut
            assert lengths[after[0]] > limit


def test_writer_without_documents_writes_nothing(tmp_path):
    assert ShardWriter(tmp_path, "x_val", 0).close() == 0
    assert os.listdir(tmp_path) == []


def test_folder_is_published_once(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    (tmp_path / "final").mkdir()  # an empty one is in nobody's way
    assert publish_folder(tmp_path / "one", tmp_path / "final")
    assert not publish_folder(tmp_path / "two", tmp_path / "final")
    assert (tmp_path / "final/content").read_text() == "one"
    assert os.listdir(tmp_path) == ["final"]


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("LENS_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/x")
    assert cache_folder() == Path("/var/x/lens_jax")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == Path("/home/someone/.cache/lens_jax")


def test_vocabulary_comes_from_meta(tmp_path):
    assert read_vocabulary(tmp_path) == (50_304, 50_256)
    (tmp_path / "meta.json").write_text('{"vocab_size": 1024, "eot_token": 0, "more": 1}')
    assert read_vocabulary(tmp_path) == (1024, 0)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1, 2]",
        '{"vocab_size": 10}',
        '{"vocab_size": "10", "eot_token": 0}',
        '{"vocab_size": 10, "eot_token": 10}',
        '{"vocab_size": 10, "eot_token": -1}',
        '{"vocab_size": 65537, "eot_token": 0}',
    ],
)
def test_bad_meta_is_refused(tmp_path, content):
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(UsageError, match=r"meta\.json") as caught:
        read_vocabulary(tmp_path)
    assert "\n" not in str(caught.value)
