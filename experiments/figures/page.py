"""The sheet that every figure of the study is drawn on, and marks that several of them share."""

import textwrap
from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from experiments.figures.options import Options as Options
from experiments.study_records import Cell, Run
from lens_jax.axis_style import FAINT, LINES
from lens_jax.fits import REFERENCE_WIDTH
from models.ladder import ALL_RUNGS

CAPTION_SIZE = 6.8
CHARACTERS = 20.0  # of a caption in one inch

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK = (colour for colour, _ in LINES)

# Rungs that stand side by side in a study, or in one atlas, differ in colour; those of the laptop
# study differ from one another, and the first four are as in the toy's figures.
_RUNG_LINES = {
    "baseline": (SKY, "P"),
    "rope": (ORANGE, "v"),
    "muon": (GREEN, "^"),
    "untied": (VERMILLION, "s"),
    "valuemix": (GREEN, "<"),
    "unet": (SKY, ">"),
    "fixedwin": (BLACK, "*"),
    "flexwin": (BLUE, "o"),
    "vte": (ORANGE, "p"),
    "betterwin": (PURPLE, "D"),
    "sparsev": (GREEN, "h"),
    "truncrope": (SKY, "d"),
    "softcap": (VERMILLION, "^"),
    "fp8head": (ORANGE, "o"),
    "lswa": (BLUE, "s"),
    "attnscale": (BLACK, "X"),
    "lswa_adam": (VERMILLION, "v"),
    "qknorm": (PURPLE, "<"),
    "embednorm": (BLUE, "p"),
    "x0skip": (PURPLE, "*"),
    "longrow": (VERMILLION, "d"),
    "mirrorvte": (PURPLE, "P"),
    "pairmix": (ORANGE, "X"),
    "dropattn": (BLACK, "h"),
}
_SPARE_MARKERS = ("H", "8", "1", "2")


def title(figure: Figure, number: int, text: str) -> None:
    """Writes number and subject of a figure above it."""
    words = f"Figure {number}.  {text}"
    figure.suptitle(words, x=0.012, ha="left", fontsize=10, fontweight="bold")


def caption(figure: Figure, text: str) -> None:
    """Writes the conditions below a figure: n, seeds, rank window, token budget, alignment.

    Wrapped at the width that the figure has now; line breaks in the text are kept.
    """
    width = int(figure.get_size_inches()[0] * CHARACTERS)
    lines = [line for part in text.split("\n") for line in textwrap.wrap(part, width)]
    figure.supxlabel(
        "\n".join(lines), x=0.012, ha="left", fontsize=CAPTION_SIZE, linespacing=1.25, ma="left"
    )


def family_line(rung: str) -> dict:
    """Returns colour and marker of a rung, the same in all figures.

    A rung that is not in the table above has a marker that no rung of the table has.
    """
    if rung in _RUNG_LINES:
        colour, marker = _RUNG_LINES[rung]
    else:
        others = [name for name in ALL_RUNGS if name not in _RUNG_LINES]
        turn, place = divmod(others.index(rung) if rung in others else len(others), len(LINES))
        colour, marker = LINES[place][0], _SPARE_MARKERS[turn % len(_SPARE_MARKERS)]
    return {"color": colour, "marker": marker}


def batch_line(index: int, count: int) -> dict:
    """Returns colour and marker of the batch in a place of `count`, from dark for the smallest."""
    place = 0.88 * index / (count - 1) if count > 1 else 0.0
    return {"color": colormaps["viridis"](place), "marker": LINES[index % len(LINES)][1]}


def legend_outside(ax, x: float, inches: float, **kwargs) -> None:
    """Adds a legend above the axes, or below them for negative inches, centred at a share x."""
    edge = 1.0 if inches > 0 else 0.0
    shift = ScaledTranslation(0, inches, ax.figure.dpi_scale_trans)
    ax.legend(
        loc="lower center" if inches > 0 else "upper center", bbox_to_anchor=(x, edge),
        bbox_transform=ax.transAxes + shift, borderaxespad=0.0, **kwargs,
    )  # fmt: skip


def zero_line(ax) -> None:
    """Draws a thin line at 0."""
    ax.axhline(0.0, color=FAINT, lw=0.7, zorder=0.5)


def words(number: int, singular: str) -> str:
    """Writes a count with its noun, `1 seed`, `3 batches`, `2 families`."""
    endings = {"y": f"{singular[:-1]}ies", "h": f"{singular}es"}
    return f"{number} {singular if number == 1 else endings.get(singular[-1], f'{singular}s')}"


def ranks_text(ranks: tuple[int, int], window: tuple[int, int]) -> str:
    """Writes a rank window, and the published one where it was scaled to the width."""
    used, published = (f"{first}-{last}" for first, last in (ranks, window))
    return used if used == published else f"{used} ({published} at width {REFERENCE_WIDTH})"


def seeds_of(runs: Sequence[Run]) -> tuple[int, int]:
    """The fewest and the most seeds that a cell of these runs has."""
    cells: dict[Cell, set[int]] = {}
    for run in runs:
        cells.setdefault(run.cell, set()).add(run.seed)
    counts = [len(seeds) for seeds in cells.values()] or [0]
    return min(counts), max(counts)


def seeds_text(runs: Sequence[Run]) -> str:
    """Writes how many seeds a cell has, `1 seed a cell`, `1 to 3 seeds a cell`."""
    fewest, most = seeds_of(runs)
    return f"{words(most, 'seed')} a cell" if fewest == most else f"{fewest} to {most} seeds a cell"
