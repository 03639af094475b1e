"""Runs of the study put in order for a comparison: batch sizes by seed, and stages in pairs."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from lens_jax.claims import Missing
from toy_modular.alignment import token_efficiency
from toy_modular.config import is_prime
from toy_modular.records import Run, Study, band_numbers

PAPER_BANDS = ("97_200", "179_50")


class Sweep(NamedTuple):
    """The finished runs of one stage over batch sizes and seeds.

    batches: (n,) ascending; seeds: (F,); runs: F lists of n, None where a run is missing;
    efficiency: (F, n), `token_efficiency`, NaN where a run is missing.
    """

    stage: str
    batches: tuple[int, ...]
    seeds: tuple[int, ...]
    runs: tuple[tuple[Run | None, ...], ...]
    efficiency: np.ndarray

    @property
    def small_batch(self) -> np.ndarray:
        """-ln B (n,), the predictor that needs no spectrum."""
        return -np.log(np.array(self.batches, np.float64))

    def censored(self) -> list[str]:
        """Names of the runs that did not reach the target while others of their seed did."""
        return [
            run.name
            for row, effs in zip(self.runs, self.efficiency, strict=True)
            for run, own in zip(row, effs, strict=True)
            if run is not None and own == 0
        ]


def sweep(study: Study, stage: str, least_batches: int = 3) -> Sweep:
    """Orders the finished runs of a stage; raises Missing for too few batch sizes."""
    runs = study.stage(stage)
    batches = tuple(sorted({run.batch for run in runs}))
    if len(batches) < least_batches:
        found = ", ".join(run.name for run in runs) or "none"
        raise Missing(
            f"stage {stage} has finished runs of {len(batches)} batch sizes and {least_batches} "
            f"are needed (found {found}{_waiting(study, stage)})"
        )
    seeds = tuple(sorted({run.seed for run in runs}))
    at = {(run.seed, run.batch): run for run in runs}
    efficiency = token_efficiency(runs)
    table = tuple(tuple(at.get((seed, batch)) for batch in batches) for seed in seeds)
    values = [[np.nan if run is None else efficiency[run.name] for run in row] for row in table]
    return Sweep(stage, batches, seeds, table, np.array(values))


def pairs(study: Study, before: str, after: str) -> Iterator[tuple[Run, Run]]:
    """Yields the finished runs of two stages that share batch size and seed."""
    earlier = {(run.batch, run.seed): run for run in study.stage(before)}
    for run in study.stage(after):
        if (run.batch, run.seed) in earlier:
            yield earlier[run.batch, run.seed], run


def require_pairs(study: Study, stages: Sequence[str]) -> None:
    """Raises Missing unless some two consecutive stages share a batch size and a seed."""
    if any(list(pairs(study, *two)) for two in pairwise(stages)):
        return
    have = ", ".join(f"{stage}: {len(study.stage(stage))}" for stage in stages)
    raise Missing(
        f"no two consecutive stages have finished runs of one batch size and seed ({have}"
        f"{_waiting(study, *stages)})"
    )


def shared_batch(study: Study, stages: Sequence[str], wanted: int | None = None) -> int:
    """Returns the smallest batch size that every stage has finished, or checks the wanted one."""
    have = {stage: {run.batch for run in study.stage(stage)} for stage in stages}
    lacking = [stage for stage in stages if not have[stage]]
    if lacking:
        raise Missing(f"no finished run of {', '.join(lacking)}{_waiting(study, *lacking)}")
    if wanted is None:
        common = set.intersection(*have.values())
        if common:
            return min(common)
        listed = "; ".join(f"{stage}: {sorted(have[stage])}" for stage in stages)
        raise Missing(f"the stages share no batch size ({listed})")
    lacking = [stage for stage in stages if wanted not in have[stage]]
    if lacking:
        raise Missing(f"batch={wanted}: no finished run of {', '.join(lacking)}")
    return wanted


def common_bands(runs: Sequence[Run]) -> list[str]:
    """Returns the bands that were probed in all runs; raises Missing where there are none."""
    probed = [set(run.bands) for run in runs]
    shared = set.intersection(*probed) if probed else set()
    if not shared:
        without = [run.name for run, bands in zip(runs, probed, strict=True) if not bands]
        raise Missing(f"no band was probed in all runs ({', '.join(without[:4]) or 'they differ'})")
    return sorted(shared, key=band_numbers)


def chosen_bands(runs: Sequence[Run], wanted: Sequence[str]) -> list[str]:
    """Returns the bands a mean goes over.

    Those wanted, as `97:200`; else the two published ones where both were probed; else all of prime
    modulus, on which no mode is shared with smaller groups; else all.
    """
    shared = common_bands(runs)
    if wanted:
        sites = [band.replace(":", "_") for band in wanted]
        for band, site in zip(wanted, sites, strict=True):
            if site not in shared:
                listed = ", ".join(shared).replace("_", ":")
                raise Missing(f"band {band} was not probed in all runs (those were: {listed})")
        return sites
    if set(PAPER_BANDS) <= set(shared):
        return list(PAPER_BANDS)
    return [site for site in shared if is_prime(band_numbers(site)[0])] or shared


def _waiting(study: Study, *stages: str) -> str:
    waiting = [note for note in study.unfinished if note.startswith(tuple(f"{s}-" for s in stages))]
    return f"; unfinished: {', '.join(note.partition(':')[0] for note in waiting)}" * bool(waiting)
