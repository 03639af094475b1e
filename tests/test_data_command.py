"""The data command: GPT-2's own token ids, a stand-in for the hub, one line for every mistake."""

import json
import lzma
import subprocess
import sys
import types
import zlib
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from experiments import encode
from experiments.data_command import main, split_words
from experiments.encode import encode_files, read_documents
from experiments.fineweb import shard_names
from experiments.shards import open_shard, write_shard
from models.command_line import UsageError

SHARED = Path(__file__).parents[2] / "shared/data"
BPE = SHARED / "gpt2_bpe"
needs_bpe = pytest.mark.skipif(not BPE.is_dir(), reason="no GPT-2 files beside the repository")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LENS_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def byte_tokens(monkeypatch):
    """A tokenizer without files: the bytes of the text."""

    def make(bpe):
        return encode.Encoding(lambda texts: [list(t.encode()) for t in texts], 300, 256)

    monkeypatch.setitem(encode.ENCODINGS, "gpt2", make)


def refusal(*words) -> str:
    with pytest.raises(UsageError) as caught:
        main(words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def run(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.data", *words]
    root = Path(__file__).parents[1]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=root)


def test_help_and_mistakes_as_a_process():
    shown = run("--help")
    assert shown.returncode == 0
    for command in ("fineweb10B", "encode", "verify", "corpus"):
        assert command in shown.stdout
    wrong = run("corpus", "vocb=300")
    assert wrong.returncode == 2
    assert wrong.stderr == "error: unknown key vocb=300; the keys here are vocab\n"
    assert not wrong.stdout


def test_command_imports_nothing_slow():
    code = (
        "import sys; from experiments.data_command import main; import experiments.data;"
        "main(['--help']);"
        "print(sorted({'jax', 'grain', 'tokenizers', 'huggingface_hub'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[1]
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert shown.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["fetch"], "the commands are fineweb10B, encode, verify, corpus"),
        (["fineweb10B", "9"], "write shards=VALUE"),
        (["fineweb10B", "shards=0"], "give 1 to 103"),
        (["fineweb10B", "shards=104"], "give 1 to 103"),
        (["fineweb10B", "shards=many"], "shards=many"),
        (["fineweb10B", "shards=1", "shards=2"], "given twice"),
        (["encode"], "no file given"),
        (["encode", "a.pdf"], "a.pdf: is none of .txt"),
        (["encode", "a.txt", "tokenizer=bert"], "give one of gpt2"),
        (["encode", "a.txt", "bpe=nowhere"], "has no encoder.json"),
        (["encode", "a.txt", "out="], "out= has no value"),
        (["encode", "a.txt", "vocab=9"], "the keys here are tokenizer, bpe, out"),
        (["verify"], "no shard given"),
        (["verify", "*.bin"], "matches no file"),
        (["verify", "a=1"], "it takes no keys"),
        (["corpus", "vocab=100"], "give 257 to 65536"),
        (["corpus", "vocab=1.5"], "whole number"),
    ],
)
def test_bad_words_are_refused(words, found):
    assert found in refusal(*words)


def test_paths_may_contain_an_equals_sign():
    assert split_words(["runs/a=b.txt", "out=x=y"], ("out",)) == (["runs/a=b.txt"], {"out": "x=y"})


def write_openmix(path: Path, count: int) -> dict[str, int]:
    """The first documents of openmix, and how many tokens its own list says each split has."""
    tokens = {"train": 0, "val": 0}
    with lzma.open(SHARED / "openmix/openmix.jsonl.xz") as lines, path.open("wb") as out:
        for line in islice(lines, count):
            fields = json.loads(line)
            tokens[fields["split"]] += fields["tokens"]
            out.write(line)
    return tokens


@needs_bpe
def test_encode_gives_gpt2_token_ids(tmp_path, capsys):
    tokens = write_openmix(tmp_path / "mix.jsonl", 150)
    main(["encode", "mix.jsonl", "tokenizer=gpt2", f"bpe={BPE}", "out=mix"])
    for split, number in (("train", 1), ("val", 0)):
        ours = open_shard(tmp_path / f"mix/mix_{split}_{number:06d}.bin", 50_257)
        theirs = open_shard(SHARED / f"openmix_gpt2/openmix_{split}_{number:06d}.bin")
        assert len(ours) == tokens[split]
        np.testing.assert_array_equal(ours, theirs[: len(ours)])
    meta = json.loads((tmp_path / "mix/meta.json").read_text())
    assert (meta["vocab_size"], meta["eot_token"]) == (50_304, 50_256)
    assert f"{tokens['train']:,} training" in capsys.readouterr().out


@needs_bpe
def test_gpt2_splits_and_special_text():
    ids = encode.gpt2_encoding(BPE).encode
    assert ids(["hello world"]) == [[31373, 995]]
    # contractions, runs of spaces, digits, and the mark of the end of text as plain characters
    assert ids(["we'll  see 123\n\n"]) == [[732, 1183, 220, 766, 17031, 628]]
    assert 50_256 not in ids(["<|endoftext|>"])[0]
    assert ids([""]) == [[]]


def test_documents_become_shards_of_their_split(tmp_path, byte_tokens):
    (tmp_path / "a.txt").write_text("é", encoding="utf-8")
    rows = [{"text": "xy"}, {"text": "v", "split": "val"}, {"text": "", "split": "train", "id": 3}]
    lines = "\n\n".join(map(json.dumps, rows)).encode()
    with lzma.open("b.jsonl.xz", "wb") as file:
        file.write(lines)
    assert main(["encode", "a.txt", "b.jsonl.xz"]) is None
    out = tmp_path / "data/a"
    assert open_shard(out / "a_train_000001.bin").tolist() == [256, 195, 169, 256, 120, 121, 256]
    assert open_shard(out / "a_val_000000.bin").tolist() == [256, 118]
    assert json.loads((out / "meta.json").read_text())["vocab_size"] == 300
    assert "is not empty" in refusal("encode", "a.txt")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["a"]


def test_many_documents_make_numbered_shards(tmp_path, byte_tokens):
    path = tmp_path / "many.jsonl"
    path.write_text("\n".join(json.dumps({"text": "a" * (n % 7)}) for n in range(600)))
    tokens = encode_files([path], tmp_path / "out", shard_tokens=100)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.bin"))
    assert names == [f"many_train_{n:06d}.bin" for n in range(1, len(names) + 1)]
    read = np.concatenate([open_shard(tmp_path / "out" / name) for name in names])
    assert len(read) == tokens["train"] == 600 + sum(n % 7 for n in range(600))


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.txt", b"\xff", "is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "a.jsonl, line 2: is not JSON"),
        ("a.jsonl", b'{"body": "x"}', "line 1: needs an object"),
        ("a.jsonl", b'{"text": 3}', "line 1: needs an object"),
        ("a.jsonl", b"[]", "line 1: needs an object"),
        ("a.jsonl", b'{"text": "x", "split": "test"}', "train or val"),
        ("a.jsonl", b'{"text": "x", "split": "val"}', "no training document"),
        ("a.jsonl", b"", "no training document"),
        ("a.jsonl.xz", b"no xz", "is damaged"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "x"}\n' * 9)[:-20], "is damaged"),
    ],
)
def test_bad_text_is_refused_and_leaves_nothing(tmp_path, byte_tokens, name, content, found):
    (tmp_path / name).write_bytes(content)
    assert found in refusal("encode", name, "out=out")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_missing_text_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        list(read_documents(tmp_path / "a.txt"))


def test_tiktoken_is_asked_without_a_folder(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert "pip install 'lens_jax[data]'" in refusal("encode", "a.txt")

    def no_network(_):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "tiktoken", types.SimpleNamespace(get_encoding=no_network))
    assert "ConnectionError" in refusal("encode", "a.txt")
    table = types.SimpleNamespace(encode_ordinary_batch=lambda texts: [[87] for _ in texts])
    stand_in = types.SimpleNamespace(get_encoding={"gpt2": table}.get)
    monkeypatch.setitem(sys.modules, "tiktoken", stand_in)
    main(["encode", "a.txt"])
    assert open_shard("data/a/a_train_000001.bin").tolist() == [50_256, 87]


@needs_bpe
def test_damaged_bpe_folder_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "encoder.json").write_text("{")
    (tmp_path / "vocab.bpe").write_text("x")
    assert "cannot be read" in refusal("encode", "a.txt", f"bpe={tmp_path}")


class Hub:
    """Stands in for huggingface_hub: writes small shards and keeps a list of what was asked."""

    def __init__(self):
        self.asked = []

    def hf_hub_download(self, *, repo_id, filename, repo_type, local_dir, force_download):
        assert (repo_id, repo_type) == ("kjj0/fineweb10B-gpt2", "dataset")
        path = Path(local_dir, filename)
        assert force_download == path.exists()
        self.asked.append(filename)
        write_shard(path, np.array([50_256, 1, 2]))
        return str(path)


def test_fineweb_fetches_what_is_missing_or_broken(tmp_path, monkeypatch, capsys):
    hub = Hub()
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    main(["fineweb10B", "shards=2"])
    assert hub.asked == shard_names(2)
    assert hub.asked[::2] == ["fineweb_val_000000.bin", "fineweb_train_000002.bin"]
    folder = tmp_path / "data/fineweb10B"
    assert sorted(path.name for path in folder.iterdir()) == sorted(hub.asked)
    broken = folder / "fineweb_train_000001.bin"
    broken.write_bytes(broken.read_bytes()[:-2])
    hub.asked.clear()
    capsys.readouterr()
    main(["fineweb10B", "shards=3"])
    assert hub.asked == ["fineweb_train_000001.bin", "fineweb_train_000003.bin"]
    said = [line.rsplit(": ")[-1] for line in capsys.readouterr().out.splitlines()]
    assert said == ["already there", "fetched", "already there", "fetched"]


def test_fineweb_without_hub_or_network(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'lens_jax[data]'" in refusal("fineweb10B", "shards=1")

    def no_network(**_):
        try:
            raise OSError(-2, "Name or service not known")
        except OSError as error:
            raise RuntimeError("see above\nat length") from error

    stand_in = types.SimpleNamespace(hf_hub_download=no_network)
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
    assert "Name or service not known" in refusal("fineweb10B", "shards=1", "folder=here")


def test_fineweb_that_arrives_broken_is_refused(tmp_path, monkeypatch):
    def cut_off(**asked):
        Path(asked["local_dir"], asked["filename"]).write_bytes(b"<html>")

    stand_in = types.SimpleNamespace(hf_hub_download=cut_off)
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
    assert "fineweb_val_000000.bin: has 6 bytes" in refusal("fineweb10B", "shards=1")


def test_verify_prints_every_shard_and_marks_the_broken(tmp_path, capsys):
    write_shard(tmp_path / "a.bin", np.array([3, 9, 1]))
    write_shard(tmp_path / "c.bin", np.array([60_000]))
    assert main(["verify", "a.bin"]) == 0
    crc = zlib.crc32(np.array([3, 9, 1], "<u2").tobytes())
    assert capsys.readouterr().out == f"a.bin: 3 tokens, largest id 9, crc32 {crc:08x}\n"
    (tmp_path / "b.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-1])
    assert main(["verify", "*.bin"]) == 2
    shown = capsys.readouterr()
    assert shown.out.count("\n") == 1
    assert "b.bin: is truncated" in shown.err
    assert "c.bin: holds token id 60000" in shown.err


def test_corpus_is_described(tmp_path, monkeypatch, capsys):
    (tmp_path / "library").mkdir()
    for number in range(60):
        (tmp_path / f"library/m{number}.py").write_text(f"value = {number}\n")
    monkeypatch.setattr("sysconfig.get_path", {"stdlib": str(tmp_path / "library")}.get)
    main(["corpus", "vocab=300"])
    shown = capsys.readouterr().out
    assert "vocab_size: 300" in shown
    assert "unigram_entropy_val" in shown
    assert list((tmp_path / "cache").glob("corpus-py3*-v300-*"))
