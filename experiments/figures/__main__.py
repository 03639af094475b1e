"""Figures of a study from the records of its folder, and claims.csv beside them.

    python -m experiments.figures study=STUDY
    python -m experiments.figures study=STUDY fig=2 out=FOLDER tokens=65536
    python -m experiments.figures study=STUDY toy=TOY_STUDY report=report.html
    python -m experiments.figures --help

Each figure is written as PNG and PDF; claims.csv and claims.json (claims_2.csv and so on for one
figure) say in a sentence what each shows, with the verdict of a fixed rule. A figure whose runs are
not there says which are needed, and the others are drawn. The exit code is 1 if none could be.
"""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import chz

from experiments.figures.catalogue import FIGURES
from experiments.figures.drawing import Drawn, draw_figures
from experiments.figures.options import Options
from experiments.study_records import read_study
from models.command_line import (
    Layer,
    UsageError,
    build,
    cast_words,
    check_path,
    help_page,
    leaves,
    parse_words,
    run_command,
)


@chz.chz
class Task:
    """The keys of the command that are no figure's."""

    study: str | None = chz.field(default=None, doc="folder of the study")
    fig: Literal[("all", *FIGURES)] = chz.field(
        default="all", doc="which figure, a number of the list above"
    )
    out: str | None = chz.field(default=None, doc="folder to write to; none: STUDY/figures")
    report: str | None = chz.field(
        default=None, doc="HTML page of all findings, with fig=all; none: no page"
    )
    toy: str | None = chz.field(
        default=None, doc="folder of the toy study, for figures 4 and 11; none: STUDY/toy"
    )

    @chz.validate
    def _ranges(self):
        for key in ("study", "out", "report", "toy"):
            if getattr(self, key) is not None:
                check_path(key, getattr(self, key))
        if self.report is not None and self.fig != "all":
            raise ValueError(f"report={self.report}: a report has all figures; leave fig= out")


KEYS = leaves(Task) | leaves(Options)


def run_task(
    task: Task,
    options: Options,
    tell: Callable[[str], None] = print,
    command: str | None = None,
) -> Drawn:
    """Draws what is asked for; returns claims and images. command: what a report says made it.

    Raises ValueError with one line for a folder that is no study, a place that cannot be written
    to, or a damaged file.
    """
    study = read_study(task.study)
    out = Path(task.out) if task.out else study.path / "figures"
    for key, path in (("out", out), ("report", Path(task.report or out))):
        if not path.absolute().parent.is_dir():
            raise ValueError(f"{key}={path}: its folder does not exist; make it, or choose one")
    numbers = list(FIGURES) if task.fig == "all" else [task.fig]
    drawn = draw_figures(study, numbers, options, out, task.toy, tell)
    if task.report and drawn.images:
        from experiments.figures.report import write_report

        write_report(study, drawn.claims, drawn.images, Path(task.report), command=command)
        tell(f"report: {task.report}")
    return drawn


def main(argv: list[str]) -> int:
    """The command; returns 0, or 1 where no figure could be drawn. Raises UsageError."""
    if {"-h", "--help"} & set(argv):
        print(_help())
        return 0
    values = cast_words(Task, parse_words(argv), KEYS)
    task, options = (_built(cls, values) for cls in (Task, Options))
    if task.study is None:
        raise UsageError("study= is missing; give the folder of a study")
    try:
        command = shlex.join(["python", "-m", "experiments.figures", *argv])
        drawn = run_task(task, options, command=command)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    for claim in drawn.claims:
        print(f"{claim.figure}: {claim.sentence}")
    return 0 if drawn.images.keys() - drawn.missing.keys() else 1


def _built(cls: type, values: dict):
    own = {key: value for key, value in values.items() if key in leaves(cls)}
    return build(cls, [Layer("typed", own)])[0]


def _help() -> str:
    subjects = "\n".join(f"  {number:2}  {place.subject}" for number, place in FIGURES.items())
    return help_page(f"{__doc__}\nfigures:\n{subjects}\n", Task, {}, {}, KEYS)


if __name__ == "__main__":
    run_command(main)
