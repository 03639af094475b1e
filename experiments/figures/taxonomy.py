"""What each step of the ladder gains, in tokens or in throughput, and where its spectra changed.

A transition leads from a rung to the next one that the study has, each at its token-best batch and
at the rate chosen for it. Its kind follows from the two gains, and whether learning was led by
activations or by gradients from how far both spectra moved at equal loss, in units of what another
seed moves them by. The published rule takes z-scores over the transitions themselves, so that a
label depends on which others there are; this one does not. Source: protocol spec 1.10. No
matplotlib.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from math import comb, expm1, isfinite, log, log1p, nan
from typing import NamedTuple

import numpy as np

from experiments.efficiency import crossing_tokens, matched_row
from experiments.figures.options import Options, of_tiers, target_of, tolerance_of
from experiments.figures.speed import steady_throughput
from experiments.figures.trajectories import Member, token_best
from experiments.seed_spread import Spread, difference_error, seed_spread, t_test
from experiments.statistics import seed_floor, seed_pairs, unlike_pairs
from experiments.study_records import ACTIVATION, GRADIENT, Run, Study
from lens_jax.correlations import UNDEFINED, PermutationTest
from lens_jax.fits import GRAM_FLOOR, jsd, rankme, topk_share, window_alpha
from lens_jax.step_files import StepFile
from models.ladder import LADDERS

DELTA = 0.02
"""Gain from which on it counts, where it is beyond twice its seed error too."""

LED, ALIKE = 3.0, 1.2
"""Shifts in seed floors from which a spectrum has moved, and within which two moved alike."""

HEAD, TOP = (1, 10), 10
ATTENTION, MLP = "attn/c_proj", "mlp/c_proj"
PREFIX = ("baseline", "rope", "muon", "untied")


# Gains


def log_gain(before: Sequence[float], after: Sequence[float]) -> float:
    """Returns the mean ln of `after` less that of `before`; NaN if a value is not finite."""
    with np.errstate(divide="ignore"):
        gain = float(np.mean(np.log(after)) - np.mean(np.log(before)))
    return gain if isfinite(gain) else float("nan")


def direction(gain: float, error: float) -> int:
    """Returns 1 for a gain, -1 for a loss, and 0 for what is within DELTA or twice its error.

    gain: a ratio less 1; error: one seed sd of its ln, NaN where there is none to judge by.
    """
    if abs(gain) <= DELTA or abs(log1p(gain)) <= 2 * error:
        return 0
    return 1 if gain > 0 else -1


def interval(gain: float, error: float) -> tuple[float, float]:
    """Returns the gains between which one lies by twice its error of ln(1 + gain), NaN as 0."""
    middle, reach = log1p(gain), 2 * error if isfinite(error) else 0.0
    return expm1(middle - reach), expm1(middle + reach)


def kind_of(tokens: float, throughput: float, errors: tuple[float, float] = (nan, nan)) -> str:
    """Returns the kind of a transition from its token and throughput gains and their errors."""
    if not (isfinite(tokens) and isfinite(throughput)):
        return "not measured"
    learning, speed = direction(tokens, errors[0]), direction(throughput, errors[1])
    if learning == speed == 1:
        return "joint"
    if {learning, speed} == {1, -1}:
        return "tradeoff"
    if learning == 1:
        return "learning-side"
    return "throughput-side" if speed == 1 else "null"


def led_by(activation: float, gradient: float) -> str:
    """Returns what led a gain in learning, from the two shifts in units of their seed floors."""
    if not (isfinite(activation) and isfinite(gradient)):
        return "unresolved"
    if max(activation, gradient) < LED:
        return "unresolved"
    if max(activation, gradient) <= ALIKE * min(activation, gradient):
        return "mixed"
    return "activation-led" if activation > gradient else "gradient-led"


# Spectra at equal loss


class Shape(NamedTuple):
    """A statistic of the last layer's spectrum of a kind, of a matrix where it is a gradient's."""

    kind: str
    matrix: str | None
    of: Callable[[np.ndarray], float]


def head_alpha(values: np.ndarray) -> float:
    """The exponent of eigenvalues on ranks 1-10, whatever the width."""
    return window_alpha(values, *HEAD)


def gradient_head(values: np.ndarray) -> float:
    """The same of singular values, NaN where they fall to the rounding of their Gram matrix."""
    return window_alpha(values, *HEAD, GRAM_FLOOR)


SHAPES = {
    "activation head": Shape(ACTIVATION, None, head_alpha),
    "activation top 10": Shape(ACTIVATION, None, lambda values: topk_share(values, TOP)),
    "gradient head": Shape(GRADIENT, ATTENTION, gradient_head),
    "gradient top 10": Shape(GRADIENT, ATTENTION, lambda values: topk_share(values, TOP)),
    "gradient ln RankMe": Shape(
        GRADIENT, ATTENTION, lambda values: float(np.log(rankme(values, GRAM_FLOOR)))
    ),
}
SPECTRA = ((ACTIVATION, None), (GRADIENT, ATTENTION), (GRADIENT, MLP))
"""Those whose divergence at equal loss is taken; the first two decide what led."""


def spectrum(run: Run, row: StepFile | None, kind: str, matrix: str | None) -> np.ndarray | None:
    """Returns the last layer's spectrum of a row, None where it was not measured or is all zeros.

    All zeros are the gradients below a head that starts at zero.
    """
    if row is None or not any(matrix is None or f"/{matrix}/" in s for s in run.sites(kind)):
        return None
    site = run.final_site(kind, matrix)
    values = row.array(kind, site) if row.has(kind, site) else np.zeros(1)
    return values if np.any(values) else None


class Matched:
    """Spectra of runs at the target loss, each read once."""

    def __init__(self, study: Study, options: Options):
        self._loss, self._tolerance = target_of(study, options), tolerance_of(study, options)
        self._known: dict = {}

    def spectrum(self, run: Run, kind: str, matrix: str | None) -> np.ndarray | None:
        """Returns a spectrum of the last layer, None where there is none at that loss."""
        key = run.name, kind, matrix
        if key not in self._known:
            row = matched_row(run, self._loss, self._tolerance)
            self._known[key] = spectrum(run, row, kind, matrix)
        return self._known[key]

    def by_batch(self, runs: Sequence[Run]) -> dict[int, list[Run]]:
        """Returns those of the runs that have a spectrum of activations there, by batch."""
        found: dict[int, list[Run]] = {}
        for run in runs:
            if self.spectrum(run, ACTIVATION, None) is not None:
                found.setdefault(run.batch, []).append(run)
        return found

    def value(self, shape: Shape, run: Run) -> float:
        """Returns a statistic of a run, NaN where it has no spectrum there."""
        values = self.spectrum(run, shape.kind, shape.matrix)
        return float("nan") if values is None else shape.of(values)

    def divergence(self, pairs, kind: str, matrix: str | None) -> list[float]:
        """Returns the JSD of every pair of runs of which both have their spectrum."""
        both = [[self.spectrum(run, kind, matrix) for run in pair] for pair in pairs]
        return [jsd(*pair) for pair in both if pair[0] is not None and pair[1] is not None]


# Noise


class Noise(NamedTuple):
    """What another seed changes, pooled over the cells that have several.

    tokens, throughput: of their ln; shapes: of each statistic; floors: median JSD of seed pairs at
    equal loss, NaN without any; runs: how many there are in those cells.
    """

    tokens: Spread
    throughput: Spread
    shapes: dict[str, Spread]
    floors: dict[tuple[str, str | None], float]
    runs: int


def seed_noise(study: Study, options: Options, tier: str, matched: Matched) -> Noise:
    """Returns what seeds change at a tier."""
    part = of_tiers(study, options, (tier,))
    repeated = {run.name for pair in seed_pairs(part) for run in pair}

    return Noise(
        seed_spread(part, lambda run: log(crossing_tokens(run, part.target_loss))),
        seed_spread(part, lambda run: log(steady_throughput(run))),
        {name: seed_spread(part, partial(matched.value, shape)) for name, shape in SHAPES.items()},
        {key: _floor(part, *key) for key in SPECTRA},
        len(repeated),
    )


def _floor(part: Study, kind: str, matrix: str | None) -> float:
    """The seed floor at the target loss; NaN without two seeds that have the spectrum."""
    part = replace(part, runs=tuple(run for run in part.runs if run.layers(kind, matrix)))
    return seed_floor(part, kind, matrix).equal_loss


# Transitions


class Transition(NamedTuple):
    """From one rung to the next that the study has.

    tokens, throughput, time: gains, the ratio less 1; equal_batch: the token gain at the batch of
    `before` where `after` has it; errors: seed errors of ln(1 + gain) of the first two, NaN without
    seeds; shifts: JSD at equal loss in seed floors; changes: of SHAPES, change_errors: theirs.
    """

    before: Member
    after: Member
    tokens: float
    throughput: float
    time: float
    equal_batch: float
    errors: tuple[float, float]
    divergences: dict[tuple[str, str | None], float]
    shifts: dict[tuple[str, str | None], float]
    changes: dict[str, float]
    change_errors: dict[str, float]

    @property
    def name(self) -> str:
        return f"{self.before.family.rung} \u2192 {self.after.family.rung}"

    @property
    def kind(self) -> str:
        """learning-side, throughput-side, joint, tradeoff, null, or not measured."""
        return kind_of(self.tokens, self.throughput, self.errors)

    @property
    def led(self) -> str:
        """activation-led, gradient-led, mixed or unresolved."""
        return led_by(*(self.shifts[key] for key in SPECTRA[:2]))

    @property
    def gains_learning(self) -> bool:
        return self.kind in ("learning-side", "joint")

    @property
    def judged(self) -> bool:
        """Whether both gains and both shifts are known, so that it could have been led by one."""
        known = all(isfinite(self.shifts[key]) for key in SPECTRA[:2])
        return known and self.kind != "not measured"


def ladder_of(study: Study, tier: str) -> tuple[str, ...]:
    """Returns the rungs of a tier in the order of their ladder, those beside it left out."""
    here = [run for run in study.chosen if run.cell.tier == tier]
    ladders = {run.config.get("ladder", "published") for run in here}
    rungs = {run.cell.rung for run in here}
    order = LADDERS["clean" if ladders == {"clean"} else "published"]
    return tuple(rung.name for rung in order if rung.over is None and rung.name in rungs)


def transitions(
    study: Study, options: Options, tier: str = "d12"
) -> tuple[list[Transition], Noise, list[str]]:
    """Returns the transitions of a tier, the noise they are judged by, and rungs left out.

    A rung without a run that reached the target is left out, so that the ladder goes on over it.
    """
    target, matched = target_of(study, options), Matched(study, options)
    noise = seed_noise(study, options, tier, matched)
    rungs = ladder_of(study, tier)
    families = {f.rung: f for f in study.families if f.tier == tier}
    found = {rung: token_best(study, families[rung], options) for rung in rungs}
    kept = [m for m in found.values() if m is not None and isfinite(m.tokens)]
    left_out = [rung for rung in rungs if rung not in {m.family.rung for m in kept}]
    made = [_transition(study, *pair, noise, matched, target) for pair in pairwise(kept)]
    return made, noise, left_out


def _transition(study, before: Member, after: Member, noise, matched, target) -> Transition:
    tokens = -log_gain(*([crossing_tokens(r, target) for r in m.runs] for m in (before, after)))
    speed = log_gain(*([steady_throughput(r) for r in m.runs] for m in (before, after)))
    ends = before.runs, after.runs
    errors = tuple(difference_error(own, *ends) for own in (noise.tokens, noise.throughput))
    change_errors = {k: difference_error(own, *ends) for k, own in noise.shapes.items()}
    pairs = unlike_pairs(*ends)
    moved = {key: matched.divergence(pairs, *key) for key in SPECTRA}
    moved = {key: float(np.mean(own)) if own else float("nan") for key, own in moved.items()}
    changes = {}
    for name, shape in SHAPES.items():
        ends = [[matched.value(shape, run) for run in m.runs] for m in (before, after)]
        changes[name] = float(np.mean(ends[1]) - np.mean(ends[0]))
    return Transition(
        before, after, np.expm1(tokens), np.expm1(speed), np.expm1(tokens + speed),
        _equal_batch(study, before, after, target),
        errors, moved, {key: own / noise.floors[key] for key, own in moved.items()}, changes,
        change_errors,
    )  # fmt: skip


def _equal_batch(study: Study, before: Member, after: Member, target: float) -> float:
    """The token gain at the tokens a step of `before`, NaN where `after` has no such runs."""
    size = before.first.tokens_per_step
    there = [run for run in study.of(after.family) if run.tokens_per_step == size]
    if not there:
        return float("nan")
    ends = [[crossing_tokens(run, target) for run in runs] for runs in (before.runs, there)]
    return float(np.expm1(-log_gain(*ends)))


def prefix_test(made: Sequence[Transition]) -> tuple[PermutationTest, float]:
    """Tests that activation-led transitions lie in the prefix; and the least p that could be.

    Of the transitions that are judged; the others say nothing of what led them. Statistic: their
    share in the prefix (baseline to untied) less that beyond. Null: which transitions are
    activation-led has nothing to do with where they lie; one-sided, hypergeometric. UNDEFINED where
    none is judged on one of the two sides, or none is activation-led.
    """
    judged = [own for own in made if own.judged]
    inside = [t.after.family.rung in PREFIX for t in judged]
    led = [t.gains_learning and t.led == "activation-led" for t in judged]
    count, early, n = sum(led), sum(inside), len(judged)
    if not (0 < early < n and count > 0):
        return UNDEFINED, 1.0
    hits = sum(a and b for a, b in zip(inside, led, strict=True))
    ways = [comb(early, k) * comb(n - early, count - k) for k in range(min(early, count) + 1)]
    p, least = sum(ways[hits:]) / comb(n, count), ways[-1] / comb(n, count)
    share = hits / early - (count - hits) / (n - early)
    return PermutationTest(share, p, comb(n, count), True), least


def ends_test(made: Sequence[Transition], noise: Noise) -> PermutationTest:
    """Tests the gain of all transitions together: the first rung against the last, two-sided t.

    Gains of neighbouring transitions share a rung, so that their errors have opposite signs and
    their sum is that of the two ends alone. The error is that of seeds; the p is that of t with its
    degrees of freedom. That each end is the best of its batches makes p no smaller without a gain:
    the least of several means varies less than one of them.
    """
    ends = made[0].before, made[-1].after
    total = sum(log1p(own.tokens) for own in made)
    error = difference_error(noise.tokens, *(member.runs for member in ends))
    return t_test(total, error, noise.tokens.freedom)
