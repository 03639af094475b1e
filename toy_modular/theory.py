"""Check the links between covariance spectra and modes of a band, of docs/theory.md.

    python -m toy_modular.theory                     on codes built to have a property
    python -m toy_modular.theory study=STUDY         and on every run of a study, at its last step
    python -m toy_modular.theory out=links.csv       every row in full (.csv or .json)

A claim is held where the measured number is as predicted within the tolerance that stands beside
it, failed where it is not, undecided where chance may say the same or a number is missing. `>>`
reads: above what chance gives by more than the tolerance. On constructed codes a failed claim is a
fault of this program, and the exit code is 1; on trained models it is a finding. Of trained models
the table has medians over bands; the file has every band.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import chz
import numpy as np

from lens_jax.plain_rows import csv_text, plain
from models.atomic_files import write_bytes_atomic
from models.command_line import (
    Layer,
    UsageError,
    build,
    cast_words,
    check_path,
    check_report,
    help_page,
    parse_words,
    run_command,
)
from toy_modular.records import CURRENT, LAST, LAW, NEXT, Run, read_study
from toy_modular.theory_codes import constructed_rows
from toy_modular.theory_links import trained_rows
from toy_modular.theory_rows import FAILED, HELD, UNDECIDED, BandTables, Row

ENDINGS = (".csv", ".json")
VERDICTS = (HELD, FAILED, UNDECIDED)
NUMBERS = ("measured", "predicted", "tolerance")
STORED = 1e-4
"""Relative error of tables and covariances that were stored as float32."""


@chz.chz
class TheoryConfig:
    """The command's keys."""

    study: str | None = chz.field(
        default=None, doc="folder of a study whose runs are checked; none: constructed codes only"
    )
    out: str | None = chz.field(default=None, doc="file of all rows, .csv or .json; none: no file")

    @chz.validate
    def _paths(self):
        if self.study is not None:
            check_path("study", self.study)
        if self.out is not None:
            if Path(self.out).suffix not in ENDINGS:
                raise ValueError(f"out={self.out}: end the name in {' or '.join(ENDINGS)}")
            check_report(self.out)


def main(argv: list[str]) -> int:
    """The command; returns its exit code. Raises UsageError for bad words and damaged files."""
    if {"-h", "--help"} & set(argv):
        print(help_page(__doc__, TheoryConfig, {}, {}))
        return 0
    values = cast_words(TheoryConfig, parse_words(argv))
    config, _ = build(TheoryConfig, [Layer("typed", values)])
    try:
        trained = [] if config.study is None else study_rows(config.study)
    except ValueError as error:
        raise UsageError(str(error)) from error
    constructed = constructed_rows()
    print_rows("constructed codes", constructed)
    if trained:
        print_rows(f"trained models, medians over bands, of {config.study}", medians(trained))
    if config.out is not None:
        text = rows_text([*constructed, *trained], Path(config.out).suffix)
        write_bytes_atomic(config.out, text.encode())
    return int(any(row.verdict == FAILED for row in constructed))


# Trained models


def study_rows(folder: str | Path) -> list[Row]:
    """The rows of all bands of all runs of a study, each at the run's last probed step.

    Raises ValueError with one line where there is no study, nothing was probed in it, or a file is
    damaged.
    """
    bands = [band for run in read_study(folder).runs for band in read_bands(run)]
    if not bands:
        raise ValueError(f"study={folder}: no run has band tables (features/step_*.npz) to check")
    return [row for band in bands for row in trained_rows(band)]


def read_bands(run: Run) -> Iterator[BandTables]:
    """The bands of a run's last probed step; those without finite numbers or spread are left out.

    Raises ValueError naming the file for arrays whose shapes do not agree.
    """
    if not run.features:
        return
    last, leading = run.features[-1], None
    spectra = [row for row in run.spectra if row.step <= last.step]
    if spectra and spectra[-1].has("act_cov_eigenvectors", LAST):
        leading = spectra[-1].array("act_cov_eigenvectors", LAST)
    for site in run.bands:
        kinds = (CURRENT, NEXT, "covariance", LAW)
        current, following, covariance, law = (last.array(kind, site) for kind in kinds)
        c, width = len(law), len(covariance)
        agree = current.shape == following.shape == (c, width)
        if not agree or covariance.shape != (width, width) or law.ndim != 1 or c < 2:
            raise ValueError(f"{last.path}: the arrays of band {site} do not fit one another")
        if leading is not None and len(leading) != width:
            raise ValueError(
                f"{spectra[-1].path}: eigenvectors of width {len(leading)}, bands of {width}"
            )
        finite = all(np.all(np.isfinite(each)) for each in (current, following, covariance, law))
        if finite and np.trace(covariance) > 0:
            where = f"{run.name} {site.replace('_', ':')} step {last.step}"
            yield BandTables(where, current, following, covariance, law, STORED, leading)


def medians(rows: Sequence[Row]) -> list[Row]:
    """One row a claim: medians over the bands, and how many bands have which verdict."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.link, row.claim, row.table), []).append(row)
    found = []
    for key in sorted(groups, key=lambda key: key[0]):  # stable: claims stay in their order
        same = groups[key]
        numbers = {name: _median([getattr(row, name) for row in same]) for name in NUMBERS}
        counts = {name: sum(row.verdict == name for row in same) for name in VERDICTS}
        verdict = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        found.append(same[0]._replace(where=f"{len(same)} bands", verdict=verdict, **numbers))
    return found


def _median(values: Sequence[float]) -> float:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.median(finite)) if finite else float("nan")


# Output


def print_rows(title: str, rows: Sequence[Row]) -> None:
    """Prints rows as a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    headings = ("link", "object", "table", "claim", "measured", "", "predicted", "+-", "verdict")
    table = Table(*headings, title=title, box=box.SIMPLE, title_justify="left")
    for row in rows:
        numbers = (f"{row.measured:.4g}", row.relation, f"{row.predicted:.4g}")
        name = (str(row.link), row.where, row.table, row.claim)
        table.add_row(*name, *numbers, f"{row.tolerance:.0e}", row.verdict)
    # into a file or a pipe lines are written out whole
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


def rows_text(rows: Sequence[Row], ending: str) -> str:
    """All rows as CSV with a header, or as a JSON list; empty or null for what is not finite."""
    cells = [row._asdict() for row in rows]
    if ending == ".json":
        return json.dumps([plain(row) for row in cells], indent=2, allow_nan=False) + "\n"
    return csv_text(cells, Row._fields)


if __name__ == "__main__":
    run_command(main)
