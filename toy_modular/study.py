"""The toy study, from data to figures: `python -m toy_modular.study profile=laptop`.

Learning rates are searched (or taken as given), every member is trained once more with measurements
to its target, and the figures are drawn. Whatever is finished is on disk and not repeated: the same
command goes on where it was stopped.
"""

import time
from collections.abc import Callable
from pathlib import Path

from models.command_line import UsageError, help_page, parse_words, run_command
from toy_modular.search import Selection, grouped, search
from toy_modular.study_config import (
    Kind,
    Study,
    StudyConfig,
    help_values,
    resolve,
)
from toy_modular.study_folder import StudyFolder
from toy_modular.study_table import describe_runs, write_table
from toy_modular.workers import Failed, choose_engine, run_jobs

USAGE = """usage: python -m toy_modular.study [profile=laptop|paper] [task=grok] [key=value ...]

Trains the stages of the toy at several batch sizes and seeds to a common validation loss, measures
spectra and features on the way, and draws the figures. Stop it with Ctrl-C; the same command goes
on."""

Note = Callable[[str], None]


def run_study(study: Study, note: Note) -> Path:
    """Runs what is left of a study and returns its folder.

    Raises UsageError for a folder of another study, and at the very end if a member failed.
    """
    with StudyFolder(study) as folder:
        engine = choose_engine(study.config.engine)
        note(f"study in {folder.path}, engine={engine}")
        selections = _select(study, folder, engine, note)
        failures = _train_all(study, folder, selections, engine, note)
        write_table(folder.path)
        note(describe_runs(folder.path))
        if study.config.figures:
            try:
                _draw(study, folder.path, note)
            except (ValueError, OSError) as error:
                failures.append(f"the figures: {error}")
    if failures:
        raise UsageError(f"{len(failures)} failures, the first: {failures[0]}")
    return folder.path


def _select(study: Study, folder: StudyFolder, engine: str, note: Note) -> dict[Kind, float]:
    """The rate of every kind: a single candidate, one stored before, or the search's choice."""
    rates = {kind: study.candidates(kind) for kind in study.kinds()}
    chosen = {kind: found[0] for kind, found in rates.items() if len(found) == 1}
    chosen |= {
        kind: folder.selected[kind.name]["lr"] for kind in rates if kind.name in folder.selected
    }
    open_kinds = [kind for kind in rates if kind not in chosen]
    if not open_kinds:
        return chosen
    note(f"search of learning rates: {', '.join(kind.name for kind in open_kinds)}")
    found = search(study, open_kinds, folder.path / "search", engine, note)
    folder.add_selected({kind.name: selection.to_json() for kind, selection in found.items()})
    for kind, selection in found.items():
        note(_describe_selection(kind, selection))
    return chosen | {kind: selection.lr for kind, selection in found.items()}


def _describe_selection(kind: Kind, selection: Selection) -> str:
    result = selection.trials[selection.lr]
    edge = ", at the edge of what was tried" if selection.edge else ""
    loss = result.get("val_loss", float("nan"))
    return (
        f"{kind.name}: lr {selection.lr:.4g} of {len(selection.trials)} rates ({result['reason']} "
        f"at step {result['step']}, val loss {loss:.3f}{edge})"
    )


def _train_all(
    study: Study, folder: StudyFolder, rates: dict[Kind, float], engine: str, note: Note
) -> list[str]:
    """Trains and measures every member that has no result; returns what failed, in words."""
    jobs = []
    for kind, rate in rates.items():
        members = {seed: study.member(kind, seed, rate) for seed in study.seeds(kind)}
        places = {seed: folder.path / "runs" / f"{kind.name}-s{seed}" for seed in members}
        left = [seed for seed in members if not (places[seed] / "result.json").exists()]
        jobs += grouped([members[s] for s in left], [places[s] for s in left], None, engine)
    failures = []
    for done, (job, results) in enumerate(
        run_jobs(jobs, engine, note, folder.path / "compiled"), start=1
    ):
        if isinstance(results, Failed):
            failures.append(f"{job.folders[0]}: {results.error}")
            note(f"failed, the others go on: {failures[-1]}")
            continue
        for place, result in zip(job.folders, results, strict=True):
            loss = result.get("val_loss", float("nan"))
            note(
                f"[{done}/{len(jobs)}] {place.name}: {result['reason']} at step {result['step']}, "
                f"{result['tokens'] / 1e6:.2f}M tokens, val loss {loss:.4f}"
            )
    return failures


def _draw(study: Study, path: Path, note: Note) -> None:
    if study.task == "rff":
        from lens_jax.show import draw_run

        for spectra in sorted(path.glob("runs/*/spectra")):
            note(str(draw_run(spectra.parent)))
        return
    from toy_modular.figures import draw_figures

    for line in draw_figures(path):
        note(line)


def main(arguments: list[str]) -> int:
    """Runs the command."""
    if {"--help", "-h", "help"} & set(arguments):
        values, keys = help_values(arguments)
        print(help_page(USAGE, StudyConfig, {}, values, keys))
        return 0
    began = time.monotonic()

    def note(text: str) -> None:
        print(text, flush=True)

    path = run_study(resolve(parse_words(arguments)), note)
    note(f"{path}: done in {(time.monotonic() - began) / 60:.1f} min")
    return 0


if __name__ == "__main__":
    run_command(main)
