"""A folder that one program at a time writes in, and that belongs to one configuration.

The folder of a study, of the language models or of the toy. Nothing here imports jax.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path

from models.atomic_files import is_unfinished, write_json
from models.command_line import UsageError

_LOCK = "lock"


def read_kept(path: Path, mend: str = "remove it, or choose another out=") -> dict:
    """The JSON object of a file of such a folder; raises UsageError with the mend if damaged."""
    with contextlib.suppress(ValueError):
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            return found
    raise UsageError(f"{path} is damaged; {mend}")


def copy_config(source: Path, target: Path) -> None:
    """Copies a config.json without the place that its folder had: out= is auto again."""
    config = read_kept(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, config | ({"out": "auto"} if "out" in config else {}))


class ClaimedFolder:
    """Held by one program at a time; use it as a context manager.

    document: what is kept as config.json, plain JSON. free: its keys that may change when the
    program goes on in the folder. flat: what of a document is compared, key by key. own: names that
    may lie there before there is a config.json.
    Raises UsageError, on being entered, for a folder that cannot be written, is in use, holds
    something else or belongs to another document.
    """

    def __init__(
        self,
        path: Path,
        document: dict,
        free: Collection[str],
        *,
        flat: Callable[[dict], dict] = dict,
        own: Collection[str] = (),
    ):
        self.path = path
        self._document = json.loads(json.dumps(document))
        self._free, self._flat, self._own = free, flat, (_LOCK, *own)

    def __enter__(self):
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UsageError(
                f"out={self.path}: cannot be written ({error.strerror}); choose another"
            ) from error
        try:
            self._claim()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, *_) -> None:
        os.close(self._lock)  # and with it the lock

    def kept(self, name: str) -> dict:
        """What a file of the folder keeps, nothing where it is not there."""
        path = self.path / name
        return read_kept(path) if path.exists() else {}

    def keep_more(self, name: str, found: dict) -> None:
        """Adds to what a file of the folder keeps."""
        write_json(self.path / name, self.kept(name) | found)

    def _claim(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"{self.path} is in use by another study; wait for it, or choose another out="
            ) from error
        config = self.path / "config.json"
        if config.exists():
            self._refuse_changes(read_kept(config))
        elif any(
            entry.name not in self._own and not is_unfinished(entry)
            for entry in self.path.iterdir()
        ):
            raise UsageError(f"{self.path} is no study: no config.json; choose another out=")
        write_json(config, self._document)

    def _refuse_changes(self, stored: dict) -> None:
        old, new = self._flat(stored), self._flat(self._document)
        for key in sorted(old.keys() | new.keys()):
            if key not in self._free and old.get(key) != new.get(key):
                raise UsageError(
                    f"{self.path} belongs to another study: {key} was {old.get(key)}, now "
                    f"{new.get(key)}; set it back, or choose another out="
                )
