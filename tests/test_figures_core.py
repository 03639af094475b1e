"""The command that draws figures: what is missing is named, and files are whole and the same."""

import csv
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from synthetic_language_study import make_study, name
from synthetic_study import make_study as make_toy

from experiments.figures.__main__ import KEYS, Task, main, run_task
from experiments.figures.catalogue import FIGURES, TOY
from experiments.figures.options import Options, target_of, tokens_of, tolerance_of
from experiments.figures.page import (
    _RUNG_LINES,
    batch_line,
    family_line,
    ranks_text,
    seeds_of,
    seeds_text,
    words,
)
from experiments.study_records import read_study
from lens_jax.claims import Claim, Missing
from models.command_line import UsageError
from models.ladder import ALL_RUNGS, RUNGS

ROOT = Path(__file__).parents[1]
KERNELS = ("h_11/attn/c_proj/kernel", "h_11/mlp/c_proj/kernel")
SMALL = {"sites": ("h_11/resid_post",), "kernels": KERNELS, "groups": 2, "trials": ()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("study") / "s"
    return make_study(
        made, rungs=("baseline", "muon"), batches=(4, 8, 16), seed_cells=(),
        unfinished=(name("muon", batch=4),), **SMALL,
    )  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    made = tmp_path_factory.mktemp("toy") / "t"
    return make_toy(
        made, stages=("muon",), batches=(32, 64, 128), seeds=(0,), width=24, groups=2,
        bands=("23_4", "24_4"),
    )  # fmt: skip


def run(folder, out, **keys):
    task = {key: keys.pop(key) for key in ("fig", "toy", "report") if key in keys}
    lines = []
    drawn = run_task(Task(study=str(folder), out=str(out), **task), Options(**keys), lines.append)
    return drawn, lines


# Files


def test_one_figure_and_its_claims(folder, tmp_path):
    drawn, lines = run(folder, tmp_path / "o", fig=7, tolerance=0.08)
    assert list(drawn.images) == ["7"]
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == [
        "claims_7.csv", "claims_7.json", "figure_7.pdf", "figure_7.png",
    ]  # fmt: skip
    rows = json.loads((tmp_path / "o" / "claims_7.json").read_text())
    assert [row["sentence"] for row in rows] == [claim.sentence for claim in drawn.claims]
    table = list(csv.DictReader((tmp_path / "o" / "claims_7.csv").open()))
    assert list(table[0]) == list(Claim._fields)
    assert f"unfinished: {name('muon', batch=4)}: has no result.json yet" in lines
    assert any(line.startswith("figure 7: ") and line.endswith("figure_7.png") for line in lines)


def test_the_same_records_give_the_same_bytes(folder, tmp_path):
    for out in ("a", "b"):
        run(folder, tmp_path / out, fig=7, tolerance=0.08)
    for kind in ("png", "pdf"):
        one, other = ((tmp_path / out / f"figure_7.{kind}").read_bytes() for out in "ab")
        assert one == other
    assert b"CreationDate" not in (tmp_path / "a" / "figure_7.pdf").read_bytes()


def test_a_figure_without_its_runs_says_which_and_others_are_drawn(folder, tmp_path, monkeypatch):
    from experiments.figures import __main__, catalogue

    few = {number: catalogue.FIGURES[number] for number in (7, 9, 16)}
    monkeypatch.setattr(__main__, "FIGURES", few)
    drawn, lines = run(folder, tmp_path / "o", tolerance=0.08)
    assert list(drawn.images) == ["7", "9", "16"]
    assert list(drawn.missing) == ["9", "16"]
    assert "preset=fig9" in drawn.missing["9"]  # its page says so too
    missing = [line for line in lines if "not drawn" in line]
    assert [line.partition(":")[0] for line in missing] == ["figure 9", "figure 16"]
    assert "two measured seeds" in missing[0]
    assert "preset=fig9" in missing[0]
    assert "d36 or d48" in missing[1]
    assert (tmp_path / "o" / "claims.csv").is_file()


def test_nothing_drawn_is_exit_code_1(folder, tmp_path, capsys):
    assert main([f"study={folder}", "fig=9", f"out={tmp_path / 'o'}"]) == 1
    assert "figure 9: not drawn" in capsys.readouterr().out
    assert main([f"study={folder}", "fig=7", f"out={tmp_path / 'o'}", "tolerance=0.08"]) == 0
    assert "\n7: Undecided" in capsys.readouterr().out


def test_a_report_holds_the_claims_and_the_figures(folder, tmp_path, monkeypatch):
    from experiments.figures import __main__, catalogue

    few = {number: catalogue.FIGURES[number] for number in (7, 9)}
    monkeypatch.setattr(__main__, "FIGURES", few)
    drawn, lines = run(folder, tmp_path / "o", report=str(tmp_path / "r.html"), tolerance=0.08)
    page = (tmp_path / "r.html").read_text()
    assert drawn.claims[0].claim[1:] in page
    assert "data:image/png;base64," in page
    assert f"report: {tmp_path / 'r.html'}" in lines


def test_out_is_a_folder_of_the_study_by_default(folder):
    run_task(Task(study=str(folder), fig=7), Options(tolerance=0.08), lambda line: None)
    assert (folder / "figures" / "figure_7.png").is_file()


# The toy's


def test_figures_of_the_toy_are_collected(folder, toy, tmp_path):
    drawn, lines = run(folder, tmp_path / "o", fig=4, toy=str(toy))
    assert list(drawn.images) == ["4a"]  # one stage only: 4b needs four
    assert {claim.figure for claim in drawn.claims} == {"4a"}
    assert all(isinstance(claim.statistic, float) for claim in drawn.claims)
    files = sorted(path.name for path in (tmp_path / "o").iterdir())
    assert files == ["claims_4.csv", "claims_4.json", "figure_4a.pdf", "figure_4a.png"]
    assert any(line.startswith("figure 4b: not drawn") for line in lines)


def test_a_study_without_a_toy_says_so(folder, toy, tmp_path):
    drawn, lines = run(folder, tmp_path / "o", fig=11)
    assert not drawn.images
    assert any("toy=FOLDER" in line and "toy_modular.study" in line for line in lines)
    with pytest.raises(ValueError, match="no such folder"):
        run(folder, tmp_path / "o", fig=4, toy=str(tmp_path / "absent"))


# Bad input


@pytest.mark.parametrize(
    ("words_", "said"),
    [
        (["fig=99"], "fig=99: give one of all, 1, 2"),
        (["fig=4a"], "fig=4a: give one of all, 1, 2"),
        (["figs=2"], "unknown key figs=2; did you mean fig?"),
        (["window=3"], "window=3: give 2 values separated by commas"),
        (["window=9,10"], "window=9,10: give FIRST,LAST, 3 ranks or more"),
        (["progress=2"], "progress=2.0: give a share above 0 and up to 1"),
        (["tolerance=-1"], "tolerance=-1.0: give a positive number"),
        (["fig=2", "report=r.html"], "report=r.html: a report has all figures; leave fig= out"),
    ],
)  # fmt: skip
def test_bad_words_are_one_line(folder, words_, said):
    with pytest.raises(UsageError) as caught:
        main([f"study={folder}", *words_])
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_bad_places_are_one_line(folder, tmp_path):
    for words_, said in (
        ([], "study= is missing"),
        ([f"study={tmp_path / 'absent'}"], "no such folder"),
        ([f"study={tmp_path}"], "no study"),
        ([f"study={folder}", f"out={tmp_path}/a/b"], "out=.*its folder does not exist"),
        ([f"study={folder}", f"report={tmp_path}/a/b.html"], "report=.*does not exist"),
    ):
        with pytest.raises(UsageError, match=said):
            main(words_)


def test_help_lists_every_key_and_figure(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {key}=" in shown for key in KEYS)
    assert all(f"{number:4}  {place.subject}\n" in shown for number, place in FIGURES.items())


def test_neither_help_nor_figures_import_jax(folder, tmp_path):
    code = (
        "import sys\n"
        "from experiments.figures.__main__ import main\n"
        "main(['--help'])\n"
        "assert not {'jax', 'matplotlib', 'flax', 'rich'} & set(sys.modules), 'help is slow'\n"
        f"main(['study={folder}', 'out={tmp_path / 'o'}', 'fig=7', 'tolerance=0.08'])\n"
        "import experiments.figures.report, importlib\n"
        "from experiments.figures.catalogue import FIGURES\n"
        "for place in FIGURES.values():\n"
        "    importlib.import_module(f'experiments.figures.{place.module}')\n"
        "assert not {'jax', 'flax', 'optax', 'toy_modular'} & set(sys.modules), 'jax'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# The catalogue and the page


def test_the_catalogue_has_the_eighteen_figures_and_all_exist():
    from importlib import import_module

    assert list(FIGURES)[:18] == list(range(1, 19))  # more may follow
    for number, place in FIGURES.items():
        module = import_module(f"experiments.figures.{place.module}")
        if number not in TOY:
            assert callable(getattr(module, place.function))
            assert len(module.INCHES[number]) == 2


def test_every_rung_has_its_own_line():
    lines = [tuple(family_line(rung).values()) for rung in (*ALL_RUNGS, "of another checkout")]
    assert len(set(lines)) == len(ALL_RUNGS) + 1
    laptop = ("baseline", "muon", "untied", "flexwin", "betterwin", "attnscale")
    assert len({family_line(rung)["color"] for rung in laptop}) == 6
    for one, other in pairwise(rung for rung in RUNGS if rung in _RUNG_LINES):
        assert family_line(one)["color"] != family_line(other)["color"]


def test_batches_run_from_dark_to_light():
    light = [sum(batch_line(place, 5)["color"][:3]) for place in range(5)]
    assert light == sorted(light)
    assert len(batch_line(0, 1)["color"]) == 4


def test_words_of_captions(folder):
    assert [words(n, "seed") for n in (1, 3)] == ["1 seed", "3 seeds"]
    assert (words(2, "family"), words(2, "batch")) == ("2 families", "2 batches")
    assert ranks_text((90, 200), (90, 200)) == "90-200"
    assert ranks_text((6, 12), (90, 200)) == "6-12 (90-200 at width 768)"
    runs = read_study(folder).chosen
    assert (seeds_of(runs), seeds_text(runs)) == ((1, 1), "1 seed a cell")
    assert seeds_of([]) == (0, 0)


def test_what_neither_words_nor_study_name_is_missing(folder):
    study = read_study(folder)
    assert target_of(study, Options()) == 4.5
    assert target_of(study, Options(target=3.2)) == 3.2
    assert tokens_of(study, Options()) == 2**16
    assert tolerance_of(study, Options()) == 0.005
    bare = type(study)(study.path, {}, study.selected, study.runs, study.unfinished)
    for ask in (target_of, tokens_of):
        with pytest.raises(Missing, match=r"give (target|tokens)="):
            ask(bare, Options())
