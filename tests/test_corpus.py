"""The embedded corpus, over a small made-up library: same bytes every time, splits apart."""

import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest

from experiments import corpus
from experiments.corpus import build_corpus, list_files, unigram_entropy
from experiments.shards import open_shard
from models.command_line import UsageError

VOCAB = 300


def make_library(folder: Path) -> Path:
    """Sixty small modules of made-up words, and files that are no part of the text."""
    generator = random.Random(0)  # noqa: S311, no secret
    words = ["".join(generator.choices("abcdefgh_é", k=6)) for _ in range(80)]
    for number in range(60):
        path = folder / ("package" if number % 3 else ".") / f"module_{number:02d}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = f"# {number}\n" + " ".join(generator.choices(words, k=60)) + " <|endoftext|>\n"
        path.write_text(text, encoding="utf-8")
    for name in ("latin.py", "package/latin.py"):
        (folder / name).write_bytes("# é".encode("latin-1"))
    (folder / "notes.txt").write_text("not python")
    for name in ("site-packages", "dist-packages"):
        (folder / name).mkdir()
        (folder / name / "module.py").write_text("not the library")
    return folder


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def documents(tokens: np.ndarray) -> list[list[int]]:
    """Token lists between document marks."""
    return [part[1:].tolist() for part in np.split(tokens, np.flatnonzero(tokens == 0))[1:]]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return make_library(tmp_path_factory.mktemp("library"))


@pytest.fixture(scope="module")
def built(library, tmp_path_factory):
    return build_corpus(VOCAB, library=library, cache=tmp_path_factory.mktemp("cache"))


def test_files_of_the_corpus(built):
    assert sorted(read_folder(built)) == [
        "corpus_train_000001.bin",
        "corpus_val_000000.bin",
        "meta.json",
        "tokenizer.json",
    ]
    meta = json.loads((built / "meta.json").read_text())
    train = open_shard(built / "corpus_train_000001.bin", VOCAB)
    val = open_shard(built / "corpus_val_000000.bin", VOCAB)
    assert meta["vocab_size"] == VOCAB
    assert meta["eot_token"] == 0
    assert (meta["train_tokens"], meta["val_tokens"]) == (len(train), len(val))
    assert train[0] == val[0] == 0
    assert built.name.startswith(f"corpus-py{meta['python']}-v{VOCAB}-")


def test_every_file_is_one_document_of_one_split(library, built):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(built / "tokenizer.json"))
    texts = {}
    for split, name in (("train", "corpus_train_000001.bin"), ("val", "corpus_val_000000.bin")):
        found = documents(np.array(open_shard(built / name)))
        texts[split] = [tokenizer.decode(ids, skip_special_tokens=False) for ids in found]
    files = [file for file in list_files(library) if "latin" not in file.name]
    for split, held_out in (("train", False), ("val", True)):
        names = sorted(file.name for file in files if file.held_out is held_out)
        expected = [(library / name).read_text(encoding="utf-8") for name in names]
        assert texts[split] == expected  # with the end-of-text characters as plain text
    assert len(texts["train"]) + len(texts["val"]) == 60
    assert texts["val"]


def test_split_follows_the_name_alone():
    files = [corpus.SourceFile(f"a/module_{number}.py", number) for number in range(20_000)]
    share = np.mean([file.held_out for file in files])
    assert share == pytest.approx(0.06, abs=0.005)
    assert [file.held_out for file in files] == [file._replace(size=9).held_out for file in files]


def test_second_build_gives_the_same_bytes(library, built, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    again = build_corpus(VOCAB, library=library, cache=tmp_path)
    assert again.name == built.name
    assert read_folder(again) == read_folder(built)


def test_cached_corpus_is_not_built_again(library, built, monkeypatch):
    monkeypatch.setattr(corpus, "write_corpus", None)
    assert build_corpus(VOCAB, library=library, cache=built.parent) == built


def test_changed_library_is_another_corpus(library, built, tmp_path):
    files = list_files(library)
    assert corpus.corpus_name(files, VOCAB) == built.name
    assert corpus.corpus_name(files[1:], VOCAB) != built.name
    assert corpus.corpus_name([files[0]._replace(size=1), *files[1:]], VOCAB) != built.name
    assert corpus.corpus_name(files, VOCAB + 1) != built.name


def test_validation_text_does_not_reach_the_tokenizer(built, tmp_path):
    other = make_library(tmp_path / "library")
    for file in list_files(other):
        if file.held_out:
            (other / file.name).write_text("zzzz " * 100)
    changed = build_corpus(VOCAB, library=other, cache=tmp_path / "cache")
    before, after = read_folder(built), read_folder(changed)
    assert after["tokenizer.json"] == before["tokenizer.json"]
    assert after["corpus_train_000001.bin"] == before["corpus_train_000001.bin"]
    assert after["corpus_val_000000.bin"] != before["corpus_val_000000.bin"]


def test_builds_at_the_same_time_do_not_disturb_each_other(library, built, tmp_path, monkeypatch):
    publish, barrier = corpus.publish_folder, Barrier(3)

    def publish_together(part, folder):
        barrier.wait(timeout=30)
        return publish(part, folder)

    monkeypatch.setattr(corpus, "publish_folder", publish_together)
    with ThreadPoolExecutor(3) as pool:
        folders = list(
            pool.map(lambda _: build_corpus(VOCAB, library=library, cache=tmp_path), range(3))
        )
    assert folders == [tmp_path / built.name] * 3
    assert os.listdir(tmp_path) == [built.name]
    assert read_folder(folders[0]) == read_folder(built)


def test_failed_build_leaves_nothing(library, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "unigram_entropy", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_corpus(VOCAB, library=library, cache=tmp_path)
    assert os.listdir(tmp_path) == []


def test_unigram_entropy_is_that_of_add_one_counts():
    train, val = np.array([3, 0, 1]), np.array([1, 2, 0])
    probabilities = [4 / 7, 1 / 7, 2 / 7]
    expected = -sum(n * np.log(p) for n, p in zip(val, probabilities, strict=True)) / 3
    assert unigram_entropy(train, val) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("vocab", [256, 65_537, -1])
def test_vocabulary_out_of_range_is_refused(vocab, library, tmp_path):
    with pytest.raises(UsageError, match=str(vocab)):
        build_corpus(vocab, library=library, cache=tmp_path)


def test_library_without_text_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no \.py file"):
        build_corpus(VOCAB, library=tmp_path, cache=tmp_path / "cache")
    (tmp_path / "only.py").write_text("x = 1\n")
    with pytest.raises(UsageError, match="0 validation"):
        build_corpus(VOCAB, library=tmp_path, cache=tmp_path / "cache")
