"""Figure 3: what each transition of the ladder gains, and which spectra moved with it.

A row a transition, the same in all panels. Source: protocol spec, figure 3; the rules are in
`taxonomy`.
"""

from collections.abc import Sequence
from math import isfinite

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from experiments.figures.options import Options, target_of, tolerance_of
from experiments.figures.page import caption, legend_outside, title, words
from experiments.figures.speed import timings_text
from experiments.figures.taxonomy import (
    ATTENTION,
    DELTA,
    LED,
    MLP,
    PREFIX,
    SPECTRA,
    Noise,
    Transition,
    direction,
    ends_test,
    interval,
    prefix_test,
    transitions,
)
from experiments.study_records import ACTIVATION, GRADIENT, Study
from lens_jax.axis_style import BLUE, FAINT, INK, LINES, SHADE, VERMILLION
from lens_jax.claims import (
    FAILED,
    HELD,
    UNDECIDED,
    Claim,
    Missing,
    number,
    p_text,
    verdict,
)

INCHES = {3: (7.2, 4.2)}
LADDER_STEPS = 15  # of the published ladder
GREEN, PURPLE = LINES[2][0], LINES[3][0]
FAST = ("fp8head", "lswa", "attnscale")
COLOURS = {
    "learning-side": BLUE,
    "throughput-side": VERMILLION,
    "joint": GREEN,
    "tradeoff": PURPLE,
}
ABOVE = 0.24  # inches, of legends over the titles of panels
MOST_GAIN = 3.0  # drawn; what is beyond is written at the edge


def draw_3(figure: Figure, study: Study, options: Options) -> list[Claim]:
    """Draws the taxonomy of d12; raises Missing without two rungs that reached the target."""
    made, noise, left_out = transitions(study, options)
    if not made:
        raise Missing(
            "two rungs at d12 with a measured run that reached the target: "
            "python -m experiments.study preset=fig3"
        )
    figure.set_size_inches(INCHES[3][0], 2.3 + 0.3 * len(made))
    title(figure, 3, "What each step of the ladder gains")
    axes = figure.subplots(1, 5, sharey=True, width_ratios=(1.55, 0.9, 0.9, 0.9, 0.9))
    _draw_gains(axes[0], made)
    _draw_shifts(axes[1], made, ((ACTIVATION, None),), "(b) activations")
    _draw_changes(axes[2], made, ("activation head", "activation top 10"))
    _draw_shifts(axes[3], made, ((GRADIENT, ATTENTION), (GRADIENT, MLP)), "(c) gradients")
    _draw_changes(axes[4], made, ("gradient head", "gradient ln RankMe"))
    axes[0].set_yticks(range(len(made)), [own.name for own in made])
    axes[0].set_ylim(len(made) - 0.4, -0.6)
    caption(figure, _caption_text(study, options, made, noise, left_out))
    return _claims(made, noise)


def _draw_gains(ax, made: Sequence[Transition]) -> None:
    """Token and throughput gains with twice their seed errors, and the kind of each row."""
    ax.axvspan(-100 * DELTA, 100 * DELTA, color=SHADE, lw=0, zorder=0)
    for colour, shape, index, label in ((BLUE, "o", 0, "tokens"), (VERMILLION, "s", 1, "speed")):
        gains = [(own.tokens, own.throughput)[index] for own in made]
        ends = np.array(
            [interval(gain, own.errors[index]) for gain, own in zip(gains, made, strict=True)]
        )
        places = np.arange(len(made)) + (-0.14, 0.14)[index]
        shown, ends = 100 * np.minimum(gains, MOST_GAIN), 100 * np.minimum(ends, MOST_GAIN)
        ax.errorbar(
            shown, places, xerr=np.abs(ends.T - shown), fmt=shape, color=colour, ms=4,
            elinewidth=0.9, label=label,
        )  # fmt: skip
        for x, y, gain in zip(shown, places, gains, strict=True):
            if gain > MOST_GAIN:
                ax.text(x, y - 0.22, f"{gain:+.0%} \u2192", ha="right", fontsize=6, color=colour)
    ax.axvline(0, color=FAINT, lw=0.7)
    low, high = ax.get_xlim()
    ax.set_xlim(low, high + 0.75 * (high - low))
    for place, own in enumerate(made):
        led = f"\n{own.led}" if own.gains_learning else ""
        ax.text(
            0.99, place, own.kind + led, ha="right", va="center", fontsize=6.5,
            color=COLOURS.get(own.kind, FAINT), transform=ax.get_yaxis_transform(),
        )  # fmt: skip
    ax.set_xlabel("gain (%)")
    ax.set_title("(a) gains and kind")
    legend_outside(ax, 0.5, ABOVE, ncols=2)


def _draw_shifts(ax, made: Sequence[Transition], keys, name: str) -> None:
    """JSD at equal loss in seed floors, or as it stands where there is no floor."""
    ax.set_title(name)
    in_floors = any(isfinite(own.shifts[key]) for own in made for key in keys)
    marks = ((BLUE, "o", "$W_O$"), (VERMILLION, "D", "MLP out"))
    drawn = False
    for (colour, shape, label), key in zip(marks, keys, strict=False):
        values = [(own.shifts if in_floors else own.divergences)[key] for own in made]
        kept = np.flatnonzero(np.isfinite(values) & (np.array(values) > 0))
        if kept.size:
            drawn = True
            ax.plot(np.array(values)[kept], kept, ls="", color=colour, marker=shape, label=label)
    if not drawn:
        _nothing(ax, "not measured\nat this loss")
        return
    ax.set_xscale("log")
    if in_floors:
        ax.axvline(1, color=FAINT, lw=0.8, ls=":")
        ax.axvline(LED, color=INK, lw=0.8, ls="--")
        low, high = ax.get_xlim()
        ax.set_xlim(min(low, 0.7), max(high, 5))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("JSD / seed floor" if in_floors else "JSD (nats)")
    if len(keys) > 1:
        legend_outside(ax, 0.5, ABOVE, ncols=2, columnspacing=0.8, handletextpad=0.1)


def _draw_changes(ax, made: Sequence[Transition], names: Sequence[str]) -> None:
    """Changes of two statistics, each with twice the seed error of a difference."""
    drawn = False
    labels = {
        "activation head": r"$\alpha$ 1-10",
        "activation top 10": "top 10",
        "gradient head": r"$\alpha$ 1-10",
        "gradient ln RankMe": "ln RankMe",
    }
    for offset, (colour, shape), name in zip((-0.14, 0.14), LINES[2:4], names, strict=True):
        values = np.array([own.changes[name] for own in made])
        bars = np.nan_to_num([2 * own.change_errors[name] for own in made])
        kept = np.flatnonzero(np.isfinite(values))
        if kept.size:
            drawn = True
            ax.errorbar(
                values[kept], kept + offset, xerr=bars[kept], fmt=shape, color=colour, ms=4,
                elinewidth=0.9, label=labels[name],
            )  # fmt: skip
    if not drawn:
        _nothing(ax, "not measured\nat this loss")
        return
    ax.axvline(0, color=FAINT, lw=0.7)
    ax.set_xlabel("change")
    ax.xaxis.set_major_locator(MaxNLocator(2))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    legend_outside(ax, 0.5, ABOVE, handlelength=1.2)


def _nothing(ax, reason: str) -> None:
    # The rows are shared, so their ticks must stay; `not_measured` would take them from all panels.
    ax.text(0.5, 0.5, reason, ha="center", va="center", color=FAINT, transform=ax.transAxes)
    ax.set_xticks([])
    ax.set_facecolor("#f7f7f7")


def _claims(made: Sequence[Transition], noise: Noise) -> list[Claim]:
    seeds = min(len(own.after.runs) for own in made)
    return [
        _gain_claim(made, noise, seeds),
        _prefix_claim(made, noise, seeds),
        *_speed_claim(made, seeds),
    ]


def _gain_claim(made: Sequence[Transition], noise: Noise, seeds: int) -> Claim:
    """The ladder gains tokens from its first rung here to its last."""
    test = ends_test(made, noise)
    outcome = verdict(test.statistic, test.p, 0.0)
    n = len(made)
    total = float(np.prod([1 + own.tokens for own in made])) - 1
    counts = {
        kind: sum(own.kind == kind for own in made) for kind in (*COLOURS, "null", "not measured")
    }
    listed = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    first, last = made[0].before.family.rung, made[-1].after.family.rung
    freedom = words(noise.tokens.freedom, "degree")
    control = (
        f"seed sd of ln tokens {number(noise.tokens.seeds, '.3f')} with {freedom} of freedom"
        if noise.runs
        else "no cell has two seeds, so there is no error"
    )
    return Claim(
        "3", f"the ladder from {first} to {last} lowers the tokens to the target", 2, seeds, "",
        test.statistic, test.p, control, outcome,
        f"{outcome.capitalize()}: token gain {number(total, '+.0%')} from {first} to {last}, each "
        f"at its best batch, t {number(test.statistic, '.1f')} of the difference between these two "
        f"rungs in seed errors, {p_text(test)}; over {words(n, 'transition')} ({listed}), which "
        f"share rungs and have no test together; {control}.",
    )  # fmt: skip


def _prefix_claim(made: Sequence[Transition], noise: Noise, seeds: int) -> Claim:
    """The published column of activation-led gains is dominated by the prefix of the ladder."""
    test, least = prefix_test(made)
    outcome = verdict(test.statistic, test.p, least)
    judged = [own for own in made if own.judged]
    led = [own.name for own in judged if own.gains_learning and own.led == "activation-led"]
    floors = [noise.floors[key] for key in SPECTRA[:2]]
    known = all(map(isfinite, floors))
    floor = f"seed floors: JSD {floors[0]:.2g} of activations, {floors[1]:.2g} of gradients"
    control = floor if known else "no cell has two seeds at this loss, so there is no floor"
    found = ", ".join(led) or "none"
    return Claim(
        "3", f"activation-led gains lie in the prefix of the ladder, up to {PREFIX[-1]}",
        len(judged), seeds, "1-10", test.statistic, test.p, control, outcome,
        f"{outcome.capitalize()}: activation-led gains: {found}; gains and shifts are known of "
        f"{len(judged)} of {words(len(made), 'transition')}, which alone are counted; one-sided "
        f"{p_text(test)} (least possible {least:.2g}); {control}.",
    )  # fmt: skip


def _speed_claim(made: Sequence[Transition], seeds: int) -> list[Claim]:
    """The late rungs named in the paper gain throughput; nothing where none follows its own rung.

    A rule, for three transitions have no test: held where the throughput gain is the larger of the
    two and counts in each; it fails where one counts as a loss of throughput, or as a greater gain
    of tokens; undecided where neither does, or one was not timed.
    """
    below = {"fp8head": "softcap", "lswa": "fp8head", "attnscale": "lswa"}
    late = [own for own in made if below.get(own.after.family.rung) == own.before.family.rung]
    if not late:
        return []
    fast = [
        own.throughput > own.tokens and direction(own.throughput, own.errors[1]) == 1
        for own in late
    ]
    against = [
        direction(own.throughput, own.errors[1]) == -1
        or (own.tokens > own.throughput and direction(own.tokens, own.errors[0]) == 1)
        for own in late
    ]
    timed = all(isfinite(own.throughput) for own in late)
    outcome = HELD if all(fast) else FAILED if any(against) else UNDECIDED
    outcome = outcome if timed else UNDECIDED
    share = sum(fast) / len(fast) if timed else float("nan")
    each = ", ".join(
        f"{own.after.family.rung} {number(own.throughput, '+.1%')} speed and "
        f"{number(own.tokens, '+.1%')} tokens"
        for own in late
    )
    return [
        Claim(
            "3", f"{', '.join(FAST)} gain throughput rather than tokens", len(late), seeds, "",
            share, float("nan"), "rule, no test", outcome,
            f"{outcome.capitalize()}: {each}.",
        )
    ]  # fmt: skip


def _caption_text(study, options: Options, made: Sequence[Transition], noise: Noise, left_out):
    used = [own.before for own in made] + [made[-1].after]
    seeds = sorted({len(member.runs) for member in used})
    batches = ", ".join(f"{m.family.rung} {m.first.batch}" for m in used)
    target, tolerance = target_of(study, options), tolerance_of(study, options)
    among = f"{words(len(made), 'transition')} between the {len(used)} rungs of this study"
    parts = [
        f"{among}, of {LADDER_STEPS} of the whole ladder."
        if len(made) < LADDER_STEPS
        else f"{among}.",
        f"Each rung at its token-best batch ({batches}), {'-'.join(map(str, seeds))} "
        f"{'seed' if seeds == [1] else 'seeds'} a rung; tokens to loss {target:g}; speed: median "
        "step at the widest window come to, as run. "
        f"{timings_text((m.family.rung, m.runs) for m in used)}",
        f"Shaded: gains below {DELTA:.0%}. Spectra: last layer, loss {target:g} \u00b1 "
        f"{tolerance:g}, head on ranks 1-10; gradients per sample."
    ]  # fmt: skip
    if noise.runs:
        parts.append(
            f"Bars: twice the seed error, from {noise.runs} runs in cells with several seeds"
            + (", what a seed changes everywhere taken out" if noise.tokens.crossed else "")
            + "; a gain must exceed it too. Dotted: the seed floor of the JSD, dashed: three "
            "floors, from which a spectrum counts as moved."
        )
    else:
        parts.append("No cell has several seeds: no errors, no floors, nothing resolved.")
    if left_out:
        parts.append(f"Left out, for no run reached the target: {', '.join(left_out)}.")
    return " ".join(parts)
