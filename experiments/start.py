"""How a run begins: from its newest checkpoint or afresh, and what it says of itself."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from experiments.checkpoints import Checkpoints
from experiments.config import RunConfig
from experiments.processes import share
from experiments.progress import Display
from experiments.schedule import Schedule
from experiments.setup import Run
from lens_jax.step import TrainState
from models.attention import choose
from models.command_line import UsageError

RECORDED_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


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
            f"{config.micro_rows} rows, which the devices in use must "
            f"divide; {mend}"
        )
    rows = config.data.val_tokens // config.row
    if rows % run.mesh.size:
        display.note(
            f"validation runs whole on every device: its {rows} rows cannot be shared by "
            f"{run.mesh.size} of them; give data.val_tokens= in multiples of "
            f"{config.row * run.mesh.size}"
        )
    if start:
        display.note(f"resumed at step {start}")
    yardstick = run.facts["unigram_entropy"]
    if yardstick is not None:
        display.note(f"yardstick: unigram entropy of the validation text {yardstick:.3f} nats")


def circumstances(config: RunConfig, run: Run, data: str) -> dict[str, Any]:
    """What a checkpoint says of where and how it was computed; plain JSON."""
    dtype = np.dtype(run.facts["dtype"])
    return {
        "data": data,
        "num_devices": run.mesh.size,
        "platform": run.mesh.devices.flat[0].platform,
        "dtype": dtype.name,
        "attention": choose(config.attention, config.arch.masked, dtype, config.size.head_dim),
        "remat": config.remat,
        "fsdp": config.fsdp,
        "accumulate": config.accumulate,
        "versions": {name: version(name) for name in RECORDED_PACKAGES},
    }


def initial_state(
    run: Run, checkpoints: Checkpoints, here: Mapping[str, Any]
) -> tuple[TrainState, int]:
    """The state a run goes on from and its step: the newest checkpoint's, else a fresh one.

    here: the `circumstances` it goes on in. Other devices and libraries are told of; raises
    UsageError for a checkpoint that was trained on other data or in another precision.
    """
    latest = share(checkpoints.latest())
    if latest is None:
        return run.fresh_state(), 0
    meta = checkpoints.read_meta(latest)
    if meta["data"] != here["data"]:
        raise UsageError(
            f"the checkpoint at step {latest} was trained on {meta['data']}, not on "
            f"{here['data']}; bring that data back, or start anew with another out="
        )
    if meta.get("dtype", here["dtype"]) != here["dtype"]:  # earlier checkpoints do not say
        raise UsageError(
            f"the checkpoint at step {latest} was trained in {meta['dtype']} on "
            f"{meta['platform']}, compute_dtype=auto means {here['dtype']} on {here['platform']}; "
            f"go on there, or start anew with another out="
        )
    for line in _changes(meta, here):
        print(f"note: {line}: losses agree to rounding, not bit by bit")
    return checkpoints.restore(latest, run.shapes), latest


def _changes(meta: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """A line for every circumstance that a checkpoint names and that is another one here."""
    lines = []
    if meta["num_devices"] != here["num_devices"]:
        lines.append(f"saved on {meta['num_devices']} devices, resumed on {here['num_devices']}")
    keys = ("platform", "attention", "remat", "fsdp", "accumulate")
    pairs = {f"{key}={meta[key]}": f"{key}={here[key]}" for key in keys if key in meta}
    pairs |= {
        f"{name} {before}": f"{name} {here['versions'][name]}"
        for name, before in meta["versions"].items()
        if name in here["versions"]
    }
    lines += [f"saved with {old}, resumed with {new}" for old, new in pairs.items() if old != new]
    return lines
