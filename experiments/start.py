"""How a run begins: from its newest checkpoint or afresh, and what it says of itself."""

import jax

from experiments.checkpoints import Checkpoints
from experiments.config import RunConfig
from experiments.devices import replicated
from experiments.processes import share
from experiments.progress import Display
from experiments.schedule import Schedule
from experiments.setup import Run
from lens_jax.step import TrainState
from models.command_line import UsageError


def greet(display: Display, config: RunConfig, run: Run, schedule: Schedule, start: int) -> None:
    """Tell what the run is, what it runs on, and what its losses compare with."""
    devices = run.mesh.devices.flat
    display.note(
        f"{run.num_params:,} parameters on {run.mesh.size} x {devices[0].device_kind}, "
        f"{run.facts['dtype']}; {schedule.num_steps} steps of {config.tokens_per_step:,} tokens; "
        f"{len(schedule.measure)} measured steps"
    )
    idle = jax.device_count() - run.mesh.size
    if idle:
        mend = f"lower accumulate={config.accumulate}" if config.accumulate > 1 else "raise batch"
        display.note(
            f"{idle} of {jax.device_count()} devices are idle: a micro-batch has "
            f"{config.rows_per_step // config.accumulate} rows, which the devices in use must "
            f"divide; {mend}"
        )
    if start:
        display.note(f"resumed at step {start}")
    yardstick = run.facts["unigram_entropy"]
    if yardstick is not None:
        display.note(f"yardstick: unigram entropy of the validation text {yardstick:.3f} nats")


def initial_state(run: Run, checkpoints: Checkpoints, data: str) -> tuple[TrainState, int]:
    """The state a run goes on from and its step: the newest checkpoint's, else a fresh one.

    Raises UsageError for a checkpoint that was trained on other data.
    """
    latest = share(checkpoints.latest())
    if latest is None:
        return run.fresh_state(), 0
    meta = checkpoints.read_meta(latest)
    if meta["data"] != data:
        raise UsageError(
            f"the checkpoint at step {latest} was trained on {meta['data']}, not on {data}; bring "
            f"that data back, or start anew with another out="
        )
    saved_on = meta["num_devices"]
    if saved_on != run.mesh.size:
        print(
            f"note: saved on {saved_on} devices, resumed on {run.mesh.size}: losses agree to "
            f"rounding, not bit by bit"
        )
    shapes = jax.eval_shape(run.fresh_state)
    sharding = replicated(run.mesh)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes
    )
    return checkpoints.restore(latest, abstract), latest
