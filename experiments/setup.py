"""From a configuration to the objects of a run: data, model, optimizer, compiled functions."""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import RunConfig, probed_layers
from experiments.data import HeldOut, TokenFiles, held_out, token_hash
from experiments.devices import make_mesh, place_rows, replicated, split_leading
from experiments.loss import make_loss
from experiments.schedule import Schedule
from lens_jax.lens import Lens, ProbeBatch, make_lens
from lens_jax.step import TrainState, init_state, make_train_step
from models.attention import choose
from models.command_line import UsageError
from models.gpt import GPT, init_params
from models.layers import layer_plan
from optim.groups import make_optimizer

KEPT_GRADIENT_BYTES = 16 * 2**30  # of one sweep, where samples take several passes


class Run(NamedTuple):
    """The compiled side of a run.

    step: as `lens_jax.step.make_train_step` returns it. evaluate(params, window) -> mean validation
    loss at an attention window in tokens (None: the rung has none).
    fresh_state() -> TrainState on the mesh. probe_batch: the fixed probe set on the mesh, or None.
    facts: what every spectrum record says of this run. num_params: of the model.
    """

    mesh: Any
    step: Callable
    evaluate: Callable
    fresh_state: Callable[[], TrainState]
    probe_batch: ProbeBatch | None
    facts: dict[str, Any]
    num_params: int


def hold_out(config: RunConfig, files: TokenFiles) -> HeldOut:
    """The validation rows and the probe set of a configuration.

    The probe set is held out also where no probe reads it, so that probes never change what is
    trained on.
    """
    return held_out(
        files,
        row=config.row,
        val_tokens=config.data.val_tokens,
        probe_offset=config.data.probe_offset,
        probe_windows=config.probes.windows,
        probe_window=config.probes.window,
    )


def compute_dtype(config: RunConfig):
    """The dtype of the matrix products: as configured, or bfloat16 off the CPU."""
    if config.compute_dtype == "auto":
        return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return jnp.dtype(config.compute_dtype)


def make_model(config: RunConfig, mesh=None) -> GPT:
    """The model of a configuration on the devices of a mesh, or on one.

    Raises UsageError for attention that cannot run here.
    """
    dtype = compute_dtype(config)
    try:
        choose(config.attention, config.arch.masked, dtype, config.size.head_dim)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return GPT(config.arch, config.size, dtype, config.attention, config.remat, mesh)


def run_lens(config: RunConfig) -> Lens:
    """The probes of a configuration: activations of every layer, matrices of the probed ones.

    A layer without attention has no matrices of attention to watch.
    """
    plan = layer_plan(config.arch, config.size.n_layer)
    paths = tuple(
        f"h_{layer}/{matrix.replace('.', '/')}/kernel"
        for layer in probed_layers(config)
        for matrix in config.probes.matrices
        if plan[layer].attention or not matrix.startswith("attn.")
    )
    if config.probes.data == "batch":
        windows = samples = config.rows_per_step
        chunk = windows // config.accumulate
    else:
        windows, samples = config.probes.windows, config.probes.gradient_windows
        chunk = config.probes.chunk
    sites = tuple(f"h_{layer}/resid_post" for layer in range(config.size.n_layer))
    names = config.probes.names
    return make_lens(
        windows=windows,
        samples=samples,
        chunk=chunk,
        activations=sites if "activation" in names else (),
        gradients=paths if "gradient" in names else (),
        weights=paths if "weight" in names else (),
        sweeps=config.probes.sweeps or _sweeps(config, paths),
        route="one_backward",
    )


def _sweeps(config: RunConfig, paths: Sequence[str]) -> int:
    """Visits of the probe set, so that the rows kept in one stay below KEPT_GRADIENT_BYTES.

    A single pass keeps Gram matrices instead, and a training batch is visited but once.
    """
    samples = config.probes.gradient_windows
    if config.probes.data == "batch" or samples <= config.probes.chunk:
        return 1
    squares = sum(4 if "/mlp/" in path else 1 for path in paths)  # kernels, in units of width^2
    kept = 4 * samples * squares * config.size.n_embd**2
    return max(1, min(len(paths), -(-kept // KEPT_GRADIENT_BYTES)))


def read_yardstick(files: TokenFiles) -> float | None:
    """Unigram entropy of the validation text in nats a token, where meta.json beside it tells."""
    meta = files.train[0].parent / "meta.json"
    if not meta.exists():
        return None
    return json.loads(meta.read_text()).get("unigram_entropy_val")


def make_run(
    config: RunConfig, schedule: Schedule, held: HeldOut, unigram_entropy: float | None = None
) -> Run:
    """Builds everything that a training loop calls; nothing is compiled before its first call."""
    micro_rows = config.rows_per_step // config.accumulate
    mesh = make_mesh(micro_rows)
    model = make_model(config, mesh)
    loss_fn = make_loss(model)
    shapes = jax.eval_shape(lambda: init_params(model, config.seed))
    tx = make_optimizer(config.optim, schedule.horizon, shapes, split=split_leading(mesh))
    lens = run_lens(config)
    step = make_train_step(
        loss_fn,
        tx,
        lens,
        probe_data=config.probes.data,
        eigen=config.probes.eigen,
        out_sharding=replicated(mesh),
    )
    fixed = bool(lens.probes or lens.sweeps) and config.probes.data == "fixed"
    return Run(
        mesh=mesh,
        step=step,
        evaluate=_make_evaluate(loss_fn, held.val, micro_rows, mesh),
        fresh_state=jax.jit(
            lambda: init_state(init_params(model, config.seed), tx), out_shardings=replicated(mesh)
        ),
        probe_batch=_place_probe_set(config, held.probe, mesh) if fixed else None,
        facts=_record_facts(config, held, lens) | {"unigram_entropy": unigram_entropy},
        num_params=sum(leaf.size for leaf in jax.tree.leaves(shapes)),
    )


def _make_evaluate(loss_fn, rows: np.ndarray, most_rows: int, mesh) -> Callable:
    """Mean loss over all validation rows, in chunks of at most a micro-batch."""
    chunk = max(n for n in range(1, most_rows + 1) if len(rows) % n == 0)
    chunks = place_rows(mesh, rows.reshape(-1, chunk, rows.shape[1]), axis=1)

    @jax.jit
    def evaluate(params, batches):
        return jnp.mean(jax.lax.map(lambda batch: loss_fn(params, batch)[0], batches))

    return lambda params, window: evaluate(params, with_window({"tokens": chunks}, mesh, window))


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


def _place_probe_set(config: RunConfig, windows: np.ndarray, mesh) -> ProbeBatch:
    samples, rest = np.split(windows, [config.probes.gradient_windows])
    samples = {"tokens": place_rows(mesh, samples, axis=0)}
    if not len(rest):
        return ProbeBatch(samples)
    rest = rest.reshape(-1, config.probes.chunk, rest.shape[1])
    return ProbeBatch(samples, {"tokens": place_rows(mesh, rest, axis=1)})


def _record_facts(config: RunConfig, held: HeldOut, lens: Lens) -> dict[str, Any]:
    fixed = config.probes.data == "fixed"
    window = config.probes.window if fixed else config.row
    windows = config.probes.windows if fixed else config.rows_per_step
    samples = config.probes.gradient_windows if fixed else config.rows_per_step
    return {
        "rung": config.rung,
        "tier": config.tier,
        "profile": config.profile,
        "batch": config.batch,
        "seed": config.seed,
        "width": config.size.n_embd,
        "num_layers": config.size.n_layer,
        "probe_data": config.probes.data,
        "probe_hash": token_hash(held.probe) if fixed else None,
        "gradient_samples": samples if lens.sweeps else 0,
        "sample_tokens": window,
        "act_tokens": windows * window,
        "dtype": compute_dtype(config).name,
        "eigen": config.probes.eigen,
    }
