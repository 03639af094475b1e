"""Checkpoints of a run: orbax, asynchronous, with checksums that are verified on restore.

One saved step is one orbax Composite that appears by an atomic rename, as folder `<step>/`:

    state   the arrays (params, opt_state, step, ...), any tree of dicts, tuples and NamedTuples
    sums    per leaf: dtype, shape, checksum (`experiments.checksums`); and the checksum of `meta`
    meta    what the caller says of the run: step, sample index, config, versions, device count

Orbax itself restores a flipped bit in a data file without a word, as wrong weights; the sums catch
it.  Everything a user can meet (damage, a full disk, another model) is a one-line UsageError.
"""

import contextlib
import json
import os
import shutil
import zlib
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments import checkpoint_damage as damage
from experiments.checksums import host_checksum, leaves_by_path, tree_checksums
from experiments.processes import share
from models.command_line import UsageError

_SPARE_BYTES = 1 << 20  # what metadata and directory entries of one saved step may take
_DROPPED = "dropped"  # steps no longer kept are moved here, so that a kill leaves none half removed


class Checkpoints:
    """The saved steps of one folder.

    `keep=None` keeps every step; `keep=n` keeps the n highest steps, and step 0.  One writer per
    folder (see `experiments.run_folder`): opening for writing removes the half-written steps of a
    killed run.  `read_only=True` changes nothing on disk, so a live run can be looked at.
    With several processes every method is collective: call it in all of them.

    Raises UsageError when the folder cannot be made, or is absent and `read_only`.
    """

    def __init__(
        self, folder: str | os.PathLike, *, keep: int | None = None, read_only: bool = False
    ):
        if keep is not None and keep < 1:
            raise ValueError(f"keep={keep}: at least 1, or None to keep every checkpoint")
        damage.shorten_orbax_log()
        self.folder = Path(folder).absolute()  # orbax notices a relative path in a thread only
        self._read_only = read_only
        self._pending: tuple[int, int] | None = None  # step under way and its bytes
        if read_only and not self.folder.is_dir():
            raise UsageError(f"no checkpoints: {self.folder} is not a folder")
        options = ocp.CheckpointManagerOptions(
            save_interval_steps=0 if read_only else 1,
            preservation_policy=_Newest(keep),
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            todelete_subdir=None if read_only else _DROPPED,
            read_only=read_only,
        )
        handlers = {
            # Weights hardly compress: without, saving is 4 times as fast for 8 % more bytes, and a
            # flipped bit is one wrong number for the checksum to find, not a failing decoder.
            "state": ocp.PyTreeCheckpointHandler(use_compression=False),
            "sums": ocp.JsonCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        try:
            self._manager = ocp.CheckpointManager(
                self.folder, options=options, item_handlers=handlers
            )
        except OSError as error:
            reason = damage.reason(error)
            raise UsageError(
                f"cannot use {self.folder} for checkpoints: {reason}; choose another out="
            ) from error
        self._remove_dropped()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # Saving

    def save(self, step: int, state, meta: dict) -> bool:
        """Start to save a step; False, and nothing done, if that step is saved already.

        On return the arrays have been copied or are held, so `state` may be donated to the next
        step at once; the writing goes on in the background.  A save that is still under way is
        waited for first, and if it failed its error is raised here, before anything is written;
        the state is untouched and save() may be called again.  `meta` must be plain JSON.

        Raises UsageError when the disk is full (asked before writing, with free and needed bytes)
        or cannot be written; ValueError for a meta that is not JSON, or if opened read_only.
        """
        if self._read_only:
            raise ValueError(f"{self.folder} was opened read_only")
        self.wait()
        if share(step in self.steps()):
            return False
        leaves = leaves_by_path(state)
        needed = sum(leaf.nbytes for leaf in leaves.values()) + _SPARE_BYTES
        self._refuse_full_disk(step, needed)
        # A copy: orbax writes it later, when the caller's dictionary may have moved on.
        meta = json.loads(json.dumps(meta, allow_nan=False))
        checksums = tree_checksums(state)
        sums = {
            "leaves": {
                path: [str(leaf.dtype), list(leaf.shape), checksums[path]]
                for path, leaf in leaves.items()
            },
            "meta": _json_checksum(meta),
        }
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            sums=ocp.args.JsonSave(sums),
            meta=ocp.args.JsonSave(meta),
        )
        self._pending = (step, needed)
        with self._failed_save_in_one_line():
            self._manager.save(step, args=args, force=True)  # force: no interval rule of orbax's
        return True

    def wait(self) -> None:
        """Block until the save under way is on disk; raises UsageError if it failed."""
        with self._failed_save_in_one_line():
            self._manager.wait_until_finished()
        self._pending = None
        self._remove_dropped()

    def close(self) -> None:
        """Wait for the save under way, then release orbax's threads; may be called twice."""
        try:
            self.wait()
        finally:
            self._manager.close()

    @contextlib.contextmanager
    def _failed_save_in_one_line(self):
        try:
            yield
        except (OSError, ValueError) as error:
            if self._pending is None:
                raise
            step, needed = self._pending
            self._pending = None
            self._remove_unfinished(step)
            raise UsageError(self._failed_save(step, needed, damage.reason(error))) from error

    def _failed_save(self, step: int, needed: int, reason: str) -> str:
        latest = self.latest()
        kept = "no earlier one is saved" if latest is None else f"step {latest} is still whole"
        if reason == damage.DISK_FULL:
            reason = f"disk full, free {_megabytes(self._free())}, needed {_megabytes(needed)}"
        return f"checkpoint of step {step} in {self.folder} was not saved: {reason}; {kept}"

    def _refuse_full_disk(self, step: int, needed: int) -> None:
        # With several processes only the writing itself can tell: a refusal in one of them would
        # leave the others waiting.
        if jax.process_count() == 1 and self._free() < needed:
            raise UsageError(self._failed_save(step, needed, damage.DISK_FULL))

    def _free(self) -> int:
        return shutil.disk_usage(self.folder).free

    def _remove_unfinished(self, step: int) -> None:
        """Give back the space of a save that failed; after a kill the next start does it."""
        if jax.process_index() == 0:
            for unfinished in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)

    def _remove_dropped(self) -> None:
        if not self._read_only and jax.process_index() == 0:
            shutil.rmtree(self.folder / _DROPPED, ignore_errors=True)

    # Reading

    def steps(self) -> list[int]:
        """Saved steps on disk, ascending; a save under way is not among them."""
        names = (entry.name for entry in self.folder.iterdir() if entry.is_dir())
        return sorted(int(name) for name in names if name.isdecimal())

    def latest(self) -> int | None:
        """The highest saved step, or None."""
        return max(self.steps(), default=None)

    def read_meta(self, step: int) -> dict:
        """What the caller of save() said of that step; no array is read.

        Raises UsageError when the step is not there or its meta or sums are damaged.
        """
        self._require(step)
        sums = self._read_sums(step)
        with self._damage_in_one_line(step, "meta"):
            meta = self._manager.restore(
                step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
            )["meta"]
        if _json_checksum(meta) != sums["meta"]:
            found = damage.Damage("meta/metadata", "its checksum does not match")
            raise UsageError(self._damaged(step, found))
        return meta

    def restore(self, step: int, abstract_state):
        """Arrays of a saved step in the tree, dtypes and shardings of `abstract_state`, verified.

        `abstract_state` holds arrays or ShapeDtypeStructs; a leaf without a sharding goes to the
        first device.  The devices may differ from those of the run that saved.

        Raises UsageError when the step is not there, was written by another model or optimizer
        (the first leaf that differs is named), or is damaged (checksum, missing or cut files).
        """
        self._require(step)
        leaves = self._read_sums(step)["leaves"]
        self._refuse_other_tree(step, leaves, abstract_state)
        target = jax.tree.map(_with_sharding, abstract_state)
        with self._damage_in_one_line(step, "state"):
            damage.find_state_damage(self.folder / str(step) / "state")
        state = self._restore_state(step, target)
        self._refuse_wrong_sums(step, leaves, tree_checksums(state))
        return state

    def restore_numpy(self, step: int, part: str | None = None):
        """State of a saved step as nested dicts (NamedTuples too) and lists of NumPy arrays.

        `part` names one top-level entry of the state, say "params", and only that is read.
        Needs neither the code that made the state nor its number of devices; for analysis tools.
        An empty part of an optimizer state is None.  Raises UsageError as restore() does.
        """
        self._require(step)
        leaves = self._read_sums(step)["leaves"]
        if part is not None:
            leaves = {path: leaf for path, leaf in leaves.items() if path.split("/")[0] == part}
            if not leaves:
                raise ValueError(f"part={part!r}: the state of step {step} has no such entry")
        with self._damage_in_one_line(step, "state"):
            damage.find_state_damage(self.folder / str(step) / "state")
            target = self._manager.item_metadata(step)["state"].tree
            if part is not None:
                target = {part: target[part]}
            target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), target)
        self._refuse_other_tree(step, leaves, target)
        state = self._restore_state(step, target)
        restored = {path: host_checksum(leaf) for path, leaf in leaves_by_path(state).items()}
        self._refuse_wrong_sums(step, leaves, restored)
        return state if part is None else state[part]

    def _restore_state(self, step: int, target):
        args = ocp.args.PyTreeRestore(
            target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,  # for restore_numpy; restore() has compared the whole tree
        )
        with self._damage_in_one_line(step, "state"):
            return self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]

    def _read_sums(self, step: int) -> dict:
        with self._damage_in_one_line(step, "sums"):
            sums = self._manager.restore(
                step, args=ocp.args.Composite(sums=ocp.args.JsonRestore())
            )["sums"]
            leaves = {
                path: (str(dtype), tuple(shape), int(value))
                for path, (dtype, shape, value) in sums["leaves"].items()
            }
            return {"leaves": leaves, "meta": int(sums["meta"])}

    # Refusals

    def _require(self, step: int) -> None:
        steps = self.steps()
        if step not in steps:
            there = ", ".join(map(str, steps[-8:])) or "none"
            raise UsageError(f"no checkpoint of step {step} in {self.folder}; there are: {there}")

    def _refuse_other_tree(self, step: int, saved: dict, wanted_tree) -> None:
        wanted = {
            path: (str(leaf.dtype), tuple(leaf.shape))
            for path, leaf in leaves_by_path(wanted_tree).items()
        }
        saved = {path: (dtype, shape) for path, (dtype, shape, _) in saved.items()}
        differing = [path for path in sorted(wanted | saved) if wanted.get(path) != saved.get(path)]
        if differing:
            first = differing[0]
            raise UsageError(
                f"checkpoint of step {step} in {self.folder} holds another model or optimizer: "
                f"{first} is {_kind(saved, first)} there and {_kind(wanted, first)} here "
                f"({len(differing)} leaves differ); resume with the configuration that saved it"
            )

    def _refuse_wrong_sums(self, step: int, saved: dict, restored: dict[str, int]) -> None:
        wrong = [path for path in sorted(restored) if restored[path] != saved[path][2]]
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            found = damage.Damage("state", f"the checksum of {wrong[0]}{more} does not match")
            raise UsageError(self._damaged(step, found))

    @contextlib.contextmanager
    def _damage_in_one_line(self, step: int, item: str):
        # Broad on purpose: damaged metadata makes orbax raise anything, bare Exception included.
        # Trouble of the machine is no damage and passes through.
        try:
            yield
        except (UsageError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except damage.Damage as found:
            raise UsageError(self._damaged(step, found)) from found
        except Exception as error:
            found = damage.describe(error, self.folder / str(step), item)
            raise UsageError(self._damaged(step, found)) from error

    def _damaged(self, step: int, found: damage.Damage) -> str:
        folder = self.folder / str(step)
        earlier = [other for other in self.steps() if other < step]
        mend = (
            f"delete {folder} to fall back to step {earlier[-1]}"
            if earlier
            else "no earlier step is saved, start again with another out="
        )
        return (
            f"checkpoint of step {step} is damaged: {folder / found.where}: {found.reason}; {mend}"
        )


class _Newest:
    """Orbax preservation policy: the `keep` highest steps, whatever the order of saving, and 0."""

    def __init__(self, keep: int | None):
        self._keep = keep

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        newest = steps if self._keep is None else sorted(steps)[-self._keep :]
        return [step == 0 or step in newest for step in steps]


def _json_checksum(value) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _with_sharding(leaf) -> jax.ShapeDtypeStruct:
    # Without one orbax would ask for the devices of the machine that saved.
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _kind(leaves: dict, path: str) -> str:
    if path not in leaves:
        return "absent"
    dtype, shape = leaves[path]
    return f"{dtype}{list(shape)}"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
