"""Token shards: `.bin` files in the format of modded-nanogpt, checked when opened.

A shard is 256 little-endian int32 (magic, version, number of tokens, zeros) followed by the tokens
as little-endian uint16. Everything here is written under a temporary name and renamed, so a reader
meets a whole file, a whole folder, or nothing.
"""

import errno
import json
import os
import secrets
import shutil
import warnings
from pathlib import Path

import numpy as np

from models.atomic_files import write_bytes_atomic
from models.command_line import UsageError

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
MAX_VOCAB = 2**16
GPT2_VOCAB, GPT2_EOT = 50_304, 50_256  # 50,257 tokens, padded to a multiple of 128
SHARD_TOKENS = 100_000_000  # tokens in a published FineWeb shard


def cache_folder() -> Path:
    """Absolute path of $LENS_JAX_CACHE, else $XDG_CACHE_HOME/lens_jax, else ~/.cache/lens_jax."""
    own, shared = os.environ.get("LENS_JAX_CACHE"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(own) if own else Path(shared or "~/.cache") / "lens_jax"
    return folder.expanduser().absolute()


def part_path(path: Path) -> Path:
    """A name beside `path` that nobody else uses, for a folder that is not finished yet."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")


def publish_folder(part: Path, folder: Path) -> bool:
    """Give a finished folder its name; False, and `part` removed, when the name is already taken.

    An empty folder of that name is replaced. Two processes that build the same folder at once both
    succeed: the later one finds the name taken.
    """
    try:
        part.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(part)
        return False
    return True


def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    """Write a one-dimensional array of token ids as a shard, atomically.

    Raises UsageError when there is no token, an id does not fit into uint16, or the disk is full.
    """
    path, tokens = Path(path), np.asarray(tokens)
    if tokens.ndim != 1 or not tokens.size or tokens.dtype.kind not in "iu":
        raise UsageError(
            f"{path}: a shard is one row of whole numbers, not {tokens.dtype} of shape "
            f"{tokens.shape}; give at least one token"
        )
    if tokens.min() < 0 or tokens.max() >= MAX_VOCAB:
        raise UsageError(
            f"{path}: token ids {tokens.min()} to {tokens.max()} do not fit into uint16; "
            f"use a vocabulary of at most {MAX_VOCAB}"
        )
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    write_bytes_atomic(path, header.tobytes() + tokens.astype("<u2").tobytes())


def open_shard(path: str | Path, vocab_size: int | None = None) -> np.memmap:
    """Map a shard's tokens, uint16 (n,), read-only, after checking header, size and token ids.

    With `vocab_size` the largest id is looked for too; that reads the file once and remembers the
    answer in the cache folder. Raises UsageError naming the file, what was found and the mend.
    """
    path = Path(path)
    count = _checked_count(path)
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))
    if vocab_size is not None:
        largest = largest_token(path, tokens)
        if largest >= vocab_size:
            raise UsageError(
                f"{path}: holds token id {largest}, outside the vocabulary of {vocab_size}; state "
                f"the true vocab_size in {path.parent / 'meta.json'} or encode the text again"
            )
    return tokens


def _checked_count(path: Path) -> int:
    """Number of tokens a shard holds, its header and size in agreement."""
    try:
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be read ({error.strerror}); give the path of a .bin shard, or fetch "
            f"some with 'python -m experiments.data fineweb10B'"
        ) from None
    if size < HEADER_BYTES:
        raise UsageError(
            f"{path}: has {size} bytes, fewer than a shard's header of {HEADER_BYTES}; "
            f"fetch or write it again"
        )
    magic, version, count = (int(value) for value in np.frombuffer(header, "<i4")[:3])
    if magic != MAGIC:
        raise UsageError(
            f"{path}: begins with {magic} instead of the shard magic {MAGIC}; make shards of text "
            f"with 'python -m experiments.data encode'"
        )
    if version != VERSION:
        raise UsageError(
            f"{path}: is a shard of version {version}; only version {VERSION} is read, "
            f"so encode the text again"
        )
    if count < 1:
        raise UsageError(f"{path}: its header says {count} tokens; fetch or write it again")
    expected = HEADER_BYTES + 2 * count
    if size == HEADER_BYTES + 4 * count:
        raise UsageError(
            f"{path}: stores its {count} tokens in 4 bytes each; only uint16 is read, "
            f"so write it again with 2 bytes a token"
        )
    if size != expected:
        fault = "is truncated" if size < expected else "has bytes after its end"
        raise UsageError(
            f"{path}: {fault} ({size} bytes, but {count} tokens make {expected}); "
            f"fetch or write it again"
        )
    return count


def largest_token(path: Path, tokens: np.ndarray) -> int:
    """Largest id in a shard, remembered by absolute path, size and time of last change."""
    stat = path.stat()
    key, stamp = str(path.absolute()), {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    store = cache_folder() / "largest_token.json"
    known = _read_known(store)
    match known.get(key):
        case {"largest": int(largest), **rest} if rest == stamp:
            return largest
    largest = int(tokens.max())
    known = {name: entry for name, entry in known.items() if Path(name).exists()}
    text = json.dumps(known | {key: stamp | {"largest": largest}}, indent=0)
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomic(store, text.encode())
    except (OSError, UsageError):
        # Without a cache the answer is as good, only slower the next time.
        warnings.warn(
            f"cannot write {store}; shards will be scanned again at every start, "
            f"set LENS_JAX_CACHE to a folder that can be written",
            stacklevel=2,
        )
    return largest


def _read_known(store: Path) -> dict:
    """The cache of largest ids; a missing or damaged one counts as empty and is rebuilt."""
    try:
        known = json.loads(store.read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def read_vocabulary(folder: Path) -> tuple[int, int]:
    """Vocabulary size and end-of-text token of the shards in a folder: its meta.json, else GPT-2's.

    Raises UsageError when the meta.json does not say.
    """
    path = folder / "meta.json"
    if not path.exists():
        return GPT2_VOCAB, GPT2_EOT
    try:
        meta = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: is no readable JSON ({error}); write it again") from None
    match meta:
        case {"vocab_size": int(size), "eot_token": int(eot)} if 0 <= eot < size <= MAX_VOCAB:
            return size, eot
    raise UsageError(
        f"{path}: needs whole numbers vocab_size (at most {MAX_VOCAB}) and eot_token below it; "
        f"mend or delete it"
    )


class ShardWriter:
    """Documents in, numbered shards `<stem>_%06d.bin` out; `close` writes the last one.

    A shard ends at a document boundary, unless one document alone is longer than a shard.
    """

    def __init__(
        self, folder: Path, stem: str, first: int, shard_tokens: int = SHARD_TOKENS
    ) -> None:
        self.folder, self.stem, self.shard_tokens = folder, stem, shard_tokens
        self.tokens = 0
        self._number = first
        self._waiting: list[np.ndarray] = []
        self._num_waiting = 0

    def add(self, document: np.ndarray) -> None:
        """Append one document, an array of ids (n,)."""
        if self._num_waiting + len(document) > self.shard_tokens:
            self._flush()
        while len(document) > self.shard_tokens:
            self._wait(document[: self.shard_tokens])
            self._flush()
            document = document[self.shard_tokens :]
        self._wait(document)

    def close(self) -> int:
        """Write what is left; the number of tokens written in all."""
        self._flush()
        return self.tokens

    def _wait(self, document: np.ndarray) -> None:
        self._waiting.append(document)
        self._num_waiting += len(document)

    def _flush(self) -> None:
        if self._num_waiting:
            path = self.folder / f"{self.stem}_{self._number:06d}.bin"
            write_shard(path, np.concatenate(self._waiting))
            self.tokens += self._num_waiting
            self._number += 1
        self._waiting, self._num_waiting = [], 0
