"""From a configuration to the objects of a run: data, model, optimizer, compiled functions."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import RunConfig
from experiments.data import HeldOut, TokenFiles, held_out
from experiments.devices import make_mesh, place_rows, replicated, split_leading, state_sharding
from experiments.loss import make_loss
from experiments.precision import full_precision
from experiments.probe_set import place_probe_set, record_facts, run_lens, with_window
from experiments.schedule import Schedule
from lens_jax.lens import Lens, ProbeBatch
from lens_jax.step import TrainState, init_state, make_train_step
from models.attention import choose
from models.command_line import UsageError
from models.gpt import GPT, init_params
from optim.groups import make_optimizer


class Functions(NamedTuple):
    """What a configuration computes on a mesh, before there are any data.

    step: as `lens_jax.step.make_train_step` returns it. fresh_state() -> TrainState. shapes: its
    arrays as ShapeDtypeStructs, which say how they lie on the mesh too.
    """

    model: GPT
    loss_fn: Callable
    lens: Lens
    step: Callable
    fresh_state: Callable[[], TrainState]
    shapes: TrainState


class Run(NamedTuple):
    """The compiled side of a run.

    step, fresh_state, shapes: as in `Functions`. evaluate(params, window) -> mean validation loss
    at an attention window in tokens (None: the rung has none). probe_batch: the fixed probe set on
    the mesh, or None. facts: what every spectrum record says of this run. num_params: of the model.
    """

    mesh: Any
    step: Callable
    evaluate: Callable
    fresh_state: Callable[[], TrainState]
    shapes: TrainState
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
        probe_spread=config.data.probe_spread,
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
    return GPT(config.arch, config.size, dtype, config.attention, config.remat, mesh, config.fsdp)


def read_yardstick(files: TokenFiles) -> float | None:
    """Unigram entropy of the validation text in nats a token, where meta.json beside it tells."""
    meta = files.train[0].parent / "meta.json"
    if not meta.exists():
        return None
    return json.loads(meta.read_text()).get("unigram_entropy_val")


def make_run(
    config: RunConfig, schedule: Schedule, held: HeldOut, unigram_entropy: float | None = None
) -> Run:
    """Builds everything that a training loop calls; nothing is compiled before its first call.

    config: as `devices.settled` leaves it.
    """
    mesh = make_mesh(config.micro_rows)
    made = make_functions(config, schedule, mesh)
    lens, dtype = made.lens, made.model.dtype
    fixed = bool(lens.probes or lens.sweeps) and config.probes.data == "fixed"
    return Run(
        mesh=mesh,
        step=made.step,
        evaluate=_make_evaluate(made.loss_fn, held.val, config.micro_rows, mesh, dtype),
        fresh_state=made.fresh_state,
        shapes=made.shapes,
        probe_batch=place_probe_set(config, held.probe, mesh) if fixed else None,
        facts=record_facts(config, held.probe, lens, dtype) | {"unigram_entropy": unigram_entropy},
        num_params=sum(leaf.size for leaf in jax.tree.leaves(made.shapes.params)),
    )


def make_functions(config: RunConfig, schedule: Schedule, mesh) -> Functions:
    """Model, loss, optimizer and lens of a configuration as functions of a mesh; runs nothing.

    Raises UsageError for attention that cannot run here.
    """
    model = make_model(config, mesh)
    loss_fn, lens = make_loss(model), run_lens(config)
    params = jax.eval_shape(lambda: init_params(model, config.seed))
    split = split_leading(mesh)
    tx = make_optimizer(
        config.optim,
        schedule.horizon,
        params,
        split=split,
        joined=None if split is None or config.fsdp else replicated(mesh),
    )

    def fresh_state():
        return init_state(init_params(model, config.seed), tx)

    shapes = jax.eval_shape(lambda params: init_state(params, tx), params)
    sharding = state_sharding(mesh, shapes, cut=config.fsdp)
    step = make_train_step(
        loss_fn,
        tx,
        lens,
        probe_data=config.probes.data,
        eigen=config.probes.eigen,
        out_shardings=(sharding, replicated(mesh), replicated(mesh)),
    )
    return Functions(
        model=model,
        loss_fn=loss_fn,
        lens=lens,
        step=full_precision(step, model.dtype),
        fresh_state=jax.jit(fresh_state, out_shardings=sharding),
        shapes=jax.tree.map(lambda leaf, where: leaf.update(sharding=where), shapes, sharding),
    )


def _make_evaluate(loss_fn, rows: np.ndarray, most_rows: int, mesh, dtype) -> Callable:
    """Mean loss over all validation rows, in chunks of at most a micro-batch."""
    chunk = validation_chunk(len(rows), most_rows, mesh.size)
    chunks = place_rows(mesh, rows.reshape(-1, chunk, rows.shape[1]), axis=1)

    @jax.jit
    def mean_loss(params, batches):
        return jnp.mean(jax.lax.map(lambda batch: loss_fn(params, batch)[0], batches))

    evaluate = full_precision(mean_loss, dtype)
    return lambda params, window: evaluate(params, with_window({"tokens": chunks}, mesh, window))


def validation_chunk(rows: int, most: int, num_devices: int) -> int:
    """Rows of one pass of a validation: a divisor of `rows`, and at most `most`.

    The greatest that the devices can share, where there is one: any other is computed whole on
    every device.
    """
    divisors = [count for count in range(1, most + 1) if rows % count == 0]
    shared = [count for count in divisors if count % num_devices == 0]
    return max(shared or divisors)
