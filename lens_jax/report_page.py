"""The HTML, style and script of a report; text goes in and comes out escaped.

Nothing is loaded from anywhere, which a content policy in the page states too. Without JavaScript
all rows of all tables are there; with it they can be sorted and chosen.
"""

from collections.abc import Sequence
from html import escape

Cell = tuple[str, float | None]

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --soft: #5a5a5a; --page: #f4f4f2;
  --card: #ffffff; --line: #d0d0cc; --head: #e9e9e5; --hover: #f0f5fa; --link: #00588a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e6; --soft: #a9a9a6; --page: #161718;
  --card: #202224; --line: #44474a; --head: #2c2f32; --hover: #29323a; --link: #7cc4f2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 100rem; color: var(--ink);
  background: var(--page); font: 1rem/1.45 system-ui, sans-serif; }
h1 { font-size: clamp(1.1rem, 4vw, 1.35rem); margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 1.5rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p { margin: .3rem 0 .7rem; max-width: 60rem; }
.conditions { list-style: none; margin: 0; padding: 0; color: var(--soft); font-size: .875rem;
  display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; }
.conditions li { overflow-wrap: anywhere; }
.figures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)); }
figure { margin: 0; border: 1px solid var(--line); border-radius: .4rem; overflow: hidden;
  background: var(--card); }
figure img { display: block; width: 100%; height: auto; padding: .5rem; background: #ffffff; }
figcaption { padding: .5rem .75rem .7rem; font-size: .875rem; }
.controls { display: flex; flex-wrap: wrap; gap: .5rem 1.2rem; margin: 0 0 .5rem; }
.controls[hidden] { display: none; }
select { font: inherit; padding: .3rem; margin-left: .3rem; color: inherit;
  background: var(--card); border: 1px solid var(--line); border-radius: .3rem; }
.count, .note { color: var(--soft); font-size: .875rem; }
.count { margin: 0 0 .3rem; }
.scroll { overflow: auto; width: fit-content; max-width: 100%; max-height: 85vh;
  border: 1px solid var(--line); border-radius: .4rem; background: var(--card); }
table { width: max-content; border-collapse: separate; border-spacing: 0; font-size: .8125rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
thead th { position: sticky; top: 0; z-index: 1; padding: 0; background: var(--head);
  vertical-align: bottom; white-space: normal; }
thead button { width: 100%; min-width: 4.5rem; max-width: 10rem; padding: .45rem .6rem; border: 0;
  font: inherit; font-weight: 600; text-align: inherit; color: inherit; background: none;
  cursor: pointer; }
thead button::after { content: "\\00a0\\2195"; color: var(--soft); }
[aria-sort=ascending] button::after { content: "\\00a0\\25b2"; color: var(--link); }
[aria-sort=descending] button::after { content: "\\00a0\\25bc"; color: var(--link); }
tr > :first-child { position: sticky; left: 0; text-align: left; background: var(--card);
  font-weight: 500; border-right: 1px solid var(--line); }
thead tr > :first-child { z-index: 2; background: var(--head); }
tbody tr:hover > * { background: var(--hover); }
:focus-visible { outline: 2px solid var(--link); outline-offset: -2px; }
dl { font-size: .875rem; margin: .4rem 0; }
dt { font-weight: 600; margin-top: .35rem; }
dd { margin: 0; color: var(--soft); }
summary { cursor: pointer; font-size: .875rem; padding: .3rem 0; }
"""

SCRIPT = """
"use strict";
const words = new Intl.Collator("en", { numeric: true });
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];

function key(row, column) {
  const cell = row.cells[column];
  return parseFloat(cell.dataset.number ?? cell.textContent);
}

// What is not a number stays at the end, whichever way the others go.
function compare(a, b, column, sign) {
  if (column === 0) return sign * words.compare(a.cells[0].textContent, b.cells[0].textContent);
  const x = key(a, column), y = key(b, column);
  if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y);
  return x === y ? 0 : x < y ? -sign : sign;
}

function sort(head) {
  const up = head.getAttribute("aria-sort") !== "ascending";
  const body = head.closest("table").tBodies[0];
  const rows = [...body.rows].sort((a, b) => compare(a, b, head.cellIndex, up ? 1 : -1));
  all("th", head.parentNode).forEach((other) => other.setAttribute("aria-sort", "none"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  body.append(...rows);
}

const kind = document.getElementById("kind"), steps = document.getElementById("steps");

function choose() {
  all("section[data-kind]").forEach((part) => {
    part.hidden = kind.value !== "all" && kind.value !== part.dataset.kind;
    const rows = all("tbody tr", part);
    rows.forEach((row) => { row.hidden = steps.value === "last" && !("last" in row.dataset); });
    const shown = rows.filter((row) => !row.hidden).length;
    part.querySelector(".count").textContent = shown + " of " + rows.length + " rows";
  });
}

all("thead button").forEach((button) => {
  button.addEventListener("click", () => sort(button.parentNode));
});
if (kind) {
  all("select").forEach((select) => select.addEventListener("change", choose));
  document.querySelector(".controls").hidden = false;
  choose();
}
"""


def page(
    headline: Sequence[str], conditions: Sequence[str], figures: list[str], tables: list[str]
) -> str:
    """Returns the whole page; figures and tables are HTML already, the words are not."""
    name = escape(" \u00b7 ".join(headline))
    facts = "".join(f"<li>{escape(fact)}</li>" for fact in conditions)
    numbers = _numbers(tables) if tables else '<p class="note">No spectra were measured.</p>'
    return frame(
        name,
        facts,
        f"""<section aria-labelledby="figures">
<h2 id="figures">Figures</h2>
<div class="figures">
{"".join(figures)}</div>
</section>
<section aria-labelledby="numbers">
<h2 id="numbers">Numbers</h2>
{numbers}</section>
""",
    )


def frame(name: str, facts: str, body: str, *, style: str = STYLE, links: str = "") -> str:
    """Returns a whole page that stands alone, from parts that are HTML already.

    facts: the items of the list below the name; links: what follows it in the header.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{name}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{name}</h1>
<ul class="conditions">{facts}</ul>
{links}</header>
<main>
{body}</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _numbers(tables: list[str]) -> str:
    return f"""<p class="note">A row is one site at one measured step. What follows \u00b1 is a
standard error by the jackknife over groups of probe windows or gradient samples: the error
of sampling, not the difference between two trainings. \u2013: not recorded; n/a: not defined
for this spectrum (all gradients are zero at the start, for one); \u221e: so few samples cannot
tell the mean gradient from noise. A click on a heading sorts.</p>
<form class="controls" hidden>
<label>Show<select id="kind">
<option value="all">all kinds</option>
<option value="activation">activations</option>
<option value="gradient">gradients</option>
<option value="weight">weights</option>
</select></label>
<label>Steps<select id="steps">
<option value="last">last measured step</option>
<option value="all">all steps</option>
</select></label>
</form>
{"".join(tables)}"""


def figure(source: str, inches: tuple[float, float], alt: str, caption: str) -> str:
    """Returns an image, given as an address that holds it, with its caption."""
    width, height = (round(100 * length) for length in inches)
    return (
        f'<figure><img src="{source}" width="{width}" height="{height}" alt="{escape(alt)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
    )


def table(
    kind: str,
    title: str,
    columns: Sequence[tuple[str, str]],
    rows: Sequence[tuple[Sequence[Cell], bool]],
) -> str:
    """Returns a table of one kind of rows and the meaning of its columns.

    columns: (heading, meaning) of what follows site, step and tokens; rows: (cells, whether of
    the last measured step), a cell being its text and the number to sort it by, None where the
    text begins with that number.
    """
    heads = "".join(_head(name, note) for name, note in (*FIXED, *columns))
    meanings = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(note)}</dd>" for name, note in dict.fromkeys(columns)
    )
    body = "\n".join(_line(cells, last) for cells, last in rows)
    name = escape(title)
    return f"""<section data-kind="{kind}" aria-labelledby="{kind}">
<h3 id="{kind}">{name}</h3>
<p class="count" role="status"></p>
<div class="scroll" role="region" aria-labelledby="{kind}" tabindex="0"><table>
<thead><tr>{heads}</tr></thead>
<tbody>
{body}
</tbody></table></div>
<details><summary>What the columns are</summary><dl>{meanings}</dl></details>
</section>
"""


FIXED = (
    ("site", "tap or parameter"),
    ("step", "updates made before"),
    ("tokens", "trained on before"),
)


def _head(name: str, note: str) -> str:
    return (
        f'<th scope="col" aria-sort="none" title="{escape(note)}">'
        f'<button type="button">{escape(name)}</button></th>'
    )


def _line(cells: Sequence[Cell], last: bool) -> str:
    (site, _), *others = cells
    numbers = "".join(
        f"<td>{escape(text)}</td>"
        if number is None
        else f'<td data-number="{_js(number)}">{escape(text)}</td>'
        for text, number in others
    )
    return f'<tr{" data-last" if last else ""}><th scope="row">{escape(site)}</th>{numbers}</tr>'


def _js(number: float) -> str:
    return "Infinity" if number == float("inf") else str(number)
