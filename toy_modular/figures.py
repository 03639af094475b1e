"""Figures of the toy study from the records of its folder, and claims.csv beside them.

    python -m toy_modular.figures study=STUDY
    python -m toy_modular.figures study=STUDY fig=4a stage=muon out=FOLDER
    python -m toy_modular.figures --help

4a: exponents and token efficiency over batch sizes; 4b: concentration of a band's modes in the four
stages; 11a: spectra at equal loss; 11b: paired changes of H_peak from stage to stage; 11c: spectra
of stages at equal loss; factorial: what the untied stage consists of; of a study with task=grok,
grokking: a page a run. Each is written as PNG and PDF, and claims.csv and claims.json
(claims_4a.csv and so on for one figure) say in a sentence what each shows, with the verdict of a
fixed rule; features.csv has every band of every run at its end, with nulls and edits. A figure
whose runs are not there yet says which, and the others are drawn.
"""

import io
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Literal

import chz

from lens_jax.alignment import RATIO_TOLERANCE
from lens_jax.claims import Claim, Missing, claims_csv, claims_json
from models.atomic_files import write_bytes_atomic
from models.command_line import (
    Layer,
    UsageError,
    build,
    cast_words,
    check_path,
    help_page,
    parse_words,
    run_command,
)
from toy_modular.feature_table import feature_rows, features_csv
from toy_modular.records import Study, read_study

FIGURES = {
    "4a": ("figures_prediction", "draw", "INCHES"),
    "4b": ("figures_modes", "draw_curves", "CURVES_INCHES"),
    "11a": ("figures_spectra", "draw_spectra", "SPECTRA_INCHES"),
    "11b": ("figures_modes", "draw_bars", "BARS_INCHES"),
    "11c": ("figures_spectra", "draw_divergence", "DIVERGENCE_INCHES"),
    "factorial": ("figures_factorial", "draw", "INCHES"),
}
FORMATS, DPI = ("png", "pdf"), 200
Window = tuple[int, int]


@chz.chz
class FigureConfig:
    """The keys of the command."""

    study: str | None = chz.field(default=None, doc="folder of the study")
    fig: Literal[("all", *FIGURES, "grokking")] = chz.field(default="all", doc="which figure")
    out: str | None = chz.field(default=None, doc="folder to write to; none: STUDY/figures")
    stage: str = chz.field(default="muon", doc="stage of 4a")
    window: Window = chz.field(default=(10, 40), doc="main rank window, at width 128")
    at: float = chz.field(default=0.2, doc="share of a run at which 4a is tested")
    loss: float | None = chz.field(
        default=None, doc="loss of 11a; none: the lowest at which most runs were measured"
    )
    tolerance: float = chz.field(default=0.02, doc="greatest distance of a row from a matched loss")
    ratio: float = chz.field(
        default=RATIO_TOLERANCE,
        doc="greatest distance in ln(tokens) of a row from a share of a run, or from equal tokens",
    )
    batch: int | None = chz.field(default=None, doc="batch size of 4b; none: the least of all four")
    band: str | None = chz.field(
        default=None, doc="band of 4b, as 97:200; none: the first of bands="
    )
    bands: tuple[str, ...] = chz.field(
        default=(),
        doc="bands of 11b and factorial; none: 97:200 and 179:50, else the prime ones",
    )
    modes: int = chz.field(default=4, doc="modes of H_S, the greatest and the fixed ones")
    x: Literal["progress", "tokens"] = chz.field(default="progress", doc="axis of 4b")
    align: Literal["progress", "steps"] = chz.field(
        default="progress", doc="11b at thirds of each run, or at equal steps"
    )
    steps: tuple[int, ...] = chz.field(default=(500, 1000, 1500), doc="the steps of align=steps")

    @chz.validate
    def _ranges(self):
        for key in ("study", "out"):
            if getattr(self, key) is not None:
                check_path(key, getattr(self, key))
        if not 1 <= self.window[0] <= self.window[1] - 2:
            raise ValueError(
                f"window={self.window[0]},{self.window[1]}: give FIRST,LAST, 3 ranks or more"
            )
        if not 0 < self.at <= 1:
            raise ValueError(f"at={self.at}: give a share of the run above 0 and up to 1")
        for key in ("tolerance", "ratio", "loss", "modes", "batch"):
            if getattr(self, key) is not None and not 0 < getattr(self, key) < float("inf"):
                raise ValueError(f"{key}={getattr(self, key)}: give a positive number")
        if not self.steps or min(self.steps) < 1:
            raise ValueError(
                f"steps={','.join(map(str, self.steps))}: give training steps from 1 on"
            )
        for band in (*self.bands, *filter(None, (self.band,))):
            if [part.isdigit() for part in band.split(":")] != [True, True]:
                raise ValueError(f"band {band}: give modulus:offset, for example 97:200")

    @property
    def other_windows(self) -> tuple[Window, ...]:
        """Rank windows that 4a shows beside the main one, declared before any run was made."""
        return ((1, 10), (10, 40), (40, 90), (50, 200))


def draw_figures(folder: str | Path, out: str | Path | None = None) -> list[str]:
    """Draws all figures of a study with the command's defaults; returns what there is to tell.

    These are the lines that the command prints. Raises as `run_figures`.
    """
    lines: list[str] = []
    where = None if out is None else str(out)
    claims = run_figures(FigureConfig(study=str(folder), out=where), lines.append)
    return lines + [f"{claim.figure}: {claim.sentence}" for claim in claims]


def run_figures(config: FigureConfig, tell: Callable[[str], None] = print) -> list[Claim]:
    """Draws what a configuration asks for and returns the claims; files are replaced whole.

    Tells of every file, of every figure that lacks its runs, and of every run that has not ended.
    Raises ValueError with one line for a folder that is no study or a damaged file in it.
    """
    if not Path(config.study).is_dir():
        raise ValueError(f"study={config.study}: no such folder")
    out = Path(config.out) if config.out else Path(config.study) / "figures"
    if not out.parent.is_dir():
        raise ValueError(f"out={out}: its folder does not exist; make it, or choose one")
    of_grokking = grokking_runs(config.study)
    if of_grokking or config.fig == "grokking":
        claims = _draw_grokking(of_grokking, out, tell)
    else:
        study = read_study(config.study)
        claims = _draw_walks(study, config, out, tell)
        if config.fig == "all":
            _write_features(study, config.modes, out, tell)
    if claims:
        stem = "claims" if config.fig == "all" else f"claims_{config.fig}"
        for ending, text in (("csv", claims_csv(claims)), ("json", claims_json(claims))):
            path = out / f"{stem}.{ending}"
            write_bytes_atomic(path, text.encode())
            tell(f"claims: {path}")
    return claims


def _write_features(study: Study, modes: int, out: Path, tell) -> None:
    """Writes features.csv where bands were probed."""
    rows = list(feature_rows(study.runs, modes))
    if rows:
        out.mkdir(exist_ok=True)
        write_bytes_atomic(out / "features.csv", features_csv(rows).encode())
        tell(f"features: {out / 'features.csv'}")


def _draw_walks(study: Study, config: FigureConfig, out: Path, tell) -> list[Claim]:
    for note in study.unfinished:
        tell(f"unfinished: {note}")
    claims = []
    for name in FIGURES if config.fig == "all" else (config.fig,):
        try:
            found, figure = _draw(name, study, config)
        except Missing as reason:
            tell(f"{name}: not drawn: {reason}")
            continue
        for path in _write_figure(figure, out, name):
            tell(f"{name}: {path}")
        claims += found
    return claims


def grokking_runs(study: str | Path) -> list[Path]:
    """Folders of the runs with task=grok in a study that have something to draw."""
    found = []
    for config in sorted(Path(study).glob("runs/*/config.json")):
        try:
            is_one = json.loads(config.read_bytes()).get("task") == "grok"
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{config}: no readable JSON ({error})") from error
        if is_one and any((config.parent / "features").glob("step_*.npz")):
            found.append(config.parent)
    return found


def _draw_grokking(runs: list[Path], out: Path, tell) -> list[Claim]:
    from toy_modular.figure_grokking import draw_page

    if not runs:
        tell("grokking: not drawn: no measured run of task=grok in the study")
        return []
    claims = []
    for run in runs:
        figure, found = draw_page(run)
        for path in _write_figure(figure, out, f"grokking_{run.name}"):
            tell(f"grokking: {path}")
        claims.append(
            Claim(
                figure="grokking",
                claim="the key modes are there before validation accuracy rises",
                n=1,
                seeds=1,
                window="",
                statistic=found.get("ratio", float("nan")),
                p=float("nan"),
                control=f"share of a flat spectrum {found['null_share']:.3f}",
                verdict=found["verdict"],
                sentence=found["sentence"],
            )
        )
    return claims


def _draw(name: str, study: Study, config: FigureConfig):
    # Matplotlib takes half a second, which --help should not wait for; figures are made by hand,
    # without pyplot's global state.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from lens_jax.axis_style import STYLE

    module, function, inches = FIGURES[name]
    module = import_module(f"toy_modular.{module}")
    with rc_context(STYLE):
        figure = Figure(figsize=getattr(module, inches), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        return getattr(module, function)(figure, study, config), figure


def _write_figure(figure, out: Path, name: str) -> list[Path]:
    """Writes a figure in every format and returns the files."""
    out.mkdir(exist_ok=True)
    paths = [out / f"figure_{name}.{kind}" for kind in FORMATS]
    for path, kind in zip(paths, FORMATS, strict=True):
        write_bytes_atomic(path, _image(figure, kind))
    return paths


def _image(figure, kind: str) -> bytes:
    # Without a date the same records give the same file.
    metadata = {"CreationDate": None} if kind == "pdf" else {}
    image = io.BytesIO()
    figure.savefig(image, format=kind, metadata=metadata)
    return image.getvalue()


def main(argv: list[str]) -> int:
    """The command; returns 0, or 1 where no figure could be drawn. Raises UsageError."""
    if {"-h", "--help"} & set(argv):
        print(help_page(__doc__, FigureConfig, {}, {}))
        return 0
    values = cast_words(FigureConfig, parse_words(argv))
    config, _ = build(FigureConfig, [Layer("typed", values)])
    if config.study is None:
        raise UsageError("study= is missing; give the folder of a study")
    try:
        claims = run_figures(config)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    for claim in claims:
        print(f"{claim.figure}: {claim.sentence}")
    return 0 if claims else 1


if __name__ == "__main__":
    run_command(main)
