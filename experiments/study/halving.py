"""Learning-rate search by successive halving, where trials go on and do not begin again.

The trials of a cell train to a rung of tokens; of n the best max(1, n // eta) go on, from where
they stand. The last one standing is the cell's chosen run: it simply goes on to the target. What is
not finite ranks last. A best rate at an end of its grid is tried against the next one beyond it.
Source: ladder spec 8, of which the released code trains every rung from scratch.
"""

from collections.abc import Callable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from experiments.efficiency import crossing_tokens
from experiments.study.grid import Study
from experiments.study.outcome import Outcome
from experiments.study.pool import Failed, Task
from experiments.study.rates import rounded
from experiments.study_records import Cell, read_run

Train = Callable[[list[Task], str], Mapping[str, Outcome | Failed]]


class Trial(NamedTuple):
    """A rate and how far it came; crossing: tokens to the target, NaN where it is not reached."""

    lr_scale: float
    name: str
    outcome: Outcome
    crossing: float


class Selection(NamedTuple):
    """The multiplier chosen for a cell; edge: whether none beyond it was tried."""

    lr_scale: float
    edge: bool
    trials: tuple[Trial, ...]

    def to_json(self) -> dict:
        return {
            "lr_scale": self.lr_scale,
            "edge": self.edge,
            "trials": [
                {
                    "lr_scale": trial.lr_scale,
                    "run": trial.name,
                    **trial.outcome._asdict(),
                    "val_loss": _finite(trial.outcome.val_loss),
                    "crossing_tokens": _finite(trial.crossing),
                }
                for trial in sorted(self.trials)
            ],
        }


def search(study: Study, cells: list[Cell], runs: Path, train: Train) -> dict[Cell, Selection]:
    """Selections of the cells all of whose trials have trained.

    A cell of which a trial broke off has none, lest a full disk decide its rate: the others go on,
    and it is taken up when the study is begun again. train(tasks, what) trains tasks and returns
    outcomes by folder name. runs: where folders lie.
    """
    trials: dict[Cell, dict[float, Trial]] = {cell: {} for cell in cells}
    alive = {cell: study.candidates(cell) for cell in cells}

    def advance(going: dict[Cell, list[float]], tokens: int, what: str) -> dict[Cell, list[float]]:
        broken = _train(study, going, tokens, runs, train, trials, what)
        for cell in broken:
            del alive[cell]
        return {cell: rates for cell, rates in going.items() if cell not in broken}

    for number, tokens in enumerate(study.config.rung_tokens, start=1):
        going = {cell: rates for cell, rates in alive.items() if len(rates) > 1 or number == 1}
        going = advance(going, tokens, f"rung {number}")
        for _ in range(study.config.beyond if number == 1 else 0):
            outside = {cell: _outside(trials[cell]) for cell in going}
            more = {cell: [rate] for cell, rate in outside.items() if rate is not None}
            if not more:
                break
            for cell, rates in advance(more, tokens, "beyond the grid").items():
                alive[cell] = sorted({*alive[cell], *rates})
            going = {cell: rates for cell, rates in going.items() if cell in alive}
        for cell in going:
            alive[cell] = survivors([trials[cell][rate] for rate in alive[cell]], study.config.eta)
    return {cell: _select(trials[cell]) for cell in alive}


def rank_key(trial: Trial) -> tuple:
    """Sorts trials, best first: tokens to the target, then the loss reached, then the diverged."""
    if trial.outcome.reason == "target":
        return 0, trial.crossing
    if trial.outcome.reason == "diverged":
        return 2, -trial.outcome.tokens
    return 1, trial.outcome.val_loss


def survivors(trials: list[Trial], eta: int) -> list[float]:
    """Which rates of a rung go on, ascending: the best max(1, n // eta), n with the diverged."""
    ranked = sorted(trials, key=rank_key)
    return sorted(trial.lr_scale for trial in ranked[: max(1, len(trials) // eta)])


def _select(trials: Mapping[float, Trial]) -> Selection:
    # Only trials that came as far as any are compared: a loss after fewer tokens is no worse one.
    everyone = list(trials.values())
    finite = [trial for trial in everyone if trial.outcome.reason != "diverged"] or everyone
    farthest = max(_reach(trial) for trial in finite)
    fair = [trial for trial in finite if _reach(trial) >= farthest]
    best = min(fair, key=rank_key).lr_scale
    return Selection(best, best in (min(trials), max(trials)), tuple(trials.values()))


def _reach(trial: Trial) -> float:
    return float("inf") if trial.outcome.reason == "target" else trial.outcome.tokens


def _outside(trials: Mapping[float, Trial]) -> float | None:
    """The rate beyond the end that the best one lies at, None if it lies inside."""
    best = min(trials.values(), key=rank_key).lr_scale
    if best == max(trials):
        return rounded(round(2 * best, 6))
    return rounded(round(best / 2, 6)) if best == min(trials) else None


def _train(
    study: Study, going, tokens: int, runs: Path, train: Train, trials, what: str
) -> set[Cell]:
    """Trains trials up to a rung and puts them in their places; returns the cells that broke."""
    of_name, tasks = {}, []
    # One trial of every cell, then the next of every cell: side by side, two of a cell would
    # compile the same program twice instead of one for the other.
    for round_ in zip_longest(*([(cell, rate) for rate in going[cell]] for cell in going)):
        for cell, rate in filter(None, round_):
            task = make_task(study, cell, study.config.search_seed, rate, runs, tokens)
            of_name[task.folder.name] = cell, rate
            tasks.append(task)
    broken = set()
    for name, outcome in train(tasks, what).items():
        cell, rate = of_name[name]
        if isinstance(outcome, Failed):
            broken.add(cell)
            continue
        crossing = float("nan")
        if outcome.reason == "target":
            crossing = crossing_tokens(read_run(runs / name), study.target(cell))
        trials[cell][rate] = Trial(rate, name, outcome, crossing)
    return broken


def make_task(
    study: Study, cell: Cell, seed: int, lr_scale: float, runs: Path, until: int | None = None
) -> Task:
    """The task of a run; it pauses at the first validation with `until` tokens."""
    name = study.run_name(cell, seed, lr_scale)
    label = f"{cell.name}-s{seed} lr x{lr_scale:g}"
    return Task(label, study.run_words(cell, seed, lr_scale), runs / name, until)


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None
