"""Text files into token shards: documents in, `<name>_train_%06d.bin` and `_val_` out."""

import json
import lzma
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.shards import (
    GPT2_EOT,
    GPT2_VOCAB,
    SHARD_TOKENS,
    ShardWriter,
    part_path,
    publish_folder,
)
from models.command_line import UsageError

SUFFIXES = (".txt", ".jsonl", ".jsonl.xz")
FIRST_NUMBER = {"train": 1, "val": 0}  # of the shards of a split, as published
BATCH = 256  # documents encoded together


class Document(NamedTuple):
    """A text and the split it belongs to, train or val."""

    split: str
    text: str


class Encoding(NamedTuple):
    """A tokenizer: texts to lists of ids, the vocabulary a model gives it, its document mark."""

    encode: Callable[[list[str]], list[list[int]]]
    vocab_size: int
    eot_token: int


def gpt2_encoding(folder: Path | None) -> Encoding:
    """GPT-2's BPE, from a folder with encoder.json and vocab.bpe, else from tiktoken.

    Special tokens in a text are plain text. The vocabulary is padded to 50,304 (ladder spec 6).
    """
    encode = _gpt2_from_folder(folder) if folder else _gpt2_from_tiktoken()
    return Encoding(encode, GPT2_VOCAB, GPT2_EOT)


ENCODINGS: dict[str, Callable[[Path | None], Encoding]] = {"gpt2": gpt2_encoding}


def _gpt2_from_folder(folder: Path) -> Callable[[list[str]], list[list[int]]]:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary, merges = folder / "encoder.json", folder / "vocab.bpe"
    for path in (vocabulary, merges):
        if not path.is_file():
            raise UsageError(
                f"bpe={folder}: has no {path.name}; give the folder with GPT-2's encoder.json and "
                f"vocab.bpe"
            )
    try:
        model = models.BPE.from_file(str(vocabulary), str(merges))
    except Exception as error:  # the library raises plain Exception on any fault in the files
        raise UsageError(f"bpe={folder}: cannot be read ({error}); fetch it again") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return lambda texts: [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]


def _gpt2_from_tiktoken() -> Callable[[list[str]], list[list[int]]]:
    try:
        import tiktoken
    except ImportError:
        raise UsageError(
            "tokenizer=gpt2 without bpe=FOLDER needs tiktoken; run pip install 'lens_jax[data]', "
            "or give bpe=FOLDER with GPT-2's encoder.json and vocab.bpe"
        ) from None
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except OSError as error:  # it fetches its table at the first use
        raise UsageError(
            f"tokenizer=gpt2: tiktoken could not fetch its table ({type(error).__name__}); connect "
            f"once, or give bpe=FOLDER with GPT-2's encoder.json and vocab.bpe"
        ) from error
    return encoding.encode_ordinary_batch


def read_documents(path: Path) -> Iterator[Document]:
    """Documents of a file: a .txt is one, a line of .jsonl or .jsonl.xz is one.

    A line is a JSON object with the document under "text" and optionally "split", train or val.
    Raises UsageError naming the file and the line.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give {', '.join(SUFFIXES)} files")
    if path.name.endswith(".txt"):
        try:
            yield Document("train", path.read_bytes().decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: is not UTF-8 ({error}); convert it") from None
        return
    number, open_file = 0, lzma.open if path.name.endswith(".xz") else open
    with open_file(path, "rb") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _parse_line(line, f"{path}, line {number}")
        except (lzma.LZMAError, EOFError) as error:
            raise UsageError(
                f"{path}: is damaged after line {number} ({error}); fetch it again"
            ) from None


def _parse_line(line: bytes, where: str) -> Document:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where}: is not JSON ({error}); mend or remove it") from None
    match fields:
        case {"text": str(text), **rest} if rest.get("split", "train") in FIRST_NUMBER:
            return Document(rest.get("split", "train"), text)
    raise UsageError(
        f'{where}: needs an object with a string under "text" and, if any, a "split" of train or '
        f"val; mend or remove it"
    )


def encode_files(
    paths: Sequence[Path],
    out: Path,
    *,
    tokenizer: str = "gpt2",
    bpe: Path | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, int]:
    """Tokens of each split after writing the documents of `paths`, in order, as shards into `out`.

    Every document opens with the end-of-text token; shards are named after the first file and a
    meta.json stands beside them. `out` must be new or empty, and is filled in one move.
    Raises UsageError.
    """
    name, *_ = [name_of(path) for path in paths]
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"out={out} is not empty; remove it, or give another folder")
    encoding = ENCODINGS[tokenizer](bpe)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = part_path(out)
    part.mkdir()
    try:
        documents = (document for path in paths for document in read_documents(path))
        tokens = _write_shards(part, name, documents, encoding, shard_tokens)
        if not tokens["train"]:
            raise UsageError(f"{paths[0]}: no training document found; give more files")
        meta = {
            "vocab_size": encoding.vocab_size,
            "eot_token": encoding.eot_token,
            "tokenizer": tokenizer,
            "train_tokens": tokens["train"],
            "val_tokens": tokens["val"],
        }
        (part / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        if not publish_folder(part, out):
            raise UsageError(f"out={out} was filled by another process; give another folder")
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return tokens


def name_of(path: Path) -> str:
    """File name without its suffix, the name of a data set; UsageError on another suffix."""
    for suffix in SUFFIXES:
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix)
    raise UsageError(f"{path}: is none of {', '.join(SUFFIXES)}; rename or convert it")


def _write_shards(
    folder: Path,
    name: str,
    documents: Iterable[Document],
    encoding: Encoding,
    shard_tokens: int,
) -> dict[str, int]:
    writers = {
        split: ShardWriter(folder, f"{name}_{split}", first, shard_tokens)
        for split, first in FIRST_NUMBER.items()
    }
    documents = iter(documents)
    while batch := list(islice(documents, BATCH)):
        ids = encoding.encode([document.text for document in batch])
        for document, tokens in zip(batch, ids, strict=True):
            writers[document.split].add(np.array([encoding.eot_token, *tokens], np.uint16))
    return {split: writer.close() for split, writer in writers.items()}
