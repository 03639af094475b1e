"""What is wrong with a checkpoint on disk, found before orbax meets it and said in one line.

Orbax and TensorStore answer damage with some forty lines of specification, printed from several
threads and partly after the exception; a user needs the step, the file and the reason.
"""

import errno
import json
import logging
import os
import re
from pathlib import Path

import tensorstore

_MAX_REASON = 200  # characters of a library's own message that are passed on
_TENSORSTORE_REASONS = {
    "DATA_LOSS": "damaged bytes",
    "NOT_FOUND": "a file is missing",
    "OUT_OF_RANGE": "a file is cut short",
    "PERMISSION_DENIED": "permission denied",
}
DISK_FULL = os.strerror(errno.ENOSPC)  # what reason() answers on a full disk


class Damage(Exception):
    """A file or folder, relative to the folder of its step, and what is wrong with it."""

    def __init__(self, where: str, reason: str):
        super().__init__(f"{where}: {reason}")
        self.where = where
        self.reason = reason


def find_state_damage(folder: Path) -> None:
    """Raise Damage if a file of a `state` folder is missing, empty, cut short or unreadable JSON.

    Reads the index of the array database and the last byte of every stored value, a few
    milliseconds; flipped bits inside the values are left to the checksums.  May also raise
    TensorStore's own errors, for `describe`.
    """
    for path in [folder / "_METADATA", *sorted(folder.glob("array_metadatas/*"))]:
        where = f"state/{path.relative_to(folder)}"
        if not path.is_file():
            raise Damage(where, "the file is missing")
        try:
            json.loads(path.read_bytes())
        except ValueError as error:
            raise Damage(where, "not valid JSON") from error
    store = tensorstore.KvStore.open(
        {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
    ).result()
    keys = store.list().result()
    if not keys:
        raise Damage("state/manifest.ocdbt", "the file is missing")
    reads = {key: store.read(key, byte_range=slice(-1, None)) for key in keys}
    for key, read in reads.items():
        if len(read.result().value) != 1:
            raise Damage("state", f"the data file of {key.decode(errors='replace')} is missing")


def describe(error: BaseException, folder: Path, item: str) -> Damage:
    """The file below a step's `folder` that a library's error names (else `item`), and why."""
    named = re.findall(re.escape(str(folder)) + r"/([\w./-]+)", str(error))
    where = max(named, key=len).rstrip("/.") if named else item
    return Damage(where, reason(error))


def reason(error: BaseException) -> str:
    """A library's message in one short line, without TensorStore's spec and source locations."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return "not valid JSON"
    text = str(error)
    if DISK_FULL in text:
        return DISK_FULL
    code = re.match(r"([A-Z_]+):", text)
    if code and code[1] in _TENSORSTORE_REASONS:
        return _TENSORSTORE_REASONS[code[1]]
    line = " ".join(re.split(r"\[(?:tensorstore_spec|source locations)", text)[0].split())
    return f"{type(error).__name__}: {line[:_MAX_REASON]}"


def shorten_orbax_log() -> None:
    """Drop orbax's log records below ERROR, and cut its errors to one line, for this process.

    The exceptions behind those errors are raised, in words a user can act on, by Checkpoints.
    """
    logger = logging.getLogger("absl")
    if _keep_in_one_line not in logger.filters:
        logger.addFilter(_keep_in_one_line)


def _keep_in_one_line(record: logging.LogRecord) -> bool:
    if "/orbax/" not in record.pathname.replace(os.sep, "/"):
        return True
    if record.levelno < logging.ERROR:
        return False
    record.msg, record.args = record.getMessage().split("\n")[0][:_MAX_REASON], None
    record.exc_info = record.exc_text = None
    return True
