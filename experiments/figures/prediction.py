"""Figures 2 and 10: whether the exponent of an early spectrum orders batches by their tokens.

Families are kept apart throughout: a token efficiency is relative to the best batch of its family.
At equal tokens an exponent knows nothing of how long its run will be; the published alignment, a
share of each run's own length, does, and stands beside it in figure 8. Source: protocol spec,
figures 2 and 10, and its traps T1 to T4.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from experiments.figures.options import Options, of_tiers, tokens_of
from experiments.figures.page import (
    caption,
    family_line,
    legend_outside,
    ranks_text,
    seeds_of,
    seeds_text,
    title,
    words,
    zero_line,
)
from experiments.figures.prediction_tests import (
    ALPHA_BARS,
    best_look_p,
    beyond_claim,
    count_text,
    left_out_text,
    order_claim,
)
from experiments.figures.trajectories import span_text
from experiments.rank_windows import DEEP_TIERS, window_of
from experiments.statistics import FamilyPrediction, Prediction, predict
from experiments.study_records import ACTIVATION, Study
from lens_jax.axis_style import FAINT, INK, line_handle, not_measured
from lens_jax.claims import Claim, Missing, number, p_text, sign_flip_test, verdict
from lens_jax.saved_run import layer_name, short_count

INCHES = {2: (7.2, 4.0), 10: (7.2, 3.6)}
FEW = 3  # batches of a family that make an order
EXCESS = "tokens beyond the family's best (%)"


# Figure 2


def draw_2(figure: Figure, study: Study, options: Options) -> list[Claim]:
    """Draws early alpha against the tokens to target, d12 and deeper tiers apart.

    Raises Missing where no family has an exponent and a crossing at three batches.
    """
    tokens = tokens_of(study, options)
    of_d12 = of_tiers(study, options, ("d12",))
    at_d12, beyond = (window_of(study, options.window, tier) for tier in ("d12", DEEP_TIERS[0]))
    shallow = _at_tokens(of_d12, tokens, at_d12)
    deep = _at_tokens(of_tiers(study, options, DEEP_TIERS), tokens, beyond)
    found = [prediction for prediction in (shallow, deep) if prediction is not None]
    if not found:
        raise Missing(
            f"a family with {FEW} batches measured at {short_count(tokens)} tokens and run to the "
            "target: python -m experiments.study preset=fig2"
        )
    families = [family for prediction in found for family in prediction.families]
    figure.set_size_inches(INCHES[2][0], max(3.4, 2.2 + 0.2 * len(families)))
    title(figure, 2, f"Alpha after {short_count(tokens)} tokens, and tokens to the target")
    axes = figure.subplots(1, 3, width_ratios=(1.2, 1.2 if deep else 0.62, 1.1))
    lacking = "no tier beyond\nd12 in this study:\npreset=M3"
    no_order = (
        f"no order from\n{FEW} batches of d12" if of_d12.chosen else "no d12 run\nin this study"
    )
    _draw_scatter(axes[0], shallow, "(a) d12", no_order)
    _draw_scatter(axes[1], deep, "(b) deeper tiers", lacking)
    (axes[0] if shallow else axes[1]).set_ylabel(EXCESS)
    _draw_rhos(axes[2], families)
    axes[2].set_title("(c) rho of each family")
    part = of_tiers(study, options, ("d12", *DEEP_TIERS))
    caption(figure, _caption_2(part, shallow, deep, tokens))
    claims = []
    for prediction, tier in ((shallow, "d12"), (deep, "deeper tiers")):
        if prediction is not None:
            claims += _claims("2", prediction, tier, study)
    return claims


def _at_tokens(part: Study, tokens: int, window) -> Prediction | None:
    return _useful(predict(part, tokens=tokens, window=window)) if part.chosen else None


def _useful(prediction: Prediction) -> Prediction | None:
    kept = [f for f in prediction.families if np.isfinite(f.rho_alpha.statistic)]
    return prediction._replace(families=tuple(kept)) if kept else None


def _claims(figure: str, prediction: Prediction, tier: str, study: Study) -> list[Claim]:
    ranks = _ranks(prediction)
    seeds = seeds_of(_runs(study, prediction))[0]
    where = f"at {short_count(prediction.tokens)} tokens"
    what = f"{tier}: a larger alpha {where} goes with fewer tokens to the target"
    more = f"{tier}: alpha {where} says more of the tokens to the target than the batch size does"
    return [
        order_claim(figure, what, prediction, ranks, where, seeds),
        beyond_claim(figure, more, prediction, ranks, where, seeds),
    ]


def _runs(study: Study, prediction: Prediction) -> list:
    families = {family.family for family in prediction.families}
    return [run for run in study.chosen if run.family in families]


def _ranks(prediction: Prediction) -> str:
    return f"{prediction.ranks[0]}-{prediction.ranks[1]}"


def _normalised(values: np.ndarray) -> np.ndarray:
    """Values from 0 to 1 within a family; NaN where they are all equal."""
    low, high = np.nanmin(values), np.nanmax(values)
    return (values - low) / (high - low) if high > low else np.full(values.shape, np.nan)


def _draw_scatter(ax, prediction: Prediction | None, name: str, reason: str) -> None:
    ax.set_title(name)
    if prediction is None:
        not_measured(ax, reason)
        return
    for family in prediction.families:
        _draw_family(ax, family, _normalised(family.alpha))
    ax.set_xlabel("normalised early alpha")
    ax.set_xlim(-0.06, 1.06)
    _write_rho(ax, prediction)


def _draw_family(ax, family: FamilyPrediction, x: np.ndarray, error=None) -> None:
    """A family's batches, larger marks for larger ones, joined in the order of x."""
    style = family_line(family.family.rung)
    kept = np.flatnonzero(np.isfinite(x) & np.isfinite(family.excess))
    kept = kept[np.argsort(x[kept])]
    x, y = x[kept], 100 * family.excess[kept]
    if error is not None and np.any(np.isfinite(error)):
        bars = np.nan_to_num(error[kept])
        ax.errorbar(x, y, xerr=bars, fmt="none", color=style["color"], elinewidth=0.8)
    ax.plot(x, y, color=style["color"], lw=0.7, alpha=0.6)
    sizes = 14 + 34 * kept / max(1, len(family.batches) - 1)
    ax.scatter(x, y, s=sizes, color=style["color"], marker=style["marker"], lw=0)


def _write_rho(ax, prediction: Prediction) -> None:
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.24 * (high - low))
    lines = (
        rf"mean $\rho$ of $\alpha$ {number(prediction.alpha.statistic)}, "
        f"{p_text(prediction.alpha)}",
        rf"of $-\log B$ {number(prediction.batch.statistic)}, "
        f"of early loss {number(prediction.loss.statistic)}",
    )
    ax.text(0.98, 0.985, "\n".join(lines), ha="right", va="top", fontsize=7, transform=ax.transAxes)


def _draw_rhos(ax, families: Sequence[FamilyPrediction]) -> None:
    """A row a family: rho of its alpha, and of the two predictors that need no spectrum."""
    tiers = {family.family.tier for family in families}
    names = [f.family.rung if tiers == {"d12"} else f.family.name for f in families]
    for place, family in enumerate(families):
        style = family_line(family.family.rung)
        ax.plot(family.rho_batch.statistic, place, "o", ms=8, mfc="none", mec=INK)
        ax.plot(family.rho_loss.statistic, place, "|", ms=10, color=FAINT, mew=1.6)
        ax.plot(family.rho_alpha.statistic, place, ls="", **style)
    ax.axvline(0, color=FAINT, lw=0.7)
    ax.set_yticks(range(len(families)), names)
    ax.set_ylim(len(families) - 0.4, -0.6)
    ax.set(xlim=(-1.12, 1.12), xticks=(-1, 0, 1), xlabel=r"$\rho$ with token efficiency")
    handles = [
        line_handle(INK, "", "o", r"$\alpha$"),
        line_handle(INK, "", "o", r"$-\log B$"),
        line_handle(FAINT, "", "|", "early loss"),
    ]
    handles[1].set(markerfacecolor="none", markersize=7)
    legend_outside(ax, 0.4, -0.42, handles=handles, ncols=3, columnspacing=0.8, handletextpad=0.1)


def _caption_2(study: Study, shallow, deep, tokens: int) -> str:
    parts = []
    for prediction, name in ((shallow, "(a)"), (deep, "(b)")):
        if prediction is not None:
            parts.append(f"{name}: {_conditions(study, prediction)}.")
    found = [f for p in (shallow, deep) if p is not None for f in p.families]
    parts.append(
        f"Rows nearest to {short_count(tokens)} tokens in all runs. Colours as in (c), larger "
        "marks for larger batches; alpha: 0 at the least, 1 at the greatest of a family. p: "
        "batches permuted within families."
    )
    parts.append(_censored(found))
    parts.append(left_out_text(study, [family.family for family in found]))
    return " ".join(part for part in parts if part)


def _conditions(study: Study, prediction: Prediction) -> str:
    """Words on n, seeds, layer and ranks."""
    ranks = ranks_text(prediction.ranks, prediction.window)
    return (
        f"n = {count_text(prediction.families)}, {seeds_text(_runs(study, prediction))}; "
        f"last-layer activations, ranks {ranks}"
    )


def _censored(families: Sequence[FamilyPrediction]) -> str:
    """Names the batches whose runs ended above the target, which have no excess to draw."""
    names = [
        f"{family.family.name}-b{batch:g}"
        for family in families
        for batch, excess in zip(family.batches, family.excess, strict=True)
        if np.isposinf(excess)
    ]
    return f"Target missed, ranked last and not drawn: {', '.join(names)}." if names else ""


# Figure 10


def draw_10(figure: Figure, study: Study, options: Options) -> list[Claim]:
    """Draws rho by layer at the deepest tier that has families of three batches.

    Raises Missing where no tier has any.
    """
    tokens = tokens_of(study, options)
    tier, looks, layers = _by_layer(study, tokens, options)
    last = looks[-1]
    title(figure, 10, f"Early alpha of every layer, and tokens to the target, at {tier}")
    above, beside = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _draw_layers(above, looks, layers)
    for family in last.families:
        _draw_family(beside, family, family.alpha, family.alpha_error)
    beside.set(xlabel=f"early alpha of layer {layers[-1]}", ylabel=EXCESS)
    beside.set_title("(b) last layer")
    _write_rho(beside, last)
    deep = "" if tier in ("d36", "d48") else f" The paper has d36; this study has {tier}."
    spans = [f.tokens[np.isfinite(f.tokens)] for f in last.families]
    rows = span_text(np.concatenate(spans))
    part = of_tiers(study, options, (tier,))
    parts = (
        f"{_conditions(study, last)} (a: of every layer); rows at {rows} tokens, "
        f"nearest to {short_count(tokens)}.{deep} Means over seeds; larger marks for larger "
        f"batches; {ALPHA_BARS}.",
        _censored(last.families),
        left_out_text(part, [family.family for family in last.families]),
    )
    caption(figure, " ".join(part for part in parts if part))
    return [_layer_claim(study, looks, layers, tier, tokens)]


def _by_layer(study: Study, tokens: int, options: Options):
    """The deepest tier with families, their predictions by layer, and the layers' numbers."""
    for tier in ("d48", "d36", "d24", "d12"):
        part = of_tiers(study, options, (tier,))
        layers = max((run.layers(ACTIVATION) for run in part.chosen), key=len, default=[])
        window = window_of(study, options.window, tier)
        looks = [
            _useful(predict(part, tokens=tokens, window=window, layer=layer))
            for layer in range(len(layers))
        ]
        if looks and None not in looks:
            return tier, looks, [layer_name(site).rpartition("_")[2] for site in layers]
    raise Missing(
        f"a family with {FEW} batches measured in every layer at {short_count(tokens)} tokens and "
        "run to the target: python -m experiments.study preset=fig10"
    )


def _layer_rhos(looks: Sequence[Prediction]) -> dict:
    """{family: rho (layers,)} of the families that every layer has."""
    tables = [{f.family: f.rho_alpha.statistic for f in look.families} for look in looks]
    return {key: np.array([t[key] for t in tables]) for key in tables[-1] if all(map(
        lambda t: key in t, tables))}  # fmt: skip


def _draw_layers(ax, looks: Sequence[Prediction], layers: Sequence[str]) -> None:
    places = np.arange(len(layers))
    rhos = _layer_rhos(looks)
    for family, values in rhos.items():
        ax.plot(places, values, lw=0.9, alpha=0.8, label=family.rung, **family_line(family.rung))
    if len(rhos) > 1:
        ax.plot(places, np.mean(list(rhos.values()), axis=0), color=INK, lw=2.4, label="mean")
    control = looks[-1].batch.statistic
    ax.axhline(control, color=INK, ls=(0, (4, 2)), lw=1.2, label=r"$-\log B$, mean")
    zero_line(ax)
    ax.set_xticks(places, layers)
    ax.set_yticks((-1, -0.5, 0, 0.5, 1))
    ax.set(ylim=(-1.08, 1.08), xlabel="layer", ylabel=r"$\rho$ (early $\alpha$, token efficiency)")
    ax.set_title("(a) by layer")
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.1)


def _layer_claim(study: Study, looks, layers, tier: str, tokens: int) -> Claim:
    """Late layers predict best: rho rises with depth, by the signs of families."""
    rhos = _layer_rhos(looks)
    differences = [values[-1] - np.mean(values[:-1]) for values in rhos.values()]
    test, least = sign_flip_test(differences), 2.0 ** (1 - len(differences))
    outcome = verdict(test.statistic, test.p, least)
    best = best_look_p([look.families for look in looks])
    mean = np.mean(list(rhos.values()), axis=0)
    listed = ", ".join(f"{layer}: {number(rho)}" for layer, rho in zip(layers, mean, strict=True))
    control = f"mean rho of -log B {number(looks[-1].batch.statistic)}"
    seeds = seeds_of(_runs(study, looks[-1]))[0]
    return Claim(
        "10", f"{tier}: the last layer's alpha predicts better than earlier layers'",
        len(rhos), seeds, _ranks(looks[-1]), test.statistic, test.p, control, outcome,
        f"{outcome.capitalize()}: mean rho by layer {listed} at {short_count(tokens)} tokens; last "
        f"less earlier {number(test.statistic, '+.2f')} over "
        f"{words(len(rhos), 'family')}, {p_text(test)} by signs (best possible {least:.2g}); best "
        f"of all layers {p_text(best)} with batches permuted alike; {control}.",
    )  # fmt: skip
