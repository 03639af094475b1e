"""metrics.jsonl: one strict-JSON object a line, written row by row and read back after any kill.

A row has at least `kind` and `step`; its values are numbers, strings, booleans or null.  JSON has
no NaN and no infinity: they are written as the strings "nan", "inf" and "-inf", which are reserved
for that, and the reader gives floats back.

What a step number means, and therefore what a resumed run keeps.  At step s the loop does, in this
order: evaluate and write the row val s; save checkpoint s; do update s and write the row train s,
which is about the way from s to s + 1.  A run that goes on from checkpoint s does update s again,
so the rows "train" with step >= s must go, as must the rows "val" with step > s.  The row val s
stays: it was written before checkpoint s was saved, and it is about the very state in there.  So a
resumed run must not evaluate at s again if that row is there (truncate_from returns what is kept).
"""

import json
import numbers
import os
from pathlib import Path

from models.atomic_files import write_bytes_atomic
from models.command_line import UsageError

_NOT_FINITE = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


class MetricsFile:
    """The metrics of one run, open for appending; a partial last line is cut off on opening.

    Rows reach the operating system at once, so a kill of the process loses none; a power cut may
    lose the last ones.  Raises UsageError when the file cannot be opened, or a line before the
    last is damaged.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._handle = -1
        self._open()

    def append(self, row: dict) -> None:
        """Write one row.

        Raises UsageError when it cannot be written; the file then ends with the row before.
        Raises ValueError or TypeError for a row without kind and step, or a value of another type.
        """
        line = encode_row(row)
        written = 0
        try:
            while written < len(line):
                written += os.write(self._handle, line[written:])
        except OSError as error:
            os.ftruncate(self._handle, self._end)  # half a line would spoil the next one
            raise UsageError(
                f"cannot write {self.path}: {error.strerror}; free some space and resume"
            ) from error
        self._end += len(line)

    def truncate_from(self, step: int) -> list[dict]:
        """Drop the rows that a run resumed at `step` writes again; returns the rows that are kept.

        Rows of kind "val" are kept up to and including `step`, all others below it.
        """
        kept = [row for row in read_metrics(self.path) if _precedes(row, step)]
        self.close()
        write_bytes_atomic(self.path, b"".join(encode_row(row) for row in kept))
        self._open()
        return kept

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _open(self) -> None:
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UsageError(f"cannot open {self.path}: {error.strerror}") from error
        data = self.path.read_bytes()
        _, whole = _parse(self.path, data)
        os.ftruncate(handle, whole)
        if whole and data[whole - 1 : whole] != b"\n":
            whole += os.write(handle, b"\n")
        self._handle, self._end = handle, whole


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """Rows of a metrics file, in order; a partial last line, left by a kill, is not a row.

    Raises UsageError when there is no such file, or any other line is not a row.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    rows, _ = _parse(path, data)
    return rows


def _parse(path: Path, data: bytes) -> tuple[list[dict], int]:
    """Rows, and the number of bytes up to the end of the last whole row."""
    *lines, last = data.split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _decode_row(line)
        if row is None:
            raise UsageError(f"{path}: line {number} is damaged; delete or mend that line")
        rows.append(row)
    # A row ends with its brace, so a line cut short is never a whole row, newline or not.
    row = _decode_row(last)
    if row is None:
        return rows, len(data) - len(last)
    return [*rows, row], len(data)


def _precedes(row: dict, step: int) -> bool:
    return row["step"] <= step if row["kind"] == "val" else row["step"] < step


def encode_row(row: dict) -> bytes:
    """One row as a line of the file; raises ValueError for a row without kind and step."""
    if not isinstance(row.get("kind"), str) or not isinstance(row.get("step"), int):
        raise ValueError(f"a metrics row needs a kind (text) and a step (integer): {row}")
    plain = {key: _encode(key, value) for key, value in row.items()}
    return (json.dumps(plain, allow_nan=False, ensure_ascii=False) + "\n").encode()


def _encode(key: str, value):
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        if value in _NOT_FINITE:
            raise ValueError(f"{key}={value!r}: this text is reserved for a number")
        return value
    if isinstance(value, numbers.Integral):  # NumPy's integers and floats too
        return int(value)
    if isinstance(value, numbers.Real):
        value = float(value)
        return value if abs(value) < float("inf") else str(value)
    raise TypeError(f"{key} is {type(value).__name__}: a metrics row holds numbers, text and null")


def _decode_row(line: bytes) -> dict | None:
    try:
        row = json.loads(line, parse_constant=_refuse_constant)
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    row = {key: _decode(value) for key, value in row.items()}
    whole = isinstance(row.get("kind"), str) and isinstance(row.get("step"), int)
    return row if whole else None


def _decode(value):
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not JSON")
