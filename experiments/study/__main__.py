"""The study, from a grid to a verdict.

    python -m experiments.study preset=laptop
    python -m experiments.study preset=laptop rungs=untied,muon batches=4,8 seeds=0,1 out=runs/mine
    python -m experiments.study preset=M1 launcher=slurm slurm.partition=gpu
    python -m experiments.study --help

Learning rates are searched by successive halving, every member trains to the common target loss
with the lens inside, and figures and a report are drawn. Whatever is finished is on disk and not
repeated: the same command goes on where it was stopped, by Ctrl-C or by a kill. Keys of a run
(python -m experiments.train --help) go to all runs.
"""

import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

from experiments.host_threads import one_blas_thread
from experiments.study.folder import StudyFolder
from experiments.study.grid import Member, Study, StudyConfig, resolve_study
from experiments.study.halving import make_task, search
from experiments.study.outcome import Outcome
from experiments.study.pool import Failed, Machine, Stopped, Task, run_tasks, this_machine
from experiments.study.table import describe, write_table
from experiments.study_records import Cell
from lens_jax.saved_run import short_count
from models.command_line import UsageError, build, flatten, help_page, parse_words, run_command

Note = Callable[[str], None]


class Runner:
    """Trains tasks for a study, tells what became of them, and keeps the table."""

    def __init__(self, study: Study, folder: StudyFolder, note: Note):
        self._study, self._folder, self._note = study, folder, note
        self.failures: dict[str, str] = {}  # by folder, of the last time it was tried

    @cached_property
    def _machine(self) -> Machine:
        """Looked at where runs train here only: a login node may have no devices to open."""
        return this_machine(self._study.config.workers)

    def train(self, tasks: list[Task], what: str) -> Mapping[str, Outcome | Failed]:
        """Trains what is left of the tasks; outcomes by the names of their folders."""
        found, folder = {}, self._folder
        if self._study.config.launcher == "slurm":
            ends = self._through_slurm(tasks, what)
        else:
            ends = run_tasks(tasks, self._machine, folder.logs, folder.compiled, self._note)
        for task, outcome in ends:
            found[task.folder.name] = outcome
            self._note(f"{what} [{len(found)}/{len(tasks)}] {task.name}: {_words(outcome)}")
            self.failures.pop(task.folder.name, None)
            if isinstance(outcome, Failed):
                self.failures[task.folder.name] = f"{task.folder}: {outcome.error}"
            if (folder.path / "selected.json").exists():
                write_table(folder.path)
        return found

    def _through_slurm(self, tasks: list[Task], what: str) -> list[tuple[Task, Outcome | Failed]]:
        """Outcomes of tasks that Slurm has had; raises Submitted where some are Slurm's now."""
        from experiments.study.slurm import broken_off, submit

        left = [task for task in tasks if not task.is_done()]
        failed = broken_off(left, self._folder.path)
        left = [task for task in left if task.folder.name not in failed]
        if left:
            job = submit(left, self._folder.path, self._study.config.slurm)
            raise Submitted(
                f"{what}: {len(left)} runs submitted as Slurm job {job}; the same command goes on "
                f"when they have ended"
            )
        return [(task, failed.get(task.folder.name) or task.outcome()) for task in tasks]


class Submitted(Exception):
    """Runs are Slurm's now; the study goes on when it is begun again."""


def _words(outcome: Outcome | Failed) -> str:
    if isinstance(outcome, Failed):
        return f"failed, the others go on: {outcome.error}"
    end = f"{outcome.reason} after {short_count(outcome.tokens)} tokens"
    return end if outcome.reason == "diverged" else f"{end}, val loss {outcome.val_loss:.4f}"


def run_study(study: Study, note: Note) -> Path:
    """Runs what is left of a study and returns its folder.

    Raises UsageError for a folder of another study, and at the very end if a run failed; Stopped
    when a signal has come.
    """
    with StudyFolder(study) as folder:
        note(f"study in {folder.path}: {len(study.members)} members in {len(study.cells)} cells")
        runner = Runner(study, folder, note)
        rates = _select(study, folder, runner, note)
        left = _prune(study, folder, rates, runner, note)
        tasks = [make_task(study, *member, rates[member.cell], folder.runs) for member in left]
        for cell in [cell for cell in study.cells if cell not in rates]:
            note(f"{cell.name}: no rate yet, since a trial broke off; its members wait")
        ends = runner.train(tasks, "members").values()
        write_table(folder.path)
        note(describe(folder.path))
        if study.config.figures and not all(isinstance(end, Failed) for end in ends):
            _draw(folder.path, note)
    if runner.failures:
        first = next(iter(runner.failures.values()))
        raise UsageError(f"{len(runner.failures)} runs failed, the first: {first}")
    return folder.path


def _select(study: Study, folder: StudyFolder, runner: Runner, note: Note) -> dict[Cell, float]:
    """The multiplier of every cell: a single candidate, one stored before, or the search's."""
    known = folder.selected
    rates = {cell: known[cell.name]["lr_scale"] for cell in study.cells if cell.name in known}
    unsearched = [cell for cell in study.cells if cell not in rates]
    fixed = [cell for cell in unsearched if len(study.candidates(cell)) == 1]
    given = {cell: study.candidates(cell)[0] for cell in fixed}
    folder.add_selected(
        {cell.name: {"lr_scale": rate, "edge": False, "trials": []} for cell, rate in given.items()}
    )
    searched = [cell for cell in unsearched if cell not in given]
    if not searched:
        return rates | given
    found = search(study, searched, folder.runs, runner.train)
    folder.add_selected({cell.name: selection.to_json() for cell, selection in found.items()})
    for cell, selection in found.items():
        edge = ", at the edge of what was tried" if selection.edge else ""
        note(f"{cell.name}: lr x{selection.lr_scale:g} of {len(selection.trials)}{edge}")
    return rates | given | {cell: selection.lr_scale for cell, selection in found.items()}


def _prune(
    study: Study, folder: StudyFolder, rates: dict[Cell, float], runner: Runner, note: Note
) -> list[Member]:
    """The members that train to the end; the others are given up at the early tokens, if any."""
    config = study.config
    members = [member for member in study.members if member.cell in rates]
    if config.prune == "none":
        return members
    from experiments.study.pruning import early_pause, judged_now, members_to_give_up

    names, early = {}, []
    for member in members:
        run = study.run_config(*member, rates[member.cell])
        until = early_pause(run, config.prune, config.early_tokens)
        early.append(make_task(study, *member, rates[member.cell], folder.runs, until))
        names[early[-1].folder.name] = member
    ends = runner.train(early, "to the early tokens")
    failed = [name for name, end in ends.items() if isinstance(end, Failed)]
    judged, waiting = judged_now(names, failed)
    for member in waiting:
        note(f"{member.name}: waits, since a run of its family broke off before it was judged")
    given_up = members_to_give_up(folder, config, judged)
    for member in given_up:
        note(f"{member.name}: given up by prune={config.prune}")
    return [member for member in judged.values() if member not in given_up]


def _draw(path: Path, note: Note) -> None:
    """Figures and report; what cannot be drawn says so there."""
    from experiments.figures.__main__ import main as draw

    words = [f"study={path}", f"out={path / 'figures'}", f"report={path / 'report.html'}"]
    if draw(words):
        note("no figure could be drawn from these runs")


def main(argv: list[str]) -> int:
    """The command; returns its exit code."""
    one_blas_thread()
    if {"-h", "--help"} & set(argv):
        print(help_page(__doc__, StudyConfig, {}, _shown(argv)))
        return 0
    began = time.monotonic()
    try:
        path = run_study(resolve_study(argv), lambda text: print(text, flush=True))
    except Submitted as submitted:
        print(submitted)
        return 0
    except Stopped as stop:
        print(f"{stop}; every run has saved, the same command goes on")
        return 128 + stop.number
    except ValueError as error:  # a damaged file of the folder
        raise UsageError(str(error)) from error
    print(f"{path}: done in {(time.monotonic() - began) / 60:.1f} min")
    return 0


def _shown(argv: list[str]) -> dict:
    """Values for --help: those of the preset that is named."""
    from experiments.study.presets import PRESETS
    from models.command_line import Layer

    words = parse_words(word for word in argv if word not in ("-h", "--help"))
    preset = PRESETS.get(words.get("preset", "laptop"), PRESETS["laptop"])
    return flatten(build(StudyConfig, [Layer("preset", preset.study)])[0])


if __name__ == "__main__":
    run_command(main)
