"""Keep the records of a study: what figures and tables read, small enough for a repository.

    python -m experiments.pack study=runs/study_laptop out=docs/laptop_study

Of every chosen run: its configuration, its result, all validations, at most `rows` training rows,
and of each measured step the spectra of the layers whose gradients were measured, in float32.
Weight spectra, centred gradients and error bars (spectra with a group of windows left out) are kept
of the last layer, error bars of gradients at the last step only. Of the trials that were not
chosen: metrics. No weights, no eigenvectors. What is there is replaced.
A study goes on from a pack: what has ended is not repeated, the other members begin again.
"""

import shutil
from pathlib import Path

import chz
import numpy as np

from experiments.metrics import encode_row, read_metrics
from experiments.study_records import ACTIVATION, GRADIENT, Run, Study, read_study
from lens_jax.records import write_step
from lens_jax.saved_run import layer_name
from lens_jax.step_files import StepFile
from models.atomic_files import write_bytes_atomic
from models.claimed_folder import copy_config
from models.command_line import UsageError, check_path, read_command, run_command

SMALL_FILES = ("selected.json", "pruned.json", "table.csv")
RUN_FILES = ("result.json", "nonfinite.json")
TRAIN_KEYS = (
    *("kind", "step", "tokens", "loss", "grad_norm", "lr_embed", "lr_matrix"),
    *("window_blocks", "step_time_s", "tokens_per_s"),
)
KINDS = (ACTIVATION, "act_last_cov_eigenvalues", GRADIENT)
LAST_LAYER_KINDS = (f"{ACTIVATION}_left_out", f"{GRADIENT}_centred", "weight_singular_values")
LAST_STEP_KINDS = (f"{GRADIENT}_left_out",)  # large; figures take the seed floor's from it


@chz.chz
class PackConfig:
    """The keys of the command."""

    study: str | None = chz.field(default=None, doc="folder of the study")
    out: str | None = chz.field(default=None, doc="folder for its records")
    rows: int = chz.field(default=200, doc="training rows kept of a run, at even distances")

    @chz.validate
    def _ranges(self):
        for key in ("study", "out"):
            if getattr(self, key) is not None:
                check_path(key, getattr(self, key))
        if self.rows < 2:
            raise ValueError(f"rows={self.rows}: give at least 2")


def pack(study: Study, out: Path, rows: int) -> int:
    """Writes the records of a study and returns their bytes; what else lies there stays."""
    if (study.path / "config.json").is_file():
        copy_config(study.path / "config.json", out / "config.json")
    for name in SMALL_FILES:
        if (study.path / name).is_file():
            _copy(study.path / name, out / name)
    chosen = {run.name for run in study.chosen}
    for run in study.runs:
        place = out / "runs" / run.name
        if place.exists():
            shutil.rmtree(place)
        copy_config(run.path / "config.json", place / "config.json")
        for name in RUN_FILES:
            if (run.path / name).is_file():
                _copy(run.path / name, place / name)
        _pack_metrics(run, place, rows)
        if run.name in chosen:
            for row in run.steps:
                arrays = kept_arrays(run, row)
                write_step(place / "spectra", row.step, arrays, row.meta, compress=True)
    top = [out / name for name in ("config.json", *SMALL_FILES)]
    written = [path for path in (*top, *(out / "runs").rglob("*")) if path.is_file()]
    return sum(path.stat().st_size for path in written)


def kept_arrays(run: Run, row: StepFile) -> dict[str, np.ndarray]:
    """The arrays of a measured step that are kept, float32."""
    layers = {layer_name(site) for site in run.sites(GRADIENT)} or {
        layer_name(site) for site in run.sites(ACTIVATION)
    }
    last = {layer_name(run.final_site(kind)) for kind in (ACTIVATION, GRADIENT) if run.sites(kind)}
    kinds = LAST_LAYER_KINDS
    if row.step == run.steps[-1].step:
        kinds += LAST_STEP_KINDS
    found = {}
    for name in sorted(row.names):
        kind, _, site = name.partition("/")
        kept = kind in KINDS and layer_name(site) in layers
        if kept or (kind in kinds and layer_name(site) in last):
            found[name] = row.array(kind, site).astype(np.float32)
    return found


def _pack_metrics(run: Run, place: Path, most: int) -> None:
    if not (run.path / "metrics.jsonl").is_file():
        return
    rows = read_metrics(run.path / "metrics.jsonl")
    train = [row for row in rows if row["kind"] == "train"]
    kept = np.unique(np.linspace(0, len(train) - 1, min(most, len(train))).round().astype(int))
    steps = {train[i]["step"] for i in kept}
    lines = []
    for row in rows:
        if row["kind"] == "train":
            if row["step"] not in steps:
                continue
            row = {key: row[key] for key in TRAIN_KEYS if key in row}
        lines.append(encode_row(row))
    place.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(place / "metrics.jsonl", b"".join(lines))


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(target, source.read_bytes())


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
        size = pack(study, out, config.rows)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    counts = f"{len(study.chosen)} chosen runs and {len(study.trials)} trials"
    print(f"{out}: {counts}, {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    run_command(main)
