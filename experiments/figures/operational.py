"""Figure 1: what spectra tell in practice, about batches, about early runs and about tricks.

One family over its batches at equal loss, with the fits that alpha comes from; its early alpha
against the tokens that each batch needed; and two transitions of the ladder, one that gains tokens
and one that gains speed, by what they change in activations and gradients. Source: protocol spec,
figure 1; of the published one only panel (a) is described.
"""

from collections.abc import Sequence
from itertools import combinations
from math import isfinite

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter

from experiments.efficiency import alpha_at, matched_row, ranks_of
from experiments.figures.options import Options, narrowed, target_of, tokens_of, tolerance_of
from experiments.figures.page import (
    batch_line,
    caption,
    ranks_text,
    seeds_of,
    seeds_text,
    title,
    words,
)
from experiments.figures.prediction_tests import ALPHA_BARS, least_p, members
from experiments.figures.speed import timings_text
from experiments.figures.taxonomy import LED, Matched, Transition, seed_noise, transitions
from experiments.rank_windows import window_of
from experiments.statistics import FamilyPrediction, predict, unlike_pairs
from experiments.study_records import ACTIVATION, Family, Run, Study
from lens_jax.axis_style import BLUE, FAINT, VERMILLION, not_measured, rank_axes, visible
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
from lens_jax.correlations import UNDEFINED
from lens_jax.fits import fit_power_law
from lens_jax.saved_run import short_count

INCHES = {1: (7.2, 3.9)}
PAPER_FAMILY = Family("flexwin", "d36")
BARS = (
    ("activation head", r"$\alpha$ 1-10"),
    ("activation top 10", "top-10 share"),
    ("gradient head", r"grad $\alpha$ 1-10"),
    ("gradient top 10", "grad top-10"),
    ("gradient ln RankMe", "grad ln RankMe"),
)


def draw_1(figure: Figure, study: Study, options: Options) -> list[Claim]:
    """Draws the family of the most batches at equal loss; raises Missing without any of two."""
    matched = Matched(study, options)
    family, runs = _family(study, options, matched)
    title(figure, 1, "Spectra of batches, early alpha, and two kinds of gain")
    axes = figure.subplots(1, 3, width_ratios=(1.25, 0.9, 1.15))
    window = window_of(study, options.window, family.tier)
    batches = sorted({run.batch for run in study.of(family)})
    _draw_spectra(axes[0], runs, batches, study, options, matched, window)
    axes[0].set_title(f"(a) {family.name}, equal loss")
    early = _early(study, family, options, window)
    _draw_early(axes[1], early, batches)
    axes[1].set_title("(b) early tail")
    made, noise, _ = transitions(study, options)
    pair = _contrast(made)
    _draw_contrast(axes[2], pair)
    axes[2].set_title("(c) two kinds of gain")
    if family.tier != "d12":
        noise = seed_noise(study, options, family.tier, matched)
    floor = noise.floors[ACTIVATION, None]
    where = f"at {short_count(tokens_of(study, options))} tokens"
    first, last = ranks_of(runs[0], window)
    caption(figure, _caption_text(study, family, runs, options, window, pair, floor))
    return [
        _separation_claim(study, family, matched, floor),
        _order_claim(family, early, where, f"{first}-{last}", seeds_of(study.of(family))[0]),
    ]


def _family(study: Study, options: Options, matched: Matched) -> tuple[Family, list[Run]]:
    """The family of panel (a), and of every batch the first run measured at the target loss.

    The rung that was asked for, else the paper's family as deep as there is, else that of the most
    batches.
    """
    found = []
    for family in study.families:
        runs = matched.by_batch(study.of(family))
        if len(runs) > 1 and options.rung in (None, family.rung):
            paper = family.rung == PAPER_FAMILY.rung, int(family.tier.lstrip("d"))
            found.append((paper, len(runs), family, [runs[batch][0] for batch in sorted(runs)]))
    if not found:
        loss = target_of(study, options)
        raise Missing(
            f"a family of two batches measured within {tolerance_of(study, options):g} of loss "
            f"{loss:g} (tolerance=): python -m experiments.study preset=fig1"
        )
    best = max(found, key=lambda own: own[:2])
    return best[2], best[3]


def _draw_spectra(ax, runs: Sequence[Run], batches, study, options, matched, window) -> None:
    """Spectra of unit trace by batch, and dashed the line that alpha is the slope of."""
    for run in runs:
        values = matched.spectrum(run, ACTIVATION, None)
        row = matched_row(run, target_of(study, options), tolerance_of(study, options))
        fit = alpha_at(row, run.final_site(ACTIVATION), ranks_of(run, window))
        error = rf" $\pm$ {fit.error:.2f}" if isfinite(fit.error) else ""
        colour = batch_line(batches.index(run.batch), len(batches))["color"]
        label = rf"B {run.batch}: $\alpha$ {fit.value:.2f}{error}"
        shares = values / values.sum()
        ax.plot(*visible(values, values.sum()), color=colour, lw=1.1, label=label)
        if isfinite(fit.value):
            ax.plot(*fitted_line(shares, fit.first, fit.last), color="black", lw=1.1, ls="--")
    rank_axes(ax, "eigenvalue / trace")
    ax.legend(loc="lower left", borderaxespad=0.1, handlelength=1.2)


def fitted_line(values: np.ndarray, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns ranks and values of the least-squares line, half a window beyond it on each side."""
    ranks = np.arange(first, last + 1)
    kept = values[ranks - 1] > 0
    alpha = fit_power_law(values, first, last).alpha
    level = np.mean(np.log(values[ranks - 1][kept]) + alpha * np.log(ranks[kept]))
    ends = np.array([max(1.0, first / 1.5), min(values.size, last * 1.5)])
    return ends, np.exp(level - alpha * np.log(ends))


def _early(study: Study, family: Family, options: Options, window) -> FamilyPrediction | None:
    """The family's early alphas and the tokens of its batches, None where no alpha is there."""
    part = narrowed(study, options, lambda run: run.family == family)
    found = predict(part, tokens=tokens_of(study, options), window=window).families
    return found[0] if found and np.any(np.isfinite(found[0].alpha)) else None


def _draw_early(ax, early: FamilyPrediction | None, batches: Sequence[int]) -> None:
    if early is None:
        not_measured(ax, "no run measured\nat the early tokens")
        return
    for place in np.flatnonzero(np.isfinite(early.alpha) & np.isfinite(early.excess)):
        batch, at = int(early.batches[place]), (early.alpha[place], 100 * early.excess[place])
        style = batch_line(batches.index(batch), len(batches))
        style |= {"fmt": style.pop("marker"), "ms": 6, "elinewidth": 0.9}
        ax.errorbar(*at, xerr=np.nan_to_num(early.alpha_error[place]), **style)
        ax.annotate(f"B {batch}", at, (5, 4), textcoords="offset points", fontsize=7)
    ax.margins(0.22)
    ax.set(xlabel="early alpha", ylabel="tokens beyond the best batch (%)")


def _contrast(made: Sequence[Transition]) -> list[Transition]:
    """The transition of most token gain that is of the learning side, then that of most speed."""
    learning = [own for own in made if own.gains_learning]
    chosen = sorted(learning, key=lambda own: -own.tokens)[:1]
    others = [own for own in made if own not in chosen and isfinite(own.throughput)]
    faster = sorted(others, key=lambda own: (own.kind != "throughput-side", -own.throughput))
    return chosen + faster[:1]


def _draw_contrast(ax, pair: Sequence[Transition]) -> None:
    """Changes in seed errors of a difference, or as they are where no cell has several seeds."""
    if not pair:
        not_measured(ax, "no two rungs that\nreached the target")
        return
    scaled = any(isfinite(own.change_errors[name]) for own in pair for name, _ in BARS)
    height = 0.36
    for place, (own, colour) in enumerate(zip(pair, (BLUE, VERMILLION), strict=False)):
        unit = [own.change_errors[name] if scaled else 1.0 for name, _ in BARS]
        values = np.array([own.changes[name] for name, _ in BARS]) / unit
        places = np.arange(len(BARS)) + (place - 0.5) * height
        kept = np.isfinite(values)
        ax.barh(places[kept], values[kept], height=height, color=colour,
                label=f"{own.name}\n{own.kind}")  # fmt: skip
    if scaled:
        ax.axvspan(-2, 2, color="#ececec", lw=0, zorder=0)
        ax.set_xscale("symlog", linthresh=2, linscale=0.6)
        ax.xaxis.set_major_locator(FixedLocator([-1000, -100, -10, -2, 0, 2, 10, 100, 1000]))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.axvline(0, color=FAINT, lw=0.7)
    ax.set_yticks(range(len(BARS)), [name for _, name in BARS])
    ax.set_ylim(len(BARS) + 1.6, -0.6)
    ax.set_xlabel("change (seed errors)" if scaled else "change")
    ax.legend(loc="lower right", borderaxespad=0.1, fontsize=6.8, handlelength=1.0)


def separations(study: Study, family: Family, matched: Matched) -> list[float]:
    """Returns the JSD of every two batches at equal loss, the median over pairs of their seeds."""
    found = []
    for one, other in combinations(matched.by_batch(study.of(family)).values(), 2):
        pairs = unlike_pairs(one, other)
        found.append(float(np.median(matched.divergence(pairs, ACTIVATION, None))))
    return found


def _separation_claim(study: Study, family: Family, matched: Matched, floor: float) -> Claim:
    """Spectra of different batches differ at equal loss, beyond seeds.

    A rule: held where the smallest JSD of two batches is three floors or more.
    """
    found = separations(study, family, matched)
    ratio = min(found) / floor
    outcome = UNDECIDED if not isfinite(ratio) else HELD if ratio >= LED else FAILED
    cells = matched.by_batch(study.of(family))
    runs, batches = [run for own in cells.values() for run in own], len(cells)
    return Claim(
        "1", f"{family.name}: at equal loss every two batches have different spectra", batches,
        seeds_of(runs)[0], "all ranks", ratio, float("nan"),
        f"seed floor of the JSD {number(floor, '.2g')}", outcome,
        f"{outcome.capitalize()}: JSD of two of {words(batches, 'batch')} at equal loss, medians "
        f"over pairs of seeds, between {min(found):.2g} and {max(found):.2g}, "
        f"{number(ratio, '.1f')} seed floors at least (held from {LED:g} on, no test); seed floor "
        f"{number(floor, '.2g')}.",
    )  # fmt: skip


def _order_claim(
    family: Family, early: FamilyPrediction | None, where: str, ranks: str, seeds: int
) -> Claim:
    """Early alpha orders the batches of this one family; with four of them none is sure."""
    test, control = (early.rho_alpha, early.rho_batch) if early else (UNDEFINED, UNDEFINED)
    n, least = (members([early]), least_p([early])) if early else (0, 1.0)
    outcome = verdict(test.statistic, test.p, least)
    alone = f"rho of -log B alone {number(control.statistic)}"
    return Claim(
        "1", f"{family.name}: a larger alpha {where} goes with fewer tokens to the target", n,
        seeds, ranks, test.statistic, test.p, alone, outcome,
        f"{outcome.capitalize()}: rho {number(test.statistic)} over {words(n, 'batch')} {where}, "
        f"{p_text(test)} (best possible {least:.2g}); {alone}.",
    )  # fmt: skip


def _caption_text(study, family: Family, runs, options: Options, window, pair, floor) -> str:
    deep = "" if family == PAPER_FAMILY else f" The paper has {PAPER_FAMILY.name}."
    ranks = ranks_text(ranks_of(runs[0], window), window)
    parts = [
        f"n = {words(len(runs), 'batch')} of {family.name}, {seeds_text(study.of(family))}.{deep} "
        f"(a): last-layer activations, lowest seed, at loss {target_of(study, options):g} \u00b1 "
        f"{tolerance_of(study, options):g}; dashed: fits on ranks "
        f"{ranks}, \u00b1 jackknife error. (b): the same ranks at "
        f"{short_count(tokens_of(study, options))} tokens, means over seeds; "
        f"{ALPHA_BARS}.",
    ]
    if pair:
        parts.append(
            "(c): last layer at equal loss, gradients of $W_O$; grey: two seed errors. "
            + "; ".join(
                f"{own.name}: tokens {number(own.tokens, '+.0%')}, speed "
                f"{number(own.throughput, '+.0%')}"
                for own in pair
            )
            + ". "
            + timings_text({m.family.rung: m.runs for own in pair for m in own[:2]}.items())
        )
        if not any(own.kind == "throughput-side" for own in pair):
            parts.append("No transition of this study is of the throughput side alone.")
    if not isfinite(floor):
        parts.append("No cell has two seeds at this loss: no floor.")
    return " ".join(parts)
