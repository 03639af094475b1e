"""Figure 17: singular values of the last layer's W_O and MLP output, over the variants.

Needs no probe data, only the weights. The published comparison is at step 1600 and at the end;
since a step is up to eight times more tokens in one rung than in another, equal tokens stand beside
it. Source: protocol spec, figure 17.
"""

from collections.abc import Sequence
from itertools import combinations, product
from math import factorial
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments.figures.page import Options, caption, family_line, seeds_text, title, words
from experiments.figures.trajectories import (
    Member,
    late_tokens,
    measured,
    missed_text,
    span_text,
    token_best,
)
from experiments.study_records import WEIGHT, Run, Study
from lens_jax.alignment import RATIO_TOLERANCE, at_tokens
from lens_jax.axis_style import SHADE, rank_axes, visible
from lens_jax.claims import Claim, Missing, number, p_text, verdict
from lens_jax.correlations import UNDEFINED, PermutationTest, spearman_exact_p
from lens_jax.fits import jsd, window_alpha
from lens_jax.step_files import StepFile

INCHES = {17: (7.2, 6.4)}
MATRICES = (("attn/c_proj", "$W_O$"), ("mlp/c_proj", "MLP out"))
HEAD = (1, 10)
PUBLISHED_STEP = 1600


class Look(NamedTuple):
    """Where in training variants are compared: a name, its marker, and the row of a run there."""

    name: str
    marker: str
    filled: bool
    rows: dict[str, StepFile]

    def present(self, members: Sequence[Member]) -> list[Member]:
        """The variants of which a seed was measured there, with those seeds alone."""
        found = [m._replace(runs=tuple(r for r in m.runs if r.name in self.rows)) for m in members]
        return [member for member in found if member.runs]

    def values(self, run: Run, matrix: str) -> np.ndarray:
        """The singular values of a run's last layer there."""
        return self.rows[run.name].array(WEIGHT, run.final_site(WEIGHT, matrix))

    def heads(self, member: Member, matrix: str) -> list[float]:
        """The head exponents of a variant's seeds there."""
        return [window_alpha(self.values(run, matrix), *HEAD) for run in member.runs]


def draw_17(figure: Figure, study: Study, options: Options) -> list[Claim]:
    """Draws weight spectra and their head exponents; raises Missing without measured weights."""
    families = [f for f in study.families if f.tier == "d12"] or study.families
    found = [token_best(study, family, options) for family in families]
    members = [m for m in found if m is not None and _measured(m.first)]
    if not members:
        raise Missing(
            "runs with the weight probe on attn.c_proj and mlp.c_proj: "
            "python -m experiments.study preset=fig17"
        )
    looks = find_looks(members)
    figure.set_size_inches(INCHES[17][0], 4.1 + 0.2 * len(members))
    title(figure, 17, "Weight spectra of the last layer over the variants")
    axes = figure.subplots(2, 2, height_ratios=(2.3, 0.6 + 0.2 * len(members)), sharey="row")
    for (above, below), (matrix, name), letters in zip(axes.T, MATRICES, ("ac", "bd"), strict=True):
        _draw_spectra(above, members, matrix)
        above.set_title(f"({letters[0]}) {name} at the end")
        _draw_heads(below, members, looks, matrix)
        below.set_title(f"({letters[1]}) {name}, head exponent")
    axes[0, 0].set_ylabel(r"$\sigma / \Sigma\sigma$")
    axes[1, 0].set_yticks(range(len(members)), [member.family.name for member in members])
    axes[1, 0].invert_yaxis()
    axes[1, 0].tick_params(axis="y", pad=12, length=0)
    for place, member in enumerate(members):  # what stands for a variant in the upper row
        across = axes[1, 0].get_yaxis_transform()
        line = family_line(member.family.rung)
        axes[1, 0].plot(-0.025, place, transform=across, clip_on=False, ls="", **line)
    axes[1, 0].sharex(axes[1, 1])
    caption(figure, _caption_text(members, looks))
    return [_claim(members, look) for look in looks]


def _rows(run: Run, matrix: str) -> list[StepFile]:
    return [row for row in measured(run, WEIGHT, matrix) if row.step > 0]


def find_looks(members: Sequence[Member]) -> list[Look]:
    """Returns the looks that at least two variants were measured at, the end first.

    The end is the target, so variants that did not reach it are not in it. Equal tokens: the most
    that all runs were measured at. A step may be off the published one by RATIO_TOLERANCE in ln.
    """
    rows = {run.name: own for m in members for run in m.runs if (own := _measured(run))}
    reached = [run.name for m in members if m.reached for run in m.runs]
    ends = {name: rows[name][-1] for name in reached if name in rows}
    looks = [Look("at the end", "o", True, ends)]
    if tokens := late_tokens(list(rows.values())):
        equal = {name: at_tokens(own, tokens).row for name, own in rows.items()}
        where = f"at {span_text(row.tokens for row in equal.values())} tokens"
        looks.append(Look(where, "D", False, equal))
    looks.append(Look(f"at step {PUBLISHED_STEP}", "s", False, _at_step(rows, PUBLISHED_STEP)))
    return [look for look in looks if len(look.present(members)) > 1]


def _measured(run: Run) -> list[StepFile]:
    """The rows of a run that has both matrices, else none."""
    found = [_rows(run, matrix) for matrix, _ in MATRICES]
    return found[0] if all(found) else []


def _at_step(rows: dict[str, list[StepFile]], step: int) -> dict[str, StepFile]:
    nearest = {name: min(own, key=lambda r: abs(r.step - step)) for name, own in rows.items()}
    near = RATIO_TOLERANCE
    return {name: row for name, row in nearest.items() if abs(np.log(row.step / step)) <= near}


def _draw_spectra(ax, members: Sequence[Member], matrix: str) -> None:
    for member in members:
        row = _rows(member.first, matrix)[-1]
        values = row.array(WEIGHT, member.first.final_site(WEIGHT, matrix))
        line = family_line(member.family.rung)
        ax.plot(*visible(values, values.sum()), markevery=[0, 2, 5], lw=1.2, **line)
    rank_axes(ax, "")
    ax.axvspan(*HEAD, color=SHADE, lw=0, zorder=0)


def _draw_heads(ax, members: Sequence[Member], looks: Sequence[Look], matrix: str) -> None:
    """A row a variant: its head exponent at each look, the mean of its seeds, and their range."""
    for place, member in enumerate(members):
        colour = family_line(member.family.rung)["color"]
        for look in looks:
            for own in look.present([member]):
                heads = look.heads(own, matrix)
                face = colour if look.filled else "white"
                depth = 3 - look.filled  # hollow marks stay visible on filled ones
                ax.plot(
                    np.mean(heads), place, look.marker, color=colour, mfc=face, ms=5, mew=1.3,
                    zorder=depth,
                )  # fmt: skip
                ax.plot([min(heads), max(heads)], [place, place], color=colour, lw=3, alpha=0.35)
    ax.set_xlabel(r"$\alpha$ of $\sigma$, ranks 1-10")
    ax.set_ylim(-0.6, len(members) - 0.4)


def separation(members: Sequence[Member], look: Look) -> tuple[PermutationTest, float, float]:
    """Tests that the MLP output separates variants more than W_O does; with both sds.

    Of means over the seeds of a variant. Paired variances are equal exactly where sum and
    difference of the pairs do not correlate (Pitman 1939, Morgan 1939); here by ranks, so that the
    null is exact over orders. The statistic is rho, above 0 where the MLP output has the larger
    spread of head exponents.
    """
    pairs = np.array(
        [
            [np.mean(look.heads(member, matrix)) for matrix, _ in MATRICES]
            for member in look.present(members)
        ]
    )
    if len(pairs) < 3:
        return UNDEFINED, float("nan"), float("nan")
    output, mlp = pairs.T
    test = spearman_exact_p(mlp + output, mlp - output)
    return test, float(np.std(output, ddof=1)), float(np.std(mlp, ddof=1))


def _mean_jsd(members: Sequence[Member], look: Look, matrix: str) -> float:
    """The mean JSD of two variants, over all pairs of their seeds."""
    spectra = [[look.values(run, matrix) for run in m.runs] for m in look.present(members)]
    found = [np.mean([jsd(a, b) for a, b in product(*two)]) for two in combinations(spectra, 2)]
    return float(np.mean(found))


def _claim(members: Sequence[Member], look: Look) -> Claim:
    test, output, mlp = separation(members, look)
    present = look.present(members)
    count = len(present)
    outcome = verdict(test.statistic, test.p, 2 / factorial(count))
    control = (
        f"largest difference between seeds of one variant there: {_seed_ranges(present, look)}"
    )
    divergences = [_mean_jsd(members, look, matrix) for matrix, _ in MATRICES]
    return Claim(
        "17", f"{look.name}, the MLP output separates variants more than W_O", count,
        min(len(member.runs) for member in present), "1-10", test.statistic, test.p, control,
        outcome,
        f"{outcome.capitalize()}: sd of head exponents, means over seeds, of {count} variants "
        f"{look.name}: MLP out {number(mlp, '.3f')}, W_O {number(output, '.3f')}; rho(sum, "
        f"difference) = {number(test.statistic)}, {p_text(test)} over orders; mean JSD between "
        f"variants {number(divergences[1], '.2g')} beside {number(divergences[0], '.2g')}; "
        f"{control}.",
    )  # fmt: skip


def _seed_ranges(present: Sequence[Member], look: Look) -> str:
    """The largest range over seeds of a variant's head exponent, by matrix, in words."""
    repeated = [member for member in present if len(member.runs) > 1]
    if not repeated:
        return "not known, one seed each"
    found = []
    for matrix, name in MATRICES:
        widest = max(np.ptp(look.heads(member, matrix)) for member in repeated)
        found.append(f"{name.strip('$')} {widest:.3f}")
    return ", ".join(found)


def _caption_text(members: Sequence[Member], looks: Sequence[Look]) -> str:
    seeds = seeds_text([run for member in members for run in member.runs])
    named = {"o": "filled circles", "D": "diamonds", "s": "squares"}
    marks = "; ".join(f"{named[look.marker]} {look.name}" for look in looks)
    reached = [member for member in members if member.reached]
    batches = ", ".join(f"{m.family.rung} {m.first.batch}" for m in reached)
    missed = missed_text(members)
    near = any(look.marker == "s" for look in looks)
    parts = [
        f"n = {words(len(reached), 'variant')} at the batch that needed the fewest tokens "
        f"({batches or 'none'}), {seeds} (c and d: their mean, bars: their range; a and b: the "
        "lowest). Marks of a and b stand beside the names; singular values over their sum; head: "
        f"ranks 1-10 at every width (shaded). {marks.capitalize()}.",
        f"{missed} Theirs is the batch of the lowest last loss; not in the look at the end."
        if missed
        else "",
        "" if near else f"Fewer than two variants were measured near step {PUBLISHED_STEP}.",
    ]
    return " ".join(part for part in parts if part)
