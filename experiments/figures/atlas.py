"""Figures 13 to 16: spectral atlases, a row a rung, the same four columns throughout.

Activation and per-sample gradient spectra over training, and the RankMe and the tail exponent of
both along it. A rung is shown at its token-best batch. Source: protocol spec, figures 13 to 16.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.efficiency import ranks_of
from experiments.figures.page import Options, caption, ranks_text, seeds_text, title, words
from experiments.figures.trajectories import (
    ALPHAS,
    OUTPUT,
    RANKMES,
    Member,
    Statistic,
    change,
    follow,
    gradient_ranks,
    measured,
    missed_text,
    token_best,
    trajectory_rho,
)
from experiments.rank_windows import window_of
from experiments.study_records import ACTIVATION, GRADIENT, Family, Run, Study
from lens_jax.axis_style import (
    BLUE,
    FAINT,
    SHADE,
    VERMILLION,
    line_handle,
    marker,
    not_measured,
    rank_axes,
    strided,
    token_axis,
    token_norm,
    token_ticks,
    visible,
)
from lens_jax.claims import Claim, Missing, number, p_text, sign_flip_test, verdict
from lens_jax.saved_run import short_count

INCHES = {13: (7.2, 5.6), 14: (7.2, 7.6), 15: (7.2, 7.6), 16: (7.2, 5.6)}
ROWS = {
    13: ("baseline", "rope", "muon", "untied"),
    14: ("valuemix", "unet", "fixedwin", "flexwin", "vte", "betterwin"),
    15: ("sparsev", "truncrope", "softcap", "fp8head", "lswa", "attnscale"),
    16: ("flexwin", "betterwin", "sparsev"),
}
ATLAS_TIERS = ("d36", "d48")
DEEP_ROWS = ("flexwin-d36", "betterwin-d36", "sparsev-d36", "betterwin-d48")
SPECTRA = 8


# The figures


def draw_13(figure: Figure, study: Study, options: Options) -> list[Claim]:
    """Draws the atlas of the prefix, baseline to untied; raises Missing without any of them."""
    return _draw_rungs(13, figure, study, options)


def draw_14(figure: Figure, study: Study, options: Options) -> list[Claim]:
    """Draws the atlas from valuemix to betterwin; raises Missing without any of them."""
    return _draw_rungs(14, figure, study, options)


def draw_15(figure: Figure, study: Study, options: Options) -> list[Claim]:
    """Draws the atlas from sparsev to attnscale; raises Missing without any of them."""
    return _draw_rungs(15, figure, study, options)


def draw_16(figure: Figure, study: Study, options: Options) -> list[Claim]:
    """Draws the atlas of d36 and d48 on their own ranks; raises Missing without any run of them.

    What it asks is whether trajectories have the signs of d12, so every statistic is correlated
    with that of the same rung at d12, where the study has it.
    """
    families = [family for family in study.families if family.tier in ATLAS_TIERS]
    members = _members(study, families, options)
    if not members:
        raise Missing(_needed(16, "runs at tier d36 or d48 with spectra"))
    absent = [name for name in DEEP_ROWS if name not in {m.family.name for m in members}]
    window = window_of(study, options.window, ATLAS_TIERS[0])
    axes = _draw(16, figure, members, window, "d36 and d48")
    likeness = [_likeness(study, member, options) for member in members]
    for row, own in zip(axes, likeness, strict=True):
        for ax, statistics in zip(row[2:], (RANKMES, ALPHAS), strict=True):
            _write_likeness(ax, [own.get(s.name, np.nan) for s in statistics])
    likeness_note = "rho: Spearman with the trajectory of the rung at d12, activations / gradients."
    caption(figure, f"{_caption_text(members, absent, window)} {likeness_note}")
    return [_likeness_claim(members, likeness, window)]


def _draw_rungs(fig: int, figure: Figure, study: Study, options: Options) -> list[Claim]:
    families = [f for f in study.families if f.tier == "d12" and f.rung in ROWS[fig]]
    members = _members(study, families, options)
    if not members:
        raise Missing(_needed(fig, f"d12 runs of {', '.join(ROWS[fig])} with spectra"))
    absent = [rung for rung in ROWS[fig] if rung not in {m.family.rung for m in members}]
    window = window_of(study, options.window, "d12")
    _draw(fig, figure, members, window, _range(members))
    caption(figure, _caption_text(members, absent, window))
    tokens = options.tokens or study.config.get("early_tokens")
    asked = ((ALPHAS[0], "the activation tail steepens"), (RANKMES[0], "activation RankMe rises"))
    return [_change_claim(fig, members, *own, window, tokens) for own in asked if tokens]


def _range(members: Sequence[Member]) -> str:
    return " to ".join(dict.fromkeys(members[place].family.rung for place in (0, -1)))


def _needed(fig: int, what: str) -> str:
    return f"{what}: python -m experiments.study preset=fig{fig}"


def _members(study: Study, families: Sequence[Family], options: Options) -> list[Member]:
    found = [token_best(study, family, options) for family in families]
    return [own for own in found if own is not None and measured(own.first, ACTIVATION)]


def _draw(fig: int, figure: Figure, members: list[Member], window, subject: str) -> np.ndarray:
    """Draws all rows and returns the axes (rows, 4)."""
    figure.set_size_inches(INCHES[fig][0], 1.5 * len(members) + 1.9)
    title(figure, fig, f"Spectra over training, {subject}")
    axes = figure.subplots(len(members), 4, squeeze=False, sharey="col")
    tokens = [row.tokens for member in members for row in member.first.steps]
    norm = token_norm(tokens)
    for row, member in zip(axes, members, strict=True):
        ranks = ranks_of(member.first, window)
        _draw_spectra(row[0], member.first, ACTIVATION, None, norm, ranks)
        _draw_spectra(row[1], member.first, GRADIENT, OUTPUT, norm, None)
        for ax, statistics in zip(row[2:], (RANKMES, ALPHAS), strict=True):
            _draw_trajectories(ax, member, statistics, window, tokens)
        row[0].set_ylabel(_row_name(member), fontweight="bold")
    _dress(axes, pad=14 if fig == 16 else 5)  # 16 writes a line below its titles
    bar = figure.colorbar(
        ScalarMappable(norm, "viridis_r"), ax=axes[:, :2], location="bottom", aspect=40, shrink=0.7
    )
    bar.set_label("training tokens (spectra); dashed: before training", fontsize=7.5)
    token_ticks(bar.ax.xaxis, norm.vmin, norm.vmax)
    handles = [
        line_handle(BLUE, "-", "o", "activations"),
        line_handle(VERMILLION, "--", "s", "gradients of $W_O$"),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=2)
    return axes


def _row_name(member: Member) -> str:
    size = f"B {member.first.batch} ({short_count(member.first.tokens_per_step)} tokens)"
    return f"{member.family.name}\n{size}"


def _dress(axes: np.ndarray, pad: float) -> None:
    names = (r"activation $\lambda / \Sigma\lambda$", r"gradient $\sigma / \Sigma\sigma$, $W_O$")
    for ax, name in zip(axes[0], (*names, "RankMe", r"tail exponent $\alpha$"), strict=True):
        ax.set_title(name, fontsize=8.5, pad=pad)
    for ax in axes[:-1].flat:
        ax.set_xlabel("")
    axes[0, 2].set_yscale("log")
    for column in (1, 2):
        low, high = axes[0, column].get_ylim()
        for ax in axes[:, column]:
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 60 else (1,)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.yaxis.set_minor_formatter(NullFormatter())


def _draw_spectra(ax, run: Run, kind: str, matrix: str | None, norm, ranks) -> None:
    """Spectra of one run over their sum, a curve a measured step, light to dark."""
    rows = [row for row in measured(run, kind, matrix)]
    rows = [row for row in rows if row.array(kind, run.final_site(kind, matrix)).max() > 0]
    if not rows:
        not_measured(ax)
        return
    colours = ScalarMappable(norm, "viridis_r")
    for index in np.unique(np.linspace(0, len(rows) - 1, SPECTRA).round().astype(int)):
        row = rows[index]
        values = row.array(kind, run.final_site(kind, matrix))
        style = {"color": FAINT, "ls": "--"} if row.tokens == 0 else {}
        style = style or {"color": colours.to_rgba(row.tokens)}
        ax.plot(*visible(values, values.sum()), lw=1.0, **style)
    if ranks is not None:
        ax.axvspan(*ranks, color=SHADE, lw=0, zorder=0)
    rank_axes(ax, "")


def _draw_trajectories(ax, member: Member, statistics, window, tokens) -> None:
    """One statistic of activations and gradients over training; thin: seeds after the first."""
    styles = ((BLUE, "-", "o"), (VERMILLION, "--", "s"))
    for statistic, (colour, line, shape) in zip(statistics, styles, strict=True):
        for place, run in enumerate(member.runs):
            own, values = follow(run, statistic, window)
            size = {"lw": 1.3, "marker": marker(shape, own.size), "ms": 2.8}
            ax.plot(own, values, color=colour, ls=line, **(size if place == 0 else {"lw": 0.6}))
    token_axis(ax, tokens)
    ticks = ax.get_xticks()
    kept = strided(len(ticks), 3)  # the panel has room for no more
    ax.set_xticks(sorted({0.0, *ticks[kept]}))


def _caption_text(members: Sequence[Member], absent: Sequence[str], window) -> str:
    first = members[0].first
    meta = first.steps[-1].meta
    used = dict.fromkeys(ranks_text(ranks_of(m.first, window), window) for m in members)
    seeds = seeds_text([run for member in members for run in member.runs])
    samples = dict.fromkeys(
        f"{m.first.steps[-1].meta.get('gradient_samples')} samples of "
        f"{m.first.steps[-1].meta.get('sample_tokens')} tokens"
        for m in members
        if measured(m.first, GRADIENT, OUTPUT)
    )
    ranks = dict.fromkeys(gradient_ranks(m.first) for m in members)
    gradients = ", ".join(f"{own[0]}-{own[1]}" for own in ranks if own)
    parts = [
        f"n = {words(len(members), 'rung')} at the batch of the fewest tokens to the target, "
        f"{seeds} (thin: after the first); last layer. Tail ranks {', '.join(used)}, shaded"
        + (f"; gradients: ranks {gradients}." if gradients else "."),
        f"Gradients: {'; '.join(samples)}, uncentred, 2 alpha of singular values."
        if samples
        else "",
        "Gradients of unlike samples do not compare." if len(samples) > 1 else "",
        f"Activations: {meta['act_tokens']:,} tokens." if "act_tokens" in meta else "",
        "Aligned by training tokens, each run to its end; one range of y in a column.",
        missed_text(members),
        f"Not in the study: {', '.join(absent)}." if absent else "",
    ]
    return " ".join(part for part in parts if part)


# What the atlases claim


def _change_claim(
    fig: int, members: list[Member], statistic: Statistic, said: str, window, tokens: int
) -> Claim:
    """Whether a statistic of activations grows in the rungs of a figure, each counted once."""
    own = [[change(run, statistic, window, tokens) for run in m.runs] for m in members]
    means = [float(np.mean(values)) for values in own]
    test = sign_flip_test(means)
    finite = int(np.sum(np.isfinite(means)))
    least = 2.0 ** (1 - finite) if finite else 1.0
    outcome = verdict(test.statistic, test.p, least)
    span = f"from {short_count(tokens)} tokens to the end"
    listed = ", ".join(
        f"{m.family.rung} {number(mean, '+.2f')}" for m, mean in zip(members, means, strict=True)
    )
    ranks = "all ranks"
    if statistic in ALPHAS:
        ranks = f"ranks {ranks_text(ranks_of(members[0].first, window), window)}"
    return Claim(
        str(fig), f"{_range(members)}: {said} {span}", finite, min(map(len, own)),
        ranks.removeprefix("ranks "), test.statistic, test.p,
        "each rung's change might as well have the other sign", outcome,
        f"{outcome.capitalize()}: {statistic.name}, {ranks}, changes {span} by "
        f"{number(test.statistic, '+.2f')} on average ({listed}), n = {words(finite, 'rung')}, "
        f"{p_text(test)} by signs (best possible {least:.2g}).",
    )  # fmt: skip


def _likeness(study: Study, member: Member, options: Options) -> dict[str, float]:
    """rho of each statistic's trajectory with that of the same rung at d12, by name."""
    families = [f for f in study.families if f == Family(member.family.rung, "d12")]
    shallow = [own for f in families if (own := token_best(study, f, options)) is not None]
    if not shallow:
        return {}
    window = window_of(study, options.window, "d12")
    return {
        statistic.name: trajectory_rho(shallow[0].first, member.first, statistic, window)
        for statistic in (*RANKMES, *ALPHAS)
    }


def _write_likeness(ax, rhos: Sequence[float]) -> None:
    """Writes above a panel how its trajectories go with those of d12, activations first."""
    text = " / ".join(number(rho) for rho in rhos)
    place = {"transform": ax.transAxes, "ha": "right", "va": "bottom", "fontsize": 7}
    ax.text(1.0, 1.0, rf"$\rho$ {text}", **place)


def _likeness_claim(members: list[Member], likeness: list[dict[str, float]], window) -> Claim:
    means = [_mean(list(own.values())) for own in likeness]
    test = sign_flip_test(means)
    count = int(np.sum(np.isfinite(means)))
    least = 2.0 ** (1 - count) if count else 1.0
    outcome = verdict(test.statistic, test.p, least)
    names = [statistic.name for statistic in (*RANKMES, *ALPHAS)]
    listed = ", ".join(
        f"{name} {number(_mean([own.get(name, np.nan) for own in likeness]))}" for name in names
    )
    return Claim(
        "16", "trajectories of d36 and d48 have the signs of d12", count, 1,
        f"{window[0]}-{window[1]} beside d12's", test.statistic, test.p,
        "the mean rho of a family might as well have the other sign", outcome,
        f"{outcome.capitalize()}: mean rho {number(test.statistic)} between d12 and deep "
        f"trajectories ({listed}), n = {words(count, 'family')} with a d12 run of the same rung, "
        f"{p_text(test)} by signs (best possible {least:.2g}).",
    )  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")
