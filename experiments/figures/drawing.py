"""From a study's records to files: draws what is asked for, and collects images and claims."""

import io
import textwrap
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from experiments.figures.catalogue import FIGURES, TOY
from experiments.figures.options import Options, check_target, resolved
from experiments.figures.toy import draw_toy, toy_folder
from experiments.study_records import Study
from lens_jax.claims import Claim, Missing, claims_csv, claims_json
from models.atomic_files import write_bytes_atomic

FORMATS, DPI = ("png", "pdf"), 200
MISSING_INCHES = (7.2, 1.6)


class Drawn(NamedTuple):
    """Claims of all figures drawn, in order, and the PNG of each by its name, `2`, `11a`.

    missing: by name why a figure could not be drawn; where all figures were asked for, its page
    says the same and is among the images.
    """

    claims: list[Claim]
    images: dict[str, Path]
    missing: dict[str, str]


def draw_figures(
    study: Study,
    numbers: Sequence[int],
    options: Options,
    out: Path,
    toy: str | None = None,
    tell: Callable[[str], None] = print,
) -> Drawn:
    """Draws figures into the folder `out`, made if need be, as PNG and PDF, and claims beside them.

    Claims go to claims.csv and claims.json, or claims_N for one figure. Files are replaced whole,
    and the same records give the same bytes. Tells of every file, of every figure that lacks its
    runs, and of every run that has not ended or was given up. Raises ValueError with one line for a
    damaged file, UsageError for a target at which the runs do not compare.
    """
    check_target(study, options)
    options = resolved(study, options)
    for note in study.unfinished:
        tell(f"unfinished: {note}")
    for run in study.given_up:
        tell(f"given up early: {run.name}: by prune={run.given_up}")
    out.mkdir(exist_ok=True)
    claims, images, missing = [], {}, {}
    for number in numbers:
        try:
            if number in TOY:
                found, files = draw_toy(number, toy_folder(study.path, toy), out, tell)
            else:
                found, files = _draw(number, study, options, out)
        except Missing as reason:
            tell(f"figure {number}: not drawn: {reason}")
            missing[str(number)] = str(reason)
            if len(numbers) == 1:
                continue
            found, files = _draw_missing(number, str(reason), out)
        claims += found
        for name, paths in files.items():
            images[name] = next(path for path in paths if path.suffix == ".png")
            for path in paths:
                tell(f"figure {name}: {path}")
    stem = "claims" if len(numbers) > 1 else f"claims_{numbers[0]}"
    for ending, text in (("csv", claims_csv(claims)), ("json", claims_json(claims))):
        if claims:
            write_bytes_atomic(out / f"{stem}.{ending}", text.encode())
            tell(f"claims: {out / f'{stem}.{ending}'}")
    return Drawn(claims, images, missing)


def _draw(number, study, options, out) -> tuple[list[Claim], dict[str, list[Path]]]:
    place = FIGURES[number]
    module = import_module(f"experiments.figures.{place.module}")
    draw = getattr(module, place.function)
    return _on_page(number, module.INCHES[number], lambda page: draw(page, study, options), out)


def _draw_missing(number: int, reason: str, out: Path):
    """A page that says which runs a figure waits for."""

    def draw(figure) -> list[Claim]:
        from experiments.figures.page import title
        from lens_jax.axis_style import not_measured

        title(figure, number, FIGURES[number].subject)
        not_measured(figure.subplots(), "\n".join(textwrap.wrap(f"not drawn, needs {reason}", 80)))
        return []

    return _on_page(number, MISSING_INCHES, draw, out)


def _on_page(number: int, inches, draw, out: Path) -> tuple[list[Claim], dict[str, list[Path]]]:
    # Matplotlib takes half a second, which --help should not wait for; figures are made by hand,
    # without pyplot's global state. Ticks are styled when they are first drawn.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from lens_jax.axis_style import STYLE

    with rc_context(STYLE):
        figure = Figure(figsize=inches, dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        claims = draw(figure)
        paths = [out / f"figure_{number}.{kind}" for kind in FORMATS]
        for path, kind in zip(paths, FORMATS, strict=True):
            write_bytes_atomic(path, _image(figure, kind))
    return claims, {str(number): paths}


def _image(figure, kind: str) -> bytes:
    # Without a date the same records give the same file.
    metadata = {"CreationDate": None} if kind == "pdf" else {}
    image = io.BytesIO()
    figure.savefig(image, format=kind, metadata=metadata)
    return image.getvalue()
