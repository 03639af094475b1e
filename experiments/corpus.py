"""The embedded corpus: the text of the running interpreter's standard library as token shards.

Every `.py` file is a document. A byte-level BPE is trained on the training files alone; token 0
opens every document. Nothing is fetched, and the same interpreter always gives the same bytes.
"""

import hashlib
import json
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from experiments.shards import MAX_VOCAB, ShardWriter, cache_folder, part_path, publish_folder
from models.command_line import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

RECIPE = 1  # raise it whenever the same files would give other tokens
EOT = "<|endoftext|>"
EOT_TOKEN = 0
MIN_VOCAB = 257  # the 256 bytes and EOT
VAL_SHARE = 0.06  # of the files
INSTALLED = {"site-packages", "dist-packages"}  # what users add is no part of the library


class SourceFile(NamedTuple):
    """A file of the library: path relative to it in posix form, and size in bytes."""

    name: str
    size: int

    @property
    def held_out(self) -> bool:
        """Whether the file is for validation: a matter of its name alone."""
        digest = hashlib.sha256(self.name.encode()).digest()
        return int.from_bytes(digest[:8], "big") < VAL_SHARE * 2**64


def build_corpus(
    vocab_size: int, *, library: Path | None = None, cache: Path | None = None
) -> Path:
    """Folder of the corpus's shards, tokenizer.json and meta.json, made at the first call.

    The folder's name has the Python version, the vocabulary and a hash of the files' names and
    sizes. It appears whole or not at all, so processes may build it at the same time. `library` and
    `cache` default to this interpreter's standard library and this machine's cache folder.
    Raises UsageError on a vocabulary or a library that gives no corpus.
    """
    if not MIN_VOCAB <= vocab_size <= MAX_VOCAB:
        raise UsageError(
            f"corpus vocabulary {vocab_size}: give {MIN_VOCAB} to {MAX_VOCAB} (uint16 shards)"
        )
    library = library or Path(sysconfig.get_path("stdlib"))
    files = list_files(library)
    folder = (cache or cache_folder()) / corpus_name(files, vocab_size)
    if not (folder / "meta.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        _announce(files, vocab_size, folder)
        part = part_path(folder)
        part.mkdir()
        try:
            write_corpus(part, library, files, vocab_size)
            publish_folder(part, folder)  # another process may have been first: same bytes
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def list_files(library: Path) -> list[SourceFile]:
    """All `.py` files of a library, sorted by name, without what users installed into it."""
    files = []
    for folder, subfolders, names in os.walk(library):
        subfolders[:] = [name for name in subfolders if name not in INSTALLED]
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            if path.is_file():
                name = path.relative_to(library).as_posix()
                files.append(SourceFile(name, path.stat().st_size))
    if not files:
        raise UsageError(
            f"{library}: holds no .py file to make a corpus of; give shards with data=GLOB"
        )
    return sorted(files)


def corpus_name(files: Iterable[SourceFile], vocab_size: int) -> str:
    """Name of the corpus's folder, different for other Pythons, vocabularies or files."""
    state = json.dumps([RECIPE, *files])
    digest = hashlib.sha256(state.encode()).hexdigest()[:8]
    return f"corpus-py{platform.python_version()}-v{vocab_size}-{digest}"


def write_corpus(folder: Path, library: Path, files: Sequence[SourceFile], vocab_size: int) -> None:
    """Train the tokenizer, write both splits' shards, tokenizer.json and meta.json (last)."""
    train = _read_texts(library, (file for file in files if not file.held_out))
    val = _read_texts(library, (file for file in files if file.held_out))
    if not train or not val:
        raise UsageError(
            f"{library}: gives {len(train)} training and {len(val)} validation documents, too few "
            f"for a corpus; give shards with data=GLOB"
        )
    tokenizer = train_tokenizer(train, vocab_size)
    train_counts = _write_split(folder, "corpus_train", 1, tokenizer, train, vocab_size)
    val_counts = _write_split(folder, "corpus_val", 0, tokenizer, val, vocab_size)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    meta = {
        "vocab_size": vocab_size,
        "eot_token": EOT_TOKEN,
        "tokenizer": f"byte-level BPE (tokenizers {version('tokenizers')})",
        "python": platform.python_version(),
        "train_files": len(train),
        "val_files": len(val),
        "train_tokens": int(train_counts.sum()),
        "val_tokens": int(val_counts.sum()),
        "unigram_entropy_val": unigram_entropy(train_counts, val_counts),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> "Tokenizer":
    """A byte-level BPE of at most `vocab_size` tokens; EOT is token 0 and never met in text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    tokenizer.encode_special_tokens = True  # the characters of EOT in a file are plain text
    return tokenizer


def unigram_entropy(train_counts: np.ndarray, val_counts: np.ndarray) -> float:
    """Cross-entropy in nats per token of the validation counts (V,) under the training counts.

    Training counts are smoothed by adding one. A model that has learned only how frequent tokens
    are has this validation loss.
    """
    smoothed = train_counts.astype(np.float64) + 1
    log_share = np.log(smoothed / smoothed.sum())
    return float(-(val_counts * log_share).sum() / val_counts.sum())


def encode_documents(tokenizer: "Tokenizer", texts: Sequence[str]) -> Iterator[np.ndarray]:
    """Each text as uint16 ids (n,), EOT first."""
    for start in range(0, len(texts), 64):  # a full batch at once would hold every string twice
        for encoding in tokenizer.encode_batch_fast(list(texts[start : start + 64])):
            yield np.array([EOT_TOKEN, *encoding.ids], np.uint16)


def _write_split(
    folder: Path,
    stem: str,
    first: int,
    tokenizer: "Tokenizer",
    texts: Sequence[str],
    vocab_size: int,
) -> np.ndarray:
    """Write the shards of one split; how often each token occurs in it, int64 (V,)."""
    writer = ShardWriter(folder, stem, first)
    counts = np.zeros(vocab_size, np.int64)
    for document in encode_documents(tokenizer, texts):
        writer.add(document)
        counts += np.bincount(document, minlength=vocab_size)
    writer.close()
    return counts


def _read_texts(library: Path, files: Iterable[SourceFile]) -> list[str]:
    """Texts of the files that are UTF-8; a few test files are other encodings on purpose."""
    texts = []
    for file in files:
        try:
            texts.append((library / file.name).read_bytes().decode("utf-8"))
        except UnicodeDecodeError:
            continue
    return texts


def _announce(files: Sequence[SourceFile], vocab_size: int, folder: Path) -> None:
    megabytes = sum(file.size for file in files) / 1e6
    print(
        f"building the corpus once: {len(files)} files of Python {platform.python_version()}'s "
        f"standard library, {megabytes:.1f} MB, vocabulary {vocab_size}, into {folder}",
        file=sys.stderr,
        flush=True,
    )
