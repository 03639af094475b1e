"""When a run of the toy is measured, and how: the lens in spectra/, bands in features/."""

from collections.abc import Sequence
from functools import lru_cache
from math import floor, log2
from pathlib import Path
from typing import Any

import numpy as np

from lens_jax.lens import make_lens, split_windows
from lens_jax.probes import spectra
from lens_jax.records import write_step
from lens_jax.step import make_measure_step
from toy_modular.members import shared
from toy_modular.problem import Data
from toy_modular.run_config import RunConfig
from toy_modular.tasks import TASKS

SUBSET_OFFSET = 505


def is_on_grid(step: int, eval_every: int, per_doubling: int) -> bool:
    """Whether a step is on the logarithmic grid: 0, the first dispatch, then so many a doubling.

    The grid is of dispatches, so that runs of batch sizes that are powers of two apart are measured
    at equal tokens.
    """
    if per_doubling == 0:
        return False
    if step <= eval_every:
        return True
    now, before = (grid_index(n, eval_every, per_doubling) for n in (step, step - eval_every))
    return now > before


def grid_index(step: int, eval_every: int, per_doubling: int) -> int:
    """The number of the last point of that grid up to a step; 0 for step 0."""
    if step < eval_every:
        return 0
    return 1 + floor(per_doubling * log2(step / eval_every) + 1e-9)


def measured_rows(train: Any, rows: int, seed: int) -> Any:
    """The fixed training sequences of a seed's spectra, in the order of the data."""
    count = len(next(iter(train.values())))
    chosen = np.random.default_rng(seed + SUBSET_OFFSET).choice(count, rows, replace=False)
    return {name: leaf[np.sort(chosen)] for name, leaf in train.items()}


class Instrument:
    """Measures one run into its folder."""

    def __init__(self, config: RunConfig, data: Data, folder: Path):
        self._config, self._train, self._folder = config, data.train, folder

    def crossed(self, loss: float, losses_before: Sequence[float]) -> list[float]:
        """Levels that a loss is the first to reach; losses_before: those of all looks before."""
        least = min(losses_before, default=float("inf"))
        return [level for level in self._config.measure.levels if loss <= level < least]

    def is_due(self, step: int, crossed: Sequence[float], reason: str | None) -> bool:
        """Whether a step is measured: it is on the grid, a level is crossed, or the run ends."""
        measured = self._config.measure.per_doubling > 0
        return measured and bool(self._on_grid(step) or crossed or reason)

    def _on_grid(self, step: int) -> bool:
        return is_on_grid(step, self._config.eval_every, self._config.measure.per_doubling)

    def look(self, params: Any, at: dict, crossed: Sequence[float], reason: str | None) -> None:
        """Measures params; at: {"step", "tokens", "val_loss"}, the loss of all validation rows."""
        measure = self._config.measure
        meta = at | {
            "levels": list(crossed),
            "sequences": measure.rows,
            "gradient_samples": measure.samples,
            "sample_tokens": self._config.tokens_per_step
            // (self._config.batch or self._config.train_rows),
        }
        write_step(self._folder / "spectra", at["step"], self.spectra(params), meta)
        index = grid_index(at["step"], self._config.eval_every, measure.per_doubling)
        features = TASKS[self._config.task].make_features(shared(self._config))
        on_grid = self._on_grid(at["step"]) and index % measure.bands_every == 0
        if features is not None and (reason or crossed or on_grid):
            arrays = features(params, reason is not None)
            write_step(self._folder / "features", at["step"], arrays, meta)

    def spectra(self, params: Any) -> dict[str, np.ndarray]:
        """Arrays of a record in spectra/."""
        measure, config = self._config.measure, self._config
        rows = measured_rows(self._train, measure.rows, config.seed)
        look = _measure_step(shared(self._config))
        summaries, _ = look(params, split_windows(rows, measure.samples, measure.chunk))
        return spectra(summaries)


@lru_cache(maxsize=32)
def _measure_step(config: RunConfig):
    problem, measure = TASKS[config.task].make_problem(config), config.measure
    lens = make_lens(
        windows=measure.rows,
        activations=problem.activations,
        gradients=problem.gradients,
        weights=problem.weights,
        samples=measure.samples,
        chunk=measure.chunk,
        # h has a norm of one a coordinate already, and the proxy is h but for its length
        normalise=False,
    )
    return make_measure_step(problem.loss, lens)
