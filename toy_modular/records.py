"""A folder of the toy study as it lies on disk: runs with their metrics, spectra and band tables.

    STUDY/config.json, selected.json      the study's settings; the learning rate of each batch size
    STUDY/runs/<name>/config.json         settings of one run, stage, batch and seed among them
                     /metrics.jsonl       rows of kind train and val with step, tokens and loss
                     /spectra/step_*.npz  lens_jax.records: spectra of the last position and more
                     /features/step_*.npz the same format: mean h by state, a site for each band
                     /result.json         how the run ended; not there while it has not

Opening a study reads the small files. A step file is opened for its meta when the rows are asked
for, and for an array when that array is, so a figure reads what it draws. Nothing here imports jax.
"""

import json
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from lens_jax.step_files import StepFile, list_steps
from models.atomic_files import read_json_object

_BAND = re.compile(r"(\d+)_(\d+)")

SPECTRUM = "act_cov_eigenvalues"
LAST, MEAN, TOKENS = "final_norm/last", "final_norm/mean", "final_norm/tokens"
PROXY = "residual_proxy/last"
CURRENT, NEXT, LAW = "current", "next", "law"


Row = StepFile
"""One measured step of a run.

Its val_loss is that of all validation sequences; in records made before 2026-12 that is so at the
last step only, elsewhere it is that of the sequences that the run looks at every time.
"""


@dataclass(frozen=True)
class Run:
    """One densely measured run; `result` is empty as long as it has not ended."""

    path: Path
    stage: str
    batch: int
    seed: int
    config: dict
    result: dict

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.path.name

    @property
    def finished(self) -> bool:
        """Whether it came to an end of its own, divergence included."""
        return bool(self.result)

    @cached_property
    def train(self) -> dict[str, np.ndarray]:
        """Columns step, tokens and loss of the training rows."""
        return self._metrics["train"]

    @cached_property
    def val(self) -> dict[str, np.ndarray]:
        """Columns step, tokens and loss of the validation rows."""
        return self._metrics["val"]

    @cached_property
    def spectra(self) -> list[Row]:
        """The steps at which spectra were measured, ascending."""
        return _rows(self.path / "spectra", self.result)

    @cached_property
    def features(self) -> list[Row]:
        """The steps at which the bands were probed, ascending."""
        return _rows(self.path / "features", self.result)

    @property
    def bands(self) -> list[str]:
        """Sites of the probed bands, `97_200` for states 0..96 at tokens 200..296."""
        names = self.features[-1].names if self.features else ()
        sites = [name.partition("/")[2] for name in names if name.startswith(f"{CURRENT}/")]
        return sorted(sites, key=band_numbers)

    @cached_property
    def _metrics(self) -> dict[str, dict[str, np.ndarray]]:
        path = self.path / "metrics.jsonl"
        rows = _metrics_rows(path) if path.is_file() else []
        return {
            kind: {
                key: np.array([row[key] for row in rows if row["kind"] == kind], np.float64)
                for key in ("step", "tokens", "loss")
            }
            for kind in ("train", "val")
        }


@dataclass(frozen=True)
class Study:
    """A study's settings and runs; `unfinished` says of each run that has not ended why not."""

    path: Path
    config: dict
    selected: dict
    runs: tuple[Run, ...]
    unfinished: tuple[str, ...]

    def stage(self, stage: str) -> list[Run]:
        """Returns the finished runs of a stage by batch, then seed."""
        return [run for run in self.runs if run.stage == stage and run.finished]

    def edges(self, stage: str) -> list[int]:
        """Returns the batch sizes whose best learning rate lay at an end of its grid."""
        batches = sorted({run.batch for run in self.runs if run.stage == stage})
        return [b for b in batches if self.selected.get(f"{stage}-b{b}", {}).get("edge")]


def read_study(folder: str | Path) -> Study:
    """Opens a study.

    Runs that have not ended (no result.json, or no config.json yet) are told of in `unfinished` and
    are no reason to stop. Raises ValueError with one line when the folder is missing or holds no
    runs, and naming the file when one is damaged; a damaged step file is found when it is read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"study={folder}: no such folder")
    if not (folder / "runs").is_dir():
        raise ValueError(f"study={folder}: no study (no folder runs/ in it)")
    runs, unfinished = [], []
    for path in sorted(path for path in (folder / "runs").iterdir() if path.is_dir()):
        if not (path / "config.json").is_file():
            unfinished.append(f"{path.name}: has no config.json yet")
            continue
        run = _read_run(path)
        runs.append(run)
        if not run.finished:
            unfinished.append(f"{run.name}: has no result.json yet")
    if not runs:
        raise ValueError(f"study={folder}: no run in {folder / 'runs'} has begun")
    runs.sort(key=lambda run: (run.stage, run.batch, run.seed))
    return Study(
        folder,
        read_json_object(folder / "config.json", required=False),
        read_json_object(folder / "selected.json", required=False),
        tuple(runs),
        tuple(unfinished),
    )


def band_numbers(site: str) -> tuple[int, int]:
    """Returns modulus and offset of a band's site; raises ValueError for another name."""
    match = _BAND.fullmatch(site)
    if not match:
        raise ValueError(f"band {site}: give modulus_offset, for example 97_200")
    return int(match[1]), int(match[2])


def _read_run(path: Path) -> Run:
    config = read_json_object(path / "config.json")
    values = {}
    for key, kind in (("stage", str), ("batch", int), ("seed", int)):
        if not isinstance(config.get(key), kind):
            raise ValueError(f"{path / 'config.json'}: no {key} in it, or no {kind.__name__}")
        values[key] = config[key]
    result = read_json_object(path / "result.json", required=False)
    if result and not {"step", "tokens", "crossing_tokens"} <= set(result):
        raise ValueError(f"{path / 'result.json'}: lacks step, tokens or crossing_tokens")
    return Run(path, config=config, result=result, **values)


def _metrics_rows(path: Path) -> list[dict]:
    """Rows of kind train and val; a last line without its end was cut by a kill and is left out."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
            if row["kind"] in ("train", "val"):
                rows.append(
                    {"kind": row["kind"]} | {k: float(row[k]) for k in ("step", "tokens", "loss")}
                )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is no metrics row ({error!r})") from error
    return rows


def _rows(folder: Path, result: dict) -> list[Row]:
    ended, loss = result.get("step"), result.get("val_loss")
    return [
        replace(row, val_loss=float(loss)) if row.step == ended and loss is not None else row
        for row in list_steps(folder)
    ]
