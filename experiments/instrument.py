"""The lens of a configuration on its own, for weights that are already there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.config import RunConfig
from experiments.devices import make_mesh, replicated
from experiments.loss import make_loss
from experiments.precision import full_precision
from experiments.probe_set import (
    place_probe_set,
    probe_at,
    probed_places,
    record_facts,
    run_lens,
)
from experiments.setup import make_model
from lens_jax.probes import spectra
from lens_jax.records import RecordWriter, read_step, step_path
from lens_jax.step import make_measure_step
from models.command_line import UsageError

# What two measurements must share to stand in one record.
SAME = ("probe_data", "probe_hash", "gradient_samples", "sample_tokens", "dtype", "window_tokens")


class Instrument:
    """Measures one checkpoint after another on a fixed probe set and writes their records.

    windows: (probes.windows, probes.window + 1) token ids. Eigenvalues are taken on a host thread
    while the next checkpoint is measured. Use it as a context manager; leaving it waits for the
    records.
    """

    def __init__(self, config: RunConfig, windows: np.ndarray, folder: Path):
        rows = min(config.probes.chunk, config.probes.gradient_windows)
        self._mesh = make_mesh(rows)
        model = make_model(config, self._mesh)
        lens = run_lens(config)
        self.facts = record_facts(config, windows, lens, model.dtype)
        self.folder = folder
        self._names = _expected_names(config)
        measure = make_measure_step(make_loss(model), lens)
        self._measure = full_precision(measure, model.dtype)
        self._probe_batch = place_probe_set(config, windows, self._mesh)
        self._writer = RecordWriter(folder)

    def __enter__(self) -> "Instrument":
        return self

    def __exit__(self, *exception) -> None:
        self._writer.__exit__(*exception)

    def meta(self, step: int, tokens: int, window: int | None, **more) -> dict[str, Any]:
        """What the record of a checkpoint says of it."""
        return {"step": step, "tokens": tokens, "window_tokens": window, **self.facts, **more}

    def is_done(self, meta: Mapping[str, Any]) -> bool:
        """Whether everything this instrument measures is in the record of that step already.

        Raises UsageError for a record of another probe set, which must not be mixed with this one.
        """
        path = step_path(self.folder, meta["step"])
        if not path.exists():
            return False
        there, arrays = read_step(path)
        for key in SAME:
            if there.get(key) != meta[key]:
                raise UsageError(
                    f"{path} was measured with {key}={there.get(key)}, not {meta[key]}; "
                    f"give name= for records of their own"
                )
        return self._names <= arrays.keys()

    def measure(self, params: Any, meta: dict[str, Any]) -> float | None:
        """Measure parameters (NumPy arrays); the record follows. Returns the loss of the samples.

        It is None where only weights are measured.

        Arrays that the step's record already has and this measurement lacks are kept.
        """
        params = jax.device_put(params, replicated(self._mesh))
        batch = probe_at(self._probe_batch, self._mesh, meta["window_tokens"])
        summaries, loss = self._measure(params, batch)
        if loss is not None:
            meta["probe_loss"] = float(loss)
        path = step_path(self.folder, meta["step"])

        def pending():
            earlier = read_step(path)[1] if path.exists() else {}
            return earlier | spectra(summaries)

        self._writer.submit(meta["step"], meta, pending)
        return meta.get("probe_loss")


def _expected_names(config: RunConfig) -> set[str]:
    """One array of every place: what shows that it was measured."""
    kinds = ("act_cov_eigenvalues", "grad_singular_values", "weight_singular_values")
    places = probed_places(config)
    return {f"{kind}/{place}" for kind, part in zip(kinds, places, strict=True) for place in part}
