"""Figures 4 and 11: the toy's own command, run on its study, and what it wrote collected.

A process of its own keeps the two studies apart: neither package knows the other's records.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from experiments.figures.catalogue import TOY
from lens_jax.claims import Claim, Missing

MAKE = "python -m toy_modular.study out=FOLDER"


def toy_folder(study: Path, toy: str | None) -> Path:
    """The folder of the toy study; raises Missing where none is given and the study has none."""
    folder = Path(toy) if toy else study / "toy"
    if toy is None and not folder.is_dir():
        raise Missing(f"a toy study: give toy=FOLDER, or put it at {folder}: {MAKE}")
    return folder


def draw_toy(
    number: int, folder: Path, out: Path, tell: Callable[[str], None]
) -> tuple[list[Claim], dict[str, list[Path]]]:
    """Draws the parts of figure 4 or 11 into `out`; returns their claims, and files by their names.

    Tells of parts whose runs are missing. Raises Missing, with the reasons, where all are, and
    ValueError with the one line that the toy's command answers bad input with.
    """
    claims, images, reasons = [], {}, {}
    for name in TOY[number]:
        with TemporaryDirectory(dir=out) as scratch:
            reason = _run(folder, name, Path(scratch))
            if reason is not None:
                reasons[name] = reason
                continue
            claims += _read_claims(Path(scratch) / f"claims_{name}.json")
            files = sorted(Path(scratch).glob(f"figure_{name}.*"))
            images[name] = [_moved(file, out) for file in files]
    if not images:
        raise Missing("; ".join(reasons.values()))
    for name, reason in reasons.items():
        tell(f"figure {name}: not drawn: {reason}")
    return claims, images


def _run(folder: Path, name: str, out: Path) -> str | None:
    """Draws one part; returns why it was not drawn, in the words of the command, or None."""
    command = [sys.executable, "-m", "toy_modular.figures"]
    words = [f"study={folder}", f"fig={name}", f"out={out}"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise ValueError(f"figure {name} of the toy: {last.removeprefix('error: ')}")
    if done.returncode == 0:
        return None
    return done.stdout.strip().splitlines()[-1].removeprefix(f"{name}: not drawn: ")


def _read_claims(path: Path) -> list[Claim]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    nan = float("nan")
    return [Claim(**{k: nan if v is None else v for k, v in row.items()}) for row in rows]


def _moved(file: Path, out: Path) -> Path:
    os.replace(file, out / file.name)
    return out / file.name
