"""What the records of a grokking run say: when it memorised, when it generalised, what came before.

Modes are those of the group of the operation: of Z_p under addition and subtraction, and of the
cyclic group of the numbers 1 to p - 1 under multiplication, in the order of powers of a primitive
root, where p is prime; zero is left out there. NumPy, no jax.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lens_jax.claims import FAILED, HELD, UNDECIDED
from lens_jax.fits import fit_power_law, rankme
from lens_jax.records import read_step
from toy_modular.alignment import toy_window
from toy_modular.config import GrokConfig
from toy_modular.features import concentration, dominant_modes, mode_shares, pair_masses
from toy_modular.grok import make_splits

TRAINED, GENERALISED = 1.0, 0.99
RISEN = 0.1
"""Validation accuracy that far above where it stood at the end of memorising has begun to rise."""
KEY_SHARE = 0.9
WINDOW = (10, 40)
TABLES = {
    "embedding": "embedding/tokens",
    "answers": "answer/last",
    "unembedding": "unembedding/tokens",
}
LOGITS = "answer/logits"
LAST = "final_norm/last"


class Curve(NamedTuple):
    """Steps of a split with loss and accuracy there, (N,) each."""

    step: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray

    def first(self, accuracy: float) -> int | None:
        """The first step of at least that accuracy."""
        reached = np.flatnonzero(self.accuracy >= accuracy)
        return int(self.step[reached[0]]) if reached.size else None

    def at(self, step: float) -> float:
        """The accuracy at the last row up to a step."""
        return float(self.accuracy[np.searchsorted(self.step, step, side="right") - 1])


class Look(NamedTuple):
    """One measured step and its arrays by `<kind>/<site>`."""

    step: int
    arrays: dict[str, np.ndarray]


@dataclass(frozen=True)
class GrokRun:
    """A run folder, read whole; series over its looks are computed when first asked for."""

    path: Path
    task: GrokConfig
    seed: int
    train: Curve
    val: Curve
    features: tuple[Look, ...]
    spectra: tuple[Look, ...]

    @cached_property
    def order(self) -> np.ndarray:
        """The numbers along the cycle of their group, (c,)."""
        return group_order(self.task)

    @property
    def feature_steps(self) -> np.ndarray:
        return np.array([look.step for look in self.features])

    @property
    def spectra_steps(self) -> np.ndarray:
        return np.array([look.step for look in self.spectra])

    @property
    def trained(self) -> int | None:
        """The first step at which every training pair is answered rightly."""
        return self.train.first(TRAINED)

    @property
    def generalised(self) -> int | None:
        """The first step at which validation accuracy reaches 0.99."""
        return self.val.first(GENERALISED)

    @cached_property
    def onset(self) -> int | None:
        """The first step at which validation accuracy is well above that at `trained`."""
        if self.trained is None:
            return None
        later = self.val.step >= self.trained
        up = later & (self.val.accuracy >= self.val.at(self.trained) + RISEN)
        return int(self.val.step[up][0]) if up.any() else None

    @property
    def worst(self) -> int:
        """The step of the greatest validation loss between `trained` and `generalised`."""
        between = (self.val.step >= self.trained) & (self.val.step <= self.generalised)
        return int(self.val.step[between][np.argmax(self.val.loss[between])])

    @cached_property
    def key_modes(self) -> tuple[int, ...]:
        """The fewest modes with KEY_SHARE of the energy of the last look's mean logits."""
        return key_modes(self.table(self.features[-1], LOGITS))

    @property
    def null(self) -> float:
        """The share of energy in the key modes of a table with as much in every mode."""
        c = len(self.order)
        return sum(1 if 2 * mode == c else 2 for mode in self.key_modes) / (c - 1)

    def table(self, look: Look, name: str) -> np.ndarray:
        """The rows of a table by number, (p, K), in the order of the group, (c, K)."""
        return look.arrays[name].astype(np.float64)[self.order]

    def shares(self) -> dict[str, np.ndarray]:
        """Share of energy in the key modes at every look, for each table that was recorded."""
        return {
            name: np.array(
                [concentration(self.table(look, key), self.key_modes) for look in self.features]
            )
            for name, key in TABLES.items()
            if key in self.features[-1].arrays
        }

    def restricted(self) -> np.ndarray:
        """Loss of the mean logits of each answer with nothing but the key modes, at every look."""
        return np.array(
            [
                restricted_loss(self.table(look, LOGITS), self.order, self.key_modes)
                for look in self.features
            ]
        )

    def excluded(self) -> np.ndarray:
        """Mean loss of the training pairs without what depends on the answer, at every look."""
        pairs = make_splits(self.task, self.seed).train.tokens
        index = pairs[:, 0] * self.task.p + pairs[:, 1]
        return np.array([look.arrays["excluded/pairs"][index].mean() for look in self.features])

    def alphas(self) -> np.ndarray:
        """Exponent of the spectrum of h at '=' on `window`, at every look."""
        return np.array([fit_power_law(e, *self.window).alpha for e in self._eigenvalues()])

    def ranks(self) -> np.ndarray:
        """RankMe of the eigenvalues of h at '=', at every look."""
        return np.array([rankme(values) for values in self._eigenvalues()])

    def weight_ranks(self) -> dict[str, np.ndarray]:
        """RankMe of the singular values of every measured weight, at every look."""
        kind = "weight_singular_values/"
        names = [name for name in self.spectra[-1].arrays if name.startswith(kind)]
        return {
            name.removeprefix(kind): np.array([rankme(look.arrays[name]) for look in self.spectra])
            for name in names
        }

    @property
    def window(self) -> tuple[int, int]:
        """The ranks of the fit: 10 to 40 at width 128, scaled to the width of the run."""
        return toy_window(*WINDOW, self._eigenvalues()[0].size)

    def _eigenvalues(self) -> list[np.ndarray]:
        return [look.arrays[f"act_cov_eigenvalues/{LAST}"] for look in self.spectra]


def group_order(task: GrokConfig) -> np.ndarray:
    """Numbers such that the operation adds their places: 0 to p - 1, or powers of a root, (c,).

    Subtraction subtracts them. A configuration with multiplication has a prime p.
    """
    p = task.p
    if task.operation != "multiply":
        return np.arange(p)
    root, powers = 0, []
    while len(powers) < p - 1:  # a prime has a primitive root
        root, powers = root + 1, [1]
        while (power := powers[-1] * root % p) not in (0, 1):
            powers.append(power)
    return np.array(powers)


def key_modes(table: np.ndarray, share: float = KEY_SHARE) -> tuple[int, ...]:
    """The fewest positive modes, the greatest first, that hold a share of a table's energy."""
    masses = np.sort(pair_masses(mode_shares(table)))[::-1]
    count = int(np.searchsorted(np.cumsum(masses), share)) + 1
    return dominant_modes(table, min(count, masses.size))


def restricted_loss(logits: np.ndarray, answers: np.ndarray, kept: Sequence[int]) -> float:
    """Mean loss of logits by answer (c, V) with only their mean and the modes +-r of `kept`.

    answers: (c,), of each row. Source: arXiv 2301.05217, section 5, on the functions of the answer.
    """
    modes = np.fft.fft(logits, axis=0)
    mask = np.zeros(len(logits), bool)
    mask[[0, *kept, *(-r for r in kept)]] = True
    rows = np.fft.ifft(np.where(mask[:, None], modes, 0), axis=0).real
    highest = rows.max(axis=1)
    total = np.log(np.exp(rows - highest[:, None]).sum(axis=1)) + highest
    return float(np.mean(total - rows[np.arange(len(rows)), answers]))


def read_run(folder: str | Path) -> GrokRun:
    """Reads a run of task=grok. Raises ValueError in one line for a folder that is none."""
    folder = Path(folder)
    config = _json(folder / "config.json", (folder / "config.json").read_text)
    if config.get("task") != "grok":
        raise ValueError(f"{folder}: a run of task={config.get('task')}, not of task=grok")
    lines = _json(folder / "metrics.jsonl", lambda: _as_list(folder / "metrics.jsonl"))
    looks = {part: _looks(folder / part) for part in ("features", "spectra")}
    for part, found in looks.items():
        if not found:
            raise ValueError(f"{folder}: nothing in {part}/; run it with measure.per_doubling > 0")
    curves = {kind: _curve(lines, kind) for kind in ("train", "val")}
    return GrokRun(folder, GrokConfig(**config["grok"]), config["seed"], **curves, **looks)


def _as_list(path: Path) -> str:
    return "[" + ",".join(path.read_text().splitlines()) + "]"


def _json(path: Path, read):
    try:
        return json.loads(read())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no readable JSON ({' '.join(str(error).split())})") from error


def _looks(folder: Path) -> tuple[Look, ...]:
    found = [read_step(path) for path in sorted(folder.glob("step_*.npz"))]
    return tuple(Look(meta["step"], arrays) for meta, arrays in found)


def _curve(rows: list[dict], kind: str) -> Curve:
    rows = [row for row in rows if row["kind"] == kind and "accuracy" in row]
    return Curve(*(np.array([row[key] for row in rows]) for key in Curve._fields))


def half_rise(steps: np.ndarray, values: np.ndarray, first: int, last: int) -> int | None:
    """The step from which on a series stays above the middle of its values at two steps.

    What comes after `last` plays no part. None where it falls between the two.
    """
    there = np.flatnonzero((steps >= first) & (steps <= last))
    if not there.size or not values[there[-1]] > values[there[0]]:
        return None
    below = values[there] < (values[there[0]] + values[there[-1]]) / 2
    return int(steps[there][np.flatnonzero(below)[-1] + 1])


def grok_summary(run_folder: str | Path) -> dict:
    """The numbers of a run, a verdict and a sentence, as JSON data.

    Claim: the key modes are there before validation accuracy rises. It held if embedding and table
    of answers have both risen half way for good, between the two steps of the sentence, before
    validation accuracy first has; it did not if neither has; else, or without grokking, it is
    undecided.
    """
    return summarize(read_run(run_folder))


def summarize(run: GrokRun) -> dict:
    """`grok_summary` of a run that has been read."""
    found = {
        "task": f"{run.task.operation} modulo {run.task.p}",
        "train_fraction": run.task.train_fraction,
        "seed": run.seed,
        "trained_step": run.trained,
        "generalised_step": run.generalised,
        "onset_step": run.onset,
        "last_step": int(run.val.step[-1]),
        "val_accuracy": float(run.val.accuracy[-1]),
        "key_modes": list(run.key_modes),
        "null_share": run.null,
    }
    if run.generalised is None or run.onset is None:
        sentence = (
            f"{found['task']}: no grokking within {found['last_step']} steps: train accuracy 1 at "
            f"step {run.trained}, validation accuracy {found['val_accuracy']:.2f} at the end."
        )
        return found | {"verdict": UNDECIDED, "sentence": sentence}
    shares = run.shares()
    halves = {
        name: half_rise(run.feature_steps, values, run.trained, run.generalised)
        for name, values in shares.items()
    }
    worst = run.worst
    halves["val_loss"] = half_rise(run.val.step, -run.val.loss, worst, run.generalised)
    middle = (run.val.at(run.trained) + run.val.at(run.generalised)) / 2
    accuracy = int(run.val.step[(run.val.step >= run.trained) & (run.val.accuracy >= middle)][0])
    places = {
        "trained": np.searchsorted(run.feature_steps, run.trained, side="right") - 1,
        "before_onset": np.searchsorted(run.feature_steps, run.onset) - 1,
        "end": -1,
    }
    seen = {
        name: {place: float(values[at]) for place, at in places.items()}
        for name, values in shares.items()
    }
    found |= {
        "ratio": run.generalised / run.trained,
        "before_onset_step": int(run.feature_steps[places["before_onset"]]),
        "shares": seen,
        "val_loss_falls_from_step": worst,
        "half_rise_steps": halves | {"val_accuracy": accuracy},
    }
    early = [(halves[name] or np.inf) < accuracy for name in ("embedding", "answers")]
    verdict = HELD if all(early) else UNDECIDED if any(early) else FAILED
    return found | {"verdict": verdict, "sentence": _sentence(found, verdict)}


def _sentence(found: dict, verdict: str) -> str:
    shares = found["shares"]
    embedding, answers = (
        f"from {shares[name]['trained']:.2f} to {shares[name]['before_onset']:.2f}"
        for name in ("embedding", "answers")
    )
    halves = found["half_rise_steps"]
    return (
        f"{found['task']}: train accuracy 1 at step {found['trained_step']}, validation accuracy "
        f"{GENERALISED} at step {found['generalised_step']} ({found['ratio']:.1f} times later). By "
        f"step {found['before_onset_step']}, before validation accuracy rose, the share of energy "
        f"in the {len(found['key_modes'])} key modes had gone {embedding} in the embedding and "
        f"{answers} in the mean h of each answer (as much in every mode: "
        f"{found['null_share']:.2f}). Half way for good: answers at step "
        f"{halves['answers']}, embedding at {halves['embedding']}, accuracy at "
        f"{halves['val_accuracy']}, validation loss, which falls from step "
        f"{found['val_loss_falls_from_step']} on, at {halves['val_loss']}. Features before "
        f"accuracy: {verdict}."
    )
