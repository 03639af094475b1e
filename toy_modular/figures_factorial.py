"""The untied stage taken apart: main effects of what it changes at once, over factorial cells.

A cell is a stage named cell-HEAD-STD-NORM-START, for example cell-untied-std.09-norm-zero. A tied
head cannot start at 0, so the cells are no full factorial; an effect is therefore a mean over pairs
of runs that differ in that factor alone, with batch size and seed the same (toy spec 9.3).
"""

from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from lens_jax.axis_style import INK, LINES
from lens_jax.claims import Claim, Missing, number, p_text, sign_flip_test, verdict
from toy_modular.figures_page import sheet, words
from toy_modular.mode_tables import TABLES, mean_excess
from toy_modular.records import CURRENT, Run, Study
from toy_modular.sweeps import chosen_bands

INCHES = (7.1, 4.0)
PREFIX = "cell-"
FACTORS = {
    "untied head": ("tied", "untied"),
    "small embedding": ("std1", ""),
    "norm after embedding": ("nonorm", "norm"),
    "head starts at 0": ("random", "zero"),
}
"""What a factor does, and its two levels; an empty one is whatever is not the first."""


class Effect(NamedTuple):
    """Paired differences of one factor, second level less first, (n,), by (batch, seed)."""

    factor: str
    differences: np.ndarray
    seeds: int


def draw(figure: Figure, study: Study, config) -> list[Claim]:
    """Draws effects and cells; raises Missing without two cells that differ in one factor."""
    runs = [run for run in study.runs if run.stage.startswith(PREFIX) and run.finished]
    if not runs:
        raise Missing("no finished run of a stage cell-...")
    bands = chosen_bands(runs, config.bands)
    values = {
        table: {run.name: mean_excess(run.features[-1], table, bands) for run in runs}
        for table in TABLES
    }
    found = {table: effects(runs, own) for table, own in values.items()}
    if not any(effect.differences.size for effect in found[CURRENT]):
        raise Missing(f"no two of {words(len(runs), 'run')} of cells differ in one factor alone")
    claims = [_claim(effect, other, bands) for effect, other in zip(*found.values(), strict=True)]
    missed = [
        run.name.removeprefix(PREFIX) for run in runs if run.result["crossing_tokens"] is None
    ]
    note = (
        f"H_peak less its null at the end of each run, mean over bands "
        f"{', '.join(bands).replace('_', ':')}. (a) Pairs of runs that differ in one factor; their "
        "number stands beside; bars: s.e. over pairs, which share cells and so are not independent."
        + (f" Target not reached: {len(missed)} of {len(runs)} runs." if missed else "")
        + f"\n{claims[0].sentence}"
    )
    left, right = sheet(figure, 1, 2, note, width_ratios=(1, 1.05))[0]
    _draw_effects(left, found)
    _draw_cells(right, runs, values[CURRENT])
    return claims


def levels(run: Run) -> tuple[str, ...]:
    """Levels of head, std, norm and start in a cell's name; raises ValueError for another form."""
    parts = tuple(run.stage.removeprefix(PREFIX).split("-"))
    fine = len(parts) == len(FACTORS) and all(
        part in pair or "" in pair for part, pair in zip(parts, FACTORS.values(), strict=True)
    )
    if not fine:
        raise ValueError(
            f"stage {run.stage}: give cell-HEAD-STD-NORM-START, cell-tied-std1-nonorm-random"
        )
    return parts


def effects(runs: list[Run], values: dict[str, float]) -> list[Effect]:
    """Returns the paired differences of every factor; values: {run name: response}."""
    found = []
    at = {(levels(run), run.batch, run.seed): run for run in runs}
    for index, (factor, (base, _)) in enumerate(FACTORS.items()):
        differences, seeds = [], set()
        for (cell, batch, seed), run in at.items():
            low = ((*cell[:index], base, *cell[index + 1 :]), batch, seed)
            if cell[index] != base and low in at:
                differences.append(values[run.name] - values[at[low].name])
                seeds.add(seed)
        found.append(Effect(factor, np.array(differences), len(seeds)))
    return found


def _claim(effect: Effect, other: Effect, bands) -> Claim:
    test, beside = sign_flip_test(effect.differences), sign_flip_test(other.differences)
    n = int(np.sum(np.isfinite(effect.differences)))
    outcome = verdict(test.statistic, test.p, 2.0 ** (1 - n) if n else 1.0)
    control = f"by next state {number(beside.statistic, '+.3f')}, {p_text(beside)}"
    return Claim(
        "factorial", f"{effect.factor}: raises H_peak beyond its null", n, effect.seeds,
        f"bands {', '.join(bands).replace('_', ':')}", test.statistic, test.p, control, outcome,
        f"{outcome.capitalize()}: {effect.factor} changes H_peak by "
        f"{number(test.statistic, '+.3f')} over {words(n, 'pair')}, {p_text(test)} by signs, as if "
        f"pairs of one seed were independent; {control}.",
    )  # fmt: skip


def _draw_effects(ax, found: dict[str, list[Effect]]) -> None:
    for shift, (table, own), (colour, shape) in zip(
        (-0.13, 0.13), found.items(), LINES, strict=False
    ):
        for index, effect in enumerate(own):
            values = effect.differences[np.isfinite(effect.differences)]
            if not values.size:
                continue
            y = len(own) - 1 - index - shift
            ax.plot(values, np.full(values.size, y), "o", color=colour, ms=2.5, alpha=0.3, mew=0)
            error = values.std(ddof=1) / np.sqrt(values.size) if values.size > 1 else None
            label = f"by {table} state" if index == 0 else None
            ax.errorbar(
                values.mean(), y, xerr=error, color=colour, marker=shape, ls="", ms=6, label=label
            )
    ticks = [f"{effect.factor}\n(n = {effect.differences.size})" for effect in found[CURRENT]]
    ax.set_yticks(range(len(ticks) - 1, -1, -1), ticks)
    ax.axvline(0.0, color=INK, lw=0.8)
    ax.set(ylim=(-0.55, len(ticks) - 0.05), xlabel="effect on $H_{peak}$ less its null")
    ax.grid(axis="y", visible=False)
    ax.set_title("(a) Main effects")
    _legend(ax)


def _draw_cells(ax, runs: list[Run], values: dict[str, float]) -> None:
    cells = sorted({run.stage for run in runs}, key=lambda name: name.split("-"))
    for y, cell in enumerate(reversed(cells)):
        own = [run for run in runs if run.stage == cell]
        reached = [run.result["crossing_tokens"] is not None for run in own]
        for run, hit in zip(own, reached, strict=True):
            fill = LINES[0][0] if hit else "white"
            ax.plot(values[run.name], y, "o", ms=4, color=LINES[0][0], mfc=fill)
    names = [cell.removeprefix(PREFIX).replace("-", " ") for cell in reversed(cells)]
    ax.set_yticks(range(len(cells)), names, fontsize=7)
    ax.plot([], [], "o", ms=4, color=LINES[0][0], ls="", label="target reached")
    ax.plot([], [], "o", ms=4, color=LINES[0][0], mfc="white", ls="", label="not reached")
    ax.axvline(0.0, color=INK, lw=0.8)
    ax.set(xlabel="$H_{peak}$ less its null, by current state", ylim=(-0.6, len(cells) + 0.9))
    ax.set_title("(b) Cells")
    _legend(ax)


def _legend(ax) -> None:
    tight = {"handlelength": 0.9, "handletextpad": 0.4, "columnspacing": 0.9, "fontsize": 7}
    ax.legend(loc="upper center", ncol=2, borderaxespad=0.1, **tight)
