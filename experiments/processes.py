"""One training run in several processes: who meets whom, who writes, and when all stop.

Every process runs the same command with the same words:

    srun python -m experiments.train ...        # under Slurm a step of several tasks is enough
    LENS_JAX_COORDINATOR=HOST:PORT LENS_JAX_NUM_PROCESSES=2 LENS_JAX_PROCESS_ID=0 \
        python -m experiments.train ...         # elsewhere, with another number in each

These are environment variables and no keys, because what differs between the processes of a run is
no part of its configuration, which must be the same in all of them. The first process opens the run
folder, writes and speaks; checkpoints are written by all, so the folder must be on a disk that they
share. A process that fails alone leaves at once, and jax ends the others when it is missed.
"""

import atexit
import hashlib
import json
import os
import socket
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from experiments.run_folder import Resume, RunFolder
from models.command_line import UsageError

if TYPE_CHECKING:
    import jax

COORDINATOR = "LENS_JAX_COORDINATOR"
NUM_PROCESSES = "LENS_JAX_NUM_PROCESSES"
PROCESS_ID = "LENS_JAX_PROCESS_ID"
# what jax needs to find the other tasks of a Slurm step; srun sets them all
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")

_EXIT_CODES = {UsageError: 2, KeyboardInterrupt: 130}  # as models.command_line.run_command has them


def meeting(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of jax.distributed.initialize that an environment gives; None: a process alone.

    The variables of this module come first, then those of a Slurm step of several tasks, whose
    coordinator jax finds by itself. Under Slurm jax gives each task the one GPU of its place on
    the node; a task that has a node to itself takes all that Slurm gave it there.
    Raises UsageError for variables that are incomplete or make no sense.
    """
    given = {
        key: environ[key] for key in (COORDINATOR, NUM_PROCESSES, PROCESS_ID) if key in environ
    }
    if given:
        return _explicit(given)
    # the number of tasks of a job is not that of the step that this process is
    tasks = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))
    if not all(key in environ for key in _SLURM) or int(tasks) < 2:
        return None
    one_a_node = environ.get("SLURM_STEP_NUM_NODES") == tasks
    gpus = environ.get("SLURM_GPUS_ON_NODE", "")
    if one_a_node and gpus.isdecimal() and "JAX_LOCAL_DEVICE_IDS" not in environ:
        return {"local_device_ids": list(range(int(gpus)))}
    return {}


def _explicit(given: Mapping[str, str]) -> dict[str, Any]:
    for key in (COORDINATOR, NUM_PROCESSES, PROCESS_ID):
        if key not in given:
            raise UsageError(f"{key} is missing beside {next(iter(given))}; set all three")
    address, count, number = (given[key] for key in (COORDINATOR, NUM_PROCESSES, PROCESS_ID))
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UsageError(f"{COORDINATOR}={address}: write HOST:PORT of the first process")
    if not count.isdecimal() or int(count) < 1:
        raise UsageError(f"{NUM_PROCESSES}={count}: give how many processes the run has")
    if not number.isdecimal() or int(number) >= int(count):
        raise UsageError(f"{PROCESS_ID}={number}: give 0 to {int(count) - 1}")
    return {
        "coordinator_address": address,
        "num_processes": int(count),
        "process_id": int(number),
        "cluster_detection_method": "deactivate",
    }


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes of a run for the block, if the environment says so.

    Must be entered before jax is used; jax is not imported for a process alone. All but the first
    print nothing on standard output. Raises UsageError where the port of a given coordinator is in
    use; when the others do not come within five minutes, jax itself ends this process.
    """
    arguments = meeting(os.environ)
    if arguments is None:
        yield
        return
    if arguments.get("process_id") == 0:
        _refuse_used_port(arguments["coordinator_address"])
    import jax

    from experiments.devices import split_cpu

    split_cpu()
    # its handler would swallow TERM, which the training loop sees itself (see make_poll)
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(**arguments)
    try:
        share(None)  # now: on CPUs a first exchange gives up when the others are 30 s late
        with open(os.devnull, "w") as nowhere, redirect_stdout(_output(nowhere)):
            yield
    except BaseException as error:
        # The end of jax would wait for the others, which wait for this process in their next step.
        # Handlers run in reverse order, after the error has been told.
        atexit.register(_leave, _EXIT_CODES.get(type(error), 1))
        raise
    jax.distributed.shutdown()


def _refuse_used_port(address: str) -> None:
    """Jax would crash without a word."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # an ended run is no user
        try:
            trial.bind(("", int(address.rpartition(":")[2])))
        except OSError as error:
            raise UsageError(
                f"{COORDINATOR}={address}: {error.strerror}; choose another port"
            ) from error


def _output(nowhere: TextIO) -> TextIO:
    return sys.stdout if is_first() else nowhere


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_first() -> bool:
    """Whether this process writes and speaks for the run."""
    import jax

    return jax.process_index() == 0


def share(value: Any) -> Any:
    """The first process's plain JSON value, in every process; all must call it."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    mine = text if is_first() else np.zeros(size, np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(mine).astype(np.uint8).tobytes())


def open_together(
    path: str,
    resume: Resume,
    config: dict,
    free_keys: Collection[str] = (),
    shards: Sequence[Path] = (),
) -> RunFolder:
    """RunFolder.open of the first process; the others have its paths, and no lock.

    Raises UsageError in all of them when it refuses, and when the processes have different
    configurations or shards (by name and size).
    """
    if meeting(os.environ) is None:
        return RunFolder.open(path, resume, config, free_keys)
    _refuse_different(config, "configurations", "the same words, and profile= if machines differ")
    sizes = [(shard.name, shard.stat().st_size) for shard in shards]
    _refuse_different(sizes, "shards of tokens", "the same data")
    folder, refusal = None, None
    if is_first():
        try:
            folder = RunFolder.open(path, resume, config, free_keys)
        except UsageError as error:
            refusal = str(error)
    refusal, place = share((refusal, folder and str(folder.path)))
    if refusal is not None:
        raise UsageError(refusal)
    return folder or RunFolder.beside(place)


def _refuse_different(value: Any, what: str, mend: str) -> None:
    import numpy as np
    from jax.experimental import multihost_utils

    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()[:4]
    found = multihost_utils.process_allgather(np.frombuffer(digest, np.uint32))
    if np.unique(found).size > 1:
        raise UsageError(
            f"the {len(found)} processes of this run have different {what}; give all {mend}"
        )


def make_poll(mesh) -> Callable[[int], "jax.Array"]:
    """A function that every process of a mesh calls with a number; it gives all the greatest.

    The result is an array () on the devices that is waited for when it is read: read a step later,
    as the step's metrics are, it costs no time and is the same at the same step everywhere.
    """
    import jax
    import numpy as np

    from experiments.devices import replicated

    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    greatest = jax.jit(lambda numbers: numbers.max(), out_shardings=replicated(mesh))

    def poll(number: int) -> "jax.Array":
        # every device brings its process's own number
        one = np.full((1,), number, np.int32)
        return greatest(jax.make_array_from_callback((mesh.size,), rows, lambda index: one))

    return poll
