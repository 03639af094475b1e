"""The folder of a study: one writer, one configuration, and the rates that were selected.

config.json  selected.json  pruned.json  runs/  logs/  compiled/  table.csv  figures/  report.html
"""

import contextlib
import fcntl
import json
import os
from pathlib import Path

from experiments.study.grid import Study
from models.atomic_files import is_unfinished, write_json
from models.command_line import UsageError, flatten

FREE = (
    *("preset", "rungs", "tiers", "batches", "seeds", "more"),
    *("launcher", "workers", "figures", "out"),
)
"""Keys that a study may change when it goes on: they add members, or say where they train."""


class StudyFolder:
    """Opened by one study at a time; use it as a context manager.

    Raises UsageError when it cannot be written, is in use, or belongs to another study.
    """

    def __init__(self, study: Study):
        self.path = Path(study.out).expanduser()
        self.runs, self.logs = self.path / "runs", self.path / "logs"
        self.compiled = self.path / "compiled"
        own = {key: v for key, v in flatten(study.config).items() if not key.startswith("slurm.")}
        first = study.cells[0]
        self._document = own | {
            "words": dict(sorted(study.words.items())),
            "target_loss": study.target(first),
        }

    def __enter__(self) -> "StudyFolder":
        try:
            self.runs.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
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

    @property
    def selected(self) -> dict:
        """What was selected, by the name of a cell."""
        return self._read_if_there("selected.json")

    def add_selected(self, found: dict) -> None:
        """Keeps what a search has selected."""
        write_json(self.path / "selected.json", self.selected | found)

    @property
    def pruned(self) -> dict:
        """Why runs were given up, by the name of a family."""
        return self._read_if_there("pruned.json")

    def add_pruned(self, found: dict) -> None:
        """Keeps what was given up."""
        write_json(self.path / "pruned.json", self.pruned | found)

    def _read_if_there(self, name: str) -> dict:
        path = self.path / name
        return _read(path) if path.exists() else {}

    def _claim(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"{self.path} is in use by another study; wait for it, or choose another out="
            ) from error
        config = self.path / "config.json"
        if config.exists():
            stored, own = _read(config), json.loads(json.dumps(self._document))
            for key in sorted(stored.keys() | own.keys()):
                if key not in FREE and stored.get(key) != own.get(key):
                    raise UsageError(
                        f"{self.path} belongs to another study: {key} was {stored.get(key)}, now "
                        f"{own.get(key)}; set it back, or choose another out="
                    )
        elif any(
            entry.name not in ("lock", "runs") and not is_unfinished(entry)
            for entry in self.path.iterdir()
        ):
            raise UsageError(f"{self.path} is no study: no config.json; choose another out=")
        write_json(config, self._document)


def _read(path: Path) -> dict:
    with contextlib.suppress(ValueError):
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            return found
    raise UsageError(f"{path} is damaged; remove it, or choose another out=")
