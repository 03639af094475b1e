"""What a configuration measures: its lens, its probe set on the devices, and what records say."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.config import RunConfig, probed_layers
from experiments.data import token_hash
from experiments.devices import place_rows
from lens_jax.lens import Lens, ProbeBatch, make_lens
from models.layers import layer_plan

KEPT_GRADIENT_BYTES = 16 * 2**30  # of one sweep, where samples take several passes


class Places(NamedTuple):
    """Where each probe of a configuration looks: taps, and paths of kernels twice."""

    activation: tuple[str, ...]
    gradient: tuple[str, ...]
    weight: tuple[str, ...]


def probed_places(config: RunConfig) -> Places:
    """Activations of every layer, matrices of the probed ones; nothing for a probe that is off.

    A layer without attention has no matrices of attention to watch.
    """
    plan = layer_plan(config.arch, config.size.n_layer)
    sites = tuple(f"h_{layer}/resid_post" for layer in range(config.size.n_layer))
    kernels = tuple(
        f"h_{layer}/{matrix.replace('.', '/')}/kernel"
        for layer in probed_layers(config)
        for matrix in config.probes.matrices
        if plan[layer].attention or not matrix.startswith("attn.")
    )
    found = Places(sites, kernels, kernels)
    return Places(
        *(part if name in config.probes.names else () for name, part in found._asdict().items())
    )


def run_lens(config: RunConfig) -> Lens:
    """The lens of a configuration."""
    places = probed_places(config)
    if config.probes.data == "batch":
        windows = samples = config.rows_per_step
        chunk = config.micro_rows
    else:
        windows, samples = config.probes.windows, config.probes.gradient_windows
        chunk = config.probes.chunk
    pieces = config.row // config.probes.window if config.probes.sample == "window" else 1
    return make_lens(
        windows=windows,
        samples=samples,
        chunk=chunk,
        activations=places.activation,
        gradients=places.gradient,
        weights=places.weight,
        pieces=pieces if config.probes.data == "batch" else 1,
        sweeps=config.probes.sweeps or _sweeps(config, places.gradient),
        route="one_backward",
        groups=config.probes.groups,
        spread=config.probes.data == "fixed" and config.data.probe_spread,
    )


def _sweeps(config: RunConfig, paths: Sequence[str]) -> int:
    """Visits of the probe set, so that the rows kept in one stay below KEPT_GRADIENT_BYTES.

    A single pass keeps Gram matrices instead, and a training batch is visited but once.
    """
    samples = config.probes.gradient_windows
    if config.probes.data == "batch" or samples <= config.probes.chunk:
        return 1
    size = config.size
    across = sum(size.mlp_width if "/mlp/" in path else size.n_embd for path in paths)
    kept = 4 * samples * across * size.n_embd  # bytes
    return max(1, min(len(paths), -(-kept // KEPT_GRADIENT_BYTES)))


def with_window(batch: dict, mesh, window: int | None) -> dict:
    """A batch {"tokens": (..., B, T+1)} with the attention window of every row, (..., B) int32.

    Without a window (None) the batch as it is.
    """
    if window is None:
        return batch
    rows = batch["tokens"].shape[:-1]
    return batch | {"window": place_rows(mesh, np.full(rows, window, np.int32), axis=len(rows) - 1)}


def probe_at(probe_batch: ProbeBatch | None, mesh, window: int | None) -> ProbeBatch | None:
    """The fixed probe set as a step with this attention window measures it."""
    if probe_batch is None:
        return None
    samples, more = (
        None if batch is None else with_window(batch, mesh, window) for batch in probe_batch
    )
    return ProbeBatch(samples, more)


def place_probe_set(config: RunConfig, windows: np.ndarray, mesh) -> ProbeBatch:
    """The fixed probe set (windows, T+1) on the devices, cut as the lens of `config` takes it.

    Of a set that is spread over the text, so are the gradient samples, and so is every pass.
    """
    spread, chunk = config.data.probe_spread, config.probes.chunk
    samples, rest = split_samples(config, windows)
    samples = _in_passes(samples, max(1, len(samples) // chunk), spread).reshape(samples.shape)
    samples = {"tokens": place_rows(mesh, samples, axis=0)}
    if not len(rest):
        return ProbeBatch(samples)
    rest = _in_passes(rest, len(rest) // chunk, spread)
    return ProbeBatch(samples, {"tokens": place_rows(mesh, rest, axis=1)})


def split_samples(config: RunConfig, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The windows that are gradient samples, and the others, both in the order of the text."""
    chosen = np.arange(config.probes.gradient_windows)
    if config.data.probe_spread:
        chosen = chosen * len(windows) // len(chosen)
    return windows[chosen], np.delete(windows, chosen, axis=0)


def _in_passes(windows: np.ndarray, passes: int, spread: bool) -> np.ndarray:
    """Windows (n, T) as (passes, n / passes, T): one stretch of them a pass, or every n-th one."""
    if spread:
        return np.swapaxes(windows.reshape(-1, passes, windows.shape[1]), 0, 1)
    return windows.reshape(passes, -1, windows.shape[1])


def record_facts(config: RunConfig, windows: np.ndarray, lens: Lens, dtype) -> dict[str, Any]:
    """What every record says of its measurement; windows: the fixed probe set, dtype: computed in.

    act_windows windows of act_tokens tokens in all lie under the activations; a gradient sample is
    sample_tokens long.
    """
    fixed = config.probes.data == "fixed"
    row = config.probes.window if fixed else config.row
    rows = config.probes.windows if fixed else config.rows_per_step
    sample = config.probes.window if fixed or config.probes.sample == "window" else config.row
    samples = config.probes.gradient_windows if fixed else rows * (row // sample)
    return {
        "rung": config.rung,
        "tier": config.tier,
        "profile": config.profile,
        "batch": config.batch,
        "seed": config.seed,
        "width": config.size.n_embd,
        "num_layers": config.size.n_layer,
        "probe_data": config.probes.data,
        "probe_hash": token_hash(windows) if fixed else None,
        "gradient_samples": samples if lens.sweeps else 0,
        "sample_tokens": sample,
        "act_windows": rows,
        "act_tokens": rows * row,
        "dtype": np.dtype(dtype).name,
        "eigen": config.probes.eigen,
    }
