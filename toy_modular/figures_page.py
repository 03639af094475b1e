"""The sheet that every figure of the study is drawn on, and marks that several of them use."""

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lens_jax.axis_style import FAINT, INK, LINES

NOTE_SIZE = 6.8
SHADED = "#ececec"
STAGE_LINES = dict(
    zip(
        ("baseline", "rope", "muon", "untied"),
        (LINES[5], LINES[4], LINES[2], LINES[1]),
        strict=True,
    )
)
"""Colour and marker of a stage, the same in all figures."""


def sheet(figure: Figure, rows: int, columns: int, note: str, **kwargs) -> np.ndarray:
    """Returns axes (rows, columns) above a note of wrapped lines, both inside the figure."""
    width, height = figure.get_size_inches()
    paragraphs = [textwrap.wrap(part, int(width * 19.5)) for part in note.split("\n")]
    lines = [line for part in paragraphs for line in part]
    share = (len(lines) + 0.8) * NOTE_SIZE * 1.28 / 72 / height
    body, foot = figure.subfigures(2, 1, height_ratios=(1 - share, share))
    foot.text(0.012, 0.97, "\n".join(lines), fontsize=NOTE_SIZE, va="top", linespacing=1.25)
    return body.subplots(rows, columns, squeeze=False, **kwargs)


def batch_lines(batches: Sequence[int]) -> dict[int, tuple[str, str]]:
    """Returns {batch: (colour, marker)}, dark to light with the batch size."""
    scale = colormaps["viridis"]
    places = np.linspace(0.0, 0.88, len(batches)) if len(batches) > 1 else [0.0]
    shapes = [LINES[i % len(LINES)][1] for i in range(len(batches))]
    return {b: (scale(x), s) for b, x, s in zip(batches, places, shapes, strict=True)}


def batch_axis(ax, batches: Sequence[int]) -> None:
    """Makes x the batch size, logarithmic, with the sizes themselves for ticks."""
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(list(batches)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlim(min(batches) / 1.5, max(batches) * 1.5)
    ax.set_xlabel("batch size (sequences)")


def null_line(ax, value: float, label: str | None = None, style: str = "--") -> None:
    """Draws a level that needs nothing learned."""
    ax.axhline(value, color=INK, lw=0.9, ls=style, label=label, zorder=1)


def zero_line(ax) -> None:
    """Draws a thin line at 0."""
    ax.axhline(0.0, color=FAINT, lw=0.7, zorder=0.5)


def words(number: int, singular: str) -> str:
    """Writes a count with its noun, `1 seed`, `3 seeds`."""
    return f"{number} {singular}{'' if number == 1 else 's'}"


def edge_note(edges: Sequence[int], stage: str) -> str:
    """Says at which batch sizes the best learning rate was the last one tried; empty if none."""
    if not edges:
        return ""
    sizes = ", ".join(map(str, edges))
    return f" {stage}: best learning rate at the end of its grid for B = {sizes}."
