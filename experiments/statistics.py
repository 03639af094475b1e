"""Do early spectra predict which batch needs the fewest tokens? The tests of the study.

Of a family (a rung at a tier) the members are its batches. Three predictors are held against the
token efficiency E = -ln(T / min T): the exponent alpha of an early spectrum, -ln B, and the early
validation loss. Tests permute members within families, so that no family's level matters.
Source: protocol spec 1.10 to 1.12. NumPy, float64.
"""

from collections.abc import Sequence
from itertools import combinations, product
from math import isfinite, log, nan
from typing import NamedTuple

import numpy as np

from experiments.efficiency import (
    alpha_at,
    crossing_tokens,
    early_row,
    loss_at,
    matched_row,
    ranks_of,
)
from experiments.seed_spread import spread_of
from experiments.study_records import ACTIVATION, Family, Run, Study
from lens_jax.alignment import Alpha
from lens_jax.correlations import (
    UNDEFINED,
    PermutationTest,
    joint_permutation_p,
    partial_spearman_p,
    spearman_exact_p,
)
from lens_jax.fits import jsd
from lens_jax.jackknife import expected_jsd
from lens_jax.step_files import StepFile

DOUBLING = 0.35
"""In ln(tokens): half a doubling, the farthest that a share of a run can lie from a row of a grid
that doubles. A token budget is itself on the grid, so it is held to less."""

LEAST_FOR_PARTIAL = 6
"""Members below which a partial correlation given ln B says nothing (protocol spec 1.12)."""


class FamilyPrediction(NamedTuple):
    """Predictors and outcome over the n batches of a family, ascending; means over seeds.

    What tokens to the target are is the mean of their logarithm; a batch of which one seed never
    reached it counts as never.

    alpha_error: of the mean over several seeds their standard error, from the family's seeds
    together; of one seed the jackknife error. tokens: those of the states that alpha was taken
    from. efficiency: -inf for a batch that never
    reached the target. early_loss: validation loss at those states. rho_loss is of minus the loss,
    so that a good predictor of any kind has rho = 1. partial: of alpha given ln B, UNDEFINED for
    fewer than six members.
    """

    family: Family
    batches: np.ndarray
    alpha: np.ndarray
    alpha_error: np.ndarray
    r2: np.ndarray
    tokens: np.ndarray
    efficiency: np.ndarray
    excess: np.ndarray
    early_loss: np.ndarray
    minus_log_batch: np.ndarray
    rho_alpha: PermutationTest
    rho_batch: PermutationTest
    rho_loss: PermutationTest
    partial: PermutationTest


class Prediction(NamedTuple):
    """All families, and the joint tests, signed: alpha, batch, loss.

    window: as given, at width 768; ranks: at the width of the first run.
    """

    families: tuple[FamilyPrediction, ...]
    alpha: PermutationTest
    batch: PermutationTest
    loss: PermutationTest
    window: tuple[int, int]
    ranks: tuple[int, int]
    tokens: float | None
    progress: float | None


def finite_ranks(values) -> np.ndarray:
    """Efficiencies with a finite last place instead of -inf, so that censored members rank last."""
    values = np.array(values, np.float64)
    finite = values[np.isfinite(values)]
    values[np.isneginf(values)] = finite.min(initial=0.0) - 1.0
    return values


def family_prediction(
    family: Family,
    batches: Sequence[float],
    alpha: Sequence[float],
    efficiency: Sequence[float],
    early_loss: Sequence[float],
    *,
    alpha_error: Sequence[float] | None = None,
    r2: Sequence[float] | None = None,
    tokens: Sequence[float] | None = None,
    excess: Sequence[float] | None = None,
) -> FamilyPrediction:
    """Returns the tests of one family from arrays over its n batches; what is not given is NaN.

    Only members that have both an alpha and an outcome take part, in all three correlations.
    """
    batches, alpha, early_loss = (np.asarray(v, np.float64) for v in (batches, alpha, early_loss))
    outcome = finite_ranks(efficiency)
    minus_log_batch = -np.log(batches)
    present = np.isfinite(alpha) & np.isfinite(outcome)
    judged = np.where(present, outcome, nan)
    partial = UNDEFINED
    if np.count_nonzero(present) >= LEAST_FOR_PARTIAL:
        partial = partial_spearman_p(alpha, judged, minus_log_batch)

    def column(values):
        return np.full(batches.shape, nan) if values is None else np.asarray(values, np.float64)

    return FamilyPrediction(
        family=family,
        batches=batches,
        alpha=alpha,
        alpha_error=column(alpha_error),
        r2=column(r2),
        tokens=column(tokens),
        efficiency=np.asarray(efficiency, np.float64),
        excess=column(excess),
        early_loss=early_loss,
        minus_log_batch=minus_log_batch,
        rho_alpha=spearman_exact_p(alpha, judged),
        rho_batch=spearman_exact_p(minus_log_batch, judged),
        rho_loss=spearman_exact_p(-early_loss, judged),
        partial=partial,
    )


def joint_tests(
    families: Sequence[FamilyPrediction],
) -> tuple[PermutationTest, PermutationTest, PermutationTest]:
    """Returns the joint tests of alpha, -ln B and -loss: mean rho, permuted within each family.

    Exact, so p <= 0.05 happens without an effect at most as often; rho of four members takes steps
    of 0.2, so with six such families it is 3.80 % of the time, with three 2.97 %, with one never.
    """
    outcomes = [np.where(np.isfinite(f.alpha), finite_ranks(f.efficiency), nan) for f in families]

    def joint(predictors: list[np.ndarray]) -> PermutationTest:
        return joint_permutation_p(list(zip(predictors, outcomes, strict=True)), "signed")

    return (
        joint([own.alpha for own in families]),
        joint([own.minus_log_batch for own in families]),
        joint([-own.early_loss for own in families]),
    )


def predict(
    study: Study,
    *,
    tokens: float | None = None,
    progress: float | None = None,
    window: tuple[int, int] = (90, 200),
    layer: int | None = None,
    kind: str = ACTIVATION,
    matrix: str | None = None,
    seed: int | None = None,
) -> Prediction:
    """Returns how early spectra order the batches of every family, with all tests.

    tokens: the same training tokens in all runs, the study's early_tokens where neither is given.
    progress: instead a share 0..1 of each run's own tokens to the target, which uses the answer
    (protocol spec 1.11 T2). layer: an index into `run.layers()`, None the last. seed: None takes
    means over the seeds of a cell, whose outcomes must all be known. A family of which no batch has
    reached the target is left out. Raises ValueError where the study has no target, and where it
    has no early tokens and neither alignment is given.
    """
    if study.target_loss is None:
        raise ValueError(f"study={study.path}: it has no target loss to predict tokens to")
    if tokens is None and progress is None:
        tokens = study.config.get("early_tokens")
        if tokens is None:
            raise ValueError(f"study={study.path}: it has no early_tokens; give tokens=")

    def state(run: Run) -> tuple[int, Alpha, float] | None:
        row = _row(run, study.target_loss, tokens, progress)
        return None if row is None else _state(run, row, window, layer, kind, matrix)

    families = tuple(
        filter(None, (_of_family(study, family, seed, state) for family in study.families))
    )
    ranks = ranks_of(study.runs[0], window)
    return Prediction(families, *joint_tests(families), window, ranks, tokens, progress)


def _row(run: Run, target: float, tokens, progress) -> StepFile | None:
    if progress is None:
        return early_row(run, tokens)
    own = progress * crossing_tokens(run, target)
    return early_row(run, own, DOUBLING) if isfinite(own) and own > 0 else None


def _state(run: Run, row: StepFile, window, layer, kind, matrix) -> tuple | None:
    """Returns tokens, alpha and validation loss; None where the layer was not measured."""
    sites = run.layers(kind, matrix)
    place = len(sites) - 1 if layer is None else layer
    if not 0 <= place < len(sites) or not row.has(kind, sites[place]):
        return None
    # measured between two validations a step has no loss of its own
    loss = row.val_loss if isfinite(row.val_loss) else loss_at(run, row.tokens)
    return row.tokens, alpha_at(row, sites[place], ranks_of(run, window), kind), loss


def _of_family(study: Study, family: Family, seed, state) -> FamilyPrediction | None:
    """Means over the seeds of each batch: of ln T, of alpha and of the early loss."""
    runs = study.of(family, seed)
    batches = sorted({run.batch for run in runs})
    states = {run.name: state(run) for run in runs}
    alphas = {name: own[1].value for name, own in states.items() if own is not None}
    sd = spread_of(runs, lambda run: alphas.get(run.name, nan)).seeds
    cells = [[run for run in runs if run.batch == batch] for batch in batches]
    rows = [_of_cell(study, own, states, sd) for own in cells]
    log_tokens = np.array([row.pop("log_tokens") for row in rows], np.float64)
    if not np.any(np.isfinite(log_tokens)):
        return None
    columns = {name: np.array([row[name] for row in rows], np.float64) for name in rows[0]}
    behind = log_tokens - log_tokens[np.isfinite(log_tokens)].min()
    columns |= {"efficiency": -behind, "excess": np.expm1(behind)}
    return family_prediction(family, batches, **columns)


def _of_cell(study: Study, runs: list[Run], states: dict, sd: float) -> dict[str, float]:
    """Means over the runs of a cell; states: of each run by name; sd: of alpha over seeds."""
    found = [states[run.name] for run in runs if states[run.name] is not None]
    crossings = [crossing_tokens(run, study.target_loss) for run in runs]
    # Runs share their probe tokens, so the error of sampling is no smaller in a mean of them.
    errors = [alpha.error for _, alpha, _ in found]
    return {
        "log_tokens": _mean([log(own) for own in crossings]),
        "alpha": _mean([alpha.value for _, alpha, _ in found]),
        "alpha_error": sd / len(found) ** 0.5 if len(found) > 1 else _mean(errors),
        "r2": _mean([alpha.r2 for _, alpha, _ in found]),
        "tokens": _mean([own for own, _, _ in found]),
        "early_loss": _mean([loss for _, _, loss in found]),
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else nan


# What seeds alone change


class Floor(NamedTuple):
    """Median JSD of pairs of one configuration's seeds, and how many; NaN without a pair.

    sampling: what the error of measurement alone would give, the median over runs of
    `jackknife.expected_jsd`.
    """

    equal_tokens: float
    equal_loss: float
    pairs: int
    sampling: float


def seed_floor(study: Study, kind: str = ACTIVATION, matrix: str | None = None) -> Floor:
    """Returns the JSD floor of the last layer's spectra: what another seed changes.

    At equal tokens all states that two seeds share count, after step 0; at equal loss the states
    matched to the target. Source: protocol spec 1.11 T5 and 1.12, noise(config).
    """
    tolerance = study.config.get("match_tolerance", 0.005)
    sites = {run.name: run.layers(kind, matrix)[-1:] for run in study.chosen}  # the deepest or none
    at_tokens, at_target, pairs, sampling = [], [], 0, []
    for one, other in seed_pairs(study):
        for site in sites[one.name] if sites[one.name] == sites[other.name] else ():
            pairs += 1
            theirs = {row.tokens: row for row in other.steps if row.tokens}
            at_tokens += [_jsd(kind, site, row, theirs.get(row.tokens)) for row in one.steps]
            if study.target_loss is not None:
                both = (matched_row(run, study.target_loss, tolerance) for run in (one, other))
                at_target.append(_jsd(kind, site, *both))
    for run in study.chosen:
        for site in sites[run.name]:
            if run.steps[-1].has(f"{kind}_left_out", site):
                sampling.append(expected_jsd(run.steps[-1].array(f"{kind}_left_out", site)))
    return Floor(_median(at_tokens), _median(at_target), pairs, _median(sampling))


def _jsd(kind: str, site: str, *rows: StepFile | None) -> float:
    if any(row is None or not row.has(kind, site) for row in rows):
        return nan
    return jsd(*(row.array(kind, site) for row in rows))


def seed_pairs(study: Study) -> list[tuple[Run, Run]]:
    """All pairs of measured chosen runs that differ in their seed alone."""
    found = []
    for one, other in combinations(study.chosen, 2):
        same = one.cell == other.cell and one.lr_scale == other.lr_scale
        if same and one.seed != other.seed and one.steps and other.steps:
            found.append((one, other))
    return found


def unlike_pairs(ones: Sequence[Run], others: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Pairs of runs of two cells with unlike seeds, all pairs where there are no such.

    What a seed floor is of are pairs of unlike seeds; two cells' runs of one seed have their order
    of the data in common and lie closer than that.
    """
    pairs = list(product(ones, others))
    return [pair for pair in pairs if pair[0].seed != pair[1].seed] or pairs


def _median(values: Sequence[float]) -> float:
    found = [value for value in values if isfinite(value)]
    return float(np.median(found)) if found else nan
