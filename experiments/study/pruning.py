"""Which members a running study gives up at the early tokens, by what they show until then."""

from collections.abc import Mapping
from math import isfinite

from experiments.pruning import early_scores, select_survivors
from experiments.study.folder import StudyFolder
from experiments.study.grid import Member, StudyConfig
from experiments.study_records import read_study


def members_to_give_up(
    folder: StudyFolder, config: StudyConfig, members: Mapping[str, Member]
) -> list[Member]:
    """Members by the names of their folders that do not go on, all but `keep` of each family.

    What was decided once is kept in pruned.json and stays, also when seeds or batches are added.
    A run without a score, one that diverged for instance, is given up first.
    """
    decided = folder.pruned
    study = read_study(folder.path)
    found = {}
    for family in study.families:
        runs = [run for run in study.of(family) if run.name in members]
        if family.name in decided or not runs:
            continue
        scores = early_scores(runs, config.prune, config.early_tokens, config.window)
        kept = select_survivors(scores, config.keep)
        gone = {r.name: _finite(scores[r.name]) for r in runs if r.name not in kept}
        found[family.name] = {"rule": config.prune, "kept": sorted(kept), "given_up": gone}
    folder.add_pruned(found)
    gone = [name for family in (decided | found).values() for name in family["given_up"]]
    return [members[name] for name in gone if name in members]


def _finite(score: float) -> float | None:
    return score if isfinite(score) else None  # JSON has no NaN
