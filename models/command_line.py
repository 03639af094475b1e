"""`key=value` command lines over typed chz classes, with every mistake answered in one line.

A configuration is a tree of chz classes; its leaves have dotted keys (`optim.embed_lr`). Words are
cast to the declared type of their leaf and nothing else: no wildcards and no construction of
classes by name, so a command line cannot reach code. Nothing here imports jax.
"""

import difflib
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import chz

from models.type_words import UNIONS, as_typed, choices, describe

HELP_WIDTH, HELP_COLUMN = 100, 40
REST = "other keys"
_SOURCE = re.compile(r" \([^()]*spec [^()]*\)")  # of a docstring's first line, no help to a user


class UsageError(ValueError):
    """Bad input from the user; the message is one line with the key, the value and the mend.

    What cannot be printed, a line break in a value for instance, is shown escaped.
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


class Leaf(NamedTuple):
    """One settable value of a configuration; section: what the class it is of is about."""

    type: Any
    default: Any
    doc: str
    section: str = ""


class Layer(NamedTuple):
    """A named set of dotted keys and typed values; later layers win over earlier ones."""

    name: str
    values: Mapping[str, Any]


def leaves(cls: type, prefix: str = "") -> dict[str, Leaf]:
    """All dotted keys of a chz class, nested classes flattened, in order of declaration."""
    found = {}
    for name, field in chz.chz_fields(cls).items():
        if chz.is_chz(field.final_type):
            found |= leaves(field.final_type, f"{prefix}{name}.")
        else:
            default = getattr(cls(), name)
            # chz keeps the doc of a field under a private name and prints it from there itself
            about = _SOURCE.sub("", (cls.__doc__ or "").partition("\n")[0])
            found[prefix + name] = Leaf(field.final_type, default, field._doc, about)
    return found


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key to value of every leaf of a chz object (tuples become lists, as in JSON)."""
    flat = {}
    for name in chz.chz_fields(config):
        value = getattr(config, name)
        if chz.is_chz(value):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def parse_words(words: Iterable[str], aliases: Mapping[str, str] | None = None) -> dict[str, str]:
    """`key=value` words as a dict of strings, aliases replaced by the keys they stand for."""
    aliases = aliases or {}
    parsed: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UsageError(f"{word!r} is not key=value; write for example seed=1, or --help")
        key = aliases.get(key, key)
        if key in parsed:
            raise UsageError(f"{key} is given twice ({parsed[key]!r} and {value!r}); keep one")
        parsed[key] = value
    return parsed


def cast_words(
    cls: type, words: Mapping[str, str], known: Mapping[str, Leaf] | None = None
) -> dict[str, Any]:
    """Strings cast to the declared types of their keys; an unknown key names the nearest one."""
    known = known or leaves(cls)
    return {key: cast(key, text, _known(key, text, known).type) for key, text in words.items()}


def _known(key: str, text: str, known: Mapping[str, Leaf]) -> Leaf:
    if key in known:
        return known[key]
    tails = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:
        tail = difflib.get_close_matches(key.rpartition(".")[2], tails, n=1, cutoff=0.6)
        near = [tails[name] for name in tail]
    hint = f"did you mean {near[0]}?" if near else "--help lists every key"
    raise UsageError(f"unknown key {key}={text}; {hint}")


def cast(key: str, text: str, declared: Any) -> Any:
    """One string as a value of `declared`: int, float, bool, str, Literal, a union or a tuple.

    Whole numbers may be written 1e6 or 1_000_000. Raises UsageError with key, value and the mend.
    """
    try:
        return _cast(text, declared)
    except ValueError:
        raise UsageError(f"{key}={text}: give {describe(declared)}") from None


def _cast(text: str, declared: Any) -> Any:
    origin = get_origin(declared)
    if origin in UNIONS:
        return _cast_union(text, get_args(declared))
    if origin is Literal:
        for option in get_args(declared):
            if str(option) == text:
                return option
        raise ValueError(text)
    if origin is tuple:
        return _cast_tuple(text, get_args(declared))
    if declared is bool:
        return ("false", "true").index(text.lower()) == 1
    if declared is int:
        return _cast_int(text)
    if declared is float:
        return float(text)
    if declared is str:
        if not text or not text.isprintable():  # a line break, or bytes that are no text
            raise ValueError(text)
        return text
    raise TypeError(f"no cast for {declared}")


def _cast_union(text: str, options: tuple) -> Any:
    if type(None) in options and text.lower() == "none":
        return None
    for option in options:
        if option is not type(None):
            try:
                return _cast(text, option)
            except ValueError:
                continue
    raise ValueError(text)


def _cast_tuple(text: str, items: tuple) -> tuple:
    parts = [part for part in text.strip("()[]").split(",") if part.strip()]
    if len(items) == 2 and items[1] is Ellipsis:
        return tuple(_cast(part.strip(), items[0]) for part in parts)
    if len(parts) != len(items):
        raise ValueError(text)
    return tuple(_cast(part.strip(), item) for part, item in zip(parts, items, strict=True))


def _cast_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():  # also refuses inf and nan
            raise ValueError(text) from None
        return int(number)


def check_path(key: str, text: str) -> None:
    """Raises ValueError for a path that no file system takes, or in the home of nobody."""
    if len(text.encode()) > 4000 or any(len(part.encode()) > 255 for part in Path(text).parts):
        raise ValueError(f"{key}={text[:40]}...: the name is too long; give at most 255 bytes")
    try:
        Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"{key}={text}: there is no such home; write the path out") from None


def check_report(path: str) -> None:
    """Raises ValueError for an out= at which no report can be written."""
    check_path("out", path)
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"out={path}: its folder does not exist; make it, or choose one")


def build(cls: type, layers: Iterable[Layer]) -> tuple[Any, dict[str, str]]:
    """The configuration that the layers give, and for every key set the name of its last layer.

    Raises UsageError when a value has the wrong type or a class's own validation fails.
    """
    blueprint = chz.Blueprint(cls)
    origin: dict[str, str] = {}
    for layer in layers:
        blueprint.apply(dict(layer.values), layer_name=layer.name)
        origin |= dict.fromkeys(layer.values, layer.name)
    try:
        return blueprint.make(), origin
    except (ValueError, TypeError) as error:
        raise UsageError(str(error).splitlines()[0]) from None


def help_page(
    usage: str,
    cls: type,
    aliases: Mapping[str, str],
    values: Mapping[str, Any],
    known: Mapping[str, Leaf] | None = None,
    first: Iterable[str] = (),
) -> str:
    """The text of `--help`: usage, then every key with its value here, its meaning, its choices.

    Keys stand in sections, those of a nested class together; `first` come before all others.
    known: the keys, where they are not those of `cls`.
    """
    known = known or leaves(cls)
    short = {full: f"also {alias}=" for alias, full in aliases.items()}
    sections = {"": [key for key in first if key in known]}
    for key in known:
        if key not in sections[""]:
            sections.setdefault(key.rpartition(".")[0] or REST, []).append(key)
    if not sections[""]:
        sections[""] = sections.pop(REST, [])
    lines = [usage.rstrip(), "", "keys (with the value they have in this command):"]
    for section, keys in sections.items():
        if section:
            about = known[keys[0]].section
            lines += ["", section if section == REST else f"{section}: {about}"]
        for key in keys:
            lines += _help_of(key, known[key], values.get(key, known[key].default), short)
    return "\n".join(lines)


def _help_of(key: str, leaf: Leaf, value: Any, short: Mapping[str, str]) -> list[str]:
    """One key of a help page: what stands to its right is wrapped, or begins on the next line."""
    named = choices(leaf.type)
    meaning = [leaf.doc or ("" if named else describe(leaf.type)), named]
    if key in short:
        meaning.append(f"({short[key]})")
    head, margin = f"  {key}={as_typed(value)}", " " * HELP_COLUMN
    body = " ".join(part for part in meaning if part)
    lines = textwrap.wrap(
        body, HELP_WIDTH, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False
    )
    if len(head) < HELP_COLUMN:
        return [head.ljust(HELP_COLUMN) + lines[0][HELP_COLUMN:], *lines[1:]]
    return [head, *lines]


def read_command(
    cls: type, usage: str, argv: list[str], needed: Iterable[str] = (), mend: str = ""
) -> Any | None:
    """The configuration that a command's words give, or None once its help was printed.

    For commands all of whose keys are those of `cls`. needed: keys that must be given; mend: what
    to give where one is missing. Raises UsageError.
    """
    words = parse_words(word for word in argv if word not in ("-h", "--help"))
    config, _ = build(cls, [Layer("typed", cast_words(cls, words))])
    if {"-h", "--help"} & set(argv):
        print(help_page(usage, cls, {}, flatten(config)))
        return None
    for key in needed:
        if getattr(config, key) is None:
            raise UsageError(f"{key}= is missing; {mend}")
    return config


def run_command(main: Callable[[list[str]], int | None]) -> None:
    """Run a command's main; a UsageError becomes one line on stderr and exit code 2."""
    try:
        code = main(sys.argv[1:])
    except (UsageError, BrokenPipeError) as error:
        # A command may have taken the pipe for a file that cannot be written.
        if BrokenPipeError in (type(error), type(error.__cause__)):
            # the reader, `head` for instance, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(code or 0)
