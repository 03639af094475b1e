"""The folder of one member: its configuration, its curve, where it stands and how it ended.

    config.json  metrics.jsonl  state.npz  result.json  spectra/  features/

The curve is written before the state, each whole or not at all. Rows beyond the state, of a
dispatch whose state was not written any more, are left behind when the member goes on.
"""

import io
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from models.atomic_files import remove_unfinished, write_bytes_atomic, write_json
from models.command_line import UsageError
from toy_modular.run_config import RunConfig, from_nested, nested


class MemberFolder:
    """One member on disk; opening it makes it, or checks that it is of the same configuration.

    Raises UsageError for a folder of another configuration, and for damaged files in it.
    """

    def __init__(self, path: str | Path, config: RunConfig):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.path)  # of a writer that was killed
        stored = self.path / "config.json"
        if not stored.exists():
            write_json(stored, nested(config))
        elif from_nested(self._json("config.json")) != config:
            raise UsageError(f"{self.path} belongs to another configuration; choose another out=")

    @property
    def result(self) -> dict | None:
        """How the member ended, None for one that has not."""
        return self._json("result.json") if (self.path / "result.json").exists() else None

    def write_result(self, result: dict) -> None:
        write_json(self.path / "result.json", result)

    def rows(self) -> list[dict]:
        """Rows of the curve, steps ascending."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        try:
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            return sorted(rows, key=lambda row: row["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is damaged ({error}); remove its folder") from error

    def write_rows(self, rows: list[dict]) -> None:
        lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        write_bytes_atomic(self.path / "metrics.jsonl", lines.encode())

    def save(self, member: Any) -> None:
        """Writes the leaves of a tree of arrays."""
        buffer = io.BytesIO()
        leaves = jax.tree.leaves(jax.device_get(member))
        np.savez(buffer, **{f"leaf_{i:04d}": leaf for i, leaf in enumerate(leaves)})
        write_bytes_atomic(self.path / "state.npz", buffer.getvalue())

    def restore(self, like: Any) -> Any | None:
        """The tree that was saved, of the structure and shapes of `like`; None if none was."""
        path = self.path / "state.npz"
        if not path.exists():
            return None
        leaves, structure = jax.tree.flatten(like)
        try:
            with np.load(path, allow_pickle=False) as file:
                found = [file[f"leaf_{i:04d}"] for i in range(len(file.files))]
            shapes = [leaf.shape for leaf in leaves]
            if [leaf.shape for leaf in found] != shapes:
                raise ValueError("arrays of other shapes")
        except Exception as error:  # zipfile, zlib and NumPy raise many kinds on damaged bytes
            raise UsageError(f"{path} is damaged ({error}); remove its folder") from error
        return jax.tree.unflatten(structure, found)

    def _json(self, name: str) -> dict:
        try:
            return json.loads((self.path / name).read_bytes())
        except ValueError as error:
            raise UsageError(f"{self.path / name} is damaged ({error}); remove it") from error
