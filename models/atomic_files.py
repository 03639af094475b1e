"""Files that are whole or absent: written beside their place, synced, then renamed."""

import contextlib
import json
import os
from pathlib import Path

from models.command_line import UsageError


def write_bytes_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Put `data` at `path` so that a reader, or a kill at any moment, sees the old file or the new.

    The folder must exist; two threads must not write one path at once.
    Raises UsageError when the file cannot be written (read-only, disk full).
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # on a read-only disk there is nothing to remove
            unfinished.unlink()
        raise UsageError(
            f"cannot write {path}: {error.strerror}; free some space or choose another out="
        ) from error


def write_json(path: str | os.PathLike, obj) -> None:
    """Put `obj` at `path` as indented strict JSON, atomically.

    Raises ValueError for NaN and infinities, TypeError for what JSON cannot hold.
    """
    text = json.dumps(obj, indent=2, allow_nan=False, ensure_ascii=False)
    write_bytes_atomic(path, (text + "\n").encode())


def read_json_object(path: Path, *, required: bool = True) -> dict:
    """The JSON object in a file; an empty one where it is absent and not required.

    Raises ValueError, one line naming the file, for what is no JSON or no object.
    """
    if not required and not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not JSON ({' '.join(str(error).split())})") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: not a JSON object")
    return tree


def is_unfinished(path: Path) -> bool:
    """Whether a file is one that a killed writer left behind."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def remove_unfinished(folder: Path) -> None:
    """Remove what killed writers left in a folder; only for the folder's one writer."""
    for path in folder.iterdir():
        if is_unfinished(path):
            path.unlink()


def _sync_folder(folder: Path) -> None:
    # Without this a power cut may undo the rename although the data are on disk.
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
