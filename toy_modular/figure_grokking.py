"""One page on a grokking run, from its records alone: curves, features, spectra, circles.

Panels: accuracy, loss, two measures of progress; energy in the key modes, exponent and RankMe of h,
RankMe of weights; spectrum of the embedding at three looks, and its rows in the plane of a key
mode at the end of memorising and at the end of the run.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from toy_modular.features import centred, mode_shares, modes, pair_masses
from toy_modular.grok_summary import GENERALISED, KEY_SHARE, TABLES, GrokRun, read_run, summarize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INCHES = (10.5, 10.4)
DPI = 150
EMBEDDING = TABLES["embedding"]
WEIGHT_NAMES = {
    "wte/embedding": "embedding",
    "lm_head/kernel": "output head",
    "attn/c_proj/kernel": "attention out",
    "mlp/c_proj/kernel": "MLP out",
}


def draw(run_folder: str | Path, out: str | Path) -> dict:
    """Draws the page of a run to a file and returns its `grok_summary`; raises as `draw_page`."""
    figure, found = draw_page(run_folder)
    figure.savefig(out)
    return found


def draw_page(run_folder: str | Path) -> tuple["Figure", dict]:
    """The page of a run, and its `grok_summary`.

    Raises ValueError for a folder that is no measured run of task=grok.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from lens_jax.axis_style import STYLE
    from toy_modular.figures_page import sheet

    run = read_run(run_folder)
    found = summarize(run)
    with rc_context(STYLE):
        figure = Figure(figsize=INCHES, dpi=DPI, layout="constrained")
        axes = sheet(figure, 3, 3, _note(run, found))
        for ax, panel in zip(axes[:2].flat, PANELS, strict=True):
            panel(ax, run)
            _step_axis(ax, run)
        _draw_spectrum(axes[2, 0], run)
        _draw_plane(axes[2, 1], run, place(run, run.trained), "h")
        _draw_plane(axes[2, 2], run, -1, "i")
    return figure, found


def place(run: GrokRun, step: int | None) -> int:
    """Which look is the last one up to a step; the first for None."""
    return 0 if step is None else int(np.searchsorted(run.feature_steps, step, side="right")) - 1


def mode_plane(table: np.ndarray, mode: int) -> tuple[np.ndarray, float]:
    """Rows of the centred table (c, D) in the plane of a mode, (c, 2), and its share of the energy.

    The plane is spanned by the principal components of the table with nothing but that mode, so it
    is the mode that is chosen and not how the rows lie: rows without any structure scatter in it.
    """
    mode_vector = modes(table)[mode]
    _, _, directions = np.linalg.svd(np.stack([mode_vector.real, mode_vector.imag]), False)
    rows = centred(table)
    points = rows @ directions.T
    return points, float(np.sum(points**2) / np.sum(rows**2))


def _draw_accuracy(ax, run: GrokRun) -> None:
    from lens_jax.axis_style import BLUE, VERMILLION

    for curve, colour, name in ((run.train, BLUE, "train"), (run.val, VERMILLION, "validation")):
        ax.plot(_shown(curve.step), curve.accuracy, color=colour, label=name)
    ax.set(title="(a) Accuracy", ylim=(-0.03, 1.05))
    ax.legend(loc="center left")


def _draw_loss(ax, run: GrokRun) -> None:
    from lens_jax.axis_style import BLUE, VERMILLION

    for curve, colour, name in ((run.train, BLUE, "train"), (run.val, VERMILLION, "validation")):
        ax.plot(_shown(curve.step), curve.loss, color=colour, label=name)
    _guess_line(ax, run)
    ax.set(title="(b) Loss (nats)", yscale="log")
    ax.legend(loc="lower left")


def _draw_progress(ax, run: GrokRun) -> None:
    from lens_jax.axis_style import LINES

    steps = _shown(run.feature_steps)
    for (colour, _), values, name in (
        (LINES[2], run.restricted(), "key modes of the answer alone"),
        (LINES[3], run.excluded(), "training pairs without the answer's modes"),
    ):
        ax.plot(steps, values, color=colour, label=name)
    _guess_line(ax, run)
    ax.set(title="(c) Measures of progress (nats)", ylim=(0, None))
    _legend(ax, 2)


def _draw_shares(ax, run: GrokRun) -> None:
    from lens_jax.axis_style import LINES
    from toy_modular.figures_page import null_line

    for (name, values), (colour, _) in zip(run.shares().items(), LINES, strict=False):
        label = "mean h by answer" if name == "answers" else name
        ax.plot(_shown(run.feature_steps), values, color=colour, label=label)
    null_line(ax, run.null, "as much in every mode")
    ax.set(title=f"(d) Energy in {len(run.key_modes)} key modes", ylim=(0, 1))
    _legend(ax, 4)
    ax.set_yticks(np.linspace(0, 1, 6))


def _draw_alpha(ax, run: GrokRun) -> None:
    from lens_jax.axis_style import BLUE, VERMILLION

    steps = _shown(run.spectra_steps)
    (line,) = ax.plot(steps, run.alphas(), color=BLUE)
    ranks = ax.twinx()
    ranks.spines["right"].set_visible(True)
    ranks.grid(False)
    (other,) = ranks.plot(steps, run.ranks(), color=VERMILLION, ls="--")
    first, last = run.window
    ax.set(title="(e) Spectrum of h at '='", ylabel=rf"$\alpha$, ranks {first}-{last}")
    ranks.set_ylabel("RankMe")
    ax.yaxis.label.set_color(line.get_color())
    ranks.yaxis.label.set_color(other.get_color())


def _draw_weights(ax, run: GrokRun) -> None:
    from lens_jax.axis_style import LINES

    steps = _shown(run.spectra_steps)
    series = run.weight_ranks()
    for (path, values), (colour, _) in zip(series.items(), LINES, strict=False):
        ax.plot(steps, values, color=colour, label=_weight_name(path, run))
    ax.set(title="(f) RankMe of weights", ylim=(0, None))
    ax.legend(loc="lower left")


PANELS = (_draw_accuracy, _draw_loss, _draw_progress, _draw_shares, _draw_alpha, _draw_weights)


def _draw_spectrum(ax, run: GrokRun) -> None:
    from lens_jax.axis_style import BLUE, FAINT, LINES
    from toy_modular.figures_page import null_line

    looks = [(0, FAINT, "o"), (place(run, run.trained), LINES[4][0], "s")]
    if run.onset is not None:
        looks.append((place(run, run.onset - 1), LINES[2][0], "^"))
    looks.append((len(run.features) - 1, BLUE, "D"))
    for index, colour, marker in looks:
        look = run.features[index]
        masses = pair_masses(mode_shares(run.table(look, EMBEDDING)))
        style = {"lw": 0.8, "ms": 2.5, "marker": marker}
        number = np.arange(1, masses.size + 1)
        ax.plot(number, masses, color=colour, label=f"step {look.step}", **style)
    null_line(ax, 1 / masses.size)
    ax.set(title="(g) Modes of the embedding", xlabel="mode", ylabel="share of energy")
    ax.set_ylim(0, None)
    _legend(ax, len(looks))


def _draw_plane(ax, run: GrokRun, index: int, letter: str) -> None:
    from matplotlib.ticker import MaxNLocator

    look, mode, c = run.features[index], run.key_modes[0], len(run.order)
    points, share = mode_plane(run.table(look, EMBEDDING), mode)
    phase = np.arange(c) * mode % c
    ax.scatter(*points.T, c=phase, cmap="hsv", s=14, lw=0, zorder=2)
    reach = 1.12 * np.abs(points).max()
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel="first direction")
    ax.set_ylabel("second direction")
    ax.set_title(f"({letter}) Mode {mode} at step {look.step} ({share:.0%})")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(4, symmetric=True))


def _shown(steps) -> np.ndarray:
    """Steps as a logarithmic axis can show them: step 0 stands half way to the first."""
    steps = np.asarray(steps, np.float64)
    return np.where(steps > 0, steps, _least(steps) / 2)


def _least(steps: np.ndarray) -> float:
    positive = steps[steps > 0]
    return float(positive.min()) if positive.size else 1.0


def _step_axis(ax, run: GrokRun) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    from lens_jax.axis_style import INK, round_ticks

    low, high = _least(run.val.step), float(run.val.step[-1])
    ax.set(xscale="log", xlim=(0.45 * low, 1.1 * high), xlabel="step")
    ticks = round_ticks(low, high)
    ax.xaxis.set_major_locator(FixedLocator([low / 2, *ticks]))
    ax.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: "0" if value < low else f"{value:g}")
    )
    ax.xaxis.set_minor_locator(NullLocator())
    for step, style in ((run.trained, ":"), (run.generalised, "--")):
        if step is not None:
            ax.axvline(step, color=INK, lw=0.8, ls=style, zorder=0.8)


def _guess_line(ax, run: GrokRun) -> None:
    from lens_jax.axis_style import FAINT

    ax.axhline(np.log(run.task.vocab_size), color=FAINT, lw=0.8)


def _legend(ax, lines: int) -> None:
    from lens_jax.axis_style import legend_above_data

    legend_above_data(ax, lines)


def _weight_name(path: str, run: GrokRun) -> str:
    """A weight in words, with its layer where the model has several."""
    block, _, rest = path.partition("/")
    if not block.startswith("h_"):
        return WEIGHT_NAMES.get(path, path)
    several = any(name.startswith("h_1/") for name in run.weight_ranks())
    return WEIGHT_NAMES.get(rest, rest) + (f", layer {block[2:]}" if several else "")


def _note(run: GrokRun, found: dict) -> str:
    pairs = run.task.train, run.task.p**2
    numbers = ", ".join(map(str, run.key_modes))
    mirrored = ""
    if run.task.operation != "subtract":
        mirrored = "What validation has at first are pairs b, a of which a, b was trained on. "
    return (
        f"{found['sentence']}\n"
        f"One run, seed {run.seed}, {pairs[0]} of {pairs[1]} pairs trained on. Dotted: train "
        f"accuracy 1; dashed: validation accuracy {GENERALISED}; grey: a guess. Key modes, "
        f"{numbers}, are those that hold {KEY_SHARE:.0%} of the energy of the last look's mean "
        f"logits by answer: they were chosen with the end known. {mirrored}"
        f"(h), (i): embedding of the numbers in the plane of mode {run.key_modes[0]}, coloured by "
        f"number times mode modulo {len(run.order)}, with that mode's share of its energy."
    )
