"""Which tokens a run was begun on, kept in its folder so that a changed data set is noticed.

A run that goes on over other tokens than it began with repeats no numbers, and what was held out
before may be trained on now. Kept are name and length of every shard, and hashes of the held-out
tokens; the training tokens themselves would take minutes to read.
"""

import json
from pathlib import Path
from typing import Any

from experiments.data import HeldOut, TokenFiles, token_hash
from experiments.shards import open_shard
from models.atomic_files import write_json
from models.command_line import UsageError

FILE = "data.json"
_HASHES = {"val_hash": "held-out validation", "probe_hash": "held-out probe"}


def data_identity(files: TokenFiles, held: HeldOut) -> dict[str, Any]:
    """Shards of both splits as [name, tokens], and hashes of what is held out; plain JSON."""

    def shards(paths):
        return [[path.name, len(open_shard(path))] for path in paths]

    return {
        "train": shards(files.train),
        "val": shards(files.val),
        "val_hash": token_hash(held.val),
        "probe_hash": token_hash(held.probe),
    }


def keep_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Store what a run begins on; raises UsageError where the disk is full."""
    write_json(folder / FILE, identity)


def data_change(folder: Path, identity: dict[str, Any]) -> str | None:
    """A line on how the data differ from those that the run of a folder began on; None: they agree.

    A folder that keeps no identity, of a run begun before there was one, agrees with everything.
    Raises UsageError for a damaged file.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        change = _first_change(json.loads(path.read_bytes()), identity)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"{path} is damaged ({type(error).__name__}); delete it to go on without its check"
        ) from None
    if change is None:
        return None
    return (
        f"{folder}: the data have changed since the run began: {change}; bring the old data back, "
        f"or start anew with another out="
    )


def _first_change(before: dict, now: dict) -> str | None:
    for split, kind in (("train", "training"), ("val", "validation")):
        old, new = before[split], now[split]
        for (name, tokens), (new_name, new_tokens) in zip(old, new, strict=False):
            if (name, tokens) != (new_name, new_tokens):
                return f"{name} had {tokens:,} tokens, now {new_name} has {new_tokens:,}"
        if len(old) != len(new):
            return f"there were {len(old)} {kind} shards, now {len(new)}"
    for key, what in _HASHES.items():
        if before[key] != now[key]:
            return f"the {what} tokens are others ({key} {before[key]}, now {now[key]})"
    return None
