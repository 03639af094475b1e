"""The report of a study: complete, escaped, and alone."""

import base64
import re
import struct
from dataclasses import replace

import numpy as np
import pytest
from html_page import Page
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from synthetic_language_study import make_study, name

from experiments.efficiency import crossing_tokens
from experiments.figures.report import page, write_report
from experiments.pruning import retrospective
from experiments.study.table import table_rows
from experiments.study_records import read_study
from lens_jax.claims import Claim

SMALL = {"sites": (), "kernels": (), "kinds": (), "batches": (4, 8, 16)}
TITLES = (
    "Findings", "Figures", "The grid", "Giving up members early", "How to run it again",
)  # fmt: skip
COMMAND = "python -m experiments.figures study=s report=r.html"
NAN = float("nan")
CLAIMS = (
    Claim("2", "early alpha predicts <efficiency>", 6, 3, "11-25", 0.8, 0.01, "rho(-log B) = 0.20",
          "held", "Held: mean rho 0.80 & more, p = 0.01; rho(-log B) = 0.20."),
    Claim("2", "beyond the batch", 6, 3, "11-25", 0.1, 0.04, "", "undecided", "Undecided: why."),
    Claim("4a", "toy order", 5, 3, "10-40", -0.5, 0.2, "null", "did not hold", "Did not hold: so."),
    Claim("12", "every run reaches it", 9, 1, "", 0.9, NAN, "", "did not hold", "Did not hold: 8."),
)  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return read_study(
        make_study(
            tmp_path_factory.mktemp("report") / "s", rungs=("muon", "flexwin"),
            censored=(name("muon", batch=16),), unfinished=(name("flexwin", batch=4),), **SMALL,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("images"), {}
    for number in ("2", "4a", "12"):
        figure = Figure(figsize=(2, 1), dpi=100)
        FigureCanvasAgg(figure)
        found[number] = folder / f"figure_{number}.png"
        figure.savefig(found[number])
    return found


@pytest.fixture(scope="module")
def html(study, images):
    return page(study, CLAIMS, images, COMMAND)


@pytest.fixture(scope="module")
def parsed(html):
    return Page(html)


def table_of(parsed, title):
    """Rows of the table under a heading, as lists of words, headings first."""
    places = [i for i, e in enumerate(parsed.found) if e["tag"] == "table"]
    heads = [i for i, e in enumerate(parsed.found) if e["tag"] == "h3" and title in e["text"]]
    start = min(i for i in places if i > heads[0])
    end = min([i for i in places if i > start], default=len(parsed.found))
    rows, cells = [], parsed.found[start:end]
    for element in cells:
        if element["tag"] == "tr":
            rows.append([])
        elif element["tag"] in ("td", "th") and rows:
            rows[-1].append(element["text"])
    return rows


def test_page_stands_alone_and_says_so(html, parsed):
    policy = next(m for m in parsed.all("meta") if "http-equiv" in m)
    assert policy["content"].startswith("default-src 'none'")
    for element in parsed.found:
        for attribute in ("src", "href"):
            address = element.get(attribute, "")
            assert address == "" or address.startswith(("data:image/png;base64,", "#"))
    assert not parsed.all("link")
    assert "@import" not in html
    assert "url(" not in html
    assert parsed.all("html")[0]["lang"] == "en"
    assert "width=device-width" in next(m["content"] for m in parsed.all("meta") if "name" in m)
    for words in ("prefers-color-scheme: dark", "@media print"):
        assert words in html


def test_links_lead_somewhere(parsed):
    targets = {element["id"] for element in parsed.found if "id" in element}
    links = [a["href"].removeprefix("#") for a in parsed.all("a")]
    assert len(links) >= 8
    assert set(links) <= targets
    assert len(targets) == len([e for e in parsed.found if "id" in e])


def test_findings_come_first_with_evidence_null_and_verdict(parsed):
    titles = [h["text"] for h in parsed.all("h2")]
    assert titles == [*TITLES]
    first, second, third, fourth = parsed.all("article")
    assert [a["class"] for a in (first, second, third)] == ["held", "open", "failed"]
    text = " ".join(first["text"].split())
    for words in (
        "Early \u03b1 predicts <efficiency> held", "Mean rho 0.80 & more, p = 0.01.",
        "Null or control: rho(-log B) = 0.20.", "statistic 0.8", "n 6", "seeds 3", "p 0.01",
    ):  # fmt: skip
        assert re.sub(r"\s", "", words) in re.sub(r"[\s\u2011]", "", text)
    assert "undecided at this scale" in second["text"]
    assert "Null" not in second["text"]
    assert "no test" in fourth["text"]
    order = [h["text"] for h in parsed.all("h3") + parsed.all("h4")][:2]
    assert order == [
        "The primary test, declared before the runs, and its control",
        "All other findings, exploration",
    ]
    counts = parsed.all("p")[0]["text"]
    assert counts == "1 held, 2 did not hold, 1 undecided at this scale."


def test_q_is_benjamini_hochberg_over_the_claims_with_a_p(parsed):
    tests = [0.01, 0.04, 0.2]
    twin = [min(p * 3 / (i + 1) for i, p in enumerate(tests) if i >= k) for k in range(3)]
    shown = []
    for card in parsed.all("article"):
        words = re.sub(r"\s+", " ", card["text"])
        shown += [float(q) for q in re.findall(r"q ?([\d.]+)", words)]
    np.testing.assert_allclose(shown, twin, rtol=0.06)
    assert "over the 3 tests" in " ".join(p["text"].replace("\n", " ") for p in parsed.all("p"))


def test_figures_are_inside_with_their_verdicts_and_the_others_are_named(parsed, images):
    figures = parsed.all("figure")
    assert [f["id"] for f in figures] == ["figure-2", "figure-4a", "figure-12"]
    for image, path in zip(parsed.all("img"), images.values(), strict=True):
        data = base64.b64decode(image["src"].partition(",")[2])
        assert data == path.read_bytes()
        size = struct.unpack(">II", data[16:24])
        assert (int(image["width"]), int(image["height"])) == size == (200, 100)
        assert image["alt"].startswith("Figure ")
    assert "Figure 2: early \u03b1, and tokens to the target." in figures[0]["text"]
    assert "Beyond the batch: undecided at this scale" in figures[0]["text"]
    absent = next(p["text"] for p in parsed.all("p") if p["text"].startswith("Not drawn"))
    assert "1 (" in absent
    assert "18 (" in absent
    assert "; 2 (" not in absent
    assert "; 4 (" not in absent


def test_grid_has_every_chosen_run_and_trials_apart(parsed, study):
    heads, *rows = table_of(parsed, "rate chosen")
    assert heads == [
        "run", "lr_scale", "tokens to target", "excess", "val loss", "steps", "reason", "batch",
        "seed",
    ]  # fmt: skip
    assert len(rows) == len(study.chosen) == 8
    by_name = {row[0]: dict(zip(heads, row, strict=True)) for row in rows}
    runs = {run.name: run for run in study.chosen}
    best, other = (runs[name("muon", batch=batch)] for batch in (8, 4))
    tokens = [crossing_tokens(run, study.target_loss) for run in (best, other)]
    assert by_name["muon-d12-b8-s0"]["tokens to target"] == f"{tokens[0]:,.0f}"
    assert by_name["muon-d12-b8-s0"]["excess"] == "+0.0%"
    assert by_name["muon-d12-b4-s0"]["excess"] == f"{tokens[1] / tokens[0] - 1:+.1%}"
    assert by_name["muon-d12-b16-s0"]["tokens to target"] == "not reached"
    assert by_name["muon-d12-b16-s0"]["reason"] == "budget"
    assert by_name["flexwin-d12-b4-s0"]["reason"] == "not ended"
    assert by_name["flexwin-d12-b4-s0"]["excess"] == "\u2013"
    assert by_name["flexwin-d12-b16-s1"]["excess"] == "\u2013"  # no other batch has its seed


def test_excess_is_against_the_best_of_a_family_and_seed(tmp_path):
    cells = (("muon", "d12", 8, (0, 1)), ("muon", "d12", 16, (0, 1)), ("muon", "d12", 4, (0, 2)))
    made = make_study(tmp_path / "s", rungs=("muon",), batches=(4, 8, 16), seed_cells=cells,
                      trials=(), kinds=())  # fmt: skip
    rows = {(row["batch"], row["seed"]): row for row in table_rows(read_study(made))}
    for seed in (0, 1):
        tokens = {batch: rows[batch, seed]["crossing_tokens"] for batch in (8, 16)}
        assert rows[8, seed]["excess"] == 0.0
        assert rows[16, seed]["excess"] == pytest.approx(tokens[16] / tokens[8] - 1)
    assert "excess" not in rows[4, 2]  # no other batch has its seed


def test_trials_stand_apart(parsed, study):
    _, *trials = table_of(parsed, "Trials")
    assert len(trials) == len(study.trials) == 12
    assert {row[1] for row in trials} == {"0.5", "2"}


def test_pruning_is_what_hindsight_says_of_every_rule(parsed, study):
    heads, *rows = table_of(parsed, "in hindsight")
    assert heads == ["rule", "kept", "tokens saved", "regret", "best kept", "families", "cases"]
    twin = [own for keep in (1, 2) for own in retrospective(study, keep)]
    assert [row[0] for row in rows] == ["alpha", "early loss", "-log B", "chance"] * 2
    for row, own in zip(rows, twin, strict=True):
        assert row[1] == str(own.keep)
        assert row[2] == f"{own.saved:.1%}"
    assert {row[5] for row in rows[:4]} == {"2"}  # flexwin's smallest batch has not ended
    assert [row[6] for row in rows] == [str(own.cases) for own in twin]


def test_a_study_without_a_target_says_why_it_has_no_pruning(study, images):
    config = {key: value for key, value in study.config.items() if key != "target_loss"}
    text = page(replace(study, config=config), CLAIMS, images, COMMAND)
    assert "it names no early_tokens, or no target loss" in text


def test_rerun_names_both_commands_and_what_is_open(parsed):
    (code,) = parsed.all("code")
    assert code["text"].splitlines() == ["python -m experiments.study preset=laptop", COMMAND]
    assert any(name("flexwin", batch=4) in li["text"] for li in parsed.all("li"))


def test_words_of_the_records_are_escaped(study, images):
    bad = CLAIMS[0]._replace(claim="<script>x</script>", sentence="a & <b>", control='"<i>')
    parsed = Page(page(study, [bad], images, "x <y>"))
    assert len(parsed.all("script")) == 1
    assert not parsed.all("b") + parsed.all("i")


def test_a_study_without_claims_still_has_its_grid(study, tmp_path):
    write_report(study, [], {}, tmp_path / "r.html", command=COMMAND)
    parsed = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "nothing is claimed" in parsed.all("section")[0]["text"]
    assert len(parsed.all("table")) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


def test_same_records_give_the_same_page(study, images, html):
    assert page(study, CLAIMS, images, COMMAND) == html
