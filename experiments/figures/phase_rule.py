"""When a trajectory is said to pass through a phase; pure functions of one series of numbers.

Source: protocol spec, figure 18: the series is smoothed over 3 checkpoints, and a phase is a
monotone run of it whose total change exceeds 3 standard deviations between seeds.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np


class Phase(NamedTuple):
    """A stretch of checkpoints first..last over which the smoothed series moves one way."""

    first: int
    last: int
    change: float


def smooth(values: Sequence[float]) -> np.ndarray:
    """Means over each checkpoint and its two neighbours; (n,). The two ends stay as they are.

    A mean over an end and its one neighbour would not be centred and hides a first fall that is
    over at the next checkpoint.
    """
    values = np.asarray(values, np.float64)
    inner = (values[:-2] + values[1:-1] + values[2:]) / 3
    return np.concatenate([values[:1], inner, values[1:][-1:]]) if values.size else values


def phases(values: Sequence[float], threshold: float) -> list[Phase]:
    """Returns the phases of a trajectory, alternately rising and falling.

    The series is smoothed over 3 checkpoints and cut into its monotone runs; those whose total
    change exceeds the threshold are phases. Two of one direction with nothing but smaller runs
    between them are one. A threshold that is not finite calls no phase.
    Source: protocol spec, figure 18, with 3 standard deviations between seeds for the threshold.
    """
    smoothed = smooth(values)
    found: list[Phase] = []
    for first, last in _monotone_runs(smoothed):
        change = smoothed[last] - smoothed[first]
        if not abs(change) > threshold:
            continue
        if found and found[-1].change * change > 0:
            first = found.pop().first
        found.append(Phase(first, last, float(smoothed[last] - smoothed[first])))
    return found


def _monotone_runs(values: np.ndarray) -> list[tuple[int, int]]:
    """First and last index of the stretches that do not turn; equal values turn nothing."""
    runs, first, way = [], 0, 0.0
    for index in range(1, values.size):
        step = np.sign(values[index] - values[index - 1])
        if step and way and step != way:
            runs.append((first, index - 1))
            first = index - 1
        way = step or way
    return [*runs, (first, values.size - 1)] if values.size > 1 else []


def sequence(found: Sequence[Phase]) -> str:
    """Writes phases in order, `fall, rise, fall`; `none` where there are none."""
    return ", ".join("rise" if phase.change > 0 else "fall" for phase in found) or "none"


def clearness(found: Sequence[Phase]) -> float:
    """Returns how clear fall, rise, fall is: the least of its three changes, 0 where it is absent.

    Of several such triples the clearest counts.
    """
    triples = zip(found, found[1:], found[2:], strict=False)
    return max((min(abs(p.change) for p in t) for t in triples if t[0].change < 0), default=0.0)


@cache
def chance_of_phases(checkpoints: int, draws: int = 2000) -> float:
    """Share of flat trajectories with independent noise in which the rule calls any phase.

    The threshold is 3 sd of the noise, so the share depends on the number of checkpoints alone.
    """
    noise = np.random.default_rng(0).normal(size=(draws, checkpoints))
    return float(np.mean([bool(phases(row, 3.0)) for row in noise]))
