"""Learning-rate search by successive halving, for all kinds of a study at once.

Candidates of a kind train in rungs; after a rung the better half, rounded up, goes on from where it
stands. A candidate that reaches the target ends the search of its kind after the rung. A winner at
the edge of its grid is tried against the next rate beyond it.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import chz

from models.command_line import UsageError
from toy_modular.study_config import Kind, Study
from toy_modular.workers import Failed, Job, run_jobs

RUNGS = (0.125, 0.5, 1.0)
BEYOND = 2  # how often an edge is moved, by a factor of two

Results = Mapping[float, dict]


class Selection(NamedTuple):
    """The rate chosen for a kind; trials: every rate's last result; edge: whether none beyond it
    was tried."""

    lr: float
    trials: Results
    edge: bool

    def to_json(self) -> dict:
        trials = [{"lr": lr, **result} for lr, result in sorted(self.trials.items())]
        return {"lr": self.lr, "edge": self.edge, "trials": trials}


def rank_key(result: dict) -> tuple:
    """Sorts trials, best first: tokens to the target, then the loss reached, then the diverged."""
    if result["reason"] == "target":
        return 0, result["crossing_tokens"] or result["tokens_to_target"]
    if result["reason"] == "diverged":
        return 2, 0.0
    return 1, result["val_loss"]


def search(
    study: Study, kinds: list[Kind], folder: Path, engine: str, note: Callable[[str], None]
) -> dict[Kind, Selection]:
    """Selections of all kinds. Members lie in `folder` and go on from there after a kill."""
    trials: dict[Kind, dict[float, dict]] = {kind: {} for kind in kinds}
    alive = {kind: study.candidates(kind) for kind in kinds}
    for share in RUNGS:
        going = {kind: rates for kind, rates in alive.items() if rates}
        _train(study, going, share, folder, engine, note, trials)
        for kind in going:
            alive[kind] = survivors(trials[kind], alive[kind])
    for _ in range(BEYOND):
        outside = {kind: _outside(trials[kind]) for kind in kinds}
        going = {kind: [rate] for kind, rate in outside.items() if rate is not None}
        if not going:
            break
        _train(study, going, 1.0, folder, engine, note, trials)
    chosen = {}
    for kind in kinds:
        best = _best(trials[kind])
        edge = best in (min(trials[kind]), max(trials[kind]))
        chosen[kind] = Selection(best, trials[kind], edge)
    return chosen


def survivors(trials: Results, rates: list[float]) -> list[float]:
    """Which rates of a rung go on: the better half, rounded up; none once one hit the target."""
    if any(trials[rate]["reason"] == "target" for rate in rates):
        return []
    fit = [rate for rate in rates if trials[rate]["reason"] != "diverged"]
    fit.sort(key=lambda rate: rank_key(trials[rate]))
    return sorted(fit[: (len(rates) + 1) // 2])


def _best(trials: Results) -> float:
    return min(trials, key=lambda rate: rank_key(trials[rate]))


def _outside(trials: Results) -> float | None:
    """The rate beyond the edge that the best one lies at, None if it lies inside."""
    best = _best(trials)
    if best == max(trials):
        return 2 * best
    return best / 2 if best == min(trials) else None


def _train(study, going, share, folder, engine, note, trials) -> None:
    jobs, kind_of, compiled = [], {}, folder.parent / "compiled"
    for kind, rates in going.items():
        members = [_unmeasured(study, kind, rate) for rate in rates]
        steps = members[0].eval_every
        until = max(1, round(share * members[0].max_steps / steps)) * steps
        hits = [r["step"] for r in trials[kind].values() if r["reason"] == "target"]
        until = min([until, *hits])
        folders = [folder / f"{kind.name}-lr{rate:.4g}" for rate in rates]
        for job in grouped(members, folders, until, engine):
            kind_of[job.folders] = kind
            jobs.append(job)
    for done, (job, results) in enumerate(run_jobs(jobs, engine, note, compiled), start=1):
        if isinstance(results, Failed):
            raise UsageError(f"the search at {job.folders[0]} broke off: {results.error}")
        kind = kind_of[job.folders]
        for config, result in zip(job.configs, results, strict=True):
            trials[kind][config.lr] = result
            loss = result.get("val_loss", float("nan"))
            note(
                f"search [{done}/{len(jobs)}] {kind.name} lr {config.lr:.4g}: {result['reason']} "
                f"at step {result['step']}, val loss {loss:.3f}"
            )


def _unmeasured(study: Study, kind: Kind, rate: float):
    config = study.member(kind, study.config.search_seed, rate)
    return chz.replace(config, measure=chz.replace(config.measure, per_doubling=0))


def grouped(members, folders, until: int | None, engine: str) -> Iterator[Job]:
    """Members of one kind as one job for a program that takes them together, else a job each."""
    if not members:
        return
    if engine == "together":
        yield Job(tuple(members), tuple(folders), until)
    else:
        for member, place in zip(members, folders, strict=True):
            yield Job((member,), (place,), until)
