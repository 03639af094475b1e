"""Figures 4b and 11b: how the band tables of the four stages concentrate on few modes."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from lens_jax.alignment import Match
from lens_jax.axis_style import INK, LINES, token_axis
from lens_jax.claims import (
    FAILED,
    HELD,
    UNDECIDED,
    Claim,
    Missing,
    number,
    p_text,
    sign_flip_test,
    verdict,
)
from toy_modular.alignment import at_progress
from toy_modular.figures_page import STAGE_LINES, null_line, sheet, words, zero_line
from toy_modular.mode_tables import (
    TABLES,
    Scores,
    chance_peaks,
    fixed_modes,
    mean_beyond,
    mean_peak,
    null_scores,
    peak,
    scores,
)
from toy_modular.records import CURRENT, NEXT, Row, Run, Study
from toy_modular.stages import CORE
from toy_modular.sweeps import chosen_bands, pairs, require_pairs, shared_batch

SEEDS_NEEDED = 3
CURVES_INCHES, BARS_INCHES = (7.1, 4.5), (7.1, 3.6)
NULL_STYLES = (":", "--")
"""Of codes of the states in TABLES."""
TITLES = (
    "$H_{peak}$",
    "$H_S$, dominant mode",
    "$H_S$, greatest K",
    "$H_S$, fixed K",
)


# 4b


def draw_curves(figure: Figure, study: Study, config) -> list[Claim]:
    """Draws 4b, four stages at one batch size and band; raises Missing where a stage has none."""
    batch = shared_batch(study, CORE, config.batch)
    runs = {stage: [r for r in study.stage(stage) if r.batch == batch] for stage in CORE}
    everyone = [run for own in runs.values() for run in own]
    band = chosen_bands(everyone, (config.band,) if config.band else ())[0]
    claim = _curves_claim(runs, batch, band)

    note = (
        f"Band {band.replace('_', ':')} (modulus:offset), batch size {batch}, a line a seed"
        f"{_seed_counts(runs)}. Unstructured codes: of the next state dashed, of the current state "
        f"dotted; each is flat in its own row and seen through the law of steps in the other. The "
        f"fixed {config.modes} modes are the greatest of the untied stage at its end (each row its "
        f"own).\n" + claim.sentence
    )
    axes = sheet(figure, len(TABLES), len(Scores._fields), note, sharex=True)
    for row, (table, of) in enumerate(zip(axes, TABLES, strict=True)):
        fixed = fixed_modes(runs["untied"][0].features[-1], band, config.modes, of)
        last = everyone[0].features[-1]
        nulls = {c: null_scores(last, of, band, fixed, config.modes, c) for c in TABLES}
        for stage, own in runs.items():
            for index, run in enumerate(own):
                _draw_run(table, stage if index == 0 else None, run, of, band, fixed, config)
        for ax, *levels in zip(table, *nulls.values(), strict=True):
            for level, style in zip(levels, NULL_STYLES, strict=True):
                null_line(ax, level, style=style)
            ax.set_ylim(0, min(1.02, 1.08 * max(ax.get_ylim()[1], *levels)))
        table[0].set_ylabel(f"by {of} state")
        for ax, title in zip(table if row == 0 else (), TITLES, strict=False):
            ax.set_title(title.replace("K", str(config.modes)), fontsize=8.5)
    _label_x(axes[-1], everyone, config.x)
    handles = [axes[0, 0].plot([], [], color=c, marker=m, ms=3, label=s)[0]
               for s, (c, m) in STAGE_LINES.items()]  # fmt: skip
    for code, style in zip(TABLES, NULL_STYLES, strict=True):
        name = f"null, {code}"
        handles.append(axes[0, 0].plot([], [], color=INK, ls=style, lw=0.9, label=name)[0])
    axes[0, 0].figure.legend(handles=handles, loc="outside upper center", ncol=6, fontsize=8)
    return [claim]


def _seed_counts(runs: dict[str, list[Run]]) -> str:
    counts = sorted({len(own) for own in runs.values()})
    if len(counts) == 1:
        return f" ({words(counts[0], 'seed')})"
    return f" ({counts[0]} to {counts[-1]} seeds)"


def _draw_run(axes, label, run: Run, table: str, band: str, fixed, config) -> None:
    rows = [row for row in run.features if row.has(table, band)]
    found = np.array([scores(row, table, band, fixed, config.modes) for row in rows])
    last = run.result["step"]
    x = [row.tokens if config.x == "tokens" else 100 * row.step / last for row in rows]
    colour, shape = STAGE_LINES[run.stage]
    for ax, curve in zip(axes, found.T, strict=True):
        thin = {"lw": 1.4} if label else {"lw": 0.8, "alpha": 0.6}
        ax.plot(x, curve, color=colour, marker=shape, ms=2.5 if label else 0, **thin)


def _label_x(axes, runs: Sequence[Run], x: str) -> None:
    for ax in axes:
        if x == "tokens":
            token_axis(ax, [row.tokens for run in runs for row in run.features])
            ax.tick_params(axis="x", labelrotation=35)
        else:
            ax.set(xlabel="share of the run (%)", xlim=(-2, 103))


def _curves_claim(runs: dict[str, list[Run]], batch: int, band: str) -> Claim:
    """Whether untied ends above the other stages and above what chance gives, seed by seed.

    Decided, either way, by three seeds or more that agree: held where untied is the largest and
    beyond chance in each, did not hold where it is the smallest of the stages in each. Were it like
    them, either has a chance of (1/4)^3; merely not to be the largest has one of (3/4)^3.
    """
    ends = {s: {r.seed: r.features[-1] for r in own if r.features} for s, own in runs.items()}
    seeds = sorted(set.intersection(*(set(own) for own in ends.values())))
    values = {s: [peak(ends[s][seed], CURRENT, band) for seed in seeds] for s in CORE}
    chances = [chance_peaks(ends["untied"][seed], CURRENT, band) for seed in seeds]
    uppers = [{code: own.upper for code, own in chance.items()} for chance in chances]
    largest = [values["untied"][i] >= max(values[s][i] for s in CORE) for i in range(len(seeds))]
    above = [v > max(own.values()) for v, own in zip(values["untied"], uppers, strict=True)]
    smallest = [
        values["untied"][i] < min(values[s][i] for s in CORE[:-1]) for i in range(len(seeds))
    ]
    outcome = UNDECIDED
    if len(seeds) >= SEEDS_NEEDED:
        outcome = HELD if all(largest) and all(above) else FAILED if all(smallest) else UNDECIDED
    mean = float(np.mean(values["untied"])) if seeds else np.nan
    of_next, of_current = (
        number(float(np.mean([own[code] for own in uppers])) if seeds else np.nan, ".3f")
        for code in (NEXT, CURRENT)
    )
    others = ", ".join(f"{s} {np.mean(values[s]):.3f}" for s in CORE[:-1]) if seeds else "no seed"
    control = (
        f"95 % of unstructured codes of its width: of the next state below {of_next}, of the "
        f"current state below {of_current}"
    )
    return Claim(
        "4b", "untied concentrates its band on few modes, more than other stages and than chance",
        len(seeds), len(seeds), f"band {band.replace('_', ':')}", mean, np.nan, control, outcome,
        f"{outcome.capitalize()}: H_peak of untied ends at {number(mean, '.3f')} "
        f"({others}), the "
        f"largest in {sum(largest)} and beyond chance in {sum(above)} of "
        f"{words(len(seeds), 'seed')} at B = {batch}; {control}.",
    )  # fmt: skip


# 11b


class Change(NamedTuple):
    """Paired changes of one transition at one place: of H_peak, and of what is beyond the null.

    off: greatest distance of a row from the place, in ln(tokens).
    """

    members: tuple[tuple[int, int], ...]
    peak: np.ndarray
    beyond: np.ndarray
    off: float


def draw_bars(figure: Figure, study: Study, config) -> list[Claim]:
    """Draws 11b, changes of H_peak from stage to stage; raises Missing without a pair."""
    require_pairs(study, CORE)
    transitions = list(pairwise(CORE))
    everyone = [run for two in transitions for pair in pairs(study, *two) for run in pair]
    bands = chosen_bands(everyone, config.bands)
    places, at, labels = _places(config)
    found = {
        two: [_changes(study, two, bands, place, at) for place in places] for two in transitions
    }
    if not any(change.members for own in found.values() for change in own):
        raise Missing(
            "no two consecutive stages were probed at the same places; "
            "give a larger ratio=, or align="
        )
    claims = _bar_claims(found, bands, labels)
    shown = ", ".join(bands).replace("_", ":")
    off = max(change.off for own in found.values() for change in own)
    note = (
        f"Mean over pairs of runs with the same batch size and seed (their number on the bar), "
        f"each a mean over bands {shown}; table by the current state. Bars: s.e. over pairs. "
        f"Pale: only what lies beyond the null of an unstructured next-state code, the same in "
        f"both stages, so that a rise below it counts 0. Rows are at most {np.expm1(off):.0%} off "
        f"in tokens.\n" + claims[-1].sentence
    )
    ax = sheet(figure, 1, 1, note)[0, 0]
    _draw_changes(ax, found, labels)
    return claims


def _places(config) -> tuple[Sequence[float], Callable[[Run, float], Match | None], list[str]]:
    """Where runs are compared, how a row is found there, and what the place is called."""
    if config.align == "steps":
        labels = [f"step {step}" for step in config.steps]
        return config.steps, lambda run, step: _at_step(run, step, config.ratio), labels
    thirds = (1 / 3, 2 / 3, 1.0)
    return (
        thirds,
        lambda run, p: at_progress(run, run.features, p, config.ratio),
        ["1/3", "2/3", "end"],
    )


def _at_step(run: Run, step: float, ratio: float) -> Match | None:
    """The nearest row in training steps; None beyond the run's end, which no row stands for."""
    if run.result["step"] < step:
        return None
    return at_progress(run, run.features, step / run.result["step"], ratio)


def _changes(study: Study, two, bands, place: float, at) -> Change:
    members, peaks, beyond, off = [], [], [], 0.0
    for before, after in pairs(study, *two):
        matches = [at(run, place) for run in (before, after)]
        if None in matches:
            continue
        rows: list[Row] = [match.row for match in matches]
        members.append((before.batch, before.seed))
        off = max(off, *(abs(match.off) for match in matches))
        for values, score in ((peaks, mean_peak), (beyond, mean_beyond)):
            values.append(score(rows[1], CURRENT, bands) - score(rows[0], CURRENT, bands))
    return Change(tuple(members), np.array(peaks), np.array(beyond), off)


def _bar_claims(found: dict, bands: Sequence[str], labels: Sequence[str]) -> list[Claim]:
    """One claim a transition, at the last place at which it has pairs."""
    claims = []
    for two, own in found.items():
        last = max((i for i, change in enumerate(own) if change.members), default=-1)
        claims.append(_rise_claim(two, own[last], bands, labels[last]))
    return claims


def _rise_claim(two, change: Change, bands, where: str) -> Claim:
    test, beyond = sign_flip_test(change.peak), sign_flip_test(change.beyond)
    n = int(np.sum(np.isfinite(change.peak)))
    outcome = verdict(test.statistic, test.p, 2.0 ** (1 - n) if n else 1.0)
    name = " to ".join(two)
    control = f"beyond the null: {number(beyond.statistic, '+.3f')}, {p_text(beyond)}"
    return Claim(
        "11b", f"{name}: H_peak rises", n, len({seed for _, seed in change.members}),
        f"bands {', '.join(bands).replace('_', ':')}", test.statistic, test.p, control, outcome,
        f"{outcome.capitalize()}: from {name} H_peak changes by {number(test.statistic, '+.3f')} "
        f"({where}, {words(n, 'pair')}, {p_text(test)} by signs, as if pairs of "
        f"one seed were independent); {control}.",
    )  # fmt: skip


def _draw_changes(ax, found: dict, labels: Sequence[str]) -> None:
    width = 0.125
    for group, own in enumerate(found.values()):
        for index, change in enumerate(own):
            n = int(np.sum(np.isfinite(change.peak)))
            colour = LINES[index][0]
            centre = group + (index - (len(own) - 1) / 2) * 2.35 * width
            for side, values, alpha in ((-0.5, change.peak, 1.0), (0.5, change.beyond, 0.35)):
                values = values[np.isfinite(values)]
                if values.size:
                    error = values.std(ddof=1) / np.sqrt(values.size) if values.size > 1 else None
                    ax.bar(
                        centre + side * width, values.mean(), width, yerr=error, color=colour,
                        alpha=alpha, error_kw={"elinewidth": 0.9, "ecolor": INK}, zorder=2,
                    )  # fmt: skip
            if n:
                top = _top(change.peak), _top(change.beyond)
                ax.annotate(
                    f"{n}", (centre, max(*top, 0.0)), (0, 2), textcoords="offset points",
                    ha="center", fontsize=7.5,
                )  # fmt: skip
            else:
                ax.annotate("none", (centre, 0), (0, 2), textcoords="offset points",
                            ha="center", fontsize=7.5)  # fmt: skip
    for index, label in enumerate(labels):
        place = label if label.startswith(("step", "end")) else f"{label} of the run"
        ax.bar(0, 0, 0, color=LINES[index][0], label=place)
    ax.bar(0, 0, 0, color="#777777", alpha=0.35, label="beyond the null")
    zero_line(ax)
    ax.set_xticks(range(len(found)), [f"{a} to {b}" for a, b in found])
    ax.set(xlim=(-0.5, len(found) - 0.5), ylabel=r"paired change of $H_{peak}$")
    ax.grid(axis="x", visible=False)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.16 * (high - low))
    ax.legend(loc="upper left", ncol=2)


def _top(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0
    error = values.std(ddof=1) / np.sqrt(values.size) if values.size > 1 else 0.0
    return float(values.mean() + error)
