"""Figure 4a: does the exponent of early activations order batch sizes by token efficiency?

The published figure has one seed and five batch sizes and reads the exponent at a share of each
run's own length. Here every seed is a line, four rank windows are shown, and beside that alignment
stands the one at equal tokens, which does not know how long a run will be.
"""

from collections.abc import Callable, Sequence
from math import factorial

import numpy as np
from matplotlib.figure import Figure

from lens_jax.axis_style import BLUE, FAINT, LINES, VERMILLION, token_ticks
from lens_jax.correlations import (
    PermutationTest,
    alike_permutation_p,
    critical_rho,
    joint_permutation_p,
    max_over_looks_p,
    partial_spearman,
    spearman,
)
from lens_jax.fits import fit_power_law
from toy_modular.alignment import Match, at_progress, at_tokens, spectrum, toy_window
from toy_modular.claims import FAILED, HELD, UNDECIDED, Claim, Missing, number, p_text, verdict
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
    exponents = Exponents(windows)
    progress = exponents.table(runs, PROGRESS, lambda run, p: at_progress(run, run.spectra, p))
    grid = token_grid(runs)
    tokens = exponents.table(runs, grid, lambda run, n: at_tokens(run.spectra, n))
    if not np.any(np.isfinite(progress)):
        raise Missing(f"stage {config.stage}: no spectra of {LAST} near any share of its runs")
    look = int(np.argmin(np.abs(PROGRESS - config.at)))
    found = tests(runs, progress, look)
    labels = [exponents.label(window) for window in windows]
    claims = _claims(runs, found, labels[0], PROGRESS[look], progress[0])

    note = _note(study, runs, found, labels, exponents.worst, claims)
    axes = sheet(figure, 1, 3, note, sharey=True)[0]
    _draw_seeds(axes[0], runs, progress[0], labels[0], PROGRESS[look])
    for ax, table, x in ((axes[1], progress, 100 * PROGRESS), (axes[2], tokens, grid)):
        _draw_windows(ax, runs, table, x, labels)
    axes[1].set_xlabel("share of the run (%)")
    axes[2].set_xlabel("training tokens, the same in all runs")
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
        """Ranks as they were used, `10-40`, and what they are at width 128 if that differs."""
        first, last = toy_window(*window, self._width)
        wanted = "" if (first, last) == window else f" ({window[0]}-{window[1]} scaled)"
        return f"{first}-{last}{wanted}"

    def _alphas(self, row: Row) -> list[float]:
        if row.path not in self._known:
            values = spectrum(row)
            self._width = values.size
            self._known[row.path] = [
                fit_power_law(values, *toy_window(*window, values.size)).alpha
                for window in self.windows
            ]
        return self._known[row.path]


class Tests:
    """What was tested at the look that was chosen beforehand, and over all looks."""

    def __init__(self, alike, apart, best, control, partials, least_p):
        self.alike: PermutationTest = alike
        self.apart: PermutationTest = apart
        self.best: PermutationTest = best
        self.control: float = control
        self.partials: np.ndarray = partials
        self.least_p: float = least_p


def tests(runs: Sweep, progress: np.ndarray, look: int) -> Tests:
    """Tests of alpha (windows, F, looks, n) against the token efficiency (F, n)."""
    efficiency = runs.efficiency
    families = list(zip(progress[0, :, look], efficiency, strict=True))
    looks = np.moveaxis(progress, 1, 0).reshape(len(runs.seeds), -1, len(runs.batches))
    members = int(np.sum(np.all(np.isfinite(efficiency), axis=0)))
    control = [spearman(runs.small_batch, own) for own in efficiency]
    return Tests(
        alike_permutation_p(families),
        joint_permutation_p(families, "signed"),
        max_over_looks_p(looks, efficiency),
        _mean(control),
        np.array([partial_spearman(*family, runs.small_batch) for family in families]),
        2 / factorial(members) if members else 1.0,
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
    ax.axvline(100 * chosen, color=FAINT, lw=0.8, ls=":")
    zero_line(ax)
    # Room below -1 for the legend, so that it covers no line.
    ax.set(ylim=(-2.05, 1.08), xlim=(0, 102), xlabel="share of the run (%)")
    ax.set_yticks([-1, -0.5, 0, 0.5, 1])
    ax.set_ylabel(r"Spearman $\rho$ ($\alpha$, token efficiency)")
    ax.yaxis.set_label_coords(-0.2, 0.66)
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


def _claims(runs: Sweep, found: Tests, label: str, chosen: float, table) -> list[Claim]:
    members, seeds = len(runs.batches), len(runs.seeds)
    place = f"{chosen:.0%} of the run"
    outcome = verdict(found.alike.statistic, found.alike.p, found.least_p)
    control = f"rho(-log B, efficiency) = {number(found.control)}"
    order = Claim(
        "4a",
        f"{runs.stage}: a larger alpha at {place} goes with a higher token efficiency",
        members, seeds, label, found.alike.statistic, found.alike.p, control, outcome,
        f"{outcome.capitalize()}: mean rho {number(found.alike.statistic)} over "
        f"{words(seeds, 'seed')} and {words(members, 'batch')} at {place}, {p_text(found.alike)} "
        f"with batch sizes permuted alike in all seeds (apart: {p_text(found.apart)}), best of all "
        f"looks {p_text(found.best)}; {control}.",
    )  # fmt: skip
    partial = _mean(found.partials)
    # Neither sign nor size of a partial correlation of so few has a test that is not hollow.
    beyond = UNDECIDED if not np.isfinite(partial) or found.least_p > 0.05 else (
        HELD if np.all(found.partials > 0) and found.alike.p <= 0.05 and abs(found.control) < 1
        and abs(found.alike.statistic) > abs(found.control) else
        FAILED if abs(found.alike.statistic) <= abs(found.control) else UNDECIDED
    )  # fmt: skip
    why = (
        "the batch size alone orders the runs, so nothing is left to explain"
        if not np.isfinite(partial)
        else f"partial rho given log B {number(partial)}"
    )
    control_claim = Claim(
        "4a", f"{runs.stage}: alpha says more of the efficiency than the batch size does",
        members, seeds, label, partial, np.nan, control, beyond,
        f"{beyond.capitalize()}: {why}; |rho| of alpha {number(abs(found.alike.statistic))} "
        f"beside {number(abs(found.control))} of -log B.",
    )  # fmt: skip
    early = rho_curves(runs, table)[:, PROGRESS <= 0.3 + 1e-9]
    reached = int(np.sum(np.any(early > 1 - 1e-9, axis=1)))
    perfect = HELD if reached == seeds else FAILED if reached == 0 else UNDECIDED
    chance = 1 / factorial(members)
    perfect_claim = Claim(
        "4a", f"{runs.stage}: rho reaches 1 within the first 30 % of the run",
        members, seeds, label, float(reached), np.nan, f"chance of rho = 1 a look: {chance:.2g}",
        perfect,
        f"{perfect.capitalize()}: rho is 1 somewhere up to 30 % in {reached} of "
        f"{words(seeds, 'seed')} (by chance {chance:.2g} a look, looks are not independent).",
    )  # fmt: skip
    return [order, control_claim, perfect_claim]


def _note(study: Study, runs: Sweep, found: Tests, labels, worst: float, claims) -> str:
    censored = runs.censored()
    needed = critical_rho(len(runs.batches))
    parts = [
        f"n = {len(runs.batches)} batch sizes ({', '.join(map(str, runs.batches))}), "
        f"{words(len(runs.seeds), 'seed')}, last-position spectra, main window ranks {labels[0]}.",
        f"Joint p at the dotted line: {p_text(found.alike)} (batch sizes permuted alike in all "
        f"seeds), {p_text(found.apart)} (in each seed apart). Max over {len(labels)} windows and "
        f"{len(PROGRESS)} looks: {p_text(found.best)}.",
        f"One seed needs |rho| = {number(needed)} for p = 0.05."
        if np.isfinite(needed)
        else "With so few batch sizes no rho has p of 0.05 or below.",
        f"Rows are at most {np.expm1(worst):.0%} off in tokens.",
    ]
    if censored:
        parts.append(f"Efficiency 0, target not reached: {', '.join(censored)}.")
    parts.append(edge_note(study.edges(runs.stage), runs.stage))
    return " ".join(part.strip() for part in parts if part) + "\n" + claims[0].sentence
