"""Figure 9: what another seed changes, against what another batch size changes.

A seed draws both the initial weights and the order of the data. The number that matters is the
spread over batches in units of what seeds alone would make of it, early, where alpha is to predict,
and late. Source: protocol spec, figure 9 and trap T5.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from math import isfinite, log
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.efficiency import crossing_tokens, early_row, ranks_of
from experiments.figures.options import Options
from experiments.figures.page import (
    batch_line,
    caption,
    legend_outside,
    ranks_text,
    title,
    words,
)
from experiments.figures.taxonomy import ATTENTION, HEAD, TOP, head_alpha, spectrum
from experiments.figures.trajectories import gradient_alpha, gradient_ranks, late_tokens, span_text
from experiments.seed_spread import Spread, batches_test, seed_spread, small_effect_test
from experiments.study_records import ACTIVATION, GRADIENT, Cell, Run, Study
from lens_jax.axis_style import (
    BLUE,
    FAINT,
    LINES,
    SHADE,
    VERMILLION,
    line_handle,
    not_measured,
    rank_axes,
    token_ticks,
    visible,
)
from lens_jax.claims import (
    FAILED,
    HELD,
    LEVEL,
    UNDECIDED,
    Claim,
    Missing,
    number,
    p_text,
)
from lens_jax.fits import GRAM_FLOOR, jsd, rankme, topk_share, window_alpha

INCHES = {9: (7.2, 5.9)}
PAPER_RUNG = "flexwin"


class Statistic(NamedTuple):
    """A number of the last layer's spectrum of a kind."""

    name: str
    kind: str
    matrix: str | None
    of: Callable[[np.ndarray], float]


def statistics_of(run: Run, options: Options) -> tuple[Statistic, ...]:
    """What is compared, the exponent on the main window first."""
    ranks = ranks_of(run, options.window)
    theirs = gradient_ranks(run)
    alpha = f"gradient alpha {theirs[0]}-{theirs[1]}" if theirs else "gradient alpha"
    act, grad = (ACTIVATION, None), (GRADIENT, ATTENTION)
    return (
        Statistic(f"alpha {ranks[0]}-{ranks[1]}", *act, lambda v: window_alpha(v, *ranks)),
        Statistic(f"alpha {HEAD[0]}-{HEAD[1]}", *act, head_alpha),
        Statistic("top-10 share", *act, lambda v: topk_share(v, TOP)),
        Statistic("ln RankMe", *act, lambda v: log(rankme(v))),
        Statistic(alpha, *grad, gradient_alpha),
        Statistic("gradient top 10", *grad, lambda v: topk_share(v, TOP)),
        Statistic("gradient ln RankMe", *grad, lambda v: log(rankme(v, GRAM_FLOOR))),
    )


class Look(NamedTuple):
    """A number of tokens at which runs are compared.

    seeds: the runs of one cell; batches: one run a batch of its family; family: the study of it.
    """

    name: str
    tokens: float
    seeds: Sequence[Run]
    batches: Sequence[Run]
    family: Study

    def spectrum(self, run: Run, kind: str, matrix: str | None) -> np.ndarray | None:
        """The last layer's spectrum of a run there, None where it was not measured."""
        return spectrum(run, early_row(run, self.tokens), kind, matrix)

    @property
    def span(self) -> str:
        """The tokens of the rows that are compared, in words."""
        rows = (early_row(run, self.tokens) for run in self.family.chosen)
        return span_text(row.tokens for row in rows if row is not None)

    def spread(self, statistic: Statistic) -> Spread:
        """How a statistic varies over seeds and over batches."""

        def value(run: Run) -> float:
            values = self.spectrum(run, statistic.kind, statistic.matrix)
            return float("nan") if values is None else statistic.of(values)

        return seed_spread(self.family, value)


def draw_9(figure: Figure, study: Study, options: Options) -> list[Claim]:
    """Draws the seeds of one cell; raises Missing where no cell has two measured seeds."""
    cell, seeds = _cell(study, options)
    batches = _first_seeds(study, cell)
    looks = _looks(study, seeds, batches, options)
    late = looks[-1]
    title(figure, 9, f"Seeds of {cell.name}, against its other batches")
    axes = figure.subplots(2, 2)
    _draw_losses(axes[0, 0], seeds)
    for ax, kind, matrix, label in (
        (axes[0, 1], ACTIVATION, None, "eigenvalue / trace"),
        (axes[1, 0], GRADIENT, ATTENTION, r"$\sigma / \Sigma\sigma$"),
    ):
        _draw_spectra(ax, late, kind, matrix, label)
    first, last = ranks_of(seeds[0], options.window)
    axes[0, 1].axvspan(first, last, color=SHADE, lw=0, zorder=0)
    where = f"at {late.span} tokens"
    axes[0, 1].set_title(f"(b) activations {where}")
    axes[1, 0].set_title(f"(c) gradients of $W_O$ {where}")
    statistics = statistics_of(seeds[0], options)
    _draw_ratios(axes[1, 1], looks, statistics)
    caption(figure, _caption_text(study, cell, looks, options))
    return [_claim(cell, look, statistics[0]) for look in looks]


def _cell(study: Study, options: Options) -> tuple[Cell, list[Run]]:
    """The cell of most seeds: of `rung` and `batch` where given, else the paper's where it has."""
    cells: dict[Cell, list[Run]] = {}
    for run in study.chosen:
        fits = options.rung in (None, run.cell.rung) and options.batch in (None, run.batch)
        if fits and run.steps and run.layers(ACTIVATION):
            cells.setdefault(run.cell, []).append(run)
    several = [(cell, runs) for cell, runs in cells.items() if len(runs) > 1]
    if not several:
        raise Missing(
            "a cell with two measured seeds, better three: python -m experiments.study preset=fig9"
        )
    return max(several, key=lambda found: (len(found[1]), found[0].rung == PAPER_RUNG))


def _first_seeds(study: Study, cell: Cell) -> list[Run]:
    """One run a batch of the cell's family, the lowest seed that was measured."""
    found: dict[int, Run] = {}
    for run in study.of(cell.family):
        if run.steps and run.layers(ACTIVATION):
            found.setdefault(run.batch, run)
    return [found[batch] for batch in sorted(found)]


def _looks(study: Study, seeds, batches, options: Options) -> list[Look]:
    """At the study's early tokens, where it has any, and at the most that all runs share."""
    family = replace(study, runs=tuple(r for r in study.runs if r.family == seeds[0].family))
    late = late_tokens([run.steps for run in family.chosen if run.steps])
    if late is None:
        raise Missing("runs that were measured at equal tokens; these share no measured step")
    early = options.tokens or study.config.get("early_tokens")
    looks = [Look("late", late, seeds, batches, family)]
    if early and early < 0.7 * late:
        looks.insert(0, Look("early", early, seeds, batches, family))
    return looks


def _draw_losses(ax, seeds: Sequence[Run]) -> None:
    ax.set_title("(a) validation loss")
    ends = []
    for run, (colour, _) in zip(seeds, LINES * 3, strict=False):
        kept = run.val["tokens"] > 0
        if np.any(kept):
            ends += [run.val["tokens"][kept][0], run.val["tokens"][kept][-1]]
            ax.plot(run.val["tokens"][kept], run.val["loss"][kept], color=colour, lw=1.0,
                    label=f"seed {run.seed}")  # fmt: skip
    if not ends:
        not_measured(ax, "no validations")
        return
    ax.set(xscale="log", xlabel="training tokens", ylabel="validation loss")
    token_ticks(ax.xaxis, min(ends), max(ends))
    ax.legend(loc="upper right")


def _draw_spectra(ax, look: Look, kind: str, matrix: str | None, label: str) -> None:
    """Other batches thin, from dark for the smallest, the seeds on top of them."""
    drawn = False
    for place, run in enumerate(look.batches):
        values = look.spectrum(run, kind, matrix)
        if values is not None and run.cell != look.seeds[0].cell:
            colour = batch_line(place, len(look.batches))["color"]
            ax.plot(*visible(values, values.sum()), color=colour, lw=0.8, ls="--",
                    label=f"B {run.batch}")  # fmt: skip
    for run, (colour, _) in zip(look.seeds, LINES * 3, strict=False):
        values = look.spectrum(run, kind, matrix)
        if values is not None:
            drawn = True
            ax.plot(*visible(values, values.sum()), color=colour, lw=1.1, label=f"seed {run.seed}")
    if not drawn:
        not_measured(ax)
        return
    rank_axes(ax, label)
    ax.legend(loc="lower left", ncols=2, columnspacing=0.8, handlelength=1.4, borderaxespad=0.1)


def _draw_ratios(ax, looks: Sequence[Look], statistics: Sequence[Statistic]) -> None:
    """Spreads over batches in units of what seeds make of them, filled where a test tells them."""
    ax.set_title("(d) batches, against seeds alone")
    marks = {"early": (BLUE, "o", -0.12), "late": (VERMILLION, "s", 0.12)}
    handles = []
    for look in looks:
        colour, shape, offset = marks[look.name]
        for place, statistic in enumerate(statistics):
            spread = look.spread(statistic)
            if isfinite(spread.ratio) and spread.ratio > 0:
                face = colour if batches_test(spread).p <= LEVEL else "white"
                ax.plot(spread.ratio, place + offset, shape, color=colour, mfc=face)
        handles.append(line_handle(colour, "", shape, f"{look.name}, {look.span} tokens"))
    ax.axvline(1, color=FAINT, lw=0.8)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_yticks(range(len(statistics)), [statistic.name for statistic in statistics])
    ax.set_ylim(len(statistics) - 0.4, -0.6)
    ax.set_xlabel("sd over batches / that from seeds alone")
    legend_outside(ax, 0.5, -0.42, handles=handles, ncols=2, columnspacing=1.0)


def _claim(cell: Cell, look: Look, statistic: Statistic) -> Claim:
    """Held where batches are told apart; not where even an effect as large as seeds is excluded."""
    spread = look.spread(statistic)
    test, small = batches_test(spread), small_effect_test(spread)
    outcome = HELD if test.p <= LEVEL else FAILED if small.p <= LEVEL else UNDECIDED
    where = f"at {look.span} tokens"
    batches = spread.batch_freedom + 1  # of one family
    control = (
        f"sd of single runs {number(spread.seeds, '.3f')} with "
        f"{words(spread.freedom, 'degree')} of freedom"
        + (", what a seed changes in all batches taken out" if spread.crossed else "")
    )
    return Claim(
        "9", f"{cell.family.name}: alpha {where} differs between batches by more than seeds "
        "explain", batches, len(look.seeds), statistic.name.removeprefix("alpha "), test.statistic,
        test.p, control, outcome,
        f"{outcome.capitalize()}: sd of {statistic.name} {where} over the means of "
        f"{words(batches, 'batch')} is {number(spread.batches, '.3f')}, seeds alone would make it "
        f"{number(spread.batches / spread.ratio, '.3f')}; F {number(test.statistic, '.2f')}, "
        f"one-sided {p_text(test)} for no effect of the batch, {p_text(small)} for one as large as "
        f"that of seeds or larger, for normal values; {control}.",
    )  # fmt: skip


def _caption_text(study: Study, cell: Cell, looks: Sequence[Look], options: Options) -> str:
    late = looks[-1]
    ranks = ranks_text(ranks_of(late.seeds[0], options.window), options.window)
    parts = [
        f"n = {words(len(late.seeds), 'seed')} (weights and data order) of {cell.name}, "
        f"{words(len(late.batches), 'batch')} of {cell.family.name} (others dashed, lowest seed; "
        "d: all seeds, filled: p \u2264 0.05); "
        f"last layer, main window: ranks {ranks}, shaded; aligned by "
        f"tokens ({', '.join(f'{look.name} rows at {look.span}' for look in looks)})."
    ]
    for kind, matrix, name in ((ACTIVATION, None, "activations"), (GRADIENT, ATTENTION, "$W_O$")):
        found = [
            _median_jsd([late.spectrum(run, kind, matrix) for run in runs])
            for runs in (late.seeds, late.batches)
        ]
        parts.append(f"JSD of {name}: seeds {number(found[0], '.2g')}, batches "
                     f"{number(found[1], '.2g')} (medians of pairs).")  # fmt: skip
    if study.target_loss is not None:
        spread = seed_spread(late.family, lambda run: log(crossing_tokens(run, study.target_loss)))
        parts.append(
            f"Seed sd of the tokens to the target: {number(spread.within, '.1%')}"
            + (f"; {number(spread.seeds, '.1%')} without what a seed changes in all batches."
               if spread.crossed else ".")
        )  # fmt: skip
    return " ".join(parts)


def _median_jsd(spectra: Sequence[np.ndarray | None]) -> float:
    pairs = combinations([values for values in spectra if values is not None], 2)
    found = [jsd(*pair) for pair in pairs]
    return float(np.median(found)) if found else float("nan")
