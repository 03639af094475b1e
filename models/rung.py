"""What a step of a ladder is."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Rung(NamedTuple):
    """One step of a ladder; `diff` maps dotted configuration keys to new values.

    over: the rung that the diff is laid over; None: the one before it in the ladder.
    """

    name: str
    change: str
    diff: Mapping[str, Any]
    over: str | None = None
