"""Measure saved weights with the lens: the checkpoints of a run, or a published file.

    python -m experiments.measure run=runs/NAME
    python -m experiments.measure run=runs/NAME tokens=262144 probes.windows=1024 name=large
    python -m experiments.measure run=runs/NAME probe=paper
    python -m experiments.measure checkpoint=FILE.safetensors rung=softcap profile=paper out=FOLDER

The probe is the one that training uses, on the same tokens: records go where the run's own are,
and what is there already is not measured again, so the command can be stopped and repeated.
probe=paper is the released protocol, with its CSV files, in records of its own. Of a run
the keys of its probes can be given anew, of a file every key of training.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import chz

from experiments.config import RunConfig
from experiments.host_threads import one_blas_thread
from experiments.resolve import from_flat, own_words, read_stored, resolve_here
from models.command_line import (
    Layer,
    UsageError,
    build,
    cast_words,
    check_path,
    flatten,
    help_page,
    run_command,
)

GIVEN_ANEW = (
    "data.source",
    "data.folder",
    "data.probe_offset",
    "data.probe_spread",
    "attention",
    "remat",
    "compute_dtype",
)


@chz.chz
class MeasureConfig:
    """The command's own keys."""

    run: str | None = chz.field(default=None, doc="run folder whose checkpoints are measured")
    checkpoint: str | None = chz.field(
        default=None, doc="published weights, .safetensors or .npz; needs rung= and out="
    )
    probe: Literal["canonical", "paper"] = chz.field(
        default="canonical", doc="the run's own probe set, or the released protocol"
    )
    tokens: tuple[int, ...] | None = chz.field(
        default=None,
        doc="only the checkpoints nearest these training tokens; of a file, what it was trained on",
    )
    step: int = chz.field(default=0, doc="training step of a file")
    window: int | None = chz.field(
        default=None, doc="attention window of a file in tokens; none: the widest"
    )
    name: str | None = chz.field(
        default=None, doc="records go to spectra_<name>; none: spectra, or spectra_paper"
    )

    @chz.validate
    def _ranges(self):
        for key in ("run", "checkpoint"):
            if getattr(self, key) is not None:
                check_path(key, getattr(self, key))
        if self.step < 0:
            raise ValueError(f"step={self.step}: give 0 or more")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window}: give at least 1 token")
        for key in ("step", "window"):
            if self.run is not None and getattr(self, key):
                raise ValueError(f"{key}={getattr(self, key)}: a run's checkpoints have their own")
        if self.checkpoint is not None and len(self.tokens or ()) > 1:
            raise ValueError("tokens= of a file is one number: the tokens it was trained on")
        if self.name is not None and not self.name.replace("_", "").isalnum():
            raise ValueError(f"name={self.name}: give letters, digits and '_'")

    @property
    def records(self) -> str:
        """Name of the folder of records."""
        name = self.name or ("paper" if self.probe == "paper" else None)
        return "spectra" if name is None else f"spectra_{name}"


def main(argv: list[str]) -> int:
    """The command; returns its exit code."""
    one_blas_thread()
    if {"-h", "--help"} & set(argv):
        print(help_page(__doc__, MeasureConfig, {}, {}))
        print("  and keys of a run, with their meaning in python -m experiments.train --help")
        return 0
    values, words = own_words(MeasureConfig, argv)
    plan, _ = build(MeasureConfig, [Layer("typed", values)])
    if (plan.run is None) == (plan.checkpoint is None):
        raise UsageError("give run=FOLDER or checkpoint=FILE, one of the two")
    if plan.run is not None:
        stored = read_stored(Path(plan.run))
        config = given_anew(stored, words)
    else:
        stored = config = file_config(plan, words)
    from experiments.devices import split_cpu

    split_cpu()
    from experiments.measuring import measure

    return measure(plan, stored, config)


def given_anew(stored: RunConfig, words: Mapping[str, str]) -> RunConfig:
    """A run's configuration with the keys that a measurement may change; raises UsageError."""
    for key in words:
        if not key.startswith("probes.") and key not in GIVEN_ANEW:
            raise UsageError(
                f"{key}={words[key]}: a run keeps its own; only probes.* and "
                f"{', '.join(GIVEN_ANEW)} can be given anew"
            )
    fixed = {"probes.data": "fixed", "probes.sweeps": None}
    return from_flat(flatten(stored) | fixed | cast_words(RunConfig, words))


def file_config(plan: MeasureConfig, words: Mapping[str, str]) -> RunConfig:
    """The configuration that typed words give a published file; raises UsageError."""
    for key in ("rung", "out"):
        if words.get(key, "auto") == "auto":
            raise UsageError(f"checkpoint={plan.checkpoint} needs {key}=")
    return resolve_here(words)[0]


if __name__ == "__main__":
    run_command(main)
