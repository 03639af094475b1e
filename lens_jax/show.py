"""Draws a run folder on one page or as a report: `python -m lens_jax.show RUN [out=FILE]`.

Reads config.json, metrics.jsonl and spectra/ (or spectra_<name>/) only; needs neither an
accelerator nor jax.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from lens_jax.saved_run import SavedRun, conditions, headline, read_run

USAGE = """usage: python -m lens_jax.show RUN [name=NAME] [out=FILE]

Draws the run folder RUN: loss, activation, gradient and weight spectra, alpha and RankMe
over training with error bars. Parts that were not measured are left blank.

  RUN        folder with metrics.jsonl and/or spectra/ (and config.json)
  name=NAME  the records in RUN/spectra_NAME, which experiments.measure made, not RUN/spectra
  out=FILE   what to write, by its ending   [RUN/summary.png, or RUN/summary_NAME.png]
             .png .pdf .svg  all figures on one page
             .html           a report that stands alone: the figures, large and small screens,
                             and a sortable table of every statistic
             .csv            that table, a row per step and site
"""
PICTURES = (".png", ".pdf", ".svg")
FORMATS = (*PICTURES, ".html", ".csv")
INCHES, DPI = (16.0, 9.0), 120


def draw_run(
    run_folder: str | Path, out: str | Path | None = None, name: str | None = None
) -> Path:
    """Draws a run folder and returns the file, replaced whole.

    `name`: of the records, as `saved_run.read_run` takes it. `out` is by default `summary.png`, or
    `summary_<name>.png`, in the folder. Its ending chooses: .png, .pdf and .svg are
    one page of 16 x 9 inches, .html is the report of `lens_jax.report`, .csv the table of
    `lens_jax.table`. Raises ValueError with one line for a folder that is no run, a damaged file
    in it, or an `out` of another ending or in a folder that does not exist.
    """
    run_folder = Path(run_folder)
    page = "summary.png" if name is None else f"summary_{name}.png"
    out = run_folder / page if out is None else Path(out)
    if out.suffix not in FORMATS:
        raise ValueError(f"out={out}: end the name in {', '.join(FORMATS)}")
    run = read_run(run_folder, name)
    if not out.parent.is_dir():
        raise ValueError(f"out={out}: no such folder {out.parent}")
    write = {".html": _write_report, ".csv": _write_table}.get(out.suffix, _draw_page)
    _replace(out, lambda partial: write(run, partial, out.suffix[1:]))
    return out


def _replace(out: Path, write: Callable[[Path], None]) -> None:
    partial = out.with_name(f".{out.name}.tmp")
    try:
        write(partial)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def _draw_page(run: SavedRun, path: Path, kind: str) -> None:
    # Matplotlib takes half a second, and only drawing needs it. Figure and canvas are made by hand,
    # so that a training process is left without pyplot's global figures and backend.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from lens_jax.axis_style import STYLE
    from lens_jax.panels import PANELS

    with rc_context(STYLE):
        figure = Figure(figsize=INCHES, dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.09, h_pad=0.06, wspace=0.02, hspace=0.02)
        head, body = figure.subfigures(2, 1, height_ratios=(0.07, 1.0))
        head.text(0.006, 0.82, "  |  ".join(headline(run)), fontsize=13, weight="bold", va="top")
        head.text(0.006, 0.28, "   ".join(conditions(run)), fontsize=8.5, va="top")
        for ax, panel in zip(body.subplots(2, 4).flat, PANELS, strict=True):
            panel(ax, run)
        figure.savefig(path, format=kind)


def _write_report(run: SavedRun, path: Path, kind: str) -> None:
    from lens_jax.report import report

    path.write_text(report(run), encoding="utf-8")


def _write_table(run: SavedRun, path: Path, kind: str) -> None:
    from lens_jax.table import write_csv

    write_csv(run, path)


def main(arguments: list[str]) -> int:
    """Runs the command; returns 0, or 2 after one line of error."""
    if not arguments or {"--help", "-h", "help"} & set(arguments):
        print(USAGE, end="")
        return 0 if arguments else 2
    try:
        folders = [word for word in arguments if not word.startswith("-") and "=" not in word]
        options = [word for word in arguments if word not in folders]
        usage = "RUN [name=NAME] [out=FILE]"
        if len(folders) != 1:
            raise ValueError(f"{len(folders)} run folders given: give one, {usage}")
        given = {}
        for option in options:
            key, _, value = option.partition("=")
            if key not in ("name", "out") or not value:
                raise ValueError(f"unknown argument {option!r}: give {usage}")
            given[key] = value
        print(draw_run(folders[0], **given))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
