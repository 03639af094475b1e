"""The folder of one run: who may write there, which configuration it belongs to, and its metrics.

    config.json  metrics.jsonl  spectra/  checkpoints/  summary.png  lock

A run holds the lock of its folder as long as it lives; the kernel drops the lock with the process,
however it ends.  This module does not import jax: it refuses before the slow part of a start.
With several processes only the first one opens the folder.
"""

import contextlib
import fcntl
import json
import os
import re
import socket
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from experiments.metrics import MetricsFile, read_metrics
from models.atomic_files import (
    is_unfinished,
    remove_unfinished,
    write_bytes_atomic,
    write_json,
)
from models.command_line import UsageError

__all__ = [
    "MetricsFile",
    "RunFolder",
    "check_run_name",
    "read_metrics",
    "write_bytes_atomic",
    "write_json",
]

Resume = Literal["auto", "never", "must"]

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
_PROBE_BYTES = 1 << 16
_MAX_CHANGES = 4  # changed keys that a refusal spells out
_ABSENT = object()


def check_run_name(name: str) -> str:
    """The name, if it is safe as one folder name; else UsageError."""
    if not _RUN_NAME.fullmatch(name):
        raise UsageError(
            f"run name {name!r}: use up to 80 letters, digits, '.', '_' and '-', "
            "starting with a letter or digit"
        )
    return name


class RunFolder:
    """An opened, locked run folder; make one with RunFolder.open, and close it (or use `with`).

    path: absolute. resumed: whether there is a checkpoint to go on from. metrics_path,
    spectra, checkpoints: where those things live (`spectra` exists, `checkpoints` may not).
    """

    def __init__(self, path: Path, lock: int | None, resumed: bool):
        self.path = path
        self.resumed = resumed
        self.metrics_path = path / "metrics.jsonl"
        self.spectra = path / "spectra"
        self.checkpoints = path / "checkpoints"
        self._lock: int | None = lock

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        resume: Resume,
        config: dict,
        free_keys: Collection[str] = (),
    ) -> "RunFolder":
        """Create or reopen the folder of a run, lock it, and make sure that `config` fits.

        resume="auto" goes on from the latest checkpoint if there is one, "never" wants a new or
        empty folder, "must" wants a checkpoint.  A run that goes on in a folder must have the
        configuration stored there, up to `free_keys` (dotted; a key frees all below it), whose
        new values are stored.  `config` is a nested dictionary of plain JSON values.

        Raises UsageError when the folder cannot be made or written, is in use by another run,
        holds something else, or belongs to another configuration.
        """
        if resume not in ("auto", "never", "must"):
            raise UsageError(f"resume={resume!r}: one of auto, never, must")
        path = Path(path).expanduser().absolute()
        _refuse_wrong_resume(path, resume)  # before anything is written into a wrong folder
        _make_folder(path)
        lock = _take_lock(path)
        try:
            _refuse_wrong_resume(path, resume)  # the folder may have changed until the lock
            remove_unfinished(path)
            _probe_writing(path)
            config = json.loads(json.dumps(config, allow_nan=False))
            stored = _read_config(path)
            if stored is not None:
                _refuse_changes(path, stored, config, free_keys)
            if stored != config:
                write_json(path / "config.json", config)
            run = cls(path, lock, _has_checkpoint(path))
            _make_folder(run.spectra)
            remove_unfinished(run.spectra)
            return run
        except BaseException:
            _release(lock)
            raise

    @classmethod
    def beside(cls, path: str | os.PathLike) -> "RunFolder":
        """The folder that another process of the same run has opened: its paths, without a lock."""
        path = Path(path).expanduser().absolute()
        return cls(path, None, _has_checkpoint(path))

    def close(self) -> None:
        """Release the lock; may be called twice."""
        if self._lock is not None:
            _release(self._lock)
            self._lock = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot make the run folder {path}: {error.strerror}; choose another out="
        ) from error


def _take_lock(path: Path) -> int:
    """File descriptor that holds the folder's lock, with this process's pid and host inside.

    flock, because the kernel releases it when the process dies: a leftover file blocks nobody.
    The file stays: removing it would let two runs lock two different files of one name.
    """
    try:
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UsageError(
            f"cannot write in the run folder {path}: {error.strerror}; choose another out="
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
    except BlockingIOError as error:
        holder = os.pread(lock, 1000, 0)
        os.close(lock)
        raise UsageError(
            f"{path} is in use by another run ({_describe_holder(holder)}); "
            "wait for it, or choose another out="
        ) from error
    except OSError as error:
        os.close(lock)
        raise UsageError(
            f"cannot lock the run folder {path}: {error.strerror}; choose another out="
        ) from error
    return lock


def _describe_holder(text: bytes) -> str:
    # The holder may not have written its name yet, or the file may hold anything.
    with contextlib.suppress(ValueError, KeyError, TypeError):
        holder = json.loads(text)
        return f"pid {int(holder['pid'])} on {str(holder['host'])[:80]}"
    return "pid unknown"


def _release(lock: int) -> None:
    os.ftruncate(lock, 0)
    os.close(lock)


def _probe_writing(path: Path) -> None:
    """Write, sync and remove a small file, so that a full disk speaks now and not in an hour."""
    write_bytes_atomic(path / ".probe.tmp", bytes(_PROBE_BYTES))
    remove_unfinished(path)


def _has_checkpoint(path: Path) -> bool:
    folder = path / "checkpoints"
    return folder.is_dir() and any(
        entry.name.isdecimal() and entry.is_dir() for entry in folder.iterdir()
    )


def _refuse_wrong_resume(path: Path, resume: Resume) -> None:
    if resume == "must" and not _has_checkpoint(path):
        raise UsageError(f"resume=must: {path} has no checkpoint; use resume=auto or another out=")
    if not path.is_dir():
        return
    there = sorted(
        entry.name for entry in path.iterdir() if entry.name != "lock" and not is_unfinished(entry)
    )
    if resume == "never" and there:
        raise UsageError(
            f"resume=never: {path} is not empty ({there[0]}); use another out= or resume=auto"
        )
    if there and "config.json" not in there:
        raise UsageError(
            f"{path} is not the folder of a run: it has {there[0]} and no config.json; "
            "choose another out="
        )


# The configuration


def _read_config(path: Path) -> dict | None:
    file = path / "config.json"
    if not file.exists():
        return None
    try:
        stored = json.loads(file.read_bytes())
    except ValueError as error:
        raise UsageError(f"{file} is not valid JSON: {error}; choose another out=") from error
    if not isinstance(stored, dict):
        raise UsageError(f"{file} is not a JSON object; choose another out=")
    return stored


def _refuse_changes(path: Path, stored: dict, config: dict, free_keys: Collection[str]) -> None:
    old, new = _flatten(stored), _flatten(config)
    changed = [
        key
        for key in sorted(old | new)
        if old.get(key, _ABSENT) != new.get(key, _ABSENT) and not _is_free(key, free_keys)
    ]
    if changed:
        spelled = [f"{key} was {_show(old, key)}, now {_show(new, key)}" for key in changed]
        more = f" (and {len(changed) - _MAX_CHANGES} more)" if len(changed) > _MAX_CHANGES else ""
        raise UsageError(
            f"{path} belongs to another configuration: "
            f"{', '.join(spelled[:_MAX_CHANGES])}{more}; set it back, or choose another out="
        )


def _flatten(config: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _is_free(key: str, free_keys: Collection[str]) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in free_keys)


def _show(flat: dict, key: str) -> str:
    return json.dumps(flat[key]) if key in flat else "absent"
