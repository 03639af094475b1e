"""A run as one HTML file that stands alone: figures, what they show, every statistic in a table.

`report` makes the text, `python -m lens_jax.show RUN out=report.html` writes it. The figures are
those of the summary page and one more, each an image of its own inside the file; the table is that
of `lens_jax.table`.
"""

import base64
import io
import re
from collections.abc import Iterator

import numpy as np

from lens_jax.report_page import figure, page, table
from lens_jax.saved_run import SavedRun, conditions, headline
from lens_jax.table import KINDS, Column, Row, Statistic, table_columns, table_rows

INCHES = (3.8, 3.8)  # so that letters are legible where a screen has room for one figure only
# Letters that Latin ones are taken for would stand in the source otherwise.
GREEK = {"alpha": "\u03b1", "lambda": "\u03bb", "sigma": "\u03c3", "Sigma": "\u03a3"}

TITLES = {
    "activation": "Activations: eigenvalues lambda of the centred covariance",
    "gradient": "Gradients: singular values sigma of the matrix of per-sample gradients",
    "weight": "Weights: singular values sigma of the matrix",
}


def report(run: SavedRun) -> str:
    """Returns the report of a run, HTML without any resource outside of itself.

    What was not measured is said in its place. Every word of the run's files is escaped.
    """
    rows = table_rows(run)
    facts = [greek(fact) for fact in conditions(run)]
    return page(headline(run), facts, list(_figures(run)), list(_tables(run, rows)))


def _tables(run: SavedRun, rows: list[Row]) -> Iterator[str]:
    """Yields a table for each kind of rows that was measured."""
    for kind in KINDS:
        own = [row for row in rows if row.kind == kind]
        if own:
            columns = [c for c in table_columns(run, rows, kind) if c.shown]
            last = max(row.step for row in own)
            lines = [(_cells(row, columns), row.step == last) for row in own]
            heads = [(greek(column.title), greek(column.note)) for column in columns]
            yield table(kind, greek(TITLES[kind]), heads, lines)


def _cells(row: Row, columns: list[Column]) -> list[tuple[str, float | None]]:
    """Returns (text, number to sort by, where the text does not begin with it) of each cell."""
    cells = [(row.site.removesuffix("/kernel"), None), (str(row.step), None)]
    cells.append((f"{row.tokens:,}", row.tokens))
    for column in columns:
        found = row.statistics.get(column.name, Statistic())
        infinite = found.value is not None and np.isinf(found.value)
        cells.append((number_text(*found), found.value if infinite else None))
    return cells


def number_text(value: float | None, error: float | None = None) -> str:
    """Writes a statistic for people, its error with two digits: `1.209 ± 0.071`.

    An en dash stands for what was not recorded, `n/a` for what is not defined.
    """
    if value is None:
        return "\u2013"
    if np.isnan(value):
        return "n/a"
    if np.isinf(value):
        return "\u221e"
    if isinstance(value, int):
        return str(value)
    if error is None:
        return f"{value:#.4g}"
    if not np.isfinite(error) or error == 0:
        return f"{value:#.4g} \u00b1 {'0' if error == 0 else 'n/a'}"
    decimals = int(np.clip(1 - np.floor(np.log10(error)), 0, 8))
    return f"{value:.{decimals}f} \u00b1 {error:.{decimals}f}"


def greek(text: str) -> str:
    """Replaces the names of Greek letters, R2 and ^2 by their usual form; keeps rank windows whole.

    A window such as 30-150 gets a hyphen at which no line breaks.
    """
    text = re.sub(r"(?<=\d)-(?=\d)", "\u2011", text)
    text = re.sub(r"\b(alpha|lambda|sigma|Sigma)\b", lambda name: GREEK[name[0]], text)
    return re.sub(r"\bR2\b", "R\u00b2", text).replace("^2", "\u00b2")


def _figures(run: SavedRun) -> Iterator[str]:
    """Yields each panel as an image with its caption."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from lens_jax import panels
    from lens_jax.axis_style import STYLE

    captions = _captions(run, panels.has_jackknife(run, run.final_site(panels.ACTIVATION)))
    # A fixed salt and no date: the same run gives the same file.
    with rc_context(STYLE | {"svg.hashsalt": "lens_jax"}):
        for panel in (*panels.PANELS, panels.rankme_heat_map):
            drawing = Figure(figsize=INCHES, layout="constrained")
            FigureCanvasAgg(drawing)
            ax = drawing.subplots()
            panel(ax, run)
            image = io.BytesIO()
            drawing.savefig(image, format="svg", metadata={"Date": None})
            source = base64.b64encode(image.getvalue()).decode("ascii")
            alt, caption = _alternative(ax), captions[panel.__name__]
            if not ax.has_data():
                caption = f"{ax.texts[0].get_text().capitalize()}."
            yield figure(f"data:image/svg+xml;base64,{source}", INCHES, alt, greek(caption))


def _alternative(ax) -> str:
    """Returns in words what the axes of a panel show."""
    words = [_plain(ax.get_title(loc="left"))]
    if not ax.has_data():
        return f"{words[0]}: {ax.texts[0].get_text()}"
    labels = {"across": ax.get_xlabel(), "up": ax.get_ylabel()}
    words += [f"{_plain(label)} {way}" for way, label in labels.items() if label]
    bars = [
        _plain(bar.get_ylabel()) for bar in ax.figure.axes if bar is not ax and bar.get_ylabel()
    ]
    words += [f"colour: {label}" for label in bars]
    legend = ax.get_legend()
    if legend is not None:
        words.append("lines: " + ", ".join(_plain(text.get_text()) for text in legend.get_texts()))
    return "; ".join(words)


def _plain(text: str) -> str:
    """Takes the mathematics out of a label."""
    text = text.replace("$_", " ").replace("$", "").replace(r"\pm", "\u00b1").replace("\\", "")
    return greek(" ".join(text.split()))


def _captions(run: SavedRun, jackknife: bool) -> dict[str, str]:
    """Returns what each panel shows and what its error bars are, by the panel's name."""
    in_table = "No error bars" + (" here; the table has them." if jackknife else ".")
    if jackknife:
        error = "standard error by the jackknife over groups of probe windows"
        bars = f"Bands: plus and minus one {error}."
    else:
        error = "standard error of the least-squares slope (the run recorded no groups)"
        bars = f"Bars: {error}, which takes residuals for independent."
    directions = bars if jackknife else "No error bars: the run recorded no groups of windows."
    return {
        "loss": "Training loss of every step (thin) and smoothed (thick), and validation loss. "
        "No error bars.",
        "activation_spectra": "Eigenvalues of the centred covariance over their sum, a curve a "
        "measured step. Dashed: the power law of the last step in the main rank window (shaded); "
        "coloured: those of figure c, raised by a factor of 2 to be seen. "
        f"What follows \u00b1 is the {error}.",
        "tail_exponents": "Minus the slope of ln lambda on ln rank in three rank windows: larger "
        f"is steeper. {bars}",
        "rankme_trajectories": "How many directions the activations fill, in three definitions. "
        + directions
        + (" None for last tokens." if jackknife else ""),
        "gradient_spectra": "Singular values of the matrix whose rows are gradients of single "
        "samples, as they are (dashed) and minus their mean (solid). No error bars.",
        "gradient_concentration": "Share of the sum of singular values that the largest hold, by "
        f"matrix: higher is more concentrated. {in_table}",
        "layer_heat_map": "Exponent in the main rank window, a row a layer, a column a measured "
        f"step; grey where there is no fit. {in_table}",
        "rankme_heat_map": "Directions that the eigenvalues fill, a row a layer, a column a "
        f"measured step. {in_table}",
        "weight_spectra": "Singular values of the weights at the last measured step, dotted at "
        "the first. Nothing is sampled, so there is no error.",
    }
