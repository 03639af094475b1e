"""Figure 18: whether RankMe passes through collapse, expansion and compression, by batch.

Phases are called by `phase_rule`. Source: protocol spec, figure 18; the three phases are those of
Li et al. 2025 (arXiv 2509.23024), who have them in the last tokens of the last layer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments.figures.page import (
    Options,
    batch_line,
    caption,
    seeds_of,
    seeds_text,
    title,
    words,
)
from experiments.figures.phase_rule import (
    Phase,
    chance_of_phases,
    clearness,
    phases,
    sequence,
)
from experiments.study_records import ACTIVATION, Family, Run, Study
from lens_jax.axis_style import (
    BLUE,
    GRID,
    VERMILLION,
    line_handle,
    marker,
    not_measured,
    token_axis,
)
from lens_jax.claims import FAILED, HELD, UNDECIDED, Claim, Missing, number, p_text, verdict
from lens_jax.correlations import UNDEFINED, PermutationTest, joint_permutation_p
from lens_jax.fits import rankme
from lens_jax.saved_run import short_count

INCHES = {18: (7.2, 8.0)}
LAST_TOKEN = "act_last_cov_eigenvalues"  # noqa: S105
VARIANTS = ((ACTIVATION, "all tokens"), (LAST_TOKEN, "last tokens"))
SEEDS_NEEDED = 3
PATTERN = "fall, rise, fall"


class Trajectory(NamedTuple):
    """ln RankMe of a run at its measured steps, (n,) each, and the phases it goes through."""

    run: Run
    tokens: np.ndarray
    steps: np.ndarray
    values: np.ndarray
    phases: list[Phase]


def trajectory(run: Run, kind: str) -> Trajectory | None:
    """Reads ln RankMe of the last layer over training; None where it was not measured.

    ln, so that the spread between the seeds of one cell can serve cells of another size.
    """
    if not run.steps or not run.sites(ACTIVATION):
        return None
    site = run.final_site(ACTIVATION)
    rows = [row for row in run.steps if row.has(kind, site)]
    values = np.log([rankme(row.array(kind, site)) for row in rows])
    kept = np.isfinite(values)
    if not np.any(kept):
        return None
    tokens, steps = (np.array([getattr(row, n) for row in rows])[kept] for n in ("tokens", "step"))
    return Trajectory(run, tokens, steps, values[kept], [])


def seed_sd(trajectories: Sequence[Trajectory]) -> tuple[float, int]:
    """Returns the sd between seeds at equal steps and the number of runs behind it, or (NaN, 0).

    Pooled over the steps that all seeds of a cell share and over the cells with three or more.
    """
    cells: dict = {}
    for own in trajectories:
        cells.setdefault(own.run.cell, []).append(own)
    variances, runs = [], 0
    for seeds in cells.values():
        shared = set.intersection(*(set(own.steps.tolist()) for own in seeds))
        if len(seeds) < SEEDS_NEEDED or not shared:
            continue
        table = [own.values[np.isin(own.steps, sorted(shared))] for own in seeds]
        variances.append(np.var(table, axis=0, ddof=1))
        runs += len(seeds)
    if not runs:
        return float("nan"), 0
    return float(np.sqrt(np.mean(np.concatenate(variances)))), runs


class Variant(NamedTuple):
    """All trajectories of one kind with their phases, and the thresholds these were called by.

    sds: the seed sd of each family; seed_runs: runs behind all of them.
    """

    label: str
    all: list[Trajectory]
    sds: dict[Family, float]
    seed_runs: int

    @property
    def called(self) -> bool:
        """Whether there is a threshold at all."""
        return bool(np.any(np.isfinite(list(self.sds.values()))))


def read_variant(study: Study, kind: str, label: str) -> Variant:
    """Reads one kind of RankMe of all chosen runs and calls the phases.

    The noise is that between seeds of the same family, where it has cells for it: runs of one rung
    that collapse at another step each would hide what all runs of another do. Elsewhere it is
    pooled over all families.
    """
    found = [own for run in study.chosen if (own := trajectory(run, kind)) is not None]
    pooled, seed_runs = seed_sd(found)
    sds = {}
    for family in dict.fromkeys(own.run.family for own in found):
        sd, _ = seed_sd([own for own in found if own.run.family == family])
        sds[family] = sd if np.isfinite(sd) else pooled
    called = [own._replace(phases=phases(own.values, 3 * sds[own.run.family])) for own in found]
    return Variant(label, called, sds, seed_runs)


def _ended(variant: Variant) -> Variant:
    """The variant without runs that go on or diverged, whose last phases are not known."""
    ended = [t for t in variant.all if t.run.finished and t.run.result["reason"] != "diverged"]
    return variant._replace(all=ended)


def middle_test(variant: Variant) -> tuple[PermutationTest, float, int]:
    """Tests that fall, rise, fall is clearest at intermediate batches; with its least p, families.

    Within a family clearness, the mean over seeds, is correlated with minus the distance of a
    batch from the middle of the tiers; batches are permuted within families. Families in which it
    is nowhere, or of fewer than three batches, take no part.
    """
    pairs = []
    for family in dict.fromkeys(own.run.family for own in variant.all):
        members = [own for own in variant.all if own.run.family == family]
        batches = sorted({own.run.batch for own in members})
        clear = [
            np.mean([clearness(own.phases) for own in members if own.run.batch == batch])
            for batch in batches
        ]
        places = np.arange(len(batches))
        near = -np.abs(places - places.mean())
        if len(batches) >= 3 and np.ptp(clear) > 0:
            pairs.append((near, np.array(clear)))
    if not pairs:
        return UNDEFINED, 1.0, 0
    best = joint_permutation_p([(near, _arranged(clear, near)) for near, clear in pairs], "signed")
    return joint_permutation_p(pairs, "signed"), best.p, len(pairs)


def _arranged(clear: np.ndarray, near: np.ndarray) -> np.ndarray:
    """The values of `clear` in the order of `near`, the best that permuting them could come to.

    Not `near` itself: a family of which most batches show nothing has ties, and cannot reach that.
    """
    return np.sort(clear)[np.argsort(np.argsort(near, kind="stable"))]


# The figure


def draw_18(figure: Figure, study: Study, options: Options) -> list[Claim]:
    """Draws RankMe over training and its phases, a row a family; raises Missing without spectra."""
    variants = [read_variant(study, *variant) for variant in VARIANTS]
    main = variants[0]
    if not main.all:
        raise Missing(
            "runs with the activation probe measured along training: "
            "python -m experiments.study preset=fig18"
        )
    families = [f for f in study.families if any(own.run.family == f for own in main.all)]
    figure.set_size_inches(INCHES[18][0], 1.05 * len(families) + 1.7)
    title(figure, 18, "RankMe over training, and its phases")
    axes = figure.subplots(len(families), 3, squeeze=False, sharex=True)
    before = None
    for row, family in zip(axes, families, strict=True):
        batches = sorted({run.batch for run in study.of(family)})
        for ax, variant in zip(row, variants, strict=False):
            _draw_lines(ax, [t for t in variant.all if t.run.family == family], batches)
        _draw_strips(row[2], [t for t in main.all if t.run.family == family], batches, main.called)
        row[0].set_ylabel(f"{family.name}\nRankMe")
        if batches != before:
            _add_legends(row)
        before = batches
    _dress(axes, np.concatenate([own.tokens for own in main.all]))
    claims = [claim for v in map(_ended, variants) if v.all for claim in _claims(v)]
    caption(figure, _caption_text(variants, families))
    return claims


def _draw_lines(ax, trajectories: list[Trajectory], batches: list[int]) -> None:
    if not trajectories:
        not_measured(ax)
        return
    named = set()
    for own in trajectories:
        style = batch_line(batches.index(own.run.batch), len(batches))
        style |= {"marker": marker(style.get("marker", ""), len(own.values)), "ms": 2.5}
        thin = {"lw": 0.6, "ms": 0} if own.run.batch in named else {"lw": 1.3}
        label = None if own.run.batch in named else f"B {own.run.batch}"
        ax.plot(own.tokens, np.exp(own.values), label=label, **(style | thin))
        named.add(own.run.batch)


def _dress(axes: np.ndarray, tokens: np.ndarray) -> None:
    for ax, name in zip(axes[0], ("(a) all tokens", "(b) last tokens", "(c) phases"), strict=True):
        ax.set_title(name)
    token_axis(axes[0, 0], tokens)  # for all: the axis is shared
    axes[0, 0].set_xlabel("")
    for ax in axes[-1]:
        ax.set_xlabel("training tokens")


def _add_legends(row: np.ndarray) -> None:
    low, high = row[0].get_ylim()
    row[0].set_ylim(low, high + 0.3 * (high - low))
    place = {"loc": "upper right", "columnspacing": 0.7, "handlelength": 1.0, "borderaxespad": 0.0}
    row[0].legend(ncols=4, **place)
    if row[2].has_data():
        handles = [line_handle(BLUE, label="falls"), line_handle(VERMILLION, label="rises")]
        row[2].legend(handles=handles, ncols=2, **place)


def _draw_strips(ax, trajectories: list[Trajectory], batches: list[int], called: bool) -> None:
    """A line a run, batches from below; where a phase lies it is thick and coloured."""
    if not called:
        not_measured(ax, "no cell with 3 seeds:\nno threshold for a phase")
        return
    seeds = {b: [t for t in trajectories if t.run.batch == b] for b in batches}
    for place, (_batch, members) in enumerate(seeds.items()):
        for offset, own in zip(_spread(len(members)), members, strict=True):
            y = [place + offset] * 2
            ax.plot(own.tokens[[0, -1]], y, color=GRID, lw=1.0, zorder=1)
            for phase in own.phases:
                colour = VERMILLION if phase.change > 0 else BLUE
                ends = own.tokens[[phase.first, phase.last]]
                width = 4.0 if len(members) == 1 else 2.2
                ax.plot(ends, y, color=colour, lw=width, solid_capstyle="butt")
    ax.set_ylim(-0.6, len(batches) + 0.25)
    ax.set_yticks(range(len(batches)), [f"B {batch}" for batch in batches])
    ax.grid(visible=False, axis="y")


def _spread(count: int) -> np.ndarray:
    return np.linspace(-0.25, 0.25, count) if count > 1 else np.zeros(1)


def _claims(variant: Variant) -> list[Claim]:
    runs, where = variant.all, f"RankMe of {variant.label}"
    seeds, _ = seeds_of([own.run for own in runs])
    shown = [own for own in runs if clearness(own.phases) > 0]
    share = len(shown) / len(runs)
    chance = chance_of_phases(int(np.median([own.values.size for own in runs])))
    counts: dict[str, int] = {}
    for own in runs:
        counts[sequence(own.phases)] = counts.get(sequence(own.phases), 0) + 1
    listed = "; ".join(f"{name}: {n}" for name, n in sorted(counts.items(), key=lambda i: -i[1]))
    control = f"flat runs with seed noise have a phase in {chance:.1%}"
    called = variant.called
    outcome = UNDECIDED if not called else HELD if 0 < share < 1 else FAILED
    first = Claim(
        "18", f"{where}: collapse, expansion, compression occurs, and not in all runs",
        len(runs), seeds, "all ranks", share if called else np.nan, np.nan, control, outcome,
        f"{outcome.capitalize()}: {PATTERN} in {len(shown)} of {len(runs)} runs of {where} "
        f"(sequences: {listed}); {control}."
        if called
        else f"Undecided: no cell has {SEEDS_NEEDED} seeds, so no change of {where} can be told "
        "from noise.",
    )  # fmt: skip
    test, least, families = middle_test(variant)
    outcome = verdict(test.statistic, test.p, least)
    second = Claim(
        "18", f"{where}: {PATTERN} is clearest at intermediate batches",
        families, seeds, "all ranks", test.statistic, test.p, "batches permuted within families",
        outcome,
        f"{outcome.capitalize()}: rho(clearness, nearness to the middle batch) = "
        f"{number(test.statistic)} over {words(families, 'family')} that show it, {p_text(test)} "
        f"(best possible {least:.2g}), for {where}.",
    )  # fmt: skip
    return [first, second]


def _caption_text(variants: Sequence[Variant], families) -> str:
    main = variants[0]
    seeds = seeds_text([own.run for own in main.all])
    end = max(own.tokens[-1] for own in main.all)
    parts = [
        f"n = {len(main.all)} runs of {words(len(families), 'family')}, {seeds} (thin: after the "
        "first). Last layer, RankMe of eigenvalues over all ranks, aligned by tokens up to "
        f"{short_count(end)}.",
    ]
    for variant in variants:
        if variant.called:
            low, high = min(variant.sds.values()), max(variant.sds.values())
            source = f"seed sd {low:.1%} to {high:.1%} by family ({variant.seed_runs} runs)"
            parts.append(f"{variant.label.capitalize()}: {source}.")
    parts.append(
        "Phase: a monotone run of the series smoothed over 3 checkpoints whose change of ln RankMe "
        "exceeds 3 seed sd of its family; (c) is for all tokens."
    )
    return " ".join(parts)
