"""A folder of the language study as it lies on disk; what figures, forecasts and tables read.

    STUDY/config.json             preset, typed words, target loss, the primary cell of the tests
    STUDY/selected.json           of every cell the chosen learning-rate multiplier, and its trials
    STUDY/pruned.json             of every family the runs that were given up early, where any were
    STUDY/runs/<name>/            run folders of `experiments.train`, trials and chosen ones alike
                     /config.json, metrics.jsonl, spectra/step_*.npz, result.json at its end

A cell is a rung at a tier and a batch; a family is a rung at a tier, over its batches. Opening a
study reads the small files; a step file is opened when its rows are asked for. No jax.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.metrics import read_metrics
from lens_jax.saved_run import depth, layer_name
from lens_jax.step_files import StepFile, list_steps
from models.atomic_files import read_json_object
from models.ladder import ALL_RUNGS

ACTIVATION = "act_cov_eigenvalues"
GRADIENT = "grad_singular_values"
WEIGHT = "weight_singular_values"
NOT_ENDED, GIVEN_UP = "not ended", "given up"


class Family(NamedTuple):
    """A rung at a tier, whatever the batch."""

    rung: str
    tier: str

    @property
    def name(self) -> str:
        return f"{self.rung}-{self.tier}"


class Cell(NamedTuple):
    """What a learning rate is chosen for."""

    rung: str
    tier: str
    batch: int

    @property
    def name(self) -> str:
        return f"{self.rung}-{self.tier}-b{self.batch}"

    @property
    def family(self) -> Family:
        return Family(self.rung, self.tier)


@dataclass(frozen=True)
class Run:
    """One run; config has dotted keys; `result` is empty as long as it has not ended.

    given_up: the rule by which its study gave it up early, empty otherwise. Such a run has no end
    of its own, so its tokens to the target are not known.
    """

    path: Path
    config: dict
    result: dict
    given_up: str = ""

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.path.name

    @property
    def cell(self) -> Cell:
        return Cell(self.config["rung"], self.config["tier"], self.config["batch"])

    @property
    def family(self) -> Family:
        return self.cell.family

    @property
    def batch(self) -> int:
        """Long rows a step."""
        return self.config["batch"]

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def lr_scale(self) -> float:
        """The multiplier on the published rates of all groups."""
        return self.config["optim.lr_scale"]

    @property
    def tokens_per_step(self) -> int:
        """B_tok, what batches are compared by across rungs and sizes."""
        return self.batch * self.config["size.long_row"]

    @property
    def width(self) -> int:
        return self.config["size.n_embd"]

    @property
    def reached(self) -> bool:
        """Whether it ended below its target loss."""
        return self.result.get("reason") == "target"

    @property
    def finished(self) -> bool:
        """Whether it came to an end of its own, a loss that was not finite included."""
        return bool(self.result)

    @property
    def state(self) -> str:
        """Why it ended: target, budget or diverged; or else whether it was given up or goes on."""
        return self.result.get("reason", GIVEN_UP if self.given_up else NOT_ENDED)

    @cached_property
    def train(self) -> dict[str, np.ndarray]:
        """Columns of the training rows: step, tokens, loss, step_time_s, tokens_per_s, ..."""
        return _columns(self._rows, "train")

    @cached_property
    def val(self) -> dict[str, np.ndarray]:
        """Columns of the validation rows: step, tokens, loss, loss_widest_window, ..."""
        return _columns(self._rows, "val")

    @cached_property
    def steps(self) -> list[StepFile]:
        """The measured steps, ascending."""
        return list_steps(self.path / "spectra")

    def sites(self, kind: str) -> list[str]:
        """Sites of a kind, shallow to deep."""
        return sorted(self.steps[-1].sites(kind), key=depth) if self.steps else []

    def final_site(self, kind: str = ACTIVATION, matrix: str | None = None) -> str:
        """The deepest site of a kind; of a parameter kind, that of a matrix as attn/c_proj.

        Raises ValueError where it was not measured.
        """
        found = [s for s in self.sites(kind) if matrix is None or f"/{matrix}/" in f"{s}/"]
        if not found:
            what = kind if matrix is None else f"{kind} of {matrix}"
            raise ValueError(f"{self.path}: no {what} was measured")
        return found[-1]

    def layers(self, kind: str = ACTIVATION, matrix: str | None = None) -> list[str]:
        """One site a layer, shallow to deep."""
        found = [s for s in self.sites(kind) if matrix is None or f"/{matrix}/" in f"{s}/"]
        return list({layer_name(site): site for site in found}.values())

    @cached_property
    def _rows(self) -> list[dict]:
        path = self.path / "metrics.jsonl"
        return read_metrics(path) if path.is_file() else []


@dataclass(frozen=True)
class Study:
    """A study's settings and runs; `unfinished` says why a chosen run has not ended.

    Those that were given up are not among the unfinished: they will not go on.
    """

    path: Path
    config: dict
    selected: dict
    runs: tuple[Run, ...]
    unfinished: tuple[str, ...]

    @property
    def chosen(self) -> list[Run]:
        """The runs at the rate chosen for their cell, all seeds, by rung, tier, batch and seed.

        Of a cell for which none was chosen all runs, if they have one rate in common; else it is
        still being searched for.
        """
        rates = {cell: own["lr_scale"] for cell, own in self.selected.items()}
        tried: dict[str, set[float]] = {}
        for run in self.runs:
            tried.setdefault(run.cell.name, set()).add(run.lr_scale)
        for cell, own in tried.items():
            if cell not in rates and len(own) == 1:
                rates[cell] = next(iter(own))
        return [run for run in self.runs if rates.get(run.cell.name) == run.lr_scale]

    @property
    def families(self) -> list[Family]:
        """All families, in the order of the ladder, then by tier."""
        found = {run.family for run in self.runs}
        return sorted(found, key=lambda family: (ALL_RUNGS.index(family.rung), family.tier))

    @property
    def trials(self) -> list[Run]:
        """The runs of the search that were not chosen."""
        chosen = {run.name for run in self.chosen}
        return [run for run in self.runs if run.name not in chosen]

    @property
    def given_up(self) -> list[Run]:
        """The chosen runs that the study gave up early."""
        return [run for run in self.chosen if run.given_up]

    def of(self, family: Family, seed: int | None = None) -> list[Run]:
        """The chosen runs of a family by batch, of one seed or of all."""
        found = [run for run in self.chosen if run.family == family]
        return [run for run in found if seed is None or run.seed == seed]

    @property
    def target_loss(self) -> float | None:
        """The validation loss at which runs end, and are compared."""
        return self.config.get("target_loss")


class NoRuns(ValueError):
    """A study none of whose runs has begun."""


def read_study(folder: str | Path) -> Study:
    """Opens a study.

    Raises ValueError with one line when the folder is missing or holds no runs (NoRuns), and naming
    the file when one is damaged; a damaged metrics or step file is found when it is read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"study={folder}: no such folder")
    if not (folder / "runs").is_dir():
        raise ValueError(f"study={folder}: no study (no folder runs/ in it)")
    runs, unfinished, rules = [], [], _given_up(folder / "pruned.json")
    for path in sorted(path for path in (folder / "runs").iterdir() if path.is_dir()):
        if not (path / "config.json").is_file():
            unfinished.append(f"{path.name}: has no config.json yet")
            continue
        run = read_run(path)
        runs.append(run if run.finished else replace(run, given_up=rules.get(run.name, "")))
    if not runs:
        raise NoRuns(f"study={folder}: no run in {folder / 'runs'} has begun")
    runs.sort(key=lambda run: (*_order(run.cell), run.seed, run.lr_scale))
    config = read_json_object(folder / "config.json", required=False)
    selected = read_json_object(folder / "selected.json", required=False)
    study = Study(folder, config, selected, tuple(runs), ())
    open_runs = [run.name for run in study.chosen if not run.finished and not run.given_up]
    unfinished += [f"{name}: has no result.json yet" for name in open_runs]
    return replace(study, unfinished=tuple(unfinished))


def _given_up(path: Path) -> dict[str, str]:
    """{name of a run: the rule by which it was given up}; raises ValueError for a damaged file."""
    families = read_json_object(path, required=False).values()
    try:
        return {name: own["rule"] for own in families for name in own["given_up"]}
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: a family without rule and given_up; not a study's") from error


def _order(cell: Cell) -> tuple:
    return ALL_RUNGS.index(cell.rung), cell.tier, cell.batch


def read_run(path: Path) -> Run:
    """Opens one run; raises ValueError naming the file that is missing or damaged."""
    config = read_json_object(path / "config.json")
    needed = ("rung", "tier", "batch", "seed", "optim.lr_scale", "size.long_row", "size.n_embd")
    missing = [key for key in needed if key not in config]
    if missing:
        raise ValueError(f"{path / 'config.json'}: no {missing[0]} in it; not a run's")
    if config["rung"] not in ALL_RUNGS:
        raise ValueError(f"{path / 'config.json'}: rung={config['rung']} is no rung")
    result = read_json_object(path / "result.json", required=False)
    broken = path / "nonfinite.json"
    if not result and broken.is_file():
        report = read_json_object(broken)
        result = {"reason": "diverged", "step": report["step"], "tokens": report["tokens"]}
    return Run(path, config, result)


def _columns(rows: list[dict], kind: str) -> dict[str, np.ndarray]:
    """Every number of the rows of a kind as a column, NaN where a row has none."""
    rows = [row for row in rows if row["kind"] == kind]
    names = {name for row in rows for name, value in row.items() if _is_number(value)}
    names |= {"step", "tokens", "loss"}
    return {
        name: np.array([_number(row.get(name)) for row in rows], np.float64)
        for name in sorted(names)
    }


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value) -> float:
    return float(value) if _is_number(value) else float("nan")
