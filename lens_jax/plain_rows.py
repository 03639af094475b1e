"""Rows of numbers as text: what is not finite is empty in CSV and null in JSON."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """The cells of a row, None for a float that is not finite, as strict JSON wants it."""
    return {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in row.items()}


def csv_text(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The rows under a header; empty where a row has no such cell, or none that is finite."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(plain(row) for row in rows)
    return text.getvalue()
