"""Which batches a running study gives up at the early tokens, by what they show until then."""

from collections.abc import Collection, Mapping, Sequence
from math import inf, isfinite, log

from experiments.config import RunConfig
from experiments.pruning import batch_scores, early_scores, select_survivors
from experiments.study.folder import StudyFolder
from experiments.study.grid import Member, StudyConfig
from experiments.study_records import Run, read_study
from lens_jax.alignment import RATIO_TOLERANCE
from models.command_line import UsageError


def early_pause(config: RunConfig, rule: str, tokens: int) -> int:
    """Tokens at which a run may pause, so that a rule can judge it at `tokens`.

    A step is measured after the pause that its validation may bring, so a spectrum takes a step
    more. Raises UsageError where the run is not measured near enough to these tokens.
    """
    if rule == "loss":
        return tokens
    from experiments.schedule import make_schedule

    per_step = config.tokens_per_step
    measured = [step * per_step for step in make_schedule(config).measure if step]
    if not measured:
        raise UsageError(
            f"prune={rule}: runs at batch {config.batch} are not measured, so there is no spectrum "
            f"to judge by; give probes=activation or choose prune=loss"
        )
    nearest = min(measured, key=lambda seen: abs(log(seen / tokens)))
    if abs(log(nearest / tokens)) > RATIO_TOLERANCE:
        raise UsageError(
            f"prune={rule}: runs at batch {config.batch} are measured at {nearest} tokens and not "
            f"nearer to early_tokens={tokens}; choose another, or another probes.first="
        )
    return max(tokens, nearest + per_step)


def members_to_give_up(
    folder: StudyFolder, config: StudyConfig, members: Mapping[str, Member]
) -> list[Member]:
    """Members by the names of their folders that do not go on, all but `keep` batches a family.

    A batch is judged by the mean over its seeds, and all of them go on or none: of a cell with one
    seed given up no mean is known. What was decided once is kept in pruned.json and stays; seeds
    added later go the way of their batch, batches added later go on. A batch with a run that has no
    score, since it diverged for instance, is given up first; one that has reached its target by
    then is kept first.
    """
    decided = folder.pruned
    if not members:
        return []
    study = read_study(folder.path)
    found = {}
    for family in study.families:
        runs = [run for run in study.of(family) if run.name in members]
        if not runs:
            continue
        scores = early_scores(runs, config.prune, config.early_tokens, config.window)
        scores |= {run.name: inf for run in runs if _arrived(run, config.early_tokens)}
        own = decided.get(family.name)
        found[family.name] = _later(own, runs, scores) if own else _decide(config, runs, scores)
    folder.add_pruned(found)
    gone = [name for family in (decided | found).values() for name in family["given_up"]]
    return [members[name] for name in gone if name in members]


def _decide(config: StudyConfig, runs: Sequence[Run], scores: Mapping[str, float]) -> dict:
    """What pruned.json keeps of a family: scores of its batches, which runs go on, which do not."""
    batches = batch_scores(runs, scores)
    best = select_survivors(batches, config.keep)
    return {
        "rule": config.prune,
        "batches": {str(batch): _finite(score) for batch, score in batches.items()},
        "kept": sorted(run.name for run in runs if run.batch in best),
        "given_up": {r.name: _finite(scores[r.name]) for r in runs if r.batch not in best},
    }


def _later(own: dict, runs: Sequence[Run], scores: Mapping[str, float]) -> dict:
    """The same with runs that have come since, of batches of which none was kept."""
    kept = {run.batch for run in runs if run.name in own["kept"]}
    gone = {run.batch for run in runs if run.name in own["given_up"]} - kept
    later = {
        run.name: _finite(scores[run.name])
        for run in runs
        if run.batch in gone and run.name not in own["given_up"] and not run.finished
    }
    return own | {"given_up": own["given_up"] | later}


def _arrived(run: Run, tokens: int) -> bool:
    return run.reached and run.result["tokens"] <= tokens


def judged_now(
    members: Mapping[str, Member], failed: Collection[str]
) -> tuple[dict[str, Member], list[Member]]:
    """The members of families none of whose runs broke off, by folder, and all the others."""
    open_families = {members[name].cell.family for name in failed}
    judged = {name: own for name, own in members.items() if own.cell.family not in open_families}
    return judged, [own for own in members.values() if own.cell.family in open_families]


def _finite(score: float) -> float | None:
    return score if isfinite(score) else None  # JSON has no NaN
