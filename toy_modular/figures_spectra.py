"""Figures 11a and 11c: spectra at equal validation loss, across batch sizes and across stages."""

from collections.abc import Sequence
from itertools import combinations, pairwise
from math import factorial
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from lens_jax.alignment import Alpha, Match, at_loss, common_loss, equal_losses
from lens_jax.axis_style import INK, SHADE, VERMILLION, rank_axes
from lens_jax.claims import FAILED, HELD, UNDECIDED, Claim, Missing, number, p_text, verdict
from lens_jax.correlations import alike_permutation_p, joint_permutation_p
from lens_jax.fits import jsd
from lens_jax.jackknife import expected_jsd
from toy_modular.alignment import alpha, spectrum, toy_window
from toy_modular.figures_page import batch_axis, batch_lines, edge_note, sheet, words
from toy_modular.records import LAST, SPECTRUM, Row, Run, Study
from toy_modular.stages import CORE
from toy_modular.sweeps import Sweep, pairs, require_pairs, sweep

SPECTRA_INCHES, DIVERGENCE_INCHES = (7.1, 4.3), (4.6, 3.7)
DEEP = (50, 200)


# 11a


def draw_spectra(figure: Figure, study: Study, config) -> list[Claim]:
    """Draws 11a, the untied stage over batch sizes at one loss; raises Missing for too few."""
    runs = sweep(study, "untied")
    loss, matched = matched_rows(runs, config.loss, config.tolerance)
    used = [match for row in matched for match in row if match is not None]
    width = spectrum(used[0].row).size
    windows = [DEEP, config.window]
    exponents = [_alphas(matched, window) for window in windows]
    claims = [
        _order_claim(runs, own, *toy_window(*window, width))
        for window, own in zip(windows, exponents, strict=True)
    ]
    axes = sheet(
        figure, 2, 2, _spectra_note(study, runs, matched, loss, config.tolerance, claims),
        width_ratios=(1.35, 1), sharex="col",
    )  # fmt: skip
    grid = axes[0, 0].get_gridspec()
    axes[0, 0].remove()
    axes[1, 0].remove()
    _draw_matched(grid.figure.add_subplot(grid[:, 0]), runs, matched, exponents[1], config.window)
    for ax, own, claim, letter in zip(axes[:, 1], exponents, claims, "bc", strict=True):
        _draw_order(ax, runs, own, claim, letter)
    axes[1, 1].set_xlabel("batch size (sequences)")
    axes[0, 1].set_xlabel("")
    return claims


def matched_rows(
    runs: Sweep, loss: float | None, tolerance: float
) -> tuple[float, list[list[Match | None]]]:
    """Returns the loss and the rows (F lists of n) nearest it; raises Missing under three sizes.

    Without a loss it is the lowest of those at which the most runs have a row.
    """
    rows = [[[] if run is None else _measured(run) for run in row] for row in runs.runs]
    if loss is None:
        loss, _ = common_loss([own for row in rows for own in row], tolerance)
    matched = [[at_loss(own, loss, tolerance) for own in row] for row in rows]
    sizes = {
        batch
        for row in matched
        for batch, match in zip(runs.batches, row, strict=True)
        if match is not None
    }
    if len(sizes) < 3:
        raise Missing(
            f"stage {runs.stage}: spectra at loss {loss:.3f} +- {tolerance:g} of {len(sizes)} "
            f"batch sizes, 3 are needed; give loss= or a larger tolerance="
        )
    return loss, matched


def _measured(run: Run) -> list[Row]:
    return [row for row in run.spectra if row.has(SPECTRUM, LAST)]


def _alphas(matched, window: tuple[int, int]) -> list[list[Alpha | None]]:
    return [
        [None if match is None else alpha(match.row, window) for match in row] for row in matched
    ]


def values(exponents: Sequence[Sequence[Alpha | None]]) -> np.ndarray:
    """Exponents as numbers (F, n), NaN where there is none."""
    return np.array([[np.nan if a is None else a.value for a in row] for row in exponents])


def _order_claim(runs: Sweep, exponents, first: int, last: int) -> Claim:
    table, seeds = values(exponents), len(runs.seeds)
    families = [(runs.small_batch, row) for row in table]
    alike, apart = alike_permutation_p(families), joint_permutation_p(families, "signed")
    members = int(np.sum(np.any(np.isfinite(table), axis=0)))
    outcome = verdict(alike.statistic, alike.p, 2 / factorial(max(members, 1)))
    return Claim(
        "11a", f"untied: smaller batches have a steeper spectrum on ranks {first}-{last}",
        members, seeds, f"{first}-{last}", alike.statistic, alike.p,
        "same loss; the learning rate was chosen for each batch size", outcome,
        f"{outcome.capitalize()}: rho(alpha, -log B) = {number(alike.statistic)} on ranks "
        f"{first}-{last} over {words(members, 'batch size')} and {words(seeds, 'seed')}, "
        f"{p_text(alike)} (seeds apart: {p_text(apart)}).",
    )  # fmt: skip


def _draw_matched(ax, runs: Sweep, matched, exponents, window: tuple[int, int]) -> None:
    """Panel a: the first matched seed of every batch size thick, other seeds thin."""
    lines, named = batch_lines(runs.batches), set()
    for row, own in zip(matched, exponents, strict=True):
        for batch, match, fit in zip(runs.batches, row, own, strict=True):
            if match is None:
                continue
            eigenvalues = spectrum(match.row)
            shares = eigenvalues[eigenvalues > 0] / eigenvalues.sum()
            label = None if batch in named else _spectrum_label(batch, fit, match)
            thin = {"lw": 0.6, "alpha": 0.5} if batch in named else {"lw": 1.6}
            ax.plot(
                np.arange(1, shares.size + 1), shares, color=lines[batch][0], label=label, **thin
            )
            named.add(batch)
    first, last = toy_window(*window, eigenvalues.size)
    ax.axvspan(first, last, color=SHADE, lw=0, zorder=0)
    rank_axes(ax, "eigenvalue / trace")
    title = rf"$\alpha$ on the shaded ranks {first}-{last}"
    ax.legend(loc="lower left", title=title, alignment="left")
    ax.set_title("(a) untied, equal validation loss")


def _spectrum_label(batch: int, fit: Alpha, match: Match) -> str:
    error = rf" $\pm$ {fit.error:.2f}" if np.isfinite(fit.error) else ""
    return rf"B = {batch}: $\alpha$ = {fit.value:.2f}{error}, $\Delta$ loss {match.off:+.3f}"


def _draw_order(ax, runs: Sweep, exponents, claim: Claim, letter: str) -> None:
    """Panels b and c: alpha against batch size, a point a seed with its sampling error."""
    lines = batch_lines(runs.batches)
    table = values(exponents)
    for f, row in enumerate(exponents):
        shift = 1.06 ** (f - (len(exponents) - 1) / 2)
        for batch, fit in zip(runs.batches, row, strict=True):
            if fit is not None:
                colour, shape = lines[batch]
                bar = fit.error if np.isfinite(fit.error) else None
                ax.errorbar(
                    batch * shift, fit.value, bar, color=colour, marker=shape, elinewidth=0.9, ls=""
                )
    seen = np.any(np.isfinite(table), axis=0)
    means = [np.nanmean(column) for column in table.T[seen]]
    ax.plot(np.array(runs.batches)[seen], means, color=INK, lw=0.9, zorder=1)
    batch_axis(ax, runs.batches)
    ax.set_ylabel(rf"$\alpha$, ranks {claim.window}")
    test = (
        rf"$\rho(\alpha, -\log B)$ = {claim.statistic:.2f}, p = {claim.p:.2g}"
        if np.isfinite(claim.p)
        else ""
    )
    ax.set_title(f"({letter}) {test}" if test else f"({letter}) no test", fontsize=8.5)


def _spectra_note(study, runs: Sweep, matched, loss: float, tolerance: float, claims) -> str:
    absent = [
        run.name if run is not None else f"b{batch}-s{seed} (no finished run)"
        for seed, row, own in zip(runs.seeds, runs.runs, matched, strict=True)
        for batch, run, match in zip(runs.batches, row, own, strict=True)
        if match is None
    ]
    off = max(abs(match.off) for row in matched for match in row if match is not None)
    parts = [
        f"Last-position activations at validation loss {loss:.3f} (rows at most {off:.3f} off; "
        f"tolerance {tolerance:g}), {words(len(runs.seeds), 'seed')}. In a the first seed is "
        "thick, and the difference in loss is row less asked. Errors are the jackknife's over "
        "measured sequences; lines in b and c are means over seeds; p is exact, batch sizes "
        "permuted alike in all seeds.",
        f"No row at this loss: {', '.join(absent)}." if absent else "",
        edge_note(study.edges(runs.stage), runs.stage),
    ]
    return " ".join(part.strip() for part in parts if part) + "\n" + claims[0].sentence


# 11c


class Divergence(NamedTuple):
    """Divergences of one pair of runs at matched losses: their mean, how many, and the floor.

    floor: what two measurements of one model would show by sampling alone, NaN if not recorded;
    seed: of the first run.
    """

    jsd: float
    losses: int
    floor: float
    seed: int


def draw_divergence(figure: Figure, study: Study, config) -> list[Claim]:
    """Draws 11c, spectra of consecutive stages at equal loss; raises Missing without a pair."""
    require_pairs(study, CORE)
    steps = list(pairwise(CORE))
    between = [_between(study, *two, config.tolerance) for two in steps]
    if not any(between):
        raise Missing(f"no pair of stages has spectra within {config.tolerance:g} of one loss")
    seeds = [_within(study, two, config.tolerance) for two in steps]
    claims = [
        divergence_claim(two, own, floor)
        for two, own, floor in zip(steps, between, seeds, strict=True)
        if own
    ]
    losses = [pair.losses for own in between for pair in own]
    counts = f"{min(losses)} to {max(losses)} a pair"
    note = (
        f"A dot is a batch size and seed: the mean over rows of equal loss (at most "
        f"{config.tolerance:g} apart; {counts}). Spectra are compared by rank. Dashed: what "
        "sampling alone makes of two sets of sequences; too high if anything, since a pair shares "
        "one. Dotted: the mean between seeds of one stage and batch size, which share none.\n"
        + claims[-1].sentence
    )
    _draw_divergences(sheet(figure, 1, 1, note)[0, 0], steps, between, seeds)
    return claims


def divergence(one: Run, other: Run, tolerance: float) -> Divergence | None:
    """Compares two runs wherever both were measured at one loss; None where they never were."""
    matched = equal_losses(_measured(one), _measured(other), tolerance)
    if not matched:
        return None
    found = [jsd(spectrum(a), spectrum(b)) for a, b in matched]
    floors = [_floor(row) for pair in matched for row in pair]
    return Divergence(float(np.mean(found)), len(found), float(np.mean(floors)), one.seed)


def _floor(row: Row) -> float:
    kind = f"{SPECTRUM}_left_out"
    return expected_jsd(row.array(kind, LAST)) if row.has(kind, LAST) else np.nan


def _between(study: Study, before: str, after: str, tolerance: float) -> list[Divergence]:
    found = [divergence(one, other, tolerance) for one, other in pairs(study, before, after)]
    return [own for own in found if own is not None]


def _within(study: Study, stages: Sequence[str], tolerance: float) -> list[float]:
    """Divergences between seeds of one stage and batch size."""
    found = [
        divergence(one, other, tolerance)
        for stage in stages
        for one, other in combinations(study.stage(stage), 2)
        if one.batch == other.batch
    ]
    return [own.jsd for own in found if own is not None]


def divergence_claim(two, own: list[Divergence], seeds: list[float]) -> Claim:
    """Returns the claim of one transition: its mean beside the seed and the sampling floor."""
    mean = float(np.mean([d.jsd for d in own]))
    floors = [d.floor for d in own if np.isfinite(d.floor)]
    sampling = float(np.mean(floors)) if floors else np.nan
    seed = float(np.mean(seeds)) if seeds else np.nan
    # Three times the floor is where the protocol (1.10) begins to speak of a difference.
    floor = np.fmax(seed, sampling)
    outcome = UNDECIDED if not seeds else HELD if mean > 3 * floor else FAILED
    control = f"sampling floor {number(sampling, '.2g')}, seed floor {number(seed, '.2g')}"
    name = " to ".join(two)
    return Claim(
        "11c", f"{name}: spectra differ at equal loss by more than 3 floors",
        len(own), len({d.seed for d in own}), "all ranks", mean, np.nan, control, outcome,
        f"{outcome.capitalize()}: {name} has JSD {mean:.2g} at equal loss over "
        f"{words(len(own), 'pair')}; {control}.",
    )  # fmt: skip


def _draw_divergences(ax, steps, between, seeds) -> None:
    for x, (own, floor) in enumerate(zip(between, seeds, strict=True)):
        if own:
            values = np.array([d.jsd for d in own])
            place = x + np.linspace(-0.16, 0.16, values.size) if values.size > 1 else [x]
            ax.plot(place, values, "o", color=VERMILLION, ms=3.5, alpha=0.75)
            ax.plot([x - 0.3, x + 0.3], [values.mean()] * 2, color=INK, lw=1.6)
            ax.annotate(f"n = {values.size}", (x + 0.33, values.mean()), fontsize=7.5, va="center")
            sampling = np.array([d.floor for d in own])
            if np.any(np.isfinite(sampling)):
                ax.plot([x - 0.3, x + 0.3], [np.nanmean(sampling)] * 2, color=INK, lw=1, ls="--")
        if floor:
            ax.plot([x - 0.3, x + 0.3], [np.mean(floor)] * 2, color=INK, lw=1.3, ls=":")
    for style, label in (("-", "mean"), (":", "seed floor"), ("--", "sampling floor")):
        if label != "seed floor" or any(seeds):
            ax.plot([], [], color=INK, ls=style, label=label)
    ax.set_yscale("log")
    ax.set(xlim=(-0.5, len(steps) - 0.25), ylabel="JSD of spectra at equal loss (nats)")
    ax.set_xticks(range(len(steps)), [f"{a}\nto {b}" for a, b in steps])
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** 0.28)
    ax.legend(loc="upper left", ncol=3, borderaxespad=0.1)
