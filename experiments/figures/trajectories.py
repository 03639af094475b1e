"""Statistics of spectra followed along training, and the runs that stand for a family.

What the atlases (figures 13 to 16) and the weight figure (17) draw; no matplotlib. Alphas of
gradients are twice those of their singular values, so that they compare with eigenvalues'.
"""

from collections.abc import Callable, Iterable, Sequence
from math import isfinite
from typing import NamedTuple

import numpy as np

from experiments.efficiency import crossing_tokens, early_row, ranks_of
from experiments.figures.options import Options
from experiments.rank_windows import DEEP_WINDOW
from experiments.study_records import ACTIVATION, GRADIENT, Family, Run, Study
from lens_jax.alignment import at_tokens
from lens_jax.correlations import spearman
from lens_jax.fits import GRAM_FLOOR, rankme, window_alpha
from lens_jax.saved_run import gradient_window, short_count
from lens_jax.step_files import StepFile

OUTPUT = "attn/c_proj"


class Member(NamedTuple):
    """The runs that stand for a family: the seeds of one cell, and its mean tokens to target."""

    family: Family
    runs: tuple[Run, ...]
    tokens: float

    @property
    def first(self) -> Run:
        """The run of the lowest seed."""
        return self.runs[0]

    @property
    def reached(self) -> bool:
        """Whether all its runs came to the target; else no batch of the family has."""
        return isfinite(self.tokens)


def token_best(study: Study, family: Family, options: Options) -> Member | None:
    """Returns the cell of a family that needed the fewest tokens to the target, or None.

    Measured runs only, the mean over seeds; a cell with a run that missed the target comes after
    those without, one that has not ended last, and among equals the lower last loss is first.
    `options.batch` names the cell instead.
    """
    target = options.target or study.target_loss
    cells: dict[int, list[Run]] = {}
    for run in study.of(family):
        if run.steps and options.batch in (None, run.batch):
            cells.setdefault(run.batch, []).append(run)
    found = []
    for batch, runs in cells.items():
        reached = [crossing_tokens(run, target) if target else np.nan for run in runs]
        tokens = float(np.mean(reached))
        loss = np.mean([run.val["loss"][-1] if run.val["loss"].size else np.inf for run in runs])
        order = (np.isnan(tokens), np.nan_to_num(tokens), loss, batch)
        found.append((order, Member(family, tuple(runs), tokens)))
    return min(found, key=lambda cell: cell[0])[1] if found else None


def missed_text(members: Sequence[Member]) -> str:
    """Names the families that stand at the batch of the lowest last loss, for want of a target."""
    names = [member.family.name for member in members if not member.reached]
    return f"Target not reached or run not ended: {', '.join(names)}." if names else ""


# Statistics along training


class Statistic(NamedTuple):
    """A number of a spectrum, followed over training; of(run, row, window) returns it."""

    name: str
    kind: str
    matrix: str | None
    of: Callable[[Run, StepFile, tuple[int, int]], float]


def gradient_alpha(values: np.ndarray) -> float:
    """Returns the exponent of singular values of N samples on the ranks that N gives.

    NaN where they fall to the rounding of their Gram matrix inside them.
    """
    return window_alpha(values, *gradient_window(values.size), GRAM_FLOOR)


def _activation_alpha(run: Run, row: StepFile, window: tuple[int, int]) -> float:
    values = row.array(ACTIVATION, run.final_site(ACTIVATION))
    return window_alpha(values, *ranks_of(run, window))


def _activation_rankme(run: Run, row: StepFile, window: tuple[int, int]) -> float:
    return rankme(row.array(ACTIVATION, run.final_site(ACTIVATION)))


def _gradient_alpha(run: Run, row: StepFile, window: tuple[int, int]) -> float:
    values = row.array(GRADIENT, run.final_site(GRADIENT, OUTPUT))
    return 2 * gradient_alpha(values)


def _gradient_rankme(run: Run, row: StepFile, window: tuple[int, int]) -> float:
    return rankme(row.array(GRADIENT, run.final_site(GRADIENT, OUTPUT)), GRAM_FLOOR)


RANKMES = (
    Statistic("activation RankMe", ACTIVATION, None, _activation_rankme),
    Statistic("gradient RankMe", GRADIENT, OUTPUT, _gradient_rankme),
)
ALPHAS = (
    Statistic("activation alpha", ACTIVATION, None, _activation_alpha),
    Statistic("gradient alpha", GRADIENT, OUTPUT, _gradient_alpha),
)


def measured(run: Run, kind: str, matrix: str | None = None) -> list[StepFile]:
    """Returns the rows of a run that hold a kind at its last layer."""
    if not any(matrix is None or f"/{matrix}/" in f"{site}/" for site in run.sites(kind)):
        return []
    site = run.final_site(kind, matrix)
    return [row for row in run.steps if row.has(kind, site)]


def gradient_ranks(run: Run) -> tuple[int, int] | None:
    """Returns the ranks that alphas of a run's gradients are fitted on, None without gradients."""
    rows = measured(run, GRADIENT, OUTPUT)
    if not rows:
        return None
    return gradient_window(rows[-1].array(GRADIENT, run.final_site(GRADIENT, OUTPUT)).size)


def late_tokens(runs: Sequence[Sequence[StepFile]]) -> int | None:
    """Returns the most training tokens at which every run has a row, None where there are none.

    Rows of exactly these tokens, for over the 18 % that a near one may be off a spectrum moves by
    itself; near ones only where runs share no count at all.
    """
    counts = [{row.tokens for row in rows if row.tokens > 0} for rows in runs]
    if shared := set.intersection(*counts):
        return max(shared)
    near = (
        tokens
        for tokens in sorted(set.union(*counts), reverse=True)
        if all(at_tokens(rows, tokens) for rows in runs)
    )
    return next(near, None)


def span_text(tokens: Iterable[float]) -> str:
    """Writes token counts as one where they are one, else from the least to the most."""
    tokens = list(tokens)
    return " to ".join(dict.fromkeys(short_count(end) for end in (min(tokens), max(tokens))))


def follow(run: Run, statistic: Statistic, window) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and values of a statistic along a run, (n,) each, finite ones only."""
    rows = measured(run, statistic.kind, statistic.matrix)
    values = np.array([statistic.of(run, row, window) for row in rows], np.float64)
    tokens = np.array([row.tokens for row in rows], np.float64)
    kept = np.isfinite(values)
    return tokens[kept], values[kept]


def change(run: Run, statistic: Statistic, window, tokens: int) -> float:
    """Returns a statistic at the end of a run less that at `tokens` of training, or NaN."""
    rows = measured(run, statistic.kind, statistic.matrix)
    start = early_row(run, tokens)
    if start not in rows or start.step == rows[-1].step:
        return float("nan")
    ends = (statistic.of(run, row, window) for row in (rows[-1], start))
    return float(np.subtract(*ends))


def trajectory_rho(shallow: Run, deep: Run, statistic: Statistic, window) -> float:
    """Spearman of a statistic at d12 on `window` with that of a deeper run on ranks 200-400.

    Over rows of equal tokens, the untrained model left out. Neighbouring rows are no independent
    members, so this has no p of its own.
    """
    there = measured(shallow, statistic.kind, statistic.matrix)
    rows = [row for row in measured(deep, statistic.kind, statistic.matrix) if row.tokens > 0]
    pairs = [(match.row, row) for row in rows if (match := at_tokens(there, row.tokens))]
    return spearman(
        np.array([statistic.of(shallow, row, window) for row, _ in pairs]),
        np.array([statistic.of(deep, row, DEEP_WINDOW) for _, row in pairs]),
    )
