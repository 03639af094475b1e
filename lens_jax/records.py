"""Spectra on disk: one `.npz` per measured step, written whole or not at all, read without pickle.

A file `step_00000250.npz` holds arrays named `<kind>/<site>` and the entry `meta`, UTF-8 JSON as
bytes, with at least `step` and `tokens`. Spectra are raw, descending and float64; fits are never
stored instead of them. Of an activation tap of width D, W windows in G groups:

    act_cov_eigenvalues           (D,)    of the covariance (division by n - 1)
    act_cov_eigenvalues_left_out  (G, D)  the same with each group of windows left out, float32
    act_cov_eigenvalues_halves    (2, D)  of the even groups and of the odd ones, float32
    act_cov_eigenvectors          (D, k)  the leading ones as columns, signs arbitrary, float32
    act_mean_sq                   ()      squared norm of the mean vector
    act_last_cov_eigenvalues      (D,)    of the W last tokens of a tap (B, T, D)

Of the per-sample gradients of a parameter, N samples in G groups, rows of a matrix:

    grad_singular_values, grad_singular_values_centred                    (N,), of the rows as they
                                                                          are and minus their mean,
                                                                          0 beyond their rank
    grad_singular_values_left_out, grad_singular_values_centred_left_out  (G, N - N/G), float32
    grad_mean_sq, grad_mean_sq_left_out                                   () and (G,), squared norm
                                                                          of the mean gradient

Of a weight matrix: weight_singular_values. Measurements that cannot be cut into equal groups have
no `_left_out` and no `_halves`, as those of which fewer than 2 vectors would be left. Eigenvalues
of n vectors are exactly 0 beyond the first n - 1, singular values of N gradients of P entries
beyond min(N, P), or min(N - 1, P) where they are centred; what is not finite is NaN.

Entries are not compressed: float64 eigenvalues have random low bits, and on a step of 84 spectra
(0.42 MB) deflate saved 5% and took four times as long. The zip container checks a CRC of every
entry on reading.
"""

import io
import json
import os
import queue
import re
import threading
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

_FILE_NAME = re.compile(r"step_\d{8,}\.npz")
_ARRAY_NAME = re.compile(r"[A-Za-z0-9_]+(/[A-Za-z0-9_.~\-]+)+")
_NOT_IN_A_SITE = re.compile(r"[^A-Za-z0-9_.~/\-]")
# What zipfile, zlib and numpy raise on damaged bytes; RuntimeError is "entry is encrypted".
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
)

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class SpectrumRecord:
    """One array of one measured step; `meta` is the whole step's and is shared between records."""

    step: int
    tokens: int
    kind: str
    site: str
    values: np.ndarray = field(repr=False)
    meta: dict = field(repr=False)


def step_path(folder: str | Path, step: int) -> Path:
    """Where the record of a step lies."""
    return Path(folder) / f"step_{step:08d}.npz"


def check_site(site: str) -> None:
    """Raises ValueError, naming the character, for a site that no record could be of."""
    if bad := _NOT_IN_A_SITE.search(site):
        raise ValueError(
            f"the name {site!r} has {bad[0]!r} in it, and records have letters, digits and _ - . ~ "
            f"between slashes: rename the tap or the parameter"
        )
    if not all(site.split("/")):
        raise ValueError(f"the name {site!r} has an empty part: give names between single slashes")


def write_step(
    folder: str | Path, step: int, arrays: Arrays, meta: Mapping, *, compress: bool = False
) -> Path:
    """Writes one step's arrays and meta, atomically; float32 stays, other real dtypes widen.

    `meta` must be JSON data and hold `tokens`; `step` is added to it. A file of the same step is
    replaced. Whenever the process dies, the folder has the old file or the new one, never a part.
    compress: smaller by a seventh and slower, for records that are kept; they read the same.
    Raises ValueError for a name that is not `<kind>/<site>`, an array that is not real numbers, or
    a meta without `tokens`.
    """
    if step < 0:
        raise ValueError(f"step={step}: give 0 or more")
    if "tokens" not in meta:
        raise ValueError("meta has no 'tokens': give the training tokens seen at this step")
    if meta.get("step", step) != step:
        raise ValueError(f"meta says step {meta['step']}, the record is of step {step}")
    entries = {name: _real(name, value) for name, value in arrays.items()}
    text = json.dumps({**meta, "step": step}, sort_keys=True)
    entries["meta"] = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = step_path(folder, step)
    # One fixed name per step: what a killed process left is overwritten, not collected.
    partial = folder / f".{path.name}.tmp"
    try:
        with open(partial, "wb") as file:
            (np.savez_compressed if compress else np.savez)(file, **entries)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return path


def _real(name: str, value) -> np.ndarray:
    if not _ARRAY_NAME.fullmatch(name):
        check_site(name)
        raise ValueError(f"array name {name!r}: give '<kind>/<site>'")
    array = np.asarray(value)
    if not np.can_cast(array.dtype, np.float64):
        raise ValueError(f"array {name!r} has dtype {array.dtype}: give real numbers")
    return array if array.dtype == np.float32 else array.astype(np.float64)


def read_step(path: str | Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Reads (meta, arrays) of one file; arrays are named `<kind>/<site>`.

    Raises ValueError naming the file when it is missing, cut, damaged or no record.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            # Entry by entry and whole: a CRC is only checked by reading an entry to its end.
            entries = {
                name.removesuffix(".npy"): np.load(
                    io.BytesIO(archive.read(name)), allow_pickle=False
                )
                for name in archive.namelist()
            }
        meta = json.loads(entries.pop("meta").tobytes().decode("utf-8"))
        int(meta["step"]), int(meta["tokens"])
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: damaged or no spectrum record ({reason})") from error
    return meta, entries


def read_records(
    folder: str | Path, *, kind: str | None = None, site: str | None = None
) -> list[SpectrumRecord]:
    """Reads the records of a folder of step files, sorted by step, then by the order written.

    `kind` and `site` select by exact name. A folder without step files gives an empty list. Raises
    ValueError when the folder does not exist, and as `read_step` for a damaged file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of spectra")
    records = []
    for path in sorted(path for path in folder.iterdir() if _FILE_NAME.fullmatch(path.name)):
        meta, arrays = read_step(path)
        for name, values in arrays.items():
            array_kind, _, array_site = name.partition("/")
            if kind in (None, array_kind) and site in (None, array_site):
                records.append(
                    SpectrumRecord(
                        int(meta["step"]), int(meta["tokens"]), array_kind, array_site, values, meta
                    )
                )
    return sorted(records, key=lambda record: record.step)


class RecordWriter:
    """Writes records on one background thread, so that training does not wait for the host.

    Use it as a context manager. The first error of the thread is raised by the next `submit`,
    `drain` or by leaving the block; steps submitted after the failing one are still written.
    """

    def __init__(self, folder: str | Path, *, max_pending: int = 4):
        """Starts the thread; `submit` waits while `max_pending` steps hold their device arrays."""
        self._folder = Path(folder)
        self._queue = queue.Queue(maxsize=max_pending)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="record-writer", daemon=True)
        self._thread.start()

    def submit(self, step: int, meta: Mapping, pending: Callable[[], Arrays]) -> None:
        """Queues one step; `pending` fetches device values and returns the arrays of `write_step`.

        `pending` runs on the writer's thread, before `meta` is read, so it may complete a `meta`
        that waits for a device value (give each step a dict of its own).
        """
        self._raise_error()
        if not self._thread.is_alive():
            raise RuntimeError("the record writer is closed")
        self._queue.put((step, meta, pending))

    def drain(self) -> None:
        """Blocks until everything submitted is on disk; raises the first error, once."""
        self._queue.join()
        self._raise_error()

    def close(self) -> None:
        """Drains, ends the thread and raises the first error that was not raised yet."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        self._raise_error()

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.close()
        except BaseException as own:
            if error is None:
                raise
            # The block's own error goes on; the writer's is told beside it.
            error.add_note(f"the record writer failed too: {own!r}")

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            step, meta, pending = item
            try:
                write_step(self._folder, step, pending(), meta)
            # Whatever it is: a thread that died here would leave `drain` waiting for ever.
            except BaseException as error:
                error.add_note(f"while writing the spectra of step {step}")
                self._error = self._error or error
            finally:
                del item, meta, pending  # device arrays go before the next wait
                self._queue.task_done()
        self._queue.task_done()
