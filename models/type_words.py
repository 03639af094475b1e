"""Types and values of configuration fields in words: what may be typed, and what was."""

import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

UNIONS = (Union, types.UnionType)


def describe(declared: Any) -> str:
    """A type in the words of an error message or a help page."""
    origin = get_origin(declared)
    if origin in UNIONS:
        return " or ".join(describe(option) for option in get_args(declared))
    if origin is Literal:
        return "one of " + ", ".join(str(option) for option in get_args(declared))
    if origin is tuple:
        items = get_args(declared)
        if items[-1] is Ellipsis:
            return f"{describe(items[0])} several times, separated by commas"
        return f"{len(items)} values separated by commas"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    return "none" if declared is type(None) else words[declared]


def choices(declared: Any) -> str:
    """The words that a type names, in braces, with what else it takes; "" where it names none."""
    if not any(_literals(declared)):
        return ""
    return "{" + ", ".join(_options(declared)) + "}"


def _literals(declared: Any) -> Iterator[Any]:
    if get_origin(declared) is Literal:
        yield True
    for part in get_args(declared) if get_origin(declared) in (*UNIONS, tuple) else ():
        yield from _literals(part)


def _options(declared: Any) -> list[str]:
    origin = get_origin(declared)
    if origin is Literal:
        return [str(option) for option in get_args(declared)]
    if origin in (*UNIONS, tuple):
        parts = [part for part in get_args(declared) if part is not Ellipsis]
        return [option for part in parts for option in _options(part)]
    return [describe(declared)]


def as_typed(value: Any) -> str:
    """A value as it is typed on a command line: none, true, 0.9,0.95."""
    if isinstance(value, list | tuple):
        return ",".join(map(as_typed, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
