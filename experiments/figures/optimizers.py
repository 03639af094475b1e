"""Figure 7: whether final spectra differ more between batches under Muon than under Adam.

The published contrast is one rung with Muon or with Adam on its matrices (lswa and lswa_adam). A
study without that control has baseline or rope, which train with Adam, beside muon; those differ in
more than the optimizer, and the figure says so. Source: protocol spec, figure 7.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import isfinite, log2
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments.efficiency import alpha_at, matched_row, ranks_of
from experiments.figures.options import Options, target_of, tolerance_of
from experiments.figures.page import (
    batch_line,
    caption,
    ranks_text,
    seeds_of,
    seeds_text,
    title,
    words,
)
from experiments.figures.taxonomy import Matched, seed_noise
from experiments.rank_windows import window_of
from experiments.study_records import ACTIVATION, Family, Run, Study
from lens_jax.axis_style import BLUE, INK, SHADE, VERMILLION, rank_axes, visible
from lens_jax.claims import Claim, Missing, number, p_text, sign_flip_test, verdict

INCHES = {7: (7.2, 3.9)}
CONTRASTS = (("lswa", "lswa_adam"), ("muon", "rope"), ("muon", "baseline"))
"""Rungs with Muon and with Adam, best contrast first; what else differs is in the ladder."""
LINES = (("Muon", BLUE, "o"), ("Adam", VERMILLION, "s"))


class Side(NamedTuple):
    """A family at the target, its runs by batch, seeds together."""

    family: Family
    runs: dict[int, list[Run]]

    @property
    def all(self) -> list[Run]:
        return [run for runs in self.runs.values() for run in runs]


def draw_7(figure: Figure, study: Study, options: Options) -> list[Claim]:
    """Draws both optimizers' spectra; raises Missing without a contrast of two batches a side."""
    matched = Matched(study, options)
    sides = _contrast(study, matched)
    title(figure, 7, "Final spectra by batch, Muon against Adam")
    axes = figure.subplots(1, 3, width_ratios=(1.2, 1.2, 0.9))
    batches = sorted({batch for side in sides for batch in side.runs})
    for ax, side, letter, line in zip(axes, sides, "ab", LINES, strict=False):
        _draw_spectra(ax, side, batches, matched, study, options)
        ax.set_title(f"({letter}) {line[0]} ({side.family.rung})")
    ends = np.array([ax.get_ylim() for ax in axes[:2]])
    for ax in axes[:2]:
        ax.set_ylim(ends[:, 0].min(), ends[:, 1].max())
    axes[1].set_ylabel("")
    both = [separations(side, matched) for side in sides]
    floor = seed_noise(study, options, sides[0].family.tier, matched).floors[ACTIVATION, None]
    _draw_separations(axes[2], both, floor)
    caption(figure, _caption_text(study, sides, floor, options))
    return [_claim(sides, both, floor)]


def _contrast(study: Study, matched: Matched) -> list[Side]:
    """The first contrast of which both sides have measured runs of two batches at the target."""
    tiers = sorted({family.tier for family in study.families})
    for tier in tiers:
        for rungs in CONTRASTS:
            families = [Family(rung, tier) for rung in rungs]
            sides = [Side(own, matched.by_batch(study.of(own))) for own in families]
            if all(len(side.runs) > 1 for side in sides):
                return sides
    raise Missing(
        "lswa and lswa_adam, or muon and rope or baseline, at two batches or more, measured at the "
        "target loss: python -m experiments.study preset=fig7"
    )


def separations(side: Side, matched: Matched) -> dict[tuple[int, int], float]:
    """Returns {(B, B'): JSD per doubling of B} of neighbouring batches, the mean over seeds.

    To second order the JSD grows with the square of a shift, so over k doublings, at a shift that
    is even in ln B, it is k^2 times that of one; it is divided by k^2.
    """
    found = {}
    for low, high in pairwise(sorted(side.runs)):
        pairs = [(one, other) for one in side.runs[low] for other in side.runs[high]]
        doublings = log2(high / low)
        found[low, high] = float(np.mean(matched.divergence(pairs, ACTIVATION, None)))
        found[low, high] /= doublings**2
    return found


def _draw_spectra(ax, side: Side, batches: Sequence[int], matched, study, options) -> None:
    """The first seed of every batch, of unit trace, with its alpha."""
    for batch, runs in sorted(side.runs.items()):
        run = runs[0]
        values = matched.spectrum(run, ACTIVATION, None)
        ranks = ranks_of(run, window_of(study, options.window, run.cell.tier))
        row = matched_row(run, target_of(study, options), tolerance_of(study, options))
        fit = alpha_at(row, run.final_site(ACTIVATION), ranks)
        error = rf" $\pm$ {fit.error:.2f}" if isfinite(fit.error) else ""
        label = rf"B {batch}: $\alpha$ {fit.value:.2f}{error}"
        colour = batch_line(batches.index(batch), len(batches))["color"]
        ax.plot(*visible(values, values.sum()), color=colour, label=label)
    ax.axvspan(*ranks, color=SHADE, lw=0, zorder=0)
    rank_axes(ax, "eigenvalue / trace")
    ax.legend(loc="lower left", borderaxespad=0.1, handlelength=1.2)


def _draw_separations(ax, both: Sequence[dict], floor: float) -> None:
    pairs = sorted({pair for found in both for pair in found})
    for (name, colour, shape), found in zip(LINES, both, strict=True):
        kept = [pair for pair in pairs if found.get(pair, 0.0) > 0]
        places = [pairs.index(pair) for pair in kept]
        ax.plot(places, [found[p] for p in kept], color=colour, marker=shape, lw=0.9, label=name)
    if isfinite(floor):
        ax.axhline(floor, color=INK, lw=0.9, ls="--", label="seed floor")
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** 0.45)
    ax.set_xticks(range(len(pairs)), [f"{low}\u2013{high}" for low, high in pairs], rotation=45)
    ax.set(xlim=(-0.4, len(pairs) - 0.6), xlabel="batches", ylabel="JSD per doubling (nats)")
    ax.set_title("(c) separation")
    ax.legend(loc="upper left", borderaxespad=0.1)


def _claim(sides: Sequence[Side], both: Sequence[dict], floor: float) -> Claim:
    """Batches are further apart under Muon: ln of the ratio over the pairs that both sides have."""
    common = sorted(set(both[0]) & set(both[1]))
    ratios = [np.log(both[0][pair] / both[1][pair]) for pair in common]
    test = sign_flip_test(ratios)
    least = 2.0 ** (1 - len(ratios)) if ratios else 1.0
    outcome = verdict(test.statistic, test.p, least)
    contrast = " against ".join(side.family.rung for side in sides)
    riders = "" if contrast == "lswa against lswa_adam" else "; the rungs differ in more than this"
    means = [np.mean(list(found.values())) for found in both]
    seeds = min(seeds_of(side.all)[0] for side in sides)
    control = f"seed floor {number(floor, '.2g')}"
    return Claim(
        "7", "final spectra of different batches are further apart under Muon than under Adam",
        len(ratios), seeds, "all ranks", test.statistic, test.p, control, outcome,
        f"{outcome.capitalize()}: mean JSD per doubling of the batch {means[0]:.2g} under Muon and "
        f"{means[1]:.2g} under Adam ({contrast}{riders}), ratio "
        f"{number(np.exp(test.statistic))} over {words(len(ratios), 'pair')} of batches that both "
        f"have, {p_text(test)} by signs (best possible {least:.2g}); {control}.",
    )  # fmt: skip


def _caption_text(study: Study, sides: Sequence[Side], floor: float, options: Options) -> str:
    runs = [run for side in sides for run in side.all]
    window = window_of(study, options.window, runs[0].cell.tier)
    ranks = ranks_text(ranks_of(runs[0], window), window)
    rungs = [side.family.rung for side in sides]
    target, tolerance = target_of(study, options), tolerance_of(study, options)
    parts = [
        f"n = {' and '.join(str(len(side.runs)) for side in sides)} batches at "
        f"{sides[0].family.tier}, {seeds_text(runs)}; last-layer activations at loss "
        f"{target:g} \u00b1 {tolerance:g}, the first seed; alpha on the "
        f"shaded ranks {ranks}, \u00b1 its jackknife error. (c): JSD of neighbouring batches "
        "over the squared number of doublings.",
        "" if isfinite(floor) else "No cell has two seeds at this loss: no floor.",
    ]
    if rungs != list(CONTRASTS[0]):
        parts.append(
            f"Not measured: lswa against lswa_adam, which differ in the optimizer alone. "
            f"{rungs[0]} and {rungs[1]} differ by what the ladder lists between them as well."
        )
    return " ".join(part for part in parts if part)
