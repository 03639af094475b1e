"""Figure 8: how well alpha orders the batches, all along training, in both alignments.

A family is a panel. A share of each run's own length is the published alignment; at equal tokens
nobody need know how long a run will be. Source: protocol spec, figure 8 and trap T2.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from experiments.figures.options import Options, of_tiers, tokens_of
from experiments.figures.page import caption, seeds_of, seeds_text, title, words, zero_line
from experiments.figures.prediction_tests import best_look_p, count_text, left_out_text, order_claim
from experiments.statistics import Prediction, predict
from experiments.study_records import Family, Study
from lens_jax.axis_style import (
    BLUE,
    FAINT,
    INK,
    LINES,
    SKY,
    line_handle,
    spaced,
    token_ticks,
)
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
from lens_jax.saved_run import short_count

INCHES = {8: (7.2, 6.6)}
WINDOWS = ((10, 40), (40, 90), (90, 200))
PROGRESS = np.arange(1, 11) / 10
TOKEN_LOOKS = 10
FEW = 3
GREEN = LINES[2][0]
COLOURS = {WINDOWS[0]: LINES[4][0], WINDOWS[1]: SKY, WINDOWS[2]: BLUE}
GOOD_R2 = 0.9
APART = 0.05  # steps by which lines are moved, so that equal ones are all seen
SATURATED = 0.9


class Curves(NamedTuple):
    """Predictions at every window and look of one alignment.

    x: (looks,), shares or tokens; looks[window][i]: a Prediction, whose families have different
    numbers of members where a run has ended before.
    """

    x: np.ndarray
    looks: dict[tuple[int, int], list[Prediction]]

    def rho(self, window, family: Family) -> np.ndarray:
        """rho (looks,) of a family; NaN where not all of its members have an exponent."""
        return np.array([_rho(look, family) for look in self.looks[window]])

    def r2(self, window, family: Family) -> np.ndarray:
        """Median R2 (looks,) of the fits behind each rho."""
        return np.array([_r2(look, family) for look in self.looks[window]])


def draw_8(figure: Figure, study: Study, options: Options) -> list[Claim]:
    """Draws rho over training, a panel a family; raises Missing where no family has an order."""
    tokens, part = tokens_of(study, options), of_tiers(study, options, ("d12",))
    windows = tuple(dict.fromkeys((*WINDOWS, options.window)))
    families = _families(part, tokens, options.window)
    shares = np.union1d(PROGRESS, [options.progress])
    by_share = _curves(part, windows, "progress", shares)
    by_tokens = _curves(part, windows, "tokens", _token_looks(part, families, tokens))
    columns = 3 if len(families) <= 6 else 4 if len(families) <= 12 else 5
    rows = -(-len(families) // columns)
    figure.set_size_inches(INCHES[8][0], 2.5 + 2 * 1.12 * rows)
    title(figure, 8, "Order of the batches by alpha, over training")
    above, below = figure.subfigures(2, 1)
    for sheet, curves, words_ in (
        (above, by_share, "(a) at a share of each run's tokens to the target"),
        (below, by_tokens, "(b) at equal tokens"),
    ):
        sheet.suptitle(words_, x=0.012, ha="left", fontsize=9, fontweight="bold")
        axes = sheet.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        control = by_share.looks[options.window][-1]
        _draw_families(axes, curves, families, options.window, control)
    _dress(above, below, by_tokens, tokens, options)
    caption(figure, _caption_text(part, families, by_share, by_tokens, options))
    return _claims(part, by_share, by_tokens, tokens, options)


def _families(study: Study, tokens: int, window) -> list[Family]:
    """Families whose batches can be ordered, in the order of the ladder."""
    found = predict(study, tokens=tokens, window=window).families if study.chosen else ()
    named = [
        f.family
        for f in found
        if np.sum(~np.isnan(f.efficiency)) >= FEW and any(run.steps for run in study.of(f.family))
    ]
    if not named:
        raise Missing(
            f"a family at d12 with {FEW} batches run to the target, measured along training: "
            "python -m experiments.study preset=fig8"
        )
    return named


def _curves(study: Study, windows, key: str, x: np.ndarray) -> Curves:
    return Curves(
        x, {w: [predict(study, window=w, **{key: _plain(look)}) for look in x] for w in windows}
    )


def _plain(value):
    return value.item() if hasattr(value, "item") else value


def _token_looks(study: Study, families: Sequence[Family], tokens: int) -> np.ndarray:
    """Token counts at which runs were measured, `tokens` among them, thinned to a few."""
    runs = [run for family in families for run in study.of(family) if run.steps]
    # Of the largest batch, the coarsest grid; smaller ones are measured near the same counts.
    longest = max(runs, key=lambda run: (run.tokens_per_step, run.steps[-1].tokens))
    counts = np.array([row.tokens for row in longest.steps if row.tokens > 0])
    return np.union1d(counts[spaced(counts.size, TOKEN_LOOKS)], [tokens])


def _found(look: Prediction, family: Family):
    return next((f for f in look.families if f.family == family), None)


def _rho(look: Prediction, family: Family) -> float:
    # Once a run has reached the target and ended, those left are a part of the order only.
    own = _found(look, family)
    return own.rho_alpha.statistic if own and np.all(np.isfinite(own.alpha)) else np.nan


def _r2(look: Prediction, family: Family) -> float:
    own = _found(look, family)
    finite = own.r2[np.isfinite(own.r2)] if own else np.empty(0)
    return float(np.median(finite)) if finite.size else np.nan


def offsets(windows: Iterable, main) -> dict:
    """By window how far its line is moved: the main one not at all, the others off it in turns."""
    others = [window for window in windows if window != main]
    turns = (-1, 1, -2, 2)
    return {main: 0.0} | {w: APART * turn for w, turn in zip(others, turns, strict=False)}


def _draw_families(axes, curves: Curves, families, main, control: Prediction) -> None:
    """A panel a family; the line of the main window thick, in its place and above the others."""
    moved = offsets(curves.looks, main)
    for ax, family in zip(axes.flat, families, strict=False):
        ax.set_title(family.rung, fontsize=8.5, fontweight="normal")
        for window in curves.looks:
            rho, r2 = curves.rho(window, family), curves.r2(window, family)
            style = {"color": COLOURS.get(window, GREEN), "ms": 3}
            style |= {"lw": 1.8, "zorder": 2.5} if window == main else {"lw": 1.0}
            rho = rho + moved[window]
            ax.plot(curves.x, rho, **style)
            for good, face in ((r2 >= GOOD_R2, style["color"]), (r2 < GOOD_R2, "white")):
                ax.plot(curves.x[good], rho[good], "o", mfc=face, color=style["color"], ms=3)
        own = _found(control, family)
        if own is not None:
            ax.axhline(own.rho_batch.statistic, color=INK, ls=(0, (4, 2)), lw=1.2)
        zero_line(ax)
        ax.set(ylim=(-1.12, 1.12), yticks=(-1, 0, 1))
    for place, ax in enumerate(axes.flat):
        if place >= len(families):
            ax.set_axis_off()
        elif place + axes.shape[1] >= len(families):
            ax.tick_params(labelbottom=True)  # the lowest panel of its column
    for ax in axes[:, 0]:
        ax.set_ylabel(r"$\rho$")


def _dress(above, below, by_tokens: Curves, tokens: int, options: Options) -> None:
    """Axes of both alignments, a dotted line at the look that is tested, and the legend."""
    for ax in (ax for ax in above.axes if ax.axison):
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
        ax.set(xlim=(0, 1.04), xticks=(0, 0.25, 0.5, 0.75, 1))
        ax.axvline(options.progress, color=FAINT, lw=0.9, ls=":")
    for ax in (ax for ax in below.axes if ax.axison):
        ax.set_xscale("log")
        token_ticks(ax.xaxis, by_tokens.x[0], by_tokens.x[-1])
        ax.set_xticks(ax.get_xticks()[:: 2 if len(below.axes) > 6 else 1])
        ax.axvline(tokens, color=FAINT, lw=0.9, ls=":")
    above.supxlabel("share of the run (%)", fontsize=8)
    below.supxlabel("training tokens", fontsize=8)
    handles = [
        line_handle(COLOURS.get(window, GREEN), "-", "o", f"ranks {_ranks(looks[-1])}")
        for window, looks in by_tokens.looks.items()
    ]
    handles.append(line_handle(INK, (0, (4, 2)), "", r"$-\log B$"))
    above.legend(handles=handles, loc="upper right", ncols=len(handles), columnspacing=1.0)


def _ranks(look: Prediction) -> str:
    return f"{look.ranks[0]}-{look.ranks[1]}"


def _claims(study: Study, by_share: Curves, by_tokens: Curves, tokens: int, options: Options):
    """Three: the order at the tested look, what the published alignment adds, and saturation."""
    window, seeds = options.window, seeds_of(study.chosen)[0]
    place = int(np.argmin(np.abs(by_share.x - options.progress)))
    look = by_share.looks[window][place]
    best = best_look_p([each.families for looks in by_share.looks.values() for each in looks])
    where = f"at {options.progress:.0%} of the run"
    count = sum(map(len, by_share.looks.values()))
    order = order_claim(
        "8", f"d12: a larger alpha {where} goes with fewer tokens to the target", look,
        _ranks(look), where, seeds, f", best of {count} looks {p_text(best)}",
    )  # fmt: skip
    early = by_tokens.looks[window][int(np.argmin(np.abs(by_tokens.x - tokens)))]
    return [
        order,
        _alignment_claim(look, early, where, tokens, seeds),
        _saturation(by_share, seeds, window),
    ]


def _alignment_claim(look: Prediction, early: Prediction, where: str, tokens: int, seeds: int):
    """The share of a run uses the answer: rho is higher there than at equal tokens."""
    differences = [_rho(look, f.family) - _rho(early, f.family) for f in look.families]
    test = sign_flip_test(differences)
    count = int(np.sum(np.isfinite(differences)))
    least = 2.0 ** (1 - count) if count else 1.0
    outcome = verdict(test.statistic, test.p, least)
    control = f"mean rho of -log B {number(look.batch.statistic)}"
    return Claim(
        "8", f"d12: rho is higher {where} than at equal tokens, for the alignment uses the answer",
        count, seeds, _ranks(look), test.statistic, test.p, control, outcome,
        f"{outcome.capitalize()}: mean rho {number(look.alpha.statistic)} {where} beside "
        f"{number(early.alpha.statistic)} at {short_count(tokens)} tokens, difference "
        f"{number(test.statistic, '+.2f')} over {words(count, 'family')}, {p_text(test)} by signs "
        f"(best possible {least:.2g}); {control}.",
    )  # fmt: skip


def _saturation(by_share: Curves, seeds: int, window) -> Claim:
    """rho stays near 1 over the second half of runs.

    A rule, for looks of one run are not independent. held: its mean there is at least SATURATED in
    three of four families; undecided where no family has four members, of which one in 24 orders is
    perfect by chance.
    """
    last = by_share.looks[window][-1]
    late = by_share.x >= 0.5
    means = {}
    for own in last.families:
        rho = by_share.rho(window, own.family)[late]
        if np.any(np.isfinite(rho)) and len(own.batches) > FEW:
            means[own.family] = float(np.nanmean(rho))
    high = sum(mean >= SATURATED for mean in means.values())
    outcome = UNDECIDED if not means else HELD if high >= 0.75 * len(means) else FAILED
    mean = float(np.mean(list(means.values()))) if means else np.nan
    control = f"mean rho of -log B {number(last.batch.statistic)}"
    return Claim(
        "8", "d12: rho saturates near 1", len(means), seeds, _ranks(last), mean, float("nan"),
        control, outcome,
        f"{outcome.capitalize()}: over the second half of the runs the mean rho is at least "
        f"{SATURATED} in {high} of {words(len(means), 'family')} of four batches or more (mean "
        f"{number(mean)}; no test, looks of one run are not independent); {control}.",
    )  # fmt: skip


def _caption_text(study: Study, families, by_share: Curves, by_tokens: Curves, options: Options):
    window = options.window
    runs = [run for family in families for run in study.of(family)]
    last = by_share.looks[window][-1]
    fits = []
    for used, looks in by_tokens.looks.items():
        r2 = np.array([by_tokens.r2(used, family) for family in families])
        r2 = r2[np.isfinite(r2)]
        if r2.size:
            fits.append(f"{_ranks(looks[-1])}: {np.median(r2):.2f} ({r2.min():.2f} at least)")
    width = runs[0].width
    scaled = ", ".join(f"{a}-{b}" for a, b in by_share.looks)
    left_out = left_out_text(study, families)
    return (
        f"n = {count_text(last.families)}, {seeds_text(runs)}; last-layer activations; width "
        f"{width}, ranks of {scaled} at width 768. Thick: the main window; dotted: the looks that "
        f"are tested. Open marks: median R2 of the fits below {GOOD_R2}; R2 at equal tokens: "
        f"{'; '.join(fits)}. With four batches rho goes in steps of 0.2, and 1 in 24 orders is "
        "perfect by chance; lines of other windows are moved by steps of "
        f"{APART}, so that equal ones are seen. No point "
        "where a run of the family had ended, or was not measured near it."
        + (f" {left_out}" if left_out else "")
    )
