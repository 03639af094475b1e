"""Figure 4a: does the exponent of early activations order batch sizes by token efficiency?

The published figure has one seed and five batch sizes and reads the exponent at a share of each
run's own length. Here every seed is a line, four rank windows are shown, and beside that alignment
stands the one at equal tokens, which does not know how long a run will be.
"""

from collections.abc import Callable, Sequence
from math import factorial
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from lens_jax.alignment import Match, at_tokens
from lens_jax.axis_style import BLUE, FAINT, LINES, VERMILLION, token_ticks
from lens_jax.claims import (
    FAILED,
    HELD,
    LEVEL,
    UNDECIDED,
    Claim,
    Missing,
    number,
    p_text,
    verdict,
)
from lens_jax.correlations import (
    PermutationTest,
    alike_permutation_p,
    critical_rho,
    joint_permutation_p,
    max_over_looks_p,
    partial_spearman,
    spearman,
)
from lens_jax.fits import window_alpha
from toy_modular.alignment import REFERENCE_WIDTH, at_progress, spectrum, toy_window
from toy_modular.figures_page import SHADED, edge_note, sheet, words, zero_line
from toy_modular.records import LAST, SPECTRUM, Row, Run, Study
from toy_modular.sweeps import Sweep, sweep

INCHES = (7.1, 3.55)
PROGRESS = np.arange(5, 101, 5) / 100
TOKEN_POINTS = 12


def draw(figure: Figure, study: Study, config) -> list[Claim]:
    """Draws the figure and returns its claims; raises Missing for too few batch sizes."""
    runs = sweep(study, config.stage)
    windows = [config.window, *(w for w in config.other_windows if w != config.window)]
    exponents, ratio = Exponents(windows), config.ratio
    progress = exponents.table(
        runs, PROGRESS, lambda run, p: at_progress(run, run.spectra, p, ratio)
    )
    grid = token_grid(runs)
    tokens = exponents.table(runs, grid, lambda run, n: at_tokens(run.spectra, n, ratio))
    if not np.any(np.isfinite(progress)):
        raise Missing(f"stage {config.stage}: no spectra of {LAST} near any share of its runs")
    look = int(np.argmin(np.abs(PROGRESS - config.at)))
    found = tests(runs, progress, look)
    labels = [exponents.label(window) for window in windows]
    claims = _claims(runs, found, labels[0], PROGRESS[look], progress[0])

    note = _note(study, runs, found, labels, exponents, claims)
    axes = sheet(figure, 1, 3, note, sharey=True)[0]
    _draw_seeds(axes[0], runs, progress[0], labels[0], PROGRESS[look])
    for ax, table, x in ((axes[1], progress, 100 * PROGRESS), (axes[2], tokens, grid)):
        _draw_windows(ax, runs, table, x, labels)
    axes[1].set(xlabel="share of the run (%)", xlim=(0, 102))
    axes[2].set_xlabel("training tokens of each run")
    axes[2].set_xscale("log")
    token_ticks(axes[2].xaxis, grid[0], grid[-1])
    axes[1].set_title("(b) Other rank windows")
    axes[2].set_title("(c) At equal tokens")
    return claims


class Exponents:
    """Exponents of the last position's spectra, each spectrum read once.

    worst: the greatest |ln| distance of a used row from where it was wanted.
    """

    def __init__(self, windows: Sequence[tuple[int, int]]):
        self.windows, self.worst = windows, 0.0
        self._known: dict = {}
        self._width = 0

    def table(self, runs: Sweep, grid, match: Callable[[Run, float], Match | None]) -> np.ndarray:
        """Returns alpha (windows, F, looks, n), NaN where no row is near or a run is missing."""
        found = np.full((len(self.windows), len(runs.seeds), len(grid), len(runs.batches)), np.nan)
        for f, row in enumerate(runs.runs):
            for member, run in enumerate(row):
                for look, place in enumerate(grid if run else ()):
                    near = match(run, place)
                    if near is not None and near.row.has(SPECTRUM, LAST):
                        self.worst = max(self.worst, abs(near.off))
                        found[:, f, look, member] = self._alphas(near.row)
        return found

    def label(self, window: tuple[int, int]) -> str:
        """Ranks of a window as they were used, `10-40`."""
        first, last = toy_window(*window, self._width)
        return f"{first}-{last}"

    def scaling(self) -> str:
        """Says from which windows the ranks come where the width is not 128."""
        if self._width == REFERENCE_WIDTH:
            return ""
        listed = ", ".join(f"{first}-{last}" for first, last in self.windows)
        return f"Width {self._width}: windows scaled from {listed} at width {REFERENCE_WIDTH}."

    def _alphas(self, row: Row) -> list[float]:
        if row.path not in self._known:
            values = spectrum(row)
            self._width = values.size
            self._known[row.path] = [
                window_alpha(values, *toy_window(*window, values.size)) for window in self.windows
            ]
        return self._known[row.path]


class Tests(NamedTuple):
    """What was tested at the look chosen beforehand, and over all looks.

    alike, apart: batch sizes permuted alike in all seeds, or in each on its own; best: over all
    windows and looks; control: mean rho of -log B; own, partials: (F,) rho of each seed, and given
    log B; least_p: the p of a perfect order; members: batch sizes that have both numbers there in
    some seed; cells: in how many of all batch sizes and seeds.
    """

    alike: PermutationTest
    apart: PermutationTest
    best: PermutationTest
    control: float
    own: np.ndarray
    partials: np.ndarray
    least_p: float
    members: int
    cells: int


def tests(runs: Sweep, progress: np.ndarray, look: int) -> Tests:
    """Tests of alpha (windows, F, looks, n) against the token efficiency (F, n)."""
    efficiency = runs.efficiency
    families = list(zip(progress[0, :, look], efficiency, strict=True))
    looks = np.moveaxis(progress, 1, 0).reshape(len(runs.seeds), -1, len(runs.batches))
    present = np.isfinite(progress[0, :, look]) & np.isfinite(efficiency)
    members = int(np.sum(np.any(present, axis=0)))
    control = [spearman(runs.small_batch, own) for own in efficiency]
    return Tests(
        alike_permutation_p(families),
        joint_permutation_p(families, "signed"),
        max_over_looks_p(looks, efficiency),
        _mean(control),
        np.array([spearman(*family) for family in families]),
        np.array([partial_spearman(*family, runs.small_batch) for family in families]),
        2 / factorial(members) if members > 2 else 1.0,
        members,
        int(present.sum()),
    )


def token_grid(runs: Sweep) -> np.ndarray:
    """Token counts, even in the logarithm, from where all runs are measured to the shortest end."""
    tokens = [
        [r.tokens for r in run.spectra if r.tokens > 0] for row in runs.runs for run in row if run
    ]
    tokens = [own for own in tokens if own]
    if not tokens:
        raise Missing(f"stage {runs.stage}: no spectra in its runs")
    low, high = max(map(min, tokens)), min(map(max, tokens))
    return np.geomspace(min(low, high), high, TOKEN_POINTS)


def rho_curves(runs: Sweep, table: np.ndarray) -> np.ndarray:
    """Spearman rho (F, looks) of one window's alpha (F, looks, n) with the token efficiency."""
    return np.array(
        [
            [spearman(look, own) for look in seed]
            for seed, own in zip(table, runs.efficiency, strict=True)
        ]
    )


def _mean(values) -> float:
    values = np.asarray(values, np.float64)
    return float(values[np.isfinite(values)].mean()) if np.any(np.isfinite(values)) else np.nan


def _means(curves: np.ndarray) -> np.ndarray:
    return np.array([_mean(column) for column in curves.T])


def _draw_seeds(ax, runs: Sweep, table: np.ndarray, label: str, chosen: float) -> None:
    """Panel a: the main window, a thin line a seed, their mean, and what chance and B give."""
    curves = rho_curves(runs, table)
    needed = critical_rho(len(runs.batches))
    if np.isfinite(needed):
        for sign in (1, -1):
            ax.axhspan(sign * needed - 0.03, sign * 1.06, color=SHADED, lw=0, zorder=0)
        ax.plot([], [], color=SHADED, lw=6, label=r"$p \leq 0.05$ in one seed")
    for seed, curve in zip(runs.seeds, curves, strict=True):
        first = "one seed" if seed == runs.seeds[0] else None
        ax.plot(100 * PROGRESS, curve, color=BLUE, lw=0.8, alpha=0.55, label=first)
    name = rf"mean, $\alpha$ ranks {label}"
    ax.plot(100 * PROGRESS, _means(curves), color=BLUE, lw=2.2, label=name)
    control = _mean([spearman(runs.small_batch, own) for own in runs.efficiency])
    ax.axhline(control, color=VERMILLION, ls=(0, (4, 2)), lw=1.3, label=r"$-\log B$ alone")
    ax.plot([100 * chosen] * 2, [-1.06, 1.06], color=FAINT, lw=0.9, ls=":")
    zero_line(ax)
    # Room below -1 for the legend, so that it covers no line.
    ax.set(ylim=(-2.05, 1.08), xlim=(0, 102), xlabel="share of the run (%)")
    ax.set_yticks([-1, -0.5, 0, 0.5, 1])
    ax.set_ylabel(r"Spearman $\rho$ ($\alpha$, token efficiency)")
    ax.legend(loc="lower left", borderaxespad=0.1)
    ax.set_title(f"(a) {runs.stage}, n = {len(runs.batches)}")


def _draw_windows(ax, runs: Sweep, tables: np.ndarray, x, labels: Sequence[str]) -> None:
    """Panels b and c: the mean over seeds, a line a window; the main one thick."""
    for table, label, (colour, shape) in zip(tables, labels, LINES, strict=False):
        main = label == labels[0]
        means = _means(rho_curves(runs, table))
        ax.plot(
            x, means, color=colour, marker=shape, ms=3, lw=2 if main else 1, label=f"ranks {label}"
        )
    zero_line(ax)
    ax.legend(loc="lower left", borderaxespad=0.1)


def beyond_batch(found: Tests) -> str:
    """Returns whether alpha says more than the batch size does; a rule, for so few have no test.

    held: the order has p <= 0.05, rho of alpha exceeds that of -log B in every seed, and the
    partial rho is positive in every seed. did not hold: the order has p <= 0.05 with rho below 0,
    so that a larger alpha speaks for less efficiency, and no partial rho is positive. That rho of
    -log B is merely the larger one decides nothing.
    """
    if not np.all(np.isfinite(found.partials)):
        return UNDECIDED
    order = verdict(found.alike.statistic, found.alike.p, found.least_p)
    above = np.all(found.own > abs(found.control)) and np.all(found.partials > 0)
    if order == HELD:
        return HELD if above else UNDECIDED
    return FAILED if order == FAILED and np.all(found.partials <= 0) else UNDECIDED


def _claims(runs: Sweep, found: Tests, label: str, chosen: float, table) -> list[Claim]:
    members, seeds = found.members, len(runs.seeds)
    place = f"{chosen:.0%} of the run"
    outcome = verdict(found.alike.statistic, found.alike.p, found.least_p)
    control = f"rho(-log B, efficiency) = {number(found.control)}"
    order = Claim(
        "4a",
        f"{runs.stage}: a larger alpha at {place} goes with a higher token efficiency",
        members, seeds, label, found.alike.statistic, found.alike.p, control, outcome,
        f"{outcome.capitalize()}: mean rho {number(found.alike.statistic)} over "
        f"{words(seeds, 'seed')} and {words(members, 'batch size')} at {place}"
        f"{_lacking(runs, found)}, "
        f"{p_text(found.alike)} with batch sizes permuted alike in all seeds (apart: "
        f"{p_text(found.apart)}), best of all looks {p_text(found.best)}; {control}.",
    )  # fmt: skip
    partial, beyond = _mean(found.partials), beyond_batch(found)
    why = f"partial rho given log B {number(partial)}"
    if abs(found.control) > 1 - 1e-9:
        why = "the batch size alone orders the runs, so nothing is left to explain"
    control_claim = Claim(
        "4a", f"{runs.stage}: alpha says more of the efficiency than the batch size does",
        members, seeds, label, partial, np.nan, control, beyond,
        f"{beyond.capitalize()}: {why}; |rho| of alpha {number(abs(found.alike.statistic))} "
        f"beside {number(abs(found.control))} of -log B.",
    )  # fmt: skip
    early = rho_curves(runs, table)[:, PROGRESS <= 0.3 + 1e-9]
    reached = int(np.sum(np.any(early > 1 - 1e-9, axis=1)))
    chance = 1 / factorial(members)
    perfect = HELD if reached == seeds and chance <= LEVEL else UNDECIDED if reached else FAILED
    perfect = perfect if np.any(np.isfinite(early)) else UNDECIDED
    perfect_claim = Claim(
        "4a", f"{runs.stage}: rho reaches 1 within the first 30 % of the run",
        members, seeds, label, float(reached), np.nan, f"chance of rho = 1 a look: {chance:.2g}",
        perfect,
        f"{perfect.capitalize()}: rho is 1 somewhere up to 30 % in {reached} of "
        f"{words(seeds, 'seed')} (by chance {chance:.2g} a look, looks are not independent).",
    )  # fmt: skip
    return [order, control_claim, perfect_claim]


def _lacking(runs: Sweep, found: Tests) -> str:
    """Says how many runs have a row at the look, where not all have."""
    everything = runs.efficiency.size
    return "" if found.cells == everything else f" ({found.cells} of {everything} runs)"


def _note(study: Study, runs: Sweep, found: Tests, labels, exponents: Exponents, claims) -> str:
    censored = runs.censored()
    needed = critical_rho(len(runs.batches))
    parts = [
        f"n = {len(runs.batches)} batch sizes ({', '.join(map(str, runs.batches))}), "
        f"{words(len(runs.seeds), 'seed')}, last-position spectra, main window ranks {labels[0]}.",
        f"At the dotted line{_lacking(runs, found)}." if _lacking(runs, found) else "",
        f"Joint p at the dotted line: {p_text(found.alike)} (batch sizes permuted alike in all "
        f"seeds), {p_text(found.apart)} (in each seed apart). Max over {len(labels)} windows and "
        f"{len(PROGRESS)} looks: {p_text(found.best)}.",
        f"One seed needs |rho| = {number(needed)} for p = 0.05."
        if np.isfinite(needed)
        else "With so few batch sizes no rho has p of 0.05 or below.",
        f"Rows are at most {np.expm1(exponents.worst):.0%} off in tokens.",
        exponents.scaling(),
    ]
    if censored:
        parts.append(f"Efficiency 0, target not reached: {', '.join(censored)}.")
    parts.append(edge_note(study.edges(runs.stage), runs.stage))
    return " ".join(part.strip() for part in parts if part) + "\n" + claims[0].sentence
