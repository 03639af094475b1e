"""Axes and legends of the summary page: token axis, log-log rank axes, legends that cover no data.

Colours are the Okabe-Ito set, which readers with any common colour blindness tell apart.
"""

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from lens_jax.saved_run import short_count

INK, GRID, SHADE, FAINT = "#222222", "#e4e4e4", "#efe6d0", "#8c8c8c"
BLUE, VERMILLION, SKY = "#0072B2", "#D55E00", "#56B4E9"
LINES = (
    (BLUE, "o"),
    (VERMILLION, "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    (SKY, "P"),
    ("#000000", "X"),
)

FLOOR = 1e-6  # of the largest value; what lies below is rounding of a float32 Gram matrix

STYLE = {
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "legend.fontsize": 7.5,
    "legend.title_fontsize": 7.5,
    "legend.frameon": False,
    "legend.handlelength": 2.0,
    "legend.labelspacing": 0.3,
    "text.color": INK,
    "figure.facecolor": "white",
}


def not_measured(ax, reason: str = "not measured") -> None:
    """Turns the axes into a note that says why there is nothing on them."""
    ax.set(xticks=[], yticks=[], facecolor="#f7f7f7")
    ax.spines[:].set_visible(False)
    ax.text(0.5, 0.5, reason, ha="center", va="center", color=FAINT, transform=ax.transAxes)


def can_show(record) -> bool:
    """Tells whether a spectrum has anything that a curve could show."""
    return bool(np.all(np.isfinite(record.values)) and record.values.max(initial=0.0) > 0)


def reason(records: list) -> str:
    """Returns why nothing is drawn of the records of a spectrum."""
    if not records:
        return "not measured"
    if any(map(can_show, records)):
        return f"not measured: no exponent at width {records[-1].values.size}"
    zero = all(np.all(record.values == 0) for record in records)
    return "all zero" if zero else "not measured: not finite"


def token_axis(ax, tokens) -> None:
    """Makes x the training tokens of the run: logarithmic with 0 kept, or linear if short.

    Below the smallest positive count the axis is linear (symlog), so that the untrained model
    stands at its left end.
    """
    tokens = np.asarray(tokens, dtype=np.float64)
    high = tokens.max(initial=0.0)
    low = max(tokens[tokens > 0].min(initial=high), high / 1000)
    ax.set_xlabel("training tokens")
    if not np.any(tokens > 0):
        ax.set(xlim=(-1, 1), xticks=[0])
        return
    if high / low < 10:
        ax.set_xlim(-0.02 * high, 1.04 * high)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
        return
    ax.set_xscale("symlog", linthresh=low, linscale=0.35)
    ax.set_xlim(-0.12 * low, 1.15 * high)
    token_ticks(ax.xaxis, low, high, zero=True)


def token_ticks(axis, low: float, high: float, *, zero: bool = False) -> None:
    """Labels round token counts between low and high, 0 too if asked."""
    ticks = round_ticks(low, high)
    axis.set_major_locator(FixedLocator([0, *ticks] if zero else ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axis.set_minor_locator(NullLocator())


def round_ticks(low: float, high: float) -> list[float]:
    """Returns round numbers in [low, high], at least three; both ends where there are fewer."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for leading in ((1,), (1, 3), (1, 2, 5)):
        ticks = [d * 10.0**e for e in decades for d in leading]
        ticks = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        if len(ticks) >= 3:
            return ticks
    return sorted({low, high})


def token_norm(tokens) -> LogNorm:
    """Returns the colour scale of positive token counts."""
    positive = [count for count in tokens if count > 0] or [1]
    return LogNorm(min(positive), max(max(positive), 1.01 * min(positive)))


def rank_axes(ax, label: str) -> None:
    """Makes x the rank and y the label, both logarithmic, with plain rank numbers."""
    ax.set(xscale="log", yscale="log", xlabel="rank", ylabel=label)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    if np.log10(ax.get_ylim()[1] / ax.get_ylim()[0]) > 1.2:
        ax.yaxis.set_minor_formatter(NullFormatter())


def visible(values: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns ranks and scaled values that a logarithmic axis can show."""
    kept = values > FLOOR * values.max(initial=0.0)
    return np.flatnonzero(kept) + 1, values[kept] / scale if scale > 0 else values[kept]


def level(ax, value: float | None, text: str, x: float, side: str) -> None:
    """Draws a labelled yardstick across the axes, nothing for None; the label stands at x."""
    if value is not None:
        ax.axhline(value, color=INK, lw=0.8, ls="--")
        place = {"ha": side, "va": "bottom", "transform": ax.get_yaxis_transform()}
        ax.text(x, value, f"{text} {value:.2f}", fontsize=7.5, **place)


def legend_above_data(ax, num_lines: int, **kwargs) -> None:
    """Adds a legend at the top and makes room for its lines there, so that it covers nothing."""
    low, high = ax.get_ylim()
    share = 0.03 + 0.062 * num_lines
    ax.set_ylim(low, high + (high - low) * share / (1 - share))
    ax.legend(loc="upper left", borderaxespad=0.1, **kwargs)


def band(ax, x, y, error, colour: str) -> None:
    """Shades y - error to y + error; a single point, which has no band, gets a bar."""
    x, y, error = (np.asarray(values, dtype=np.float64) for values in (x, y, error))
    if x.size == 1:
        ax.errorbar(x, y, error, color=colour, elinewidth=1)
    else:
        ax.fill_between(x, y - error, y + error, color=colour, alpha=0.22, lw=0)


def line_handle(colour: str, style: str = "-", marker: str = "", label: str = "") -> Line2D:
    """Returns a legend entry that is not drawn on the axes."""
    return Line2D([], [], color=colour, ls=style, marker=marker, label=label)


def marker(shape: str, count: int) -> str:
    """Returns the marker of a line, none where the points would hide it."""
    return shape if count <= 30 else ""


def spaced(count: int, most: int) -> np.ndarray:
    """Returns at most `most` indices of range(count), even, first and last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def strided(count: int, most: int) -> np.ndarray:
    """Returns at most `most` indices of range(count), equally far apart, the last among them."""
    return np.arange(count - 1, -1, -max(1, -(-count // most)))[::-1]


def running_mean(values: np.ndarray) -> np.ndarray:
    """Smooths a curve by centred means whose reach grows with the index, 1/10 of it each side.

    On a logarithmic axis the reach has constant length; it shrinks at the end to stay centred.
    """
    index = np.arange(values.size)
    reach = np.minimum(index // 10, values.size - 1 - index)
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[index + reach + 1] - total[index - reach]) / (2 * reach + 1)
