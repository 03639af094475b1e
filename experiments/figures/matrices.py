"""Figure 6: whether spectra of per-sample gradients depend on the matrix they are taken of.

Singular values of the rows vec(dL_i / dW) of the last layer, as they are and minus their mean; the
largest value of the first is mostly the mean gradient. Source: protocol spec, figure 6.
"""

from collections.abc import Sequence
from math import isfinite

import numpy as np
from matplotlib.figure import Figure

from experiments.figures.options import Options
from experiments.figures.page import caption, seeds_text, title, words
from experiments.figures.trajectories import Member, measured, missed_text, token_best
from experiments.study_records import GRADIENT, Run, Study
from lens_jax.axis_style import LINES, not_measured, rank_axes, token_axis, visible
from lens_jax.claims import Claim, Missing, number, p_text, sign_flip_test, verdict
from lens_jax.fits import GRAM_FLOOR, rankme, topk_share
from lens_jax.saved_run import short_count
from lens_jax.step_files import StepFile

INCHES = {6: (7.2, 5.4)}
CENTRED = f"{GRADIENT}_centred"
MATRICES = (
    ("attn/c_q", "$W_Q$"),
    ("attn/c_v", "$W_V$"),
    ("attn/c_proj", "$W_O$"),
    ("mlp/c_proj", "MLP out"),
)
PUBLISHED_RUNG, TOP = "betterwin", 10


def draw_6(figure: Figure, study: Study, options: Options) -> list[Claim]:
    """Draws gradient spectra of four matrices; raises Missing without measured gradients."""
    member = _member(study, options)
    run = member.first
    names = [pair for pair in MATRICES if _rows(run, pair[0])]
    title(figure, 6, f"Gradient spectra of four matrices, {member.family.name}")
    (spectra, centred), (ranks, shares) = figure.subplots(2, 2)
    centred.sharey(spectra)
    _draw_end(spectra, run, names, GRADIENT)
    spectra.set_title("(a) at the end, as they are")
    _draw_end(centred, run, names, CENTRED)
    centred.set_title("(b) at the end, minus their mean")
    _draw_along(ranks, member, names, effective_rank, "RankMe")
    ranks.set_title("(c) RankMe over training")
    _draw_along(shares, member, names, top_share, f"share of the {TOP} largest")
    shares.set_title(f"(d) top-{TOP} share over training")
    spectra.legend(loc="lower left")
    claims = [_claim(study, options, member, names)]
    caption(figure, _caption_text(member, names))
    return claims


def effective_rank(values: np.ndarray) -> float:
    """RankMe of singular values above the rounding of their Gram matrix."""
    return rankme(values, GRAM_FLOOR)


def top_share(values: np.ndarray) -> float:
    """Share of the ten largest singular values."""
    return topk_share(values, TOP)


def _member(study: Study, options: Options) -> Member:
    """The published rung, the one asked for, or the last of the ladder that has gradients."""
    wanted = options.rung or PUBLISHED_RUNG
    found = [
        member
        for family in study.families
        if (member := token_best(study, family, options)) is not None
        and any(_rows(member.first, matrix) for matrix, _ in MATRICES)
    ]
    named = [member for member in found if member.family.rung == wanted]
    if options.rung and not named:
        raise Missing(f"rung={options.rung}: none of its runs has measured gradients")
    if not found:
        raise Missing("runs with the gradient probe: python -m experiments.study preset=fig6")
    return named[0] if named else found[-1]


def _rows(run: Run, matrix: str) -> list[StepFile]:
    """The rows of a run whose gradients of a matrix are not all zero, as below a zero head."""
    rows = measured(run, GRADIENT, matrix)
    return [row for row in rows if _values(run, row, matrix, GRADIENT).any()]


def _values(run: Run, row: StepFile, matrix: str, kind: str) -> np.ndarray:
    return row.array(kind, run.final_site(GRADIENT, matrix))


def _draw_end(ax, run: Run, names: Sequence[tuple[str, str]], kind: str) -> None:
    shown = [
        (matrix, name, line)
        for (matrix, name), line in zip(MATRICES, LINES, strict=False)
        if (matrix, name) in names
        and _rows(run, matrix)[-1].has(kind, run.final_site(GRADIENT, matrix))
    ]
    if not shown:
        not_measured(ax, "centred gradients were not kept")
        return
    for matrix, name, (colour, marker) in shown:
        values = _values(run, _rows(run, matrix)[-1], matrix, kind)
        if kind == CENTRED:
            values = values[:-1]  # 0 but for rounding
        x, y = visible(values, values.sum())
        ax.plot(x, y, color=colour, marker=marker, markevery=[0, 3, 9], label=name, lw=1.2)
    rank_axes(ax, r"$\sigma / \Sigma\sigma$")


def _draw_along(ax, member: Member, names, of, label: str) -> None:
    """A thin line a seed, and a thick one for their mean where all of them were measured."""
    tokens = []
    for (matrix, name), (colour, marker) in zip(MATRICES, LINES, strict=False):
        if (matrix, name) not in names:
            continue
        tables = [
            {row.tokens: of(_values(run, row, matrix, GRADIENT)) for row in _rows(run, matrix)}
            for run in member.runs
        ]
        for table in tables[: len(tables) if len(tables) > 1 else 0]:
            ax.plot([*table], [*table.values()], color=colour, lw=0.6, alpha=0.6)
        shared = sorted(set.intersection(*map(set, tables)))
        means = [np.mean([table[count] for table in tables]) for count in shared]
        ax.plot(shared, means, color=colour, marker=marker, ms=3.5, label=name, lw=1.5)
        tokens += [np.array([*table], np.float64) for table in tables]
    token_axis(ax, np.concatenate(tokens))
    ax.set_ylabel(label)


def _claim(study: Study, options: Options, member: Member, names) -> Claim:
    """Two matrices differ alike in family after family.

    Of every family at its best batch the RankMe of MLP out less that of W_O, the mean over its
    seeds, at the target, which families that did not reach it have no state at; null: the
    difference of a family might as well have the other sign.
    """
    found = [token_best(study, family, options) for family in study.families]
    gaps = [(own, gap) for own in found if own and (gap := mean_gap(own)) is not None]
    missed = missed_text([own for own, _ in gaps])
    kept = [(own, gap) for own, gap in gaps if own.reached and isfinite(gap)]
    test = sign_flip_test([gap for _, gap in kept])
    outcome = verdict(abs(test.statistic), test.p, 2.0 ** (1 - max(len(kept), 1)))
    ends = {name: np.mean(_end_ranks(member, matrix)) for matrix, name in names}
    listed = ", ".join(f"{name.strip('$')} {rank:.1f}" for name, rank in ends.items())
    each = ", ".join(f"{own.family.rung} {gap:+.1f}" for own, gap in kept)
    seeds = _seed_range(member, names)
    return Claim(
        "6", "gradients of the MLP output and of W_O fill different numbers of directions",
        len(kept), min((len(own.runs) for own, _ in kept), default=0), "all ranks",
        test.statistic, test.p,
        f"largest difference between seeds of {member.family.name}: {seeds}", outcome,
        f"{outcome.capitalize()}: at the end RankMe of MLP out less that of W_O, means over seeds, "
        f"is {number(test.statistic, '+.1f')}, mean over {words(len(kept), 'family')} at the best "
        f"batch ({each}), {p_text(test)} by signs; {member.family.name}: {listed}; largest "
        f"difference between seeds {seeds}."
        + (f" Left out: {missed[0].lower()}{missed[1:]}" if missed else ""),
    )  # fmt: skip


def _end_ranks(member: Member, matrix: str) -> list[float]:
    """RankMe of a matrix's gradients at the end of every seed that has them."""
    return [
        effective_rank(_values(run, rows[-1], matrix, GRADIENT))
        for run in member.runs
        if (rows := _rows(run, matrix))
    ]


def mean_gap(member: Member) -> float | None:
    """Returns RankMe of MLP out less that of W_O at the end, the mean over the seeds of a cell.

    None where a seed has not both.
    """
    ends = [_end_ranks(member, matrix) for matrix in ("mlp/c_proj", "attn/c_proj")]
    if any(len(own) < len(member.runs) for own in ends):
        return None
    return float(np.mean(ends[0]) - np.mean(ends[1]))


def _seed_range(member: Member, names) -> str:
    if len(member.runs) < 2:
        return "not known, one seed"
    return f"{max(np.ptp(_end_ranks(member, matrix)) for matrix, _ in names):.2f}"


def _caption_text(member: Member, names) -> str:
    run = member.first
    row = _rows(run, names[0][0])[-1]
    best = "its token-best" if member.reached else "of the lowest last loss, target not reached"
    samples, length = row.meta.get("gradient_samples"), row.meta.get("sample_tokens")
    return (
        f"Last layer, {member.family.name} at batch {run.batch} ({best}), "
        f"{seeds_text(member.runs)} (a and b: the lowest; c and d: thin lines, thick their mean "
        f"where all were measured). Per-sample gradients, N = "
        f"{samples} samples of T = {length} tokens; singular values over their sum; a and b at "
        f"{short_count(row.tokens)} tokens. Values below the rounding of the Gram matrix do not "
        f"count and are not drawn."
    )
