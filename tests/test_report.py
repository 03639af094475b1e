"""The report of a run: one HTML file, complete, escaped, and working in a browser."""

import base64
import json
import re
import shutil
import struct
import subprocess
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
from html_page import Page
from synthetic_run import make_run

from lens_jax.report import greek, number_text, report
from lens_jax.saved_run import read_run
from lens_jax.table import table_rows

SMALL = {"width": 24, "num_layers": 11, "num_samples": 24, "steps": (0, 1, 2, 70)}
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --disable-dev-shm-usage"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return read_run(make_run(tmp_path_factory.mktemp("run") / "first", **SMALL))


@pytest.fixture(scope="module")
def html(run):
    return report(run)


def test_page_has_what_readers_need(html, run):
    page = Page(html)
    assert page.all("html")[0]["lang"] == "en"
    assert "width=device-width" in next(m["content"] for m in page.all("meta") if "name" in m)
    assert page.all("title")[0]["text"].startswith("untied \u00b7 d12")
    assert page.all("h1")[0]["text"] == page.all("title")[0]["text"]
    assert "N = 24 samples" in page.all("ul")[0]["text"]
    heads = [th for th in page.all("th") if "thead" in th["in"]]
    assert {th["aria-sort"] for th in heads} == {"none"}
    assert len([b for b in page.all("button") if "th" in b["in"]]) == len(heads)
    boxes = [div for div in page.all("div") if div.get("role") == "region"]
    assert [box["tabindex"] for box in boxes] == ["0"] * 3
    ids = [element["id"] for element in page.found if "id" in element]
    assert len(ids) == len(set(ids))
    assert {e["aria-labelledby"] for e in page.found if "aria-labelledby" in e} <= set(ids)


def test_nothing_is_loaded_from_outside(html):
    page = Page(html)
    for element in page.found:
        for name in ("src", "href", "data", "action", "srcset"):
            assert element.get(name, "data:").startswith("data:"), element
    assert not page.all("link")
    assert not re.search(r"@import|url\(|fetch\(|XMLHttp|import\(", html)
    assert "default-src 'none'" in html


def test_every_panel_is_an_image_with_words(html):
    page = Page(html)
    images = page.all("img")
    assert len(images) == len(page.all("figcaption")) == 9
    for letter, image in zip("abcdefghi", sorted(images, key=lambda i: i["alt"]), strict=True):
        assert image["alt"].startswith(f"({letter}) ")
        assert not set(image["alt"]) & set("$\\")
        assert int(image["width"]) == int(image["height"])
        kind, _, data = image["src"].partition(";base64,")
        assert kind == "data:image/svg+xml"
        assert b"<svg" in base64.b64decode(data)
    captions = [caption["text"] for caption in page.all("figcaption")]
    assert all("error" in caption for caption in captions)
    assert "standard error by the jackknife" in captions[2]
    assert len(html) < 3_000_000


def test_every_row_is_there_with_its_numbers(html, run):
    page = Page(html)
    rows = table_rows(run)
    lines = [tr for tr in page.all("tr") if "tbody" in tr["in"]]
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        text = f"{row.site.removesuffix('/kernel')}{row.step}{row.tokens:,}"
        assert line["text"].startswith(text)
        assert ("data-last" in line) == (row.step == 70)
    deepest = next(r for r in rows if (r.step, r.site) == (70, "h_10/resid_post"))
    shown = lines[rows.index(deepest)]["text"]
    assert number_text(*deepest.statistics["act_lambda_alpha_40_90"]) in shown
    assert number_text(*deepest.statistics["act_overlap_before"]) in shown
    assert "half the \u03b1 of \u03c3\u00b2" in page.all("table")[1]["text"]
    assert "half" not in page.all("table")[0]["text"]


def test_words_of_the_files_are_escaped(run):
    bad = "<script>alert(1)</script>&\"'"
    site = run.final_site("weight_singular_values")
    (record, *_) = run.records("weight_singular_values", site)
    spectra = {"weight_singular_values": {bad: [replace(record, site=bad)]}}
    text = report(replace(run, spectra=spectra, config=run.config | {"rung": bad}))
    page = Page(text)
    assert len(page.all("script")) == 1
    assert bad in page.all("h1")[0]["text"]
    assert [th["text"] for th in page.all("th") if th.get("scope") == "row"] == [bad]


@pytest.mark.parametrize(
    "leave_out",
    [("config", "spectra"), ("metrics", "act_cov_eigenvalues"), ("grad_singular_values_centred",)],
)
def test_report_says_what_is_missing(tmp_path, leave_out):
    run = read_run(make_run(tmp_path / "part", **SMALL | {"num_layers": 2}, leave_out=leave_out))
    page = Page(report(run))
    assert len(page.all("img")) == 9
    if "spectra" in leave_out:
        captions = [caption["text"] for caption in page.all("figcaption")]
        assert captions.count("Not measured.") == 8
        assert not page.all("table")
        assert "No spectra were measured" in page.all("p")[0]["text"]


def test_without_groups_no_caption_speaks_of_a_jackknife(tmp_path):
    run = read_run(make_run(tmp_path / "plain", **SMALL | {"num_layers": 2}, groups=1))
    captions = [caption["text"] for caption in Page(report(run)).all("figcaption")]
    assert not any("jackknife" in caption for caption in captions)
    assert "least-squares slope (the run recorded no groups)" in captions[2]


def test_same_run_same_report(html, run):
    assert report(run) == html


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (None, None, "\u2013"),
        (np.nan, None, "n/a"),
        (np.nan, np.nan, "n/a"),
        (np.inf, np.nan, "\u221e"),
        (0.976, None, "0.9760"),
        (19, None, "19"),
        (1.20905, 0.07127, "1.209 \u00b1 0.071"),
        (12345.6, 678.9, "12346 \u00b1 679"),
        (3.25, np.nan, "3.250 \u00b1 n/a"),
        (1.0, 0.0, "1.000 \u00b1 0"),
    ],
)
def test_numbers_for_people(value, error, text):
    assert number_text(value, error) == text


def test_greek_letters_and_whole_windows():
    text = greek("alpha of sigma^2, ranks 4-19, R2, alphabet, h_2-x, tr Sigma")
    assert text == "\u03b1 of \u03c3\u00b2, ranks 4\u201119, R\u00b2, alphabet, h_2-x, tr \u03a3"


class Browser:
    """A headless browser behind its driver, which speaks JSON over HTTP (W3C WebDriver)."""

    def __init__(self, profile):
        command = [DRIVER, "--port=0"]
        self._driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            self._start(profile)
        except BaseException:
            self._stop()
            raise

    def _start(self, profile):
        ports = (re.search(r"on port ([1-9]\d*)", line) for line in self._driver.stdout)
        self._address = f"http://127.0.0.1:{next(port[1] for port in ports if port)}/session"
        options = {"binary": BROWSER, "args": [*QUIET.split(), f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self.ask("POST", "", capabilities={"alwaysMatch": wanted})
        self._address += f"/{session['sessionId']}"

    def ask(self, method, what, **body):
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(f"{self._address}{what}", data, method=method)  # noqa: S310
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            return json.load(answer)["value"]

    def open(self, path, width, height=844):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        override = {"cmd": "Emulation.setDeviceMetricsOverride", "params": size}
        self.ask("POST", "/goog/cdp/execute", **override)
        self.ask("POST", "/url", url=path.as_uri())

    def js(self, script, *args):
        return self.ask("POST", "/execute/sync", script=script, args=list(args))

    def element(self, css):
        return "/element/" + next(
            iter(self.ask("POST", "/element", using="css selector", value=css).values())
        )

    def click(self, css):
        self.ask("POST", f"{self.element(css)}/click")

    def press_enter(self, css):
        self.ask("POST", f"{self.element(css)}/value", text="\ue007")

    def close(self):
        try:
            self.ask("DELETE", "")
        finally:
            self._stop()

    def _stop(self):
        self._driver.terminate()
        self._driver.wait()
        self._driver.stdout.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (BROWSER and DRIVER):
        pytest.skip("no chromium with chromedriver here")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def file(html, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


@pytest.mark.parametrize(("width", "columns"), [(390, 1), (820, 2), (1280, 3)])
def test_page_fits_the_screen(browser, file, width, columns):
    browser.open(file, width)
    assert browser.js("return document.documentElement.scrollWidth") <= width
    lefts = "return [...document.querySelectorAll('figure')].map((f) => f.offsetLeft)"
    assert len(set(browser.js(lefts))) == columns
    broken = "return [...document.images].filter((i) => !i.naturalWidth).length"
    assert browser.js(broken) == 0
    box = "const b = document.querySelector('.scroll'); return b.scrollWidth - b.clientWidth"
    assert browser.js(box) > 100  # the table is wider and scrolls inside its own box
    image = base64.b64decode(browser.ask("GET", "/screenshot"))
    assert struct.unpack(">II", image[16:24]) == (width, 844)
    assert browser.ask("POST", "/se/log", type="browser") == []


COLUMN = """return [...document.querySelectorAll(`section[data-kind=${arguments[0]}] tbody tr`)]
.filter((row) => !row.hidden).map((row) => row.cells[arguments[1]].textContent)"""


def head(kind, column):
    return f"section[data-kind={kind}] th:nth-child({column + 1}) button"


def test_click_and_key_sort_numbers_as_numbers(browser, file):
    browser.open(file, 1280)
    alpha = 3
    before = browser.js(COLUMN, "activation", alpha)
    assert len(before) == 11  # of the last step
    numbers = [float(text.split()[0]) for text in before]
    browser.click(head("activation", alpha))
    assert [float(t.split()[0]) for t in browser.js(COLUMN, "activation", alpha)] == sorted(numbers)
    browser.press_enter(head("activation", alpha))
    after = [float(text.split()[0]) for text in browser.js(COLUMN, "activation", alpha)]
    assert after == sorted(numbers, reverse=True)
    marks = "return [...document.querySelectorAll('thead th')].map((h) => h.ariaSort)"
    assert browser.js(marks)[:5] == ["none", "none", "none", "descending", "none"]
    browser.click(head("activation", 0))
    sites = browser.js(COLUMN, "activation", 0)
    assert sites == [f"h_{layer}/resid_post" for layer in range(11)]  # 10 comes after 9


def test_undefined_numbers_stay_last_and_grouped_ones_are_read_whole(browser, file):
    browser.open(file, 1280)
    browser.click("#steps option[value=all]")
    alpha, tokens = 3, 2
    for _ in ("up", "down"):
        browser.click(head("gradient", alpha))
        column = browser.js(COLUMN, "gradient", alpha)
        undefined = [text == "n/a" for text in column]
        assert any(undefined)
        assert undefined == sorted(undefined)
    browser.click(head("gradient", tokens))
    counts = [int(text.replace(",", "")) for text in browser.js(COLUMN, "gradient", tokens)]
    assert counts == sorted(counts)
    assert set(counts) == {0, 16_384, 32_768, 1_146_880}


def test_rows_are_chosen_by_kind_and_step(browser, file):
    browser.open(file, 390)
    counts = "return [...document.querySelectorAll('.count')].map((c) => c.textContent)"
    assert browser.js(counts) == ["11 of 44 rows", "16 of 64 rows", "16 of 64 rows"]
    browser.click("#steps option[value=all]")
    assert browser.js(counts)[0] == "44 of 44 rows"
    browser.click("#kind option[value=weight]")
    seen = "return [...document.querySelectorAll('section[data-kind]')].map((s) => !s.hidden)"
    assert browser.js(seen) == [False, False, True]


def test_headings_stay_in_view(browser, file):
    browser.open(file, 390)
    browser.click("#steps option[value=all]")
    moved = browser.js("""const box = document.querySelector(".scroll");
        box.scrollTop = 300; box.scrollLeft = 300;
        const parts = ["thead th", "thead th:nth-child(5)", "tbody tr:nth-child(20) th"];
        const [corner, head, site] = parts.map((css) => {
          const [a, b] = [box.querySelector(css), box].map((e) => e.getBoundingClientRect());
          return [a.left - b.left, a.top - b.top];
        });
        return [box.scrollTop, box.scrollLeft, ...corner, head[1], site[0]]""")
    assert moved[:2] == [300, 300]
    assert max(abs(distance) for distance in moved[2:]) <= 2
