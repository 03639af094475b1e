"""Giving up members of a family early: by which rule, what it saves, and what it costs. NumPy.

At a fixed token budget a rule scores the members of every family, and all but the best few stop.
On a finished grid the price is known: `retrospective` says which tokens would have been saved and
how much worse the best member left is than the true best. Source: protocol spec 1.11 and 1.12.
"""

from collections.abc import Mapping, Sequence
from math import comb, inf, isfinite, isnan, log, nan
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from experiments.efficiency import alpha_at, crossing_tokens, early_row, loss_at, ranks_of
from experiments.rank_windows import window_of
from experiments.study_records import ACTIVATION, Family, Run, Study

Rule = Literal["alpha", "loss", "batch"]
RULES: tuple[Rule, ...] = ("alpha", "loss", "batch")
Key = TypeVar("Key", str, int)


def early_scores(
    runs: Sequence[Run], rule: Rule, tokens: float, window: tuple[int, int]
) -> dict[str, float]:
    """Returns {run name: score}, larger is more promising, from what is known at a token budget.

    alpha: the exponent of the last layer's spectrum on the window; loss: minus the validation loss
    there; batch: -ln B, for which no run is needed. NaN where a run has no state near the budget.
    Raises ValueError for a rule that is none.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule}: choose among {', '.join(RULES)}")
    return {run.name: _score(run, rule, tokens, window) for run in runs}


def _score(run: Run, rule: Rule, tokens: float, window: tuple[int, int]) -> float:
    if rule == "batch":
        return -log(run.tokens_per_step)
    if rule == "loss":
        loss = loss_at(run, tokens)
        return -loss if isfinite(loss) else nan
    row = early_row(run, tokens)
    site = "" if row is None or not run.sites(ACTIVATION) else run.final_site()
    if row is None or not row.has(ACTIVATION, site):
        return nan
    return alpha_at(row, site, ranks_of(run, window)).value


def batch_scores(runs: Sequence[Run], scores: Mapping[str, float]) -> dict[int, float]:
    """Returns {batch: mean over seeds of the scores by run name}, NaN where any has none.

    Over the seeds that all batches have, since a seed moves all of them alike; over each batch's
    own where they share none.
    """
    seeds: dict[int, dict[int, float]] = {}
    for run in runs:
        seeds.setdefault(run.batch, {})[run.seed] = scores[run.name]
    shared = set.intersection(*map(set, seeds.values())) if seeds else set()
    return {
        batch: float(np.mean([own[seed] for seed in shared or own])) for batch, own in seeds.items()
    }


def select_survivors(scores: Mapping[Key, float], keep: int) -> set[Key]:
    """Returns the keys of the best `keep`, at least one; equal ones by key, NaN last."""
    if keep < 1:
        raise ValueError(f"keep={keep}: give at least 1")

    def place(name: Key) -> tuple:
        score = scores[name]
        return (inf if isnan(score) else -score, name)

    return set(sorted(scores, key=place)[:keep])


class Pruned(NamedTuple):
    """What a rule would have done. saved: share of the tokens of all members to their targets.

    A case is a family at one seed, judged by itself. regret: mean over cases of
    T(best kept) / T(true best) - 1; kept_best: share of cases whose true best was kept. families,
    cases: how many were judged; keep: members left in each case.
    """

    rule: str
    keep: int
    saved: float
    regret: float
    kept_best: float
    families: int
    cases: int


class Case(NamedTuple):
    """Members of a family at one seed, what the rules choose among."""

    family: Family
    seed: int


def retrospective(
    study: Study, keep: int, *, tokens: float | None = None, window: tuple[int, int] | None = None
) -> list[Pruned]:
    """Returns what every rule, and chance, would have saved and cost on the finished members.

    Every seed is judged by itself, as if the study had no other, and the numbers are means over
    families and seeds: on one seed alone a rule can be right by luck, the more so on that on which
    learning rates were searched. A study that goes on with several seeds judges a batch by their
    mean, which errs less. A family counts at a seed with its members that have ended, if there are
    more than `keep`, and one reached the target, none of them before the budget. A member that did
    not reach it costs all the tokens it trained; where no better one was kept those are spent for
    nothing, and the true best is trained on top. chance keeps members at random: exact
    expectations.
    Raises ValueError for a study without a target or early tokens.
    """
    tokens = study.config.get("early_tokens") if tokens is None else tokens
    window = window_of(study, window)
    if tokens is None or study.target_loss is None:
        raise ValueError(f"study={study.path}: it names no early_tokens, or no target loss")
    judged = {
        case: own
        for case, own in _costs(study).items()
        if len(own) > keep and tokens < min(crossed for crossed, _ in own.values()) < inf
    }
    if not judged:
        return []
    found = []
    for rule in RULES:
        chosen = {}
        for case, own in judged.items():
            runs = [run for run in study.of(*case) if run.name in own]
            chosen[case] = select_survivors(early_scores(runs, rule, tokens, window), keep)
        found.append(_judge(rule, keep, judged, chosen, tokens))
    return [*found, _chance(keep, judged, tokens)]


def _costs(study: Study) -> dict[Case, dict[str, tuple[float, float]]]:
    """Of every ended member its tokens to the target (inf), and those it trained, by case."""
    found: dict[Case, dict[str, tuple[float, float]]] = {}
    for run in study.chosen:
        if run.finished:
            cost = crossing_tokens(run, study.target_loss), float(run.result["tokens"])
            found.setdefault(Case(run.family, run.seed), {})[run.name] = cost
    return found


def _families(judged: Mapping[Case, dict]) -> int:
    return len({case.family for case in judged})


def _spent(cost: tuple[float, float]) -> float:
    crossed, trained = cost
    return crossed if isfinite(crossed) else trained


def _regrets(costs: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Excess over the true best of every member, were it the best kept; the best ones first."""
    ranked = sorted(costs, key=lambda name: costs[name])  # those that never reached it are last
    best, _ = costs[ranked[0]]
    again = {name: 0.0 if isfinite(costs[name][0]) else best for name in ranked}
    return {name: (_spent(costs[name]) + again[name]) / best - 1 for name in ranked}


def _judge(rule: str, keep: int, judged, chosen, tokens: float) -> Pruned:
    total = saved = 0.0
    regrets, hits = [], []
    for case, own in judged.items():
        spent = {name: _spent(cost) for name, cost in own.items()}
        total += sum(spent.values())
        saved += sum(max(spent[name] - tokens, 0.0) for name in spent.keys() - chosen[case])
        by_place = _regrets(own)
        regrets.append(next(by_place[name] for name in by_place if name in chosen[case]))
        hits.append(next(iter(by_place)) in chosen[case])
    means = saved / total, float(np.mean(regrets)), float(np.mean(hits))
    return Pruned(rule, keep, *means, _families(judged), len(judged))


def _chance(keep: int, judged, tokens: float) -> Pruned:
    """Expectations of keeping `keep` of n at random: the best kept one is the r-th best with
    chance C(n - r, keep - 1) / C(n, keep)."""
    total = saved = 0.0
    regrets, hits = [], []
    for own in judged.values():
        spent = np.array([_spent(cost) for cost in own.values()])
        n = spent.size
        total += float(spent.sum())
        saved += float(np.maximum(spent - tokens, 0.0).sum()) * (n - keep) / n
        chances = np.array([comb(n - r, keep - 1) for r in range(1, n + 1)]) / comb(n, keep)
        regrets.append(float(chances @ np.array(list(_regrets(own).values()))))
        hits.append(keep / n)
    means = saved / total, float(np.mean(regrets)), float(np.mean(hits))
    return Pruned("chance", keep, *means, _families(judged), len(judged))
