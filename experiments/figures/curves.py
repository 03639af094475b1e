"""Figure 12: loss over training tokens, a panel a family, with the crossing of the target.

Families with validation losses come first; those that only have the training loss stand apart,
since a training loss at a batch is no common measure. Source: protocol spec, figure 12, 1.12 and
defect B8 of the published comparison, where some runs reach their target at a decaying rate.
"""

from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from experiments.efficiency import crossing_tokens, first_below_tokens
from experiments.figures.page import (
    Options,
    batch_line,
    caption,
    family_line,
    seeds_of,
    seeds_text,
    title,
)
from experiments.study_records import Family, Run, Study
from lens_jax.axis_style import FAINT, INK, line_handle, running_mean, token_ticks
from lens_jax.claims import FAILED, HELD, UNDECIDED, Claim, Missing
from lens_jax.saved_run import short_count

INCHES = {12: (7.2, 6.4)}
COLUMNS = 3
DECAYED = 0.9
"""Share of its peak below which a learning rate counts as decayed."""


class Curve(NamedTuple):
    """Loss of a run over tokens, (n,) each, and where its learning rate began to decay.

    validated: whether the loss is a validation loss; decay: tokens, inf where it did not, NaN where
    no rate was logged; target: tokens at which the target was crossed, inf where it was missed, NaN
    where the run goes on.
    """

    run: Run
    tokens: np.ndarray
    loss: np.ndarray
    validated: bool
    decay: float
    target: float


def decay_tokens(run: Run) -> float:
    """Returns the tokens at which the matrices' rate has last been at DECAYED of its peak.

    inf where it ends there, NaN where it was not logged. A warm-up is no decay: what counts lies
    after the peak.
    """
    rates = run.train.get("lr_matrix", np.empty(0))
    known = np.isfinite(rates)
    if not np.any(known):
        return float("nan")
    tokens, rates = run.train["tokens"][known], rates[known]
    high = np.flatnonzero(rates >= DECAYED * rates.max())[-1]
    return float("inf") if high == rates.size - 1 else float(tokens[high])


def read_curve(run: Run, target: float | None) -> Curve | None:
    """Returns the validation curve of a run, the smoothed training loss without one, or None."""
    validated = bool(np.any(run.val["tokens"] > 0))
    columns = run.val if validated else run.train
    kept = (columns["tokens"] > 0) & np.isfinite(columns["loss"])
    if not np.any(kept):
        return None
    loss = columns["loss"][kept]
    crossing = crossing_tokens(run, target) if validated and target else float("nan")
    return Curve(
        run, columns["tokens"][kept], loss if validated else running_mean(loss), validated,
        decay_tokens(run), crossing,
    )  # fmt: skip


def draw_12(figure: Figure, study: Study, options: Options) -> list[Claim]:
    """Draws the loss curves of all chosen runs; raises Missing where no run has any loss."""
    target = options.target or study.target_loss
    curves = [own for run in study.chosen if (own := read_curve(run, target)) is not None]
    if not curves:
        raise Missing("runs with a loss in metrics.jsonl: python -m experiments.study preset=fig12")
    panels = [(f, own) for v in (True, False) for f in study.families if (own := _of(curves, f, v))]
    *axes, crossings, names = _cells(figure, len(panels))
    for ax, (family, own) in zip(axes, panels, strict=True):
        _draw_family(ax, family, own, target)
    for validated in (True, False):
        alike = [own[0].validated is validated for _, own in panels]
        _equalise([ax for ax, kept in zip(axes, alike, strict=True) if kept])
    _draw_crossings(crossings, names, curves)
    caption(figure, _caption_text(curves, panels, target))
    return [] if target is None else [_reached_claim(curves, target), _decay_claim(curves)]


def _cells(figure: Figure, count: int) -> list:
    """Makes axes of `count` families, of the crossings and of their legend; sizes the figure."""
    places = list(range(count + 2))
    if places[-1] % COLUMNS == 0:  # the legend stands beside its panel
        places[-2:] = [count + 1, count + 2]
    rows = places[-1] // COLUMNS + 1
    figure.set_size_inches(INCHES[12][0], 1.75 * rows + 1.3)
    title(figure, 12, "Loss over training, and tokens to the target")
    grid = GridSpec(rows, COLUMNS, figure)
    return [figure.add_subplot(grid[divmod(place, COLUMNS)]) for place in places]


def _of(curves: list[Curve], family: Family, validated: bool) -> list[Curve]:
    return [c for c in curves if c.run.family == family and c.validated is validated]


def _draw_family(ax, family: Family, curves: list[Curve], target: float | None) -> None:
    """Solid lines where the rate is near its peak, dashed after; thin for seeds after the first."""
    batches = sorted({curve.run.batch for curve in curves})
    named = set()
    for curve in curves:
        style = batch_line(batches.index(curve.run.batch), len(batches))
        colour, shape = style["color"], style["marker"]
        width = 0.6 if curve.run.batch in named else 1.3
        named.add(curve.run.batch)
        for decayed, line in ((False, "-"), (True, (0, (2.2, 1.2)))):
            # Both parts hold the point at which they meet; of unknown rates all is solid.
            part = curve.tokens >= curve.decay if decayed else ~(curve.tokens > curve.decay)
            ax.plot(curve.tokens[part], curve.loss[part], color=colour, ls=line, lw=width)
        if np.isfinite(curve.target):
            ax.plot(curve.target, target, color=colour, marker=shape, ms=5, mec="white", mew=0.6)
    if target is not None and curves[0].validated:
        ax.axhline(target, color=INK, lw=0.7, ls=":", zorder=1)
    starts = [curve.decay for curve in curves if np.isfinite(curve.decay)]
    if starts:
        ax.axvspan(min(starts), 10 * max(c.tokens[-1] for c in curves), color="#f1f1f1", zorder=0)
    handles = []
    for place, batch in enumerate(batches):
        style = batch_line(place, len(batches))
        handles.append(line_handle(style["color"], "-", style["marker"], f"B {batch}"))
    ax.legend(handles=handles, loc="best", handlelength=1.4)
    ax.set_title(family.name)
    ax.set_ylabel("validation loss" if curves[0].validated else "training loss, smoothed")


def _equalise(axes: list) -> None:
    """Gives the panels of one kind of loss the same ranges, and log tokens for x."""
    if not axes:
        return
    lines = [line.get_xydata() for ax in axes for line in ax.lines if line.get_linestyle() != ":"]
    points = np.concatenate([xy for xy in lines if len(xy) > 1])
    (left, low), (right, high) = points.min(axis=0), points.max(axis=0)
    for ax in axes:
        ax.set(xscale="log", xlim=(left / 1.1, 1.25 * right), xlabel="training tokens")
        ax.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        token_ticks(ax.xaxis, left, right)
        ticks = ax.get_xticks()
        ax.set_xticks(ticks[:: -(-len(ticks) // 5)])


def _draw_crossings(ax, names, curves: list[Curve]) -> None:
    """Tokens to the target against the tokens of a step, a line a family: the mean over seeds."""
    ax.set_title("tokens to the target")
    names.set_axis_off()
    crossed = [curve for curve in curves if np.isfinite(curve.target)]
    if not crossed:
        ax.text(0.5, 0.5, "no run has crossed it", ha="center", color=FAINT, transform=ax.transAxes)
        return
    for family in dict.fromkeys(curve.run.family for curve in crossed):
        own = [curve for curve in crossed if curve.run.family == family]
        sizes = sorted({curve.run.tokens_per_step for curve in own})
        means = [np.mean([c.target for c in own if c.run.tokens_per_step == s]) for s in sizes]
        ax.plot(sizes, means, label=family.name, **family_line(family.rung))
    ax.set(xscale="log", yscale="log", xlabel="tokens a step", ylabel="tokens to the target")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
        axis.set_minor_locator(NullLocator())
    columns = 1 + len(ax.lines) // 9
    names.legend(*ax.get_legend_handles_labels(), loc="upper left", ncols=columns)


def _reached_claim(curves: list[Curve], target: float) -> Claim:
    """All ended runs reached the target or not, and what the published count of tokens adds."""
    validated = [curve for curve in curves if curve.validated]
    ended = [curve for curve in validated if not np.isnan(curve.target)]
    reached = [curve for curve in ended if np.isfinite(curve.target)]
    missed = [curve.run.name for curve in ended if not np.isfinite(curve.target)]
    complete = ended and len(ended) == len(validated)
    outcome = FAILED if missed else HELD if complete else UNDECIDED
    excess = [first_below_tokens(c.run, target) / c.target - 1 for c in reached]
    control = (
        f"the first validation below the target comes {np.median(excess):.1%} later than the "
        f"interpolated crossing in the median, {np.max(excess):.1%} at most"
        if excess
        else "no crossing"
    )
    share = len(reached) / len(ended) if ended else float("nan")
    unlike = f" (not: {', '.join(missed)})" if missed else ""
    return Claim(
        "12", f"every run reaches the target loss {target:g}", len(ended), _seeds(ended), "",
        share, float("nan"), control, outcome,
        f"{outcome.capitalize()}: {len(reached)} of {len(ended)} ended runs crossed "
        f"{target:g}{unlike}, {len(validated) - len(ended)} have not ended; {control}.",
    )  # fmt: skip


def _decay_claim(curves: list[Curve]) -> Claim:
    """Whether all crossings lie where the rate has not decayed, so that they compare."""
    crossed = [curve for curve in curves if np.isfinite(curve.target)]
    reached = [curve for curve in crossed if not np.isnan(curve.decay)]
    unknown = len(crossed) - len(reached)
    early = [curve for curve in reached if curve.target <= curve.decay]
    late = sorted({c.run.family.name for c in reached if c.target > c.decay})
    outcome = UNDECIDED if not reached else HELD if len(early) == len(reached) else FAILED
    share = len(early) / len(reached) if reached else float("nan")
    unlike = f" (not in {', '.join(late)})" if late else ""
    return Claim(
        "12", "targets are crossed before the learning rate decays", len(reached), _seeds(reached),
        "", share, float("nan"), f"decayed: below {DECAYED:.0%} of its peak", outcome,
        f"{outcome.capitalize()}: {len(early)} of {len(reached)} crossings come before the rate "
        f"has fallen below {DECAYED:.0%} of its peak{unlike}"
        + ("; tokens of runs on the two sides compare with reserve" if late else "")
        + (f"; {unknown} more crossed and logged no rate." if unknown else "."),
    )  # fmt: skip


def _seeds(curves: list[Curve]) -> int:
    return seeds_of([curve.run for curve in curves])[0]


def _caption_text(curves: list[Curve], panels, target: float | None) -> str:
    support = [family.name for family, own in panels if not own[0].validated]
    parts = [
        f"n = {len(curves)} runs at the rate chosen for their cell, "
        f"{seeds_text([curve.run for curve in curves])} (thin: after the first).",
        f"Dotted: target {target:g}; marks: tokens at the crossing, interpolated in ln tokens "
        "between validations."
        if target is not None
        else "No target in the study.",
        f"Dashed, and shaded from the first run on: rate below {DECAYED:.0%} of its peak.",
        f"Support, no common measure: smoothed training losses alone, of {', '.join(support)}."
        if support
        else "",
    ]
    return " ".join(part for part in parts if part)
