"""Command lines of the pages and of the commands' own help: every one is taken as it is written.

Words are read, cast and resolved as their command does it; nothing is trained, measured or drawn.
"""

import ast
import re
import shlex
from pathlib import Path

import pytest

from experiments import bench, data_command, forecast, measure, memory, pack, window_counts
from experiments.figures import __main__ as figures
from experiments.resolve import from_flat, own_words, parse_command, resolve_somewhere
from experiments.study.grid import resolve_study
from models import ladder
from models.command_line import Layer, build, cast_words, flatten, parse_words
from toy_modular import figures as toy_figures
from toy_modular import pack as toy_pack
from toy_modular import study_config, theory

ROOT = Path(__file__).parents[1]
COMMAND = re.compile(
    r"(?<!\w)python3? (?:-m (?P<module>[\w.]+)|(?P<script>\w+/\w+\.py))(?P<rest>.*)"
)
# prose or a comment behind a command begins after two spaces; a pipe or && ends it
TAIL = re.compile(r"\s{2,}.*|\s+[#|&].*|[`;)].*")


def pages() -> list[Path]:
    """Files whose command lines a reader may copy."""
    folders = ("lens_jax", "models", "optim", "experiments", "toy_modular", "benchmarks")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return [*ROOT.glob("README.md"), *(ROOT / "docs").rglob("*.md"), *sources]


def texts(path: Path) -> list[str]:
    """The text of a page, or the module docstring and the usage of a source file."""
    source = path.read_text()
    if path.suffix == ".md":
        return [source]
    tree = ast.parse(source)
    usage = [
        node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        if isinstance(node.value.value, str)
    ]
    return [ast.get_docstring(tree) or "", *usage]


def written() -> list[tuple[str, str, tuple[str, ...]]]:
    """Page, module and words of every command line."""
    found = {}
    for path in pages():
        for text in texts(path):
            for line in text.replace("\\\n", " ").splitlines():
                if (match := COMMAND.search(line)) is None or line.startswith("usage:"):
                    continue
                rest = TAIL.sub("", match["rest"].replace("[", "").replace("]", ""))
                words = tuple(word for word in shlex.split(rest) if word not in ("...", ","))
                name = match["module"] or match["script"]
                if not any(word in ("-h", "--help") for word in words):
                    found[str(path.relative_to(ROOT)), name, words] = None
    return list(found)


def typed(command: type, words: list[str], known=None):
    """As `models.command_line.read_command` takes them."""
    return build(command, [Layer("typed", cast_words(command, parse_words(words), known))])


def take_train(words: list[str]) -> None:
    resolve_somewhere(parse_command(words))


def take_measure(words: list[str]) -> None:
    own, rest = own_words(measure.MeasureConfig, words)
    plan, _ = build(measure.MeasureConfig, [Layer("typed", own)])
    if plan.run is None:
        measure.file_config(plan, rest)
    else:
        measure.given_anew(from_flat(flatten(resolve_somewhere({})[0])), rest)


def take_figures(words: list[str]) -> None:
    values = cast_words(figures.Task, parse_words(words), figures.KEYS)
    for cls in (figures.Task, figures.Options):
        figures._built(cls, values)


def take_data(words: list[str]) -> None:
    assert not words or words[0] in data_command.COMMANDS
    _, keys = data_command.split_words(
        words[1:], ("shards", "folder", "tokenizer", "bpe", "out", "vocab")
    )
    assert keys.keys() <= set(data_command.USAGE.replace("[", " ").replace("=", " ").split())


def take_ladder(words: list[str]) -> None:
    values = cast_words(ladder.LadderWords, parse_words(words))
    if "rung" in values:
        ladder.rung_values(values["rung"], values.get("ladder", "published"))


def take_show(words: list[str]) -> None:
    run, *options = words
    assert "=" not in run
    assert {option.partition("=")[0] for option in options} <= {"name", "out"}


TAKES = {
    "experiments.train": take_train,
    "experiments.bench": bench.parse_bench,
    "experiments.memory": memory.parse_memory,
    "experiments.measure": take_measure,
    "experiments.study": resolve_study,
    "experiments.figures": take_figures,
    "experiments.forecast": lambda words: typed(forecast.ForecastConfig, words),
    "experiments.pack": lambda words: typed(pack.PackConfig, words),
    "experiments.window_counts": lambda words: typed(window_counts.WindowConfig, words),
    "experiments.data": take_data,
    "models.ladder": take_ladder,
    "toy_modular.study": lambda words: study_config.resolve(parse_words(words)),
    "toy_modular.figures": lambda words: typed(toy_figures.FigureConfig, words),
    "toy_modular.theory": lambda words: typed(theory.TheoryConfig, words),
    "toy_modular.pack": lambda words: typed(toy_pack.PackConfig, words),
    "lens_jax.show": take_show,
}
TAKES_NO_KEYS = (
    *("pytest", "venv", "experiments.verify"),
    *("experiments.study.slurm_task", "toy_modular.worker"),
)


@pytest.mark.parametrize(
    ("page", "command", "words"),
    written(),
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_written_command_is_taken(page, command, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    if command.endswith(".py"):
        assert (ROOT / command).is_file()
    elif command not in TAKES_NO_KEYS:
        TAKES[command](list(words))


def test_every_command_with_keys_is_written_somewhere():
    assert {command for _, command, _ in written()} >= set(TAKES)
