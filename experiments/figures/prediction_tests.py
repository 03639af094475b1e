"""What the figures of prediction test, and how they say it; no matplotlib.

Three things could order the batches of a family by the tokens they need: the exponent of an early
spectrum, the batch size itself, and the early loss. The first is the finding; the others are what
it has to beat, for where small batches need fewer tokens any monotone function of the batch size
orders them just as well (protocol spec 1.11, T1).
"""

from collections.abc import Iterable, Sequence
from math import factorial, isfinite, prod

import numpy as np

from experiments.efficiency import crossing_tokens
from experiments.statistics import (
    LEAST_FOR_PARTIAL,
    FamilyPrediction,
    Prediction,
    finite_ranks,
)
from experiments.study_records import Family, Study
from lens_jax.claims import Claim, number, p_text, sign_flip_test, verdict
from lens_jax.correlations import PermutationTest, alike_permutation_p, max_over_looks_p

ALPHA_BARS = "bars: error of the mean over seeds, from all batches of a family (of one: jackknife)"
"""What bars of `FamilyPrediction.alpha_error` are, for a caption."""


def members(families: Sequence[FamilyPrediction]) -> int:
    """Cells that have both an exponent and an efficiency."""
    return int(sum(np.sum(_present(family)) for family in families))


def _present(family: FamilyPrediction) -> np.ndarray:
    # An efficiency of -inf, of a run that ended above the target, is a last rank and no gap.
    return np.isfinite(family.alpha) & ~np.isnan(family.efficiency)


def least_p(families: Sequence[FamilyPrediction]) -> float:
    """The p of perfect orders in all families, each permuted within itself."""
    counts = [int(np.sum(_present(f))) for f in families if isfinite(f.rho_alpha.statistic)]
    return min(1.0, 2 / prod(factorial(n) for n in counts)) if counts else 1.0


def beyond_batch(families: Sequence[FamilyPrediction]) -> tuple[PermutationTest, float]:
    """Tests that alpha orders the members better than the batch size does; and the least p.

    Statistic: mean over families of rho(alpha) less rho(-log B), the latter with the sign that its
    mean has, so that a batch effect of either direction counts as a predictor. Null: the difference
    of a family might as well have the other sign.
    """
    pairs = np.array([(f.rho_alpha.statistic, f.rho_batch.statistic) for f in families])
    pairs = pairs[np.all(np.isfinite(pairs), axis=1)] if len(pairs) else np.empty((0, 2))
    if not len(pairs):
        return PermutationTest(np.nan, np.nan, 0, True), 1.0
    direction = -1.0 if pairs[:, 1].mean() < 0 else 1.0
    return sign_flip_test(pairs[:, 0] - direction * pairs[:, 1]), 2.0 ** (1 - len(pairs))


def side_by_side(families: Sequence[FamilyPrediction], of) -> tuple[np.ndarray, np.ndarray]:
    """Values (F, n) of families over the batches that any of them has, and those batches (n,).

    of(family) returns (n,) of its own; NaN where a family lacks a batch.
    """
    batches = np.array(sorted({batch for family in families for batch in family.batches}))
    table = np.full((len(families), batches.size), np.nan)
    for row, family in zip(table, families, strict=True):
        row[np.searchsorted(batches, family.batches)] = of(family)
    return table, batches


def alike_p(families: Sequence[FamilyPrediction]) -> PermutationTest:
    """The same mean rho where a batch means the same in all families and moves in all at once."""
    alpha, _ = side_by_side(families, lambda family: family.alpha)
    efficiency, _ = side_by_side(families, lambda family: finite_ranks(family.efficiency))
    return alike_permutation_p(list(zip(alpha, efficiency, strict=True)))


def best_look_p(looks: Sequence[Sequence[FamilyPrediction]]) -> PermutationTest:
    """Tests the best mean |rho| of several looks at the same families, as `max_over_looks_p`."""
    common = set.intersection(*({f.family for f in look} for look in looks))
    kept = [[f for f in look if f.family in common] for look in looks]
    if not common:
        return PermutationTest(np.nan, np.nan, 0, True)
    batches = sorted({batch for look in kept for family in look for batch in family.batches})
    alphas = np.full((len(common), len(looks), len(batches)), np.nan)
    efficiency = np.full((len(common), len(batches)), np.nan)
    for place, look in enumerate(kept):
        for row, family in enumerate(look):
            columns = np.searchsorted(batches, family.batches)
            alphas[row, place, columns] = family.alpha
            efficiency[row, columns] = finite_ranks(family.efficiency)
    return max_over_looks_p(alphas, efficiency)


def order_claim(
    figure: str, what: str, prediction: Prediction, ranks: str, where: str, seeds: int, more=""
) -> Claim:
    """The claim that a larger alpha goes with fewer tokens, batches permuted within families."""
    families = prediction.families
    test, n, least = prediction.alpha, members(families), least_p(families)
    outcome = verdict(test.statistic, test.p, least)
    control = (
        f"mean rho of -log B {number(prediction.batch.statistic)} ({p_text(prediction.batch)}), "
        f"of the early loss {number(prediction.loss.statistic)}; batches permuted alike in "
        f"all families: {p_text(alike_p(families))}"
    )
    return Claim(
        figure, what, n, seeds, ranks, test.statistic, test.p, control, outcome,
        f"{outcome.capitalize()}: mean rho(alpha, token efficiency) {number(test.statistic)} "
        f"{where} over {count_text(families)}, {p_text(test)} with batches permuted within "
        f"families (best possible {least:.2g}){more}; {control}.",
    )  # fmt: skip


def beyond_claim(
    figure: str, what: str, prediction: Prediction, ranks: str, where: str, seeds: int
) -> Claim:
    """The claim that alpha orders better than the batch size does."""
    families = prediction.families
    test, least = beyond_batch(families)
    outcome = verdict(test.statistic, test.p, least)
    partial = np.array([family.partial.statistic for family in families], np.float64)
    partial = partial[np.isfinite(partial)]
    given = f"mean partial rho given log B {partial.mean():.2f}" if partial.size else ""
    given = given or f"no partial rho given log B, which needs {LEAST_FOR_PARTIAL} batches"
    return Claim(
        figure, what, members(families), seeds, ranks, test.statistic, test.p, given, outcome,
        f"{outcome.capitalize()}: rho of alpha {number(prediction.alpha.statistic)} beside "
        f"{number(prediction.batch.statistic)} of -log B {where}, mean difference "
        f"{number(test.statistic, '+.2f')} over {len(families)} "
        f"{'family' if len(families) == 1 else 'families'}, {p_text(test)} by signs (best possible "
        f"{least:.2g}); {given}.",
    )  # fmt: skip


def left_out_text(study: Study, kept: Iterable[Family]) -> str:
    """Names the families of a study that a figure has not, and why; empty where it has all."""
    kept, target = set(kept), study.target_loss
    gone = [family for family in study.families if family not in kept]
    missed = [
        family
        for family in gone
        if not any(isfinite(crossing_tokens(run, target)) for run in study.of(family))
    ]
    parts = (
        ("no batch reached the target", missed),
        (
            "too few batches measured there and run to the target",
            [f for f in gone if f not in missed],
        ),
    )
    return " ".join(
        f"Left out, {why}: {', '.join(family.name for family in families)}."
        for why, families in parts
        if families
    )


def count_text(families: Sequence[FamilyPrediction]) -> str:
    """Writes how many families and cells there are, `6 families (24 cells)`."""
    plural = "family" if len(families) == 1 else "families"
    return f"{len(families)} {plural} ({members(families)} cells)"
