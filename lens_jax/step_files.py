"""Measured steps of a run as files: which there are, what they hold, and one array at a time.

A figure over many runs reads what it draws and leaves the rest on the disk; `records.read_records`
reads everything. NumPy.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lens_jax.records import read_step

_STEP_FILE = re.compile(r"step_\d{8,}\.npz")


@dataclass(frozen=True)
class StepFile:
    """One measured step of a run; `array` reads from its file.

    val_loss: that the record was written with, NaN where the step had no validation. meta: what the
    record says of its step, `lens_jax.records`.
    """

    path: Path
    step: int
    tokens: int
    val_loss: float
    names: frozenset
    meta: dict = field(default_factory=dict, compare=False, repr=False)

    def has(self, kind: str, site: str) -> bool:
        """Tells whether an array was recorded."""
        return f"{kind}/{site}" in self.names

    def array(self, kind: str, site: str) -> np.ndarray:
        """Reads one array in float64; raises ValueError naming the file where it is absent."""
        if not self.has(kind, site):
            raise ValueError(f"{self.path}: no array {kind}/{site} in it; measure the run anew")
        return _read(self.path, lambda archive: archive[f"{kind}/{site}"]).astype(np.float64)

    def left_out(self, kind: str, site: str) -> np.ndarray | None:
        """Reads a spectrum with each group of windows left out, (G, D); None if not recorded."""
        kind = f"{kind}_left_out"
        return self.array(kind, site) if self.has(kind, site) else None

    def sites(self, kind: str) -> list[str]:
        """Returns the sites at which a kind was recorded, in the order of their names."""
        return sorted(n.partition("/")[2] for n in self.names if n.startswith(f"{kind}/"))


def list_steps(folder: str | Path) -> list[StepFile]:
    """Returns the measured steps of a folder, ascending; none for a folder that is not there.

    Raises ValueError naming the file whose meta cannot be read, or lacks step or tokens.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return []
    found = []
    for path in sorted(path for path in folder.iterdir() if _STEP_FILE.fullmatch(path.name)):
        meta, names = _read_meta(path)
        try:
            loss = meta.get("val_loss")
            loss = float("nan") if loss is None else float(loss)
            found.append(StepFile(path, int(meta["step"]), int(meta["tokens"]), loss, names, meta))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: meta without step, tokens or val_loss") from error
    return sorted(found, key=lambda row: row.step)


def _read_meta(path: Path) -> tuple[dict, frozenset]:
    """The meta of a step file and the names of its arrays, which stay unread."""
    return _read(
        path,
        lambda archive: (
            json.loads(archive["meta"].tobytes().decode("utf-8")),
            frozenset(archive.files) - {"meta"},
        ),
    )


def _read(path: Path, take: Callable):
    try:
        with np.load(path, allow_pickle=False) as archive:
            return take(archive)
    # Whatever damage it is: reading the whole file says it in one line.
    except Exception as error:
        read_step(path)
        raise ValueError(f"{path}: damaged ({error})") from error
