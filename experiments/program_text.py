"""What the text of a compiled program tells: its arrays, and what its devices send each other."""

import math
import re
from collections import Counter
from typing import NamedTuple

LARGEST = 10
SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[(\d[\d,]*)\]")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\(")
FUSED = re.compile(r" fusion\(.*\bcalls=%?([\w.-]+)")
# Results of these are arrays that another instruction has made.
NOTHING_NEW = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call"}
TALK = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Array(NamedTuple):
    """Type and shape of an array in the text of a program, f32[65536,768] for instance."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """The number in the name of a type is the bits of an element; pred takes a byte."""
        bits = re.search(r"\d+", self.dtype)
        return self.size * int(bits[0]) // 8 if bits else self.size

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class Talk(NamedTuple):
    """Operations of one kind in which devices talk, and the bytes that one device has of them."""

    count: int
    bytes: int


def arrays_named(text: str) -> set[Array]:
    """Every type with a shape anywhere in the text of a program."""
    return set(_arrays_in(text))


def arrays_made(text: str) -> Counter[Array]:
    """Arrays that an optimized program writes to memory, with how many instructions write one.

    Instructions inside a fusion write nothing; those that only pass arrays on are left out.
    """
    fused = set(FUSED.findall(text))
    made: Counter[Array] = Counter()
    inside = ""
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            inside = header[1]
        elif (found := INSTRUCTION.match(line)) and inside not in fused:
            result, operation = found.groups()
            if operation not in NOTHING_NEW:
                made.update(_arrays_in(result))
    return made


def largest(made: Counter[Array]) -> list[tuple[Array, int]]:
    """The largest arrays, and how many instructions make one; not all of them live at a time."""
    return sorted(made.items(), key=lambda item: -item[0].bytes)[:LARGEST]


def talk_between_devices(text: str) -> dict[str, Talk]:
    """What devices of a program send each other, by kind; a loop's body counts once."""
    found = {kind: Talk(0, 0) for kind in TALK}
    for line in text.splitlines():
        if match := INSTRUCTION.match(line):
            result, operation = match.groups()
            kind = operation.removesuffix("-done")  # of what starts and ends apart, the end
            if kind in found:
                size = sum(array.bytes for array in _arrays_in(result))
                found[kind] = Talk(found[kind].count + 1, found[kind].bytes + size)
    return {kind: talk for kind, talk in found.items() if talk.count}


def _arrays_in(result: str) -> list[Array]:
    return [Array(dtype, tuple(map(int, axes.split(",")))) for dtype, axes in SHAPE.findall(result)]
