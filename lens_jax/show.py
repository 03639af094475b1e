"""Draws a run folder on one page: `python -m lens_jax.show RUN [out=FILE]`.

Reads config.json, metrics.jsonl and spectra/ only; needs neither an accelerator nor jax.
"""

import os
import sys
from pathlib import Path

from lens_jax.saved_run import SavedRun, display_windows, read_run

USAGE = """usage: python -m lens_jax.show RUN [out=FILE]

Draws the run folder RUN on one page: loss, activation, gradient and weight spectra,
alpha and RankMe over training. Parts that were not measured are left blank.

  RUN       folder with metrics.jsonl and/or spectra/ (and config.json)
  out=FILE  page to write, .png, .pdf or .svg   [RUN/summary.png]
"""
FORMATS = (".png", ".pdf", ".svg")
INCHES, DPI = (16.0, 9.0), 120


def draw_run(run_folder: str | Path, out: str | Path | None = None) -> Path:
    """Draws a run folder on one page of 16 x 9 inches and returns the file, replaced whole.

    `out` is by default `summary.png` in the folder. Raises ValueError with one line for a folder
    that is no run, a damaged file in it, or an `out` that is no .png, .pdf or .svg in a folder
    that exists.
    """
    run_folder = Path(run_folder)
    out = run_folder / "summary.png" if out is None else Path(out)
    if out.suffix not in FORMATS:
        raise ValueError(f"out={out}: end the name in {', '.join(FORMATS)}")
    run = read_run(run_folder)
    if not out.parent.is_dir():
        raise ValueError(f"out={out}: no such folder {out.parent}")

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
        head.text(0.006, 0.82, _headline(run), fontsize=13, weight="bold", va="top")
        head.text(0.006, 0.28, _conditions(run), fontsize=8.5, va="top")
        for ax, panel in zip(body.subplots(2, 4).flat, PANELS, strict=True):
            panel(ax, run)
        partial = out.with_name(f".{out.name}.tmp")
        try:
            figure.savefig(partial, format=out.suffix[1:])
            os.replace(partial, out)
        finally:
            partial.unlink(missing_ok=True)
    return out


def _headline(run: SavedRun) -> str:
    """One line that names the run: rung, tier, profile, tokens, validation loss, seed, probes."""
    from lens_jax.axis_style import short_count

    words = [str(fact) for name in ("rung", "tier") if (fact := run.fact(name))]
    words = words or [run.path.resolve().name]
    if run.fact("profile"):
        words.append(f"{run.fact('profile')} profile")
    if run.token_counts().size:
        words.append(f"{short_count(run.token_counts().max())} tokens")
    if run.val["loss"].size:
        words.append(f"val loss {run.val['loss'][-1]:.3f}")
    words += [
        f"{name} {fact}" for name in ("batch", "seed") if (fact := run.fact(name)) is not None
    ]
    if (run.path / "nonfinite.json").is_file():
        words.append("STOPPED: not finite")
    if "probe_data" in run.meta:
        probe = {"fixed": "fixed probe set", "batch": "probes on training batches"}
        words.append(probe.get(run.meta["probe_data"], str(run.meta["probe_data"])))
    return "  |  ".join(words)


def _conditions(run: SavedRun) -> str:
    """One line with what the numbers depend on: probe sizes, rank windows, what alpha is."""
    meta, words = run.meta, []
    if not meta:
        return "no spectra in this folder"
    if "gradient_samples" in meta and "sample_tokens" in meta:
        samples, length = meta["gradient_samples"], meta["sample_tokens"]
        words.append(f"gradients: N = {samples} samples of T = {length} tokens")
    if "act_tokens" in meta:
        words.append(f"activations: {meta['act_tokens']:,} tokens")
    if "probe_hash" in meta:
        words.append(f"probe set {str(meta['probe_hash'])[:12]}")
    if "width" in meta:
        windows = display_windows(run.fact("tier"), int(meta["width"]))
        used = ", ".join(f"{first}-{last}" for first, last in windows.values())
        published = ", ".join(windows)
        scaled = "" if used == published else f" ({published} at width 768)"
        words.append(f"width {meta['width']}, rank windows {used}{scaled}")
    words.append("alpha = minus the OLS slope of ln eigenvalue on ln rank")
    return "   ".join(words)


def main(arguments: list[str]) -> int:
    """Runs the command; returns 0, or 2 after one line of error."""
    if not arguments or {"--help", "-h", "help"} & set(arguments):
        print(USAGE, end="")
        return 0 if arguments else 2
    try:
        folders = [word for word in arguments if not word.startswith("-") and "=" not in word]
        options = [word for word in arguments if word not in folders]
        if len(folders) != 1:
            raise ValueError(f"{len(folders)} run folders given: give one, RUN [out=FILE]")
        out = None
        for option in options:
            key, _, value = option.partition("=")
            if key != "out" or not value:
                raise ValueError(f"unknown argument {option!r}: give RUN [out=FILE]")
            out = value
        print(draw_run(folders[0], out))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
