"""Keep the records of a toy study: what its figures read, small enough for a repository.

    python -m toy_modular.pack study=runs/toy_laptop out=docs/laptop_study/toy

Of every finished run: configuration, curve, result, the spectra of the last position with their
error bars, and the tables of the bands that figures take, all in float32; of most runs the tables
at a third, two thirds and the end, of those at the batch size of figure 4b all of them. At the end
of a run all bands with their covariances and edits, and the leading directions of training, which
features.csv and `toy_modular.theory` take. What is there is replaced.
"""

import shutil
from pathlib import Path

import chz
import numpy as np

from lens_jax.records import write_step
from models.atomic_files import write_bytes_atomic
from models.claimed_folder import copy_config
from models.command_line import UsageError, check_path, read_command, run_command
from toy_modular.alignment import at_progress
from toy_modular.records import CURRENT, LAST, LAW, NEXT, SPECTRUM, Row, Run, Study, read_study
from toy_modular.stages import CORE
from toy_modular.sweeps import chosen_bands, shared_batch

STUDY_FILES = ("selected.json", "table.csv")
RUN_FILES = ("metrics.jsonl", "result.json")
SPECTRA = ((SPECTRUM, LAST), (f"{SPECTRUM}_left_out", LAST))
DIRECTIONS = ("act_cov_eigenvectors", LAST)
ENDS = (CURRENT, NEXT, LAW, "covariance", "edits")
THIRDS = (1 / 3, 2 / 3, 1.0)


@chz.chz
class PackConfig:
    """The keys of the command."""

    study: str | None = chz.field(default=None, doc="folder of the study")
    out: str | None = chz.field(default=None, doc="folder for its records")
    bands: tuple[str, ...] = chz.field(
        default=(), doc="bands kept all along, as 97:200; none: those that figures take"
    )

    @chz.validate
    def _ranges(self):
        for key in ("study", "out"):
            if getattr(self, key) is not None:
                check_path(key, getattr(self, key))


def pack(study: Study, out: Path, bands: tuple[str, ...] = ()) -> int:
    """Writes the records of a study and returns their bytes; raises Missing for unknown bands."""
    runs = [run for run in study.runs if run.finished]
    sites = chosen_bands(runs, bands)
    tables = [(kind, site) for site in sites for kind in (CURRENT, NEXT, LAW)]
    curves = shared_batch(study, CORE)
    _copy(study.path, STUDY_FILES, out)
    for run in runs:
        place = out / "runs" / run.name
        if place.exists():
            shutil.rmtree(place)
        _copy(run.path, RUN_FILES, place)
        _keep(run.spectra[:-1], SPECTRA, place / "spectra")
        _keep(run.spectra[-1:], (*SPECTRA, DIRECTIONS), place / "spectra")
        rows = run.features if run.batch == curves else _thirds(run)
        _keep(rows[:-1], tables, place / "features")
        ends = [(kind, site) for site in run.bands for kind in ENDS]
        _keep(rows[-1:], ends, place / "features")
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def _thirds(run: Run) -> list[Row]:
    """The rows that 11b compares, ascending."""
    found = [at_progress(run, run.features, place) for place in THIRDS]
    rows = {match.row.step: match.row for match in found if match is not None}
    return [rows[step] for step in sorted(rows)]


def _keep(rows: list[Row], names, folder: Path) -> None:
    for row in rows:
        arrays = {
            f"{kind}/{site}": row.array(kind, site).astype(np.float32)
            for kind, site in names
            if row.has(kind, site)
        }
        write_step(folder, row.step, arrays, row.meta, compress=True)


def _copy(source: Path, names, target: Path) -> None:
    if (source / "config.json").is_file():
        copy_config(source / "config.json", target / "config.json")
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (source / name).is_file():
            write_bytes_atomic(target / name, (source / name).read_bytes())


def main(argv: list[str]) -> int:
    """The command; returns its exit code. Raises UsageError on bad words or a damaged study."""
    config = read_command(
        PackConfig, __doc__, argv, ("study", "out"), "give study=FOLDER out=FOLDER"
    )
    if config is None:
        return 0
    out = Path(config.out)
    try:
        study = read_study(config.study)
        if out.resolve() == study.path.resolve():
            raise ValueError(f"out={out} is the study itself; give another folder")
        size = pack(study, out, config.bands)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    print(f"{out}: {len(study.runs)} runs, {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    run_command(main)
