"""From shards to batches: which files, which windows, in which order, and what is held out.

The state of the data is one integer, the number of training rows read so far: any row of any epoch
is found in constant time, so a run resumes exactly wherever it stopped.
`python -m experiments.data --help` tells how to fetch and make shards.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from glob import glob
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np

from experiments.config import FINEWEB_FOLDER
from experiments.corpus import build_corpus
from experiments.shards import open_shard, read_vocabulary
from models.command_line import UsageError

if TYPE_CHECKING:
    from grain import MapDataset

Order = Literal["shuffled", "sequential"]


class SourceConfig(Protocol):
    """What is read of the configuration key `data`."""

    source: str
    folder: str
    corpus_vocab: int


class TokenFiles(NamedTuple):
    """Shards of a data set, each split sorted by name; `val` may be empty (see held_out)."""

    train: tuple[Path, ...]
    val: tuple[Path, ...]
    vocab_size: int
    eot_token: int
    name: str


def resolve_source(config: SourceConfig) -> TokenFiles:
    """The shards that data.source means: auto, corpus, or a glob of .bin shards.

    auto is FineWeb in data.folder if there is any, else the corpus, which is built when needed; a
    folder that was typed must have some.
    Among a glob's files those with "val" in their name are for validation. Vocabulary and
    end-of-text token come from a meta.json beside the shards, else they are GPT-2's. The shards
    themselves are not opened. Raises UsageError.
    """
    if config.source == "auto":
        folder = Path(config.folder).expanduser()
        train, val = (sorted(folder.glob(f"fineweb_{split}_*.bin")) for split in ("train", "val"))
        if not train and (val or config.folder != FINEWEB_FOLDER):
            raise UsageError(
                f"data.folder={config.folder} has {'a validation shard but ' if val else ''}no "
                f"fineweb_train_*.bin; run 'python -m experiments.data fineweb10B "
                f"folder={folder}', or choose data=corpus"
            )
        if train:
            return _with_vocabulary(train, val, "fineweb10B")
    if config.source in ("auto", "corpus"):
        folder = build_corpus(config.corpus_vocab)
        train, val = folder.glob("corpus_train_*.bin"), folder.glob("corpus_val_*.bin")
        return _with_vocabulary(sorted(train), sorted(val), folder.name)
    return _resolve_glob(config.source)


def _resolve_glob(pattern: str) -> TokenFiles:
    expanded = Path(pattern).expanduser()
    if expanded.is_dir():
        raise UsageError(f"data={pattern} is a folder; give its shards, data='{expanded}/*.bin'")
    paths = [Path(name) for name in sorted(glob(str(expanded), recursive=True))]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise UsageError(
            f"data={pattern} matches no file; give auto, corpus, or a quoted glob of .bin shards"
        )
    val = [path for path in paths if "val" in path.name]
    train = [path for path in paths if "val" not in path.name]
    if not train:
        raise UsageError(
            f"data={pattern} matches only validation shards ('val' in their names, as "
            f"{val[0].name}); widen the glob to training shards"
        )
    return _with_vocabulary(train, val, train[0].parent.absolute().name)


def _with_vocabulary(train: Sequence[Path], val: Sequence[Path], name: str) -> TokenFiles:
    found = {path.parent: read_vocabulary(path.parent) for path in (*train, *val)}
    (first, vocabulary), *others = found.items()
    for folder, other in others:
        if other != vocabulary:
            raise UsageError(
                f"{folder} has (vocab_size, eot_token) {other} but {first} has {vocabulary}; "
                f"shards read together need one vocabulary"
            )
    return TokenFiles(tuple(train), tuple(val), *vocabulary, name)


class TrainWindows:
    """Random access to the training windows: `windows[i]` is row i, int32 (row + 1,).

    Window i of a shard covers its tokens [i * row, i * row + row], so the last token of a window,
    a target only, is the first of the next. No window crosses shards; what is left at the end of a
    shard is unused, as are the last `exclude` tokens of the last shard, which are held out.
    """

    def __init__(self, files: TokenFiles, *, row: int, exclude: int = 0) -> None:
        self.row = row
        self._shards = [open_shard(path, files.vocab_size) for path in files.train]
        kept = max(0, len(self._shards[-1]) - exclude)
        self._shards[-1] = self._shards[-1][:kept]
        self.shard_tokens = tuple(len(shard) for shard in self._shards)
        self._ends = list(accumulate(max(0, (n - 1) // row) for n in self.shard_tokens))
        if not len(self):
            raise UsageError(
                f"data {files.name}: {sum(self.shard_tokens):,} training tokens in "
                f"{len(self._shards)} shards hold no row of {row} tokens and its last target; "
                f"give more text, shorter rows (size.short_row), or hold out less"
            )

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        shard = bisect_right(self._ends, index)
        start = (index - self.first_window(shard)) * self.row
        return self._shards[shard][start : start + self.row + 1].astype(np.int32)

    def first_window(self, shard: int) -> int:
        """Index of the first window of a shard."""
        return self._ends[shard - 1] if shard else 0


class SequentialOrder:
    """Window indices in the published order of reading (ladder spec 6), over one epoch.

    Shards are read in contiguous chunks of `chunk_rows` rows, one long row. A shard is
    left, its tail unread, when position + chunk + 1 >= its length. Row starts ignore documents.
    """

    def __init__(self, windows: TrainWindows, chunk_rows: int) -> None:
        self._windows = windows
        chunk = chunk_rows * windows.row
        chunks = (max(0, (n - 2) // chunk) for n in windows.shard_tokens)
        self._ends = list(accumulate(number * chunk_rows for number in chunks))
        if not len(self):
            raise UsageError(
                f"data.order=sequential: no shard is longer than one micro-batch of {chunk:,} "
                f"tokens; give longer shards, or choose data.order=shuffled"
            )

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> int:
        shard = bisect_right(self._ends, index)
        return self._windows.first_window(shard) + index - (self._ends[shard - 1] if shard else 0)


def _window_order(
    windows: TrainWindows, order: Order, seed: int, chunk_rows: int
) -> "MapDataset[int]":
    """The endless sequence of window indices that training reads."""
    import grain  # imports jax, too slow for a command that only looks for files

    if order == "shuffled":
        # each epoch is another permutation, drawn from the seed and the epoch's number
        return grain.MapDataset.range(len(windows)).seed(seed).shuffle().repeat(None)
    if order == "sequential":
        return grain.MapDataset.source(SequentialOrder(windows, chunk_rows)).repeat(None)
    raise ValueError(f"order={order}: give shuffled or sequential")


def make_train_stream(
    windows: TrainWindows,
    *,
    order: Order,
    seed: int,
    rows: int,
    start: int = 0,
    chunk_rows: int | None = None,
    threads: int = 2,
) -> Iterator[np.ndarray]:
    """Endless training batches, int32 (rows, row + 1), beginning at sample `start`.

    `start` counts rows since the beginning of training (step * rows) and is the whole state: the
    stream from `start` equals the unbroken stream from there on, whatever rows and threads are.
    `chunk_rows` matters to the sequential order alone and defaults to `rows`. The batch is global:
    each host takes its slice of it.
    """
    import grain

    indices = _window_order(windows, order, seed, chunk_rows or rows)
    # without drop_remainder grain rounds the endless length up past the largest index at rows=1
    batches = indices[start:].map(windows.__getitem__).batch(rows, drop_remainder=True)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(batches.to_iter_dataset(options))


def sample_indices(
    step: int,
    windows: TrainWindows,
    *,
    order: Order,
    seed: int,
    rows: int,
    chunk_rows: int | None = None,
) -> list[int]:
    """Indices into `windows` of the rows of a step (0-based), as make_train_stream reads them."""
    indices = _window_order(windows, order, seed, chunk_rows or rows)
    return [int(indices[sample]) for sample in range(step * rows, (step + 1) * rows)]


class HeldOut(NamedTuple):
    """Tokens never trained on.

    `val` int32 (R, row + 1) are consecutive rows, `probe` int32 (M, probe_window + 1) consecutive
    windows without a common token, and `exclude` is how many tokens at the end of the last training
    shard the two were taken from: 0 when there are validation shards.
    """

    val: np.ndarray
    probe: np.ndarray
    exclude: int


def held_out(
    files: TokenFiles,
    *,
    row: int,
    val_tokens: int,
    probe_offset: int,
    probe_windows: int,
    probe_window: int,
    probe_spread: bool = False,
) -> HeldOut:
    """The validation rows and the fixed probe set, always the same tokens for the same arguments.

    Validation predicts the first `val_tokens` tokens after the very first of the validation
    stream (published: 10,485,760, ladder spec 7). The probe set begins at token `probe_offset` >=
    val_tokens, so no token is predicted in both (protocol spec 1.9), and is one stretch of text or,
    with probe_spread and validation shards, windows at equal distances to their end. The stream is
    the validation shards one after another or, without any, the end of the last training shard.
    Raises UsageError when there are too few tokens.
    """
    if val_tokens < 1 or val_tokens % row or probe_offset < val_tokens:
        raise UsageError(
            f"data.val_tokens={val_tokens} and data.probe_offset={probe_offset}: give a multiple "
            f"of the row of {row} tokens, and an offset not below it"
        )
    needed = max(val_tokens + 1, probe_offset + probe_windows * (probe_window + 1))
    shards = _held_out_shards(files)
    available = sum(len(shard) for shard in shards)
    if available < needed:
        where = "validation shards hold" if files.val else "last training shard holds"
        raise UsageError(
            f"data {files.name}: the {where} {available:,} tokens but {needed:,} are held out; "
            f"lower data.val_tokens={val_tokens}, data.probe_offset={probe_offset} or "
            f"probes.windows={probe_windows}, or give more text"
        )
    exclude = 0 if files.val else needed
    first = available - needed if exclude else 0
    stream = _read_span(shards, first, available if probe_spread and not exclude else needed)
    starts = np.arange(0, val_tokens, row)[:, None]
    return HeldOut(
        val=stream[starts + np.arange(row + 1)],
        probe=cut_windows(stream[probe_offset:], probe_windows, probe_window + 1, probe_spread),
        exclude=exclude,
    )


def cut_windows(stream: np.ndarray, count: int, length: int, spread: bool) -> np.ndarray:
    """Windows (count, length) of a stream, one after another or at equal distances to its end."""
    distance = max(length, len(stream) // max(1, count)) if spread else length
    return stream[distance * np.arange(count)[:, None] + np.arange(length)]


def _held_out_shards(files: TokenFiles) -> list[np.ndarray]:
    return [open_shard(path, files.vocab_size) for path in files.val or files.train[-1:]]


def held_out_stream(files: TokenFiles, held: HeldOut, most: int | None = None) -> np.ndarray:
    """The first `most` tokens (None: all) of the validation stream; none of them is trained on.

    Without validation shards that stream is the end that a run holds out, `held.exclude` tokens.
    """
    shards = _held_out_shards(files)
    available = sum(len(shard) for shard in shards)
    length = held.exclude or available
    return _read_span(shards, available - length, length if most is None else min(length, most))


def _read_span(shards: Sequence[np.ndarray], first: int, count: int) -> np.ndarray:
    """Tokens [first, first + count) of the shards one after another, int32."""
    parts = []
    for shard in shards:
        parts.append(shard[first : first + count])
        first, count = max(0, first - len(shard)), count - len(parts[-1])
    return np.concatenate(parts).astype(np.int32)


def token_hash(tokens: np.ndarray) -> str:
    """First 16 hex digits of the SHA-256 of token ids as little-endian uint32, row by row."""
    return hashlib.sha256(np.ascontiguousarray(tokens, "<u4").data).hexdigest()[:16]


if __name__ == "__main__":
    from experiments.data_command import main
    from models.command_line import run_command

    run_command(main)
