"""Timing of several variants in turns, so that noise of the machine falls on all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Timed(NamedTuple):
    """Seconds of every timed call of one variant, and what the last call returned."""

    seconds: list[float]
    result: Any


def time_in_turns(variants: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Timed]:
    """Call the variants a, b, c, a, b, c ... `repeats` times, after one untimed call of each.

    A variant returns only when its work is done (it blocks on what it dispatched).
    """
    results = {name: variant() for name, variant in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, variant in variants.items():
            began = time.perf_counter()
            results[name] = variant()
            seconds[name].append(time.perf_counter() - began)
    return {name: Timed(seconds[name], results[name]) for name in variants}


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, smallest and largest of some seconds, in the keys of the report."""
    found = {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}
    return {name: round(value, 6) for name, value in found.items()}


def paired_ratio(seconds: list[float], reference: list[float]) -> float:
    """Median over the turns of one variant's seconds over another's in the same turn."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))
