"""How fast a run trained, and on how many timed steps that rests; no matplotlib.

A step's time is null where nothing marks its start, as for the first step of a process. What one
study calls the speed of a rung may so rest on few steps, and on another window than the next rung's
if windows were still growing when the runs ended; `timings_text` says which.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.study_records import Run

LEAST_TIMED = 5
"""Timed steps below which a median is no speed."""

SKIPPED_STEPS = 10  # the first ones compile


class Timed(NamedTuple):
    """Seconds (n,) of the timed steps of a run at one window in blocks, NaN for a run without."""

    seconds: np.ndarray
    window: float


def timed_steps(run: Run) -> Timed:
    """Returns the timed steps at the widest window that a run came to.

    The first steps, which compile, are left out as long as there are others.
    """
    steps = run.train["step"]
    times, blocks = (
        run.train.get(name, np.full(steps.shape, np.nan))
        for name in ("step_time_s", "window_blocks")
    )
    window = float(np.max(blocks, initial=-np.inf, where=np.isfinite(blocks)))
    kept = np.isfinite(times) & (times > 0)
    if np.isfinite(window):
        kept &= blocks == window
    late = kept & (steps >= SKIPPED_STEPS)
    kept = late if np.any(late) else kept
    return Timed(times[kept], window if np.isfinite(window) else float("nan"))


def steady_throughput(run: Run) -> float:
    """Returns tokens a second by the median of `timed_steps`, NaN below LEAST_TIMED of them."""
    seconds = timed_steps(run).seconds
    if seconds.size < LEAST_TIMED:
        return float("nan")
    return run.tokens_per_step / float(np.median(seconds))


def timings_text(rungs: Iterable[tuple[str, Sequence[Run]]]) -> str:
    """Writes what the speed of each rung rests on, the fewest steps of its runs.

    `Timed steps (window in blocks): baseline 88, lswa 40 (6); too few: untied 3.`
    """
    enough, few = [], []
    for rung, runs in rungs:
        found = [timed_steps(run) for run in runs]
        count = min(own.seconds.size for own in found)
        windows = sorted({own.window for own in found if np.isfinite(own.window)})
        wide = f" ({'/'.join(f'{window:g}' for window in windows)})" if windows else ""
        (few if count < LEAST_TIMED else enough).append(f"{rung} {count}{wide}")
    parts = [", ".join(enough)] if enough else []
    parts += [f"too few: {', '.join(few)}"] if few else []
    return f"Timed steps (window in blocks): {'; '.join(parts)}."
