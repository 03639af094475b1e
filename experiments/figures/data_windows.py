"""Figure 5: whether two samples of text have one spectrum of token counts; no model in it.

Reads the record of `python -m experiments.window_counts` in STUDY/window_counts. Source: protocol
spec, figure 5.
"""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.figures.options import Options
from experiments.figures.page import caption, title
from experiments.study_records import Study
from experiments.window_counts import DIVERGENCE, KIND, NULL, share_beyond
from lens_jax.axis_style import BLUE, FAINT, VERMILLION, rank_axes, visible
from lens_jax.claims import FAILED, HELD, LEVEL, UNDECIDED, Claim, Missing, number
from lens_jax.step_files import StepFile, list_steps

INCHES = {5: (7.2, 3.4)}
COMMAND = "python -m experiments.window_counts a=SHARDS b=SHARDS out=STUDY/window_counts"


def draw_5(figure: Figure, study: Study, options: Options) -> list[Claim]:
    """Draws both spectra and the null; raises Missing where they were not counted."""
    del options
    rows = list_steps(study.path / "window_counts")
    if not rows or not rows[0].has(KIND, "a"):
        raise Missing(f"token counts of two samples: {COMMAND}")
    row = rows[0]
    title(figure, 5, "Spectra of token counts of two samples of text")
    spectra, null = figure.subplots(1, 2, width_ratios=(1.2, 1))
    for key, colour, style in (("a", BLUE, "-"), ("b", VERMILLION, "--")):
        values = row.array(KIND, key)[:-1]  # centred, so the last is 0 but for rounding
        x, y = visible(values, values.sum())
        spectra.plot(x, y, style, color=colour, label=row.meta[key])
    rank_axes(spectra, r"$\lambda / \Sigma\lambda$")
    spectra.set_title("(a) covariance of count vectors")
    spectra.legend(loc="lower left")
    _draw_null(null, row)
    claim = _claim(row)
    caption(figure, _caption_text(row) + "\n" + claim.sentence)
    return [claim]


def _draw_null(ax, row: StepFile) -> None:
    halves, observed = row.array(*NULL.split("/")), float(row.array(*DIVERGENCE.split("/")))
    ax.hist(halves, bins=min(20, halves.size), color=FAINT, label="random halves of the first")
    ax.axvline(observed, color=VERMILLION, label="first against second")
    ax.set(xlabel="JSD of spectra (nats)", ylabel="count", xlim=(0, None))
    ax.set_ylim(0, 1.35 * ax.get_ylim()[1])
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.set_title("(b) against chance")
    # the observed value may lie anywhere, so its line goes behind the words
    ax.legend(loc="upper right", frameon=True, framealpha=1.0, edgecolor="none")


def _claim(row: StepFile) -> Claim:
    """Held where the samples differ no more than halves of one do; that is no proof of equality.

    Undecided where so few halves were drawn that p <= LEVEL cannot be. A small p speaks against the
    claim, while in a report's q a small one speaks for its claim; so it is in the sentence alone.
    """
    halves, observed = row.array(*NULL.split("/")), float(row.array(*DIVERGENCE.split("/")))
    p = share_beyond(halves, observed)
    least = 1 / (1 + halves.size)
    outcome = UNDECIDED if least > LEVEL else FAILED if p <= LEVEL else HELD
    return Claim(
        "5", "spectra of token counts differ no more between two texts than between halves of one",
        row.meta["windows"], 1, "all ranks", observed, float("nan"),
        f"median of random halves {number(np.median(halves), '.2g')}", outcome,
        f"{outcome.capitalize()}: JSD {number(observed, '.2g')} between {row.meta['a']} and "
        f"{row.meta['b']}, {number(np.median(halves), '.2g')} (at most "
        f"{number(halves.max(), '.2g')}) between random halves of the first, p = {p:.2g} over "
        f"{halves.size} halves (least possible {least:.2g}).",
    )  # fmt: skip


def _caption_text(row: StepFile) -> str:
    meta = row.meta
    return (
        f"N = {meta['windows']} windows of {meta['window']} tokens of each sample, no overlap; "
        f"vocabulary {meta['vocab_size']:,}; centred counts, by their Gram matrix in float64."
    )
