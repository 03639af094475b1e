"""The folder of a study: one writer, one configuration, and the rates that were selected.

config.json  selected.json  search/  runs/  table.csv  figures/  compiled/
"""

import contextlib
import fcntl
import json
import os
from pathlib import Path

from models.atomic_files import is_unfinished, write_json
from models.command_line import UsageError
from toy_modular.run_config import nested
from toy_modular.study_config import Study

FREE = (
    *("engine", "figures", "out", "stages", "batches", "seeds"),
    *("side_stages", "side_batches", "side_seeds"),
)
"""Keys that a study may change when it goes on: they add members, or say how to train them."""


class StudyFolder:
    """Opened for one study at a time; use it as a context manager."""

    def __init__(self, study: Study):
        out = study.config.out
        out = f"runs/toy_{study.name}" if out == "auto" else out
        self.path = Path(out).expanduser()
        self._document = json.loads(
            json.dumps(
                {**nested(study.config), "run": {k: study.typed[k] for k in sorted(study.typed)}}
            )
        )

    def __enter__(self) -> "StudyFolder":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
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

    def _claim(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"{self.path} is in use by another study; wait for it, or choose another out="
            ) from error
        config = self.path / "config.json"
        if config.exists():
            stored, own = (_flat(document) for document in (_read(config), self._document))
            for key in sorted(stored.keys() | own.keys()):
                old, new = stored.get(key), own.get(key)
                if key not in FREE and old != new:
                    raise UsageError(
                        f"{self.path} belongs to another study: {key} was {old}, now {new}; set it "
                        f"back, or choose another out="
                    )
        elif any(
            entry.name != "lock" and not is_unfinished(entry) for entry in self.path.iterdir()
        ):
            raise UsageError(f"{self.path} is no study: no config.json; choose another out=")
        write_json(config, self._document)

    @property
    def selected(self) -> dict:
        """What was selected, by the name of a kind."""
        path = self.path / "selected.json"
        return _read(path) if path.exists() else {}

    def add_selected(self, found: dict) -> None:
        """Keeps what a search has selected."""
        write_json(self.path / "selected.json", self.selected | found)


def _flat(document: dict) -> dict:
    """Keys of the study and what was typed of its runs, as one."""
    return {k: v for k, v in document.items() if k != "run"} | document.get("run", {})


def _read(path: Path) -> dict:
    with contextlib.suppress(ValueError):
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            return found
    raise UsageError(f"{path} is damaged; remove it, or choose another out=")
