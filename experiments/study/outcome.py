"""Where a run of a study stands, as its folder tells. No jax."""

import contextlib
import fcntl
import os
from pathlib import Path
from typing import NamedTuple

from experiments.metrics import read_metrics
from models.claimed_folder import read_kept

MEND = "remove the run's folder"


class Outcome(NamedTuple):
    """reason: target, budget or diverged for a run that has ended, else paused, or new.

    tokens: those of which everything is on disk. val_loss: of the last validation at or before
    them, NaN without one.
    """

    reason: str
    tokens: int
    val_loss: float

    @property
    def ended(self) -> bool:
        return self.reason in ("target", "budget", "diverged")


NEW = Outcome("new", 0, float("nan"))


def outcome_of(folder: Path, until: int | None = None) -> Outcome:
    """Reads where a run stands; raises UsageError naming a damaged file.

    until: where it stood when it paused at so many tokens, if it has gone beyond that since.
    """
    end = _end(folder)
    saved = float("inf") if end else _saved_step(folder)
    rows = []
    if saved and (folder / "metrics.jsonl").exists():
        found = read_metrics(folder / "metrics.jsonl")
        rows = [row for row in found if row["kind"] == "val" and row["step"] <= saved]
    if until is not None:
        pauses = [row for row in rows if row["tokens"] >= until]
        if pauses and not (end and end.tokens <= pauses[0]["tokens"]):
            return Outcome("paused", pauses[0]["tokens"], pauses[0]["loss"])
    if end:
        return end
    return Outcome("paused", rows[-1]["tokens"], rows[-1]["loss"]) if rows else NEW


def _end(folder: Path) -> Outcome | None:
    if (folder / "result.json").exists():
        result = read_kept(folder / "result.json", MEND)
        return Outcome(result["reason"], result["tokens"], result["val_loss"])
    if (folder / "nonfinite.json").exists():
        broken = read_kept(folder / "nonfinite.json", MEND)
        return Outcome("diverged", broken["tokens"], float("inf"))
    return None


def is_in_use(folder: Path) -> bool:
    """Whether a process is training in the folder now, one of an earlier study for instance."""
    try:
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _saved_step(folder: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        names = os.listdir(folder / "checkpoints")
        return max((int(name) for name in names if name.isdecimal()), default=0)
    return 0
