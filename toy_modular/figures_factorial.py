"""The untied stage taken apart: effects of what it changes at once, over factorial cells.

A cell is a stage named cell-HEAD-STD-NORM-START, for example cell-untied-std.09-norm-zero. A tied
head cannot start at 0, so the cells are no full factorial; an effect is therefore a mean over pairs
of runs that differ in that factor alone, with batch size and seed the same (toy spec 9.3). Head and
scale of the embedding act on each other, a main effect of either would be a mean over two
different things, so each is taken at either level of the other and their interaction stands beside.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from lens_jax.axis_style import INK, LINES, token_axis
from lens_jax.claims import Claim, Missing, number, p_text, sign_flip_test, verdict
from toy_modular.alignment import tokens_to_target
from toy_modular.figures_page import sheet, words
from toy_modular.mode_tables import TABLES, mean_excess, null_peak
from toy_modular.records import CURRENT, Run, Study
from toy_modular.sweeps import chosen_bands

INCHES = (7.1, 4.7)
PREFIX = "cell-"
HEAD, STD, NORM, START = range(4)
LEVELS = (("tied", "untied"), ("std1", ""), ("nonorm", "norm"), ("random", "zero"))
"""Two levels of each factor of a cell; an empty one is whatever is not the first."""


class Contrast(NamedTuple):
    """An effect of a factor (an index into LEVELS), in cells at a level (index, 0 or 1) alone."""

    name: str
    factor: int
    within: tuple[int, int] | None = None


CONTRASTS = (
    Contrast("small embedding, tied head", STD, (HEAD, 0)),
    Contrast("small embedding, untied head", STD, (HEAD, 1)),
    Contrast("untied head, embedding of std 1", HEAD, (STD, 0)),
    Contrast("untied head, small embedding", HEAD, (STD, 1)),
    Contrast("norm after embedding", NORM),
    Contrast("head starts at 0", START),
)
INTERACTION = "small embedding: tied less untied"


class Effect(NamedTuple):
    """Paired differences of one contrast, second level less first, (n,), by (batch, seed)."""

    name: str
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
    tokens = {run.name: _log_tokens(run) for run in runs}
    claims = [_claim(effect, other, bands) for effect, other in zip(*found.values(), strict=True)]
    claims += [_token_claim(effect) for effect in effects(runs, tokens)]
    offset = _other_null(runs, bands)
    left, middle, right = sheet(
        figure, 1, 3, _note(runs, bands, offset, claims), width_ratios=(1, 1, 0.75)
    )[0]
    _draw_effects(left, found)
    _draw_cells(middle, runs, values[CURRENT])
    middle.axvline(offset, color=INK, lw=0.9, ls=":", label="null, current state")
    _legend(middle)
    _draw_tokens(right, runs)
    return claims


def levels(run: Run) -> tuple[str, ...]:
    """Levels of head, std, norm and start in a cell's name; raises ValueError for another form."""
    parts = tuple(run.stage.removeprefix(PREFIX).split("-"))
    fine = len(parts) == len(LEVELS) and all(
        part in pair or "" in pair for part, pair in zip(parts, LEVELS, strict=True)
    )
    if not fine:
        raise ValueError(
            f"stage {run.stage}: give cell-HEAD-STD-NORM-START, cell-tied-std1-nonorm-random"
        )
    return parts


def effects(runs: Sequence[Run], values: Mapping[str, float]) -> list[Effect]:
    """Returns the paired differences of every contrast, and of the interaction last.

    values: {run name: response}; a response that is not finite leaves its pairs out.
    """
    at = {
        (levels(run), run.batch, run.seed): values[run.name]
        for run in runs
        if np.isfinite(values[run.name])
    }
    found = []
    for name, factor, within in CONTRASTS:
        pairs = _pairs(at, factor)
        kept = {
            place: d for place, d in pairs.items() if within is None or _is_at(place[0], within)
        }
        found.append(_effect(name, kept))
    scale = _pairs(at, STD)
    tied = {place: d for place, d in scale.items() if _is_at(place[0], (HEAD, 0))}
    both = {}
    for (cell, batch, seed), difference in tied.items():
        untied = ((LEVELS[HEAD][1], *cell[1:]), batch, seed)
        if untied in scale:
            both[cell, batch, seed] = difference - scale[untied]
    return [*found, _effect(INTERACTION, both)]


def _pairs(at: Mapping, factor: int) -> dict:
    """Differences by the place of the second level, (cell, batch, seed)."""
    base, found = LEVELS[factor][0], {}
    for (cell, batch, seed), value in at.items():
        low = ((*cell[:factor], base, *cell[factor + 1 :]), batch, seed)
        if cell[factor] != base and low in at:
            found[cell, batch, seed] = value - at[low]
    return found


def _is_at(cell: Sequence[str], within: tuple[int, int]) -> bool:
    factor, level = within
    return (cell[factor] != LEVELS[factor][0]) == bool(level)


def _effect(name: str, differences: Mapping) -> Effect:
    seeds = {seed for _, _, seed in differences}
    return Effect(name, np.array(list(differences.values())), len(seeds))


def _log_tokens(run: Run) -> float:
    tokens = tokens_to_target(run)
    return float(np.log(tokens)) if np.isfinite(tokens) else np.nan


def _other_null(runs: Sequence[Run], bands: Sequence[str]) -> float:
    """How far the null of a code of the current state lies from that which is subtracted."""
    row = runs[0].features[-1]
    return float(
        np.mean([null_peak(row, CURRENT, b, CURRENT) - null_peak(row, CURRENT, b) for b in bands])
    )


# Claims


def _claim(effect: Effect, other: Effect, bands) -> Claim:
    test, beside = sign_flip_test(effect.differences), sign_flip_test(other.differences)
    n = effect.differences.size
    outcome = verdict(test.statistic, test.p, 2.0 ** (1 - n) if n else 1.0)
    control = f"by next state {number(beside.statistic, '+.3f')}, {p_text(beside)}"
    return Claim(
        "factorial", f"{effect.name}: raises H_peak", n, effect.seeds,
        f"bands {', '.join(bands).replace('_', ':')}", test.statistic, test.p, control, outcome,
        f"{outcome.capitalize()}: {effect.name} changes H_peak by "
        f"{number(test.statistic, '+.3f')} over {words(n, 'pair')}, {p_text(test)} by signs, as if "
        f"pairs of one seed were independent; {control}.",
    )  # fmt: skip


def _token_claim(effect: Effect) -> Claim:
    test, n = sign_flip_test(effect.differences), effect.differences.size
    outcome = verdict(-test.statistic, test.p, 2.0 ** (1 - n) if n else 1.0)
    change = number(100 * np.expm1(test.statistic), "+.0f")
    return Claim(
        "factorial", f"{effect.name}: lowers the tokens to the target", n, effect.seeds, "",
        test.statistic, test.p, "", outcome,
        f"{outcome.capitalize()}: {effect.name} changes tokens to the target by {change} % over "
        f"{words(n, 'pair')} that reach it, {p_text(test)} by signs, as if pairs of one seed were "
        f"independent.",
    )  # fmt: skip


def _note(runs: Sequence[Run], bands, offset: float, claims: Sequence[Claim]) -> str:
    rates = sorted({run.config["lr"] for run in runs})
    of_rates = f"one rate for all, {rates[0]:g}"
    if len(rates) > 1:
        of_rates = f"rates searched for each cell, {rates[0]:g} to {rates[-1]:g}"
    missed = sum(not np.isfinite(_log_tokens(run)) for run in runs)
    return (
        f"H_peak at the end of each run, mean over bands {', '.join(bands).replace('_', ':')}, "
        f"less that of an unstructured code of the next state; dotted: of the current state, "
        f"{offset:+.3f}. {words(len(runs), 'run')}, {of_rates}. (a) Pairs of runs that differ in "
        "one factor; their number stands beside; bars: s.e. over pairs, which share cells and so "
        "are not independent."
        + (f" Target not reached: {missed} of {len(runs)} runs." if missed else "")
        + f"\n{claims[0].sentence}"
    )


# Panels


def _draw_effects(ax, found: dict[str, list[Effect]]) -> None:
    for shift, (table, own), (colour, shape) in zip(
        (-0.13, 0.13), found.items(), LINES, strict=False
    ):
        for index, effect in enumerate(own):
            values = effect.differences
            if not values.size:
                continue
            y = len(own) - 1 - index - shift
            ax.plot(values, np.full(values.size, y), "o", color=colour, ms=2.5, alpha=0.3, mew=0)
            error = values.std(ddof=1) / np.sqrt(values.size) if values.size > 1 else None
            label = f"by {table} state" if index == 0 else None
            ax.errorbar(
                values.mean(), y, xerr=error, color=colour, marker=shape, ls="", ms=5, label=label
            )
    ticks = [_wrapped(effect) for effect in found[CURRENT]]
    ax.set_yticks(range(len(ticks) - 1, -1, -1), ticks, fontsize=7)
    ax.axvline(0.0, color=INK, lw=0.8)
    ax.set(ylim=(-0.55, len(ticks) + 0.3), xlabel="effect on $H_{peak}$")
    ax.grid(axis="y", visible=False)
    ax.set_title("(a) Effects")
    _legend(ax)


def _wrapped(effect: Effect) -> str:
    name = effect.name.replace(", ", ",\n").replace(": ", ":\n")
    return f"{name} ({effect.differences.size})"


def _cells(runs: Sequence[Run]) -> list[str]:
    """Names of the cells from the bottom up."""
    return sorted({run.stage for run in runs}, key=lambda name: name.split("-"), reverse=True)


def _draw_cells(ax, runs: Sequence[Run], values: Mapping[str, float]) -> None:
    cells = _cells(runs)
    for run in runs:
        fill = LINES[0][0] if np.isfinite(_log_tokens(run)) else "white"
        y = cells.index(run.stage)
        ax.plot(values[run.name], y, "o", ms=4, color=LINES[0][0], mfc=fill)
    names = [cell.removeprefix(PREFIX).replace("-", " ") for cell in cells]
    ax.set_yticks(range(len(cells)), names, fontsize=7)
    ax.plot([], [], "o", ms=4, color=LINES[0][0], mfc="white", ls="", label="target missed")
    ax.axvline(0.0, color=INK, lw=0.8)
    ax.set(xlabel="$H_{peak}$ less its null", ylim=(-0.6, len(cells) + 1.0))
    ax.set_title("(b) Cells")


def _draw_tokens(ax, runs: Sequence[Run]) -> None:
    cells = _cells(runs)
    reached = [run for run in runs if np.isfinite(_log_tokens(run))]
    for run in reached:
        ax.plot(tokens_to_target(run), cells.index(run.stage), "o", ms=4, color=LINES[1][0])
    ax.set_yticks(range(len(cells)), [])
    ax.set(ylim=(-0.6, len(cells) + 1.0))
    token_axis(ax, [tokens_to_target(run) for run in reached] or [1.0])
    ax.set_xlabel("to the target")
    ax.set_title("(c) Tokens")


def _legend(ax) -> None:
    tight = {"handlelength": 0.9, "handletextpad": 0.4, "labelspacing": 0.2, "fontsize": 6.5}
    ax.legend(loc="upper right", borderaxespad=0.0, frameon=True, edgecolor="none", **tight)
