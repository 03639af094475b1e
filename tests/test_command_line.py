"""Words to typed values: every text gives a value or one line, never another exception."""

import math
import re
import subprocess
import sys
from typing import Literal

import chz
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.config import RunConfig
from models.command_line import (
    Layer,
    UsageError,
    build,
    cast,
    cast_words,
    describe,
    flatten,
    help_page,
    leaves,
    parse_words,
    run_command,
)


@chz.chz
class Inner:
    """What is inside (some spec 3.1).

    No more of it is shown.
    """

    rate: float = chz.field(default=0.5, doc="how fast")
    pair: tuple[float, float] = (0.1, 0.2)


@chz.chz
class Outer:
    count: int = 3
    name: str = "x"
    flag: bool = False
    mode: Literal["a", "b", 2] = "a"
    limit: int | None = None
    goal: float | Literal["auto"] | None = "auto"
    layers: tuple[int, ...] | None = None
    names: tuple[str, ...] = ("p", "q")
    inner: Inner = chz.field(default_factory=Inner)

    @chz.validate
    def _ranges(self):
        if self.count < 0:
            raise ValueError(f"count={self.count}: give 0 or more")


KEYS = leaves(Outer)


def refusal(call, *arguments) -> str:
    with pytest.raises(UsageError) as caught:
        call(*arguments)
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("count", "12", 12),
        ("count", "-1", -1),
        ("count", "1e6", 1_000_000),
        ("count", "1_000", 1000),
        ("inner.rate", "3", 3.0),
        ("inner.rate", "1e-4", 1e-4),
        ("inner.rate", "inf", math.inf),
        ("name", "a=b c", "a=b c"),
        ("name", "none", "none"),
        ("flag", "True", True),
        ("flag", "false", False),
        ("mode", "b", "b"),
        ("mode", "2", 2),
        ("limit", "none", None),
        ("limit", "None", None),
        ("limit", "7", 7),
        ("goal", "auto", "auto"),
        ("goal", "3.2", 3.2),
        ("goal", "none", None),
        ("layers", "0,3, 6", (0, 3, 6)),
        ("layers", "(0,3)", (0, 3)),
        ("layers", "none", None),
        ("layers", "", ()),
        ("names", "activation", ("activation",)),
        ("names", "", ()),
        ("inner.pair", "0.9,0.95", (0.9, 0.95)),
        ("inner.pair", "[0.9, 0.95]", (0.9, 0.95)),
    ],
)
def test_words_take_the_declared_type(key, text, value):
    got = cast(key, text, KEYS[key].type)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "mend"),
    [
        ("count", "1.5", "a whole number"),
        ("count", "", "a whole number"),
        ("count", "inf", "a whole number"),
        ("count", "nan", "a whole number"),
        ("count", "none", "a whole number"),
        ("inner.rate", "fast", "a number"),
        ("inner.rate", "none", "a number"),
        ("name", "", "a word"),
        ("name", "a\nb", "a word"),
        ("flag", "1", "true or false"),
        ("flag", "yes", "true or false"),
        ("mode", "c", "one of a, b, 2"),
        ("limit", "some", "a whole number or none"),
        ("goal", "best", "a number or one of auto or none"),
        ("layers", "0,x", "a whole number several times, separated by commas or none"),
        ("inner.pair", "0.9", "2 values separated by commas"),
        ("inner.pair", "1,2,3", "2 values separated by commas"),
        ("inner.pair", "1,x", "2 values separated by commas"),
    ],
)
def test_wrong_words_tell_key_value_and_mend(key, text, mend):
    shown = text.replace("\n", "\\n")
    assert refusal(cast, key, text, KEYS[key].type) == f"{key}={shown}: give {mend}"


def one_line(call, *arguments) -> str | None:
    """The message of a UsageError, which must be one line, or None; anything else goes through."""
    try:
        call(*arguments)
    except UsageError as error:
        message = str(error)
    else:
        return None
    assert message.isprintable()
    return message


@given(st.sampled_from(sorted(KEYS)), st.text())
def test_any_text_gives_a_value_or_one_line(key, text):
    refused = one_line(cast, key, text, KEYS[key].type)
    if refused is not None:
        assert refused.startswith(f"{key}=")
    else:
        value = cast(key, text, KEYS[key].type)
        refused = one_line(build, Outer, [Layer("typed", {key: value})])
        assert (refused is not None) == (key == "count" and value < 0)


run_keys = sorted(leaves(RunConfig))
words = st.one_of(
    st.text(),
    st.builds("{}={}".format, st.sampled_from(run_keys), st.text()),
    st.builds("{}={}".format, st.text(), st.integers()),
    st.builds("{}={}".format, st.sampled_from(run_keys), st.floats()),
)


@given(st.lists(words, max_size=4))
def test_any_command_line_gives_values_or_one_line(argv):
    one_line(lambda: cast_words(RunConfig, parse_words(argv, {"data": "data.source"})))


@given(st.integers(), st.floats(allow_nan=False), st.booleans(), st.lists(st.integers()))
def test_what_is_printed_is_read_back(count, rate, flag, layers):
    assert cast("count", str(count), int) == count
    assert cast("inner.rate", repr(rate), float) == rate
    assert cast("flag", str(flag), bool) is flag
    text = ",".join(map(str, layers))
    assert cast("layers", text, KEYS["layers"].type) == tuple(layers)
    assert cast("layers", str(tuple(layers)), KEYS["layers"].type) == tuple(layers)


def test_words_are_split_at_the_first_equals_sign():
    assert parse_words(["name=a=b", "count=1"]) == {"name": "a=b", "count": "1"}
    assert parse_words(["n=1"], {"n": "count"}) == {"count": "1"}


@pytest.mark.parametrize("word", ["count", "=3", "", "--count", "-v"])
def test_a_word_without_key_or_value_is_refused(word):
    assert refusal(parse_words, [word]).startswith(f"{word!r} is not key=value; ")


def test_a_key_given_twice_is_refused_also_by_another_name():
    said = refusal(parse_words, ["n=1", "count=2"], {"n": "count"})
    assert said == "count is given twice ('1' and '2'); keep one"


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("cuont=3", "did you mean count?"),
        ("rate=3", "did you mean inner.rate?"),
        ("inner.rote=3", "did you mean inner.rate?"),
        ("zzzzzzz=3", "--help lists every key"),
        ("...rate=3", "did you mean inner.rate?"),
        ("inner=test_command_line:Inner", "did you mean inner.rate?"),
    ],
)
def test_unknown_keys_name_the_nearest(word, hint):
    key, _, text = word.partition("=")
    assert refusal(cast_words, Outer, {key: text}) == f"unknown key {word}; {hint}"


def test_no_class_is_made_by_name():
    """A class path is a word like any other, or no value at all."""
    assert cast("name", "os:system", str) == "os:system"
    built, _ = build(Outer, [Layer("typed", {"name": "os:system"})])
    assert built.name == "os:system"
    assert "inner" not in KEYS


def test_later_layers_win_and_are_named():
    layers = [Layer("low", {"count": 1, "inner.rate": 0.1}), Layer("high", {"count": 2})]
    config, origin = build(Outer, layers)
    assert (config.count, config.inner.rate, config.name) == (2, 0.1, "x")
    assert origin == {"count": "high", "inner.rate": "low"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"count": -1}, "count=-1: give 0 or more"),
        ({"count": "3"}, "Expected 'count' to be int, got str"),
        ({"inner.rate": "x"}, "Expected 'inner.rate' to be float, got str"),
    ],
)
def test_values_of_a_wrong_type_or_range_are_refused(values, said):
    assert refusal(build, Outer, [Layer("typed", values)]) == said


def keys_of(page: str) -> list[str]:
    return re.findall(r"^  (\w[\w.]*)=", page, re.M)


def test_flat_form_and_help_have_every_key():
    assert flatten(Outer()).keys() == KEYS.keys()
    assert flatten(Outer())["inner.pair"] == [0.1, 0.2]
    page = help_page("usage: x", Outer, {"n": "count"}, {"count": 5, "names": ["a", "b"]})
    lines = page.splitlines()
    assert lines[0] == "usage: x"
    assert keys_of(page) == list(KEYS)
    assert "inner: What is inside." in lines
    assert "  count=5" in page
    assert "(also n=)" in page
    assert "names=a,b" in page
    assert "how fast" in page
    assert all(describe(leaf.type) for leaf in KEYS.values())


def test_help_says_what_may_be_typed_in_the_words_that_are():
    page = help_page("usage: x", Outer, {}, {})
    for words in (
        r"mode=a +\{a, b, 2\}",
        r"goal=auto .* \{a number, auto, none\}",
        r"limit=none +a whole number or none\n",
        r"flag=false +true or false\n",
    ):
        assert re.search(words, page), words


def test_help_is_wrapped_and_may_begin_with_chosen_keys():
    values = {"names": ["a_long_name"] * 5}
    page = help_page(
        "usage: x", RunConfig, {}, values, leaves(Outer) | leaves(RunConfig), ["batch"]
    )
    assert max(map(len, page.splitlines())) <= 100
    assert keys_of(page)[0] == "batch"
    assert sorted(keys_of(page)) == sorted(leaves(Outer) | leaves(RunConfig))
    assert "\n" + " " * 40 + "a word several times" in page  # its value is long


def test_a_command_ends_with_its_code(capsys, monkeypatch):
    def fail(argv):
        raise UsageError(f"{argv[0]} is\nwrong")

    monkeypatch.setattr("sys.argv", ["prog", "word"])
    for main, code in ((fail, 2), (lambda argv: None, 0), (lambda argv: 1, 1)):
        with pytest.raises(SystemExit) as ended:
            run_command(main)
        assert ended.value.code == code
    assert capsys.readouterr().err == "error: word is\\nwrong\n"


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_reader_that_has_seen_enough_is_no_error(wrapped):
    program = (
        "from models.command_line import UsageError, run_command\n"
        "def main(argv):\n"
        "    try:\n"
        "        for _ in range(100_000):\n"
        "            print('line', flush=True)\n"
        "    except OSError as error:\n"
        f"        if {wrapped}:\n"
        "            raise UsageError(str(error)) from error\n"
        "        raise\n"
        "run_command(main)\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert writer.stdout.readline() == b"line\n"
    writer.stdout.close()
    assert writer.wait() == 141
    assert writer.stderr.read() == b""
    writer.stderr.close()
