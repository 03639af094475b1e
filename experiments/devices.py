"""Which devices a run uses, how arrays lie on them, and how fast they could be.

The one place where a mesh is made: a single axis `data`, of type Auto, over which rows of a batch
are split; weights and optimizer state are copied to every device, or cut among them too.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from typing import Any

from models.command_line import UsageError

ACCELERATOR_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")
PAPER_BYTES = 40e9
LEAST_CUT = 2**12  # elements of an array that is worth cutting among devices

# Dense bf16 matrix peak in FLOP/s by device kind, from the vendors' datasheets, where NVIDIA states
# twice as much, with sparsity: 1,513 for the PCIe card, 1,671 for both NVL and 1,979 for SXM. The
# longest name that a kind begins with counts.
PEAK_FLOPS = {
    "NVIDIA H200": 989.5e12,
    "NVIDIA H200 NVL": 835.5e12,
    "NVIDIA H100": 989.5e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}


def auto_profile() -> tuple[str, str]:
    """What profile=auto stands for on this machine, and why, in one phrase.

    Without an accelerator plugin installed jax is not imported to find out.
    """
    if not _has_plugin():
        return "laptop", "no accelerator plugin is installed"
    import jax

    split_cpu()  # what is asked next starts jax, and no CPU can be split after that
    device = jax.devices()[0]
    if device.platform == "cpu":
        return "laptop", "no accelerator is visible"
    memory = (device.memory_stats() or {}).get("bytes_limit", 0)
    # the limit is what jax may take, a share of the card
    if memory >= 0.7 * PAPER_BYTES:
        return "paper", f"{device.device_kind} offers {memory / 1e9:.0f} GB"
    return "laptop", f"{device.device_kind} offers {memory / 1e9:.0f} GB, the paper sizes want 40"


def _has_plugin() -> bool:
    return any(importlib.util.find_spec(name) for name in ACCELERATOR_PLUGINS)


_LOOK = """import json, jax
print(json.dumps([jax.default_backend(), jax.local_device_count()]))"""


def look_from_outside() -> tuple[str, int]:
    """Platform and number of this machine's devices, for a program whose children will use them.

    Asked of a process of its own: one that has looked holds memory of every accelerator for as
    long as it lives. Raises UsageError where jax cannot open them.
    """
    if not _has_plugin():
        return "cpu", 1
    asked = subprocess.run([sys.executable, "-c", _LOOK], capture_output=True, text=True)
    if asked.returncode:
        said = (asked.stderr.strip().splitlines() or ["nothing said"])[-1]
        raise UsageError(f"jax cannot open this machine's devices: {said}")
    platform, count = json.loads(asked.stdout.splitlines()[-1])
    return platform, count


def split_cpu(count: int | None = None) -> None:
    """Give a process without accelerator `count` devices, one a core up to two by default.

    XLA runs element-wise work of a program on one core per device, so two devices train faster on
    two cores. Changes nothing where the user has chosen. Must run before jax is used; a second call
    changes nothing.
    """
    chosen = "JAX_NUM_CPU_DEVICES" in os.environ or "xla_force_host_platform_device_count" in (
        os.environ.get("XLA_FLAGS", "")
    )
    if not chosen:
        import jax

        jax.config.update("jax_num_cpu_devices", count or min(2, os.cpu_count() or 1))


def micro_batches(batch: int, devices: int, processes: int = 1) -> int:
    """Micro-batches of a step of `batch` long rows, so that no device has more than one at a time.

    As many devices share them as divide the batch, equally many of every process.
    """
    shares = [n for n in range(1, devices + 1) if batch % n == 0 and n % processes == 0]
    return batch // max(shares, default=1)


def settled(config):
    """The configuration with accumulate= decided by the devices of this run, where it is none."""
    import chz
    import jax

    if config.accumulate is not None:
        return config
    count = micro_batches(config.batch, jax.device_count(), jax.process_count())
    return chz.replace(config, accumulate=count)


def make_mesh(micro_rows: int, most: int | None = None):
    """A mesh over as many devices as divide the rows of a micro-batch (at least one).

    most: where fewer are wanted than there are. Several processes bring equally many. Raises
    UsageError for rows that they cannot share.
    """
    import jax

    processes = jax.process_count()
    if micro_rows % processes:
        raise UsageError(
            f"{processes} processes cannot share a micro-batch of {micro_rows} rows; lower "
            f"accumulate=, or give a batch= that they divide"
        )
    rows = micro_rows // processes
    there = min(most or jax.local_device_count(), jax.local_device_count())
    count = max(n for n in range(1, there + 1) if rows % n == 0)
    devices = [
        device for i in range(processes) for device in jax.local_devices(process_index=i)[:count]
    ]
    return jax.make_mesh(
        (len(devices),), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
    )


def replicated(mesh):
    """The sharding of what is small: a whole copy on every device."""
    import jax

    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def state_sharding(mesh, shapes: Any, *, cut: bool):
    """How every array of a training state lies, in a tree like `shapes` (arrays or shapes).

    Whole on every device, or with cut (FSDP) each device has its part of the last axis that the
    devices divide; small arrays, and those without such an axis, stay whole. Parameters and their
    moments have one shape, so they lie alike.
    """
    import jax

    def spec(shape: tuple[int, ...]):
        axes = [axis for axis, length in enumerate(shape) if length % mesh.size == 0]
        if not (cut and axes and math.prod(shape) >= LEAST_CUT):
            return jax.sharding.PartitionSpec()
        return jax.sharding.PartitionSpec(*[None] * axes[-1], "data")

    return jax.tree.map(lambda leaf: jax.sharding.NamedSharding(mesh, spec(leaf.shape)), shapes)


def split_leading(mesh):
    """The sharding that cuts the leading axis among the devices; None where there is only one."""
    import jax

    if mesh.size == 1:
        return None
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))


def rows_sharding(mesh, shape: tuple[int, ...], axis: int):
    """The sharding of rows: cut along `axis` where the devices divide it, else whole."""
    import jax

    spec = [None] * len(shape)
    if shape[axis] % mesh.size == 0:
        spec[axis] = "data"
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))


def place_rows(mesh, tokens: Any, *, axis: int):
    """A host array on the mesh, as `rows_sharding` says.

    Of several processes each has the whole array and places its part.
    """
    import jax

    sharding = rows_sharding(mesh, tokens.shape, axis)
    if sharding.is_fully_addressable:
        return jax.device_put(tokens, sharding)
    return jax.make_array_from_callback(tokens.shape, sharding, lambda index: tokens[index])


def peak_flops(mesh) -> float | None:
    """bf16 peak of all devices of the mesh together, None where it is not known.

    A slice of a card (MIG) has a share of its peak that its name does not tell.
    """
    kind = mesh.devices.flat[0].device_kind
    name = max(filter(kind.startswith, PEAK_FLOPS), key=len, default=None)
    return None if name is None or " MIG " in kind else PEAK_FLOPS[name] * mesh.size
