"""A study as one HTML file that stands alone: findings, figures, the grid, how to rerun it.

The words of a finding are those of its claim; the look is that of a run's report
(`lens_jax.report_page`), with what a page of findings needs beside it.
"""

import base64
import re
import struct
from collections.abc import Mapping, Sequence
from html import escape
from math import isfinite
from pathlib import Path

from experiments.figures.catalogue import FIGURES
from experiments.figures.report_tables import grid_tables, pruning_table
from experiments.study_records import Study
from lens_jax.claims import FAILED, HELD, LEVEL, UNDECIDED, Claim, number
from lens_jax.multiplicity import benjamini_hochberg
from lens_jax.report import greek
from lens_jax.report_page import STYLE as RUN_STYLE
from lens_jax.report_page import frame
from lens_jax.saved_run import short_count
from models.atomic_files import write_bytes_atomic

STYLE = (
    RUN_STYLE
    + """
:root { --held: #00694c; --failed: #a13d00; --open: #5a5a5a; }
@media (prefers-color-scheme: dark) { :root { --held: #4fd1a5; --failed: #ffab73;
  --open: #b4b4b0; } }
body { max-width: 72rem; }
main > section { margin-top: 1.6rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: .6rem 0; font-size: .9rem; }
a { color: var(--link); }
.findings { display: grid; gap: .8rem; }
article { background: var(--card); border: 1px solid var(--line); border-radius: .4rem;
  border-left: .3rem solid var(--tone); padding: .6rem .9rem .7rem; }
article h4 { font-size: 1rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }
.held { --tone: var(--held); } .failed { --tone: var(--failed); } .open { --tone: var(--open); }
.verdict { color: var(--tone); font-weight: 700; white-space: nowrap; }
.facts { display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; margin: .2rem 0 0; }
.facts div { display: flex; gap: .35rem; }
.facts dt { margin: 0; font-weight: 400; color: var(--soft); }
.facts dd { color: var(--ink); font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.drawn { display: grid; gap: 1.2rem; }
.drawn .scroll { max-height: none; width: auto; border: 0; border-radius: 0; background: #ffffff; }
.drawn img { min-width: 42rem; max-width: 100%; margin: 0 auto; }
.drawn ul { margin: .3rem 0 0; padding-left: 1.2rem; }
pre { overflow-x: auto; padding: .6rem .8rem; background: var(--card);
  border: 1px solid var(--line); border-radius: .4rem; font-size: .875rem; }
@media print {
  :root { color-scheme: light; --ink: #000000; --soft: #444444; --page: #ffffff; --card: #ffffff;
    --line: #bbbbbb; --head: #eeeeee; --held: #00573f; --failed: #8a3400; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav, thead button::after { display: none; }
  article, figure, tr { break-inside: avoid; }
  h2, h3, h4 { break-after: avoid; }
  .scroll { overflow: visible; max-height: none; width: auto; }
  .drawn img { min-width: 0; }
  table { width: 100%; font-size: 7.5pt; }
  th, td { padding: .1rem .3rem; }
  thead th, tr > :first-child { position: static; }
  thead button { min-width: 0; padding: .1rem .3rem; }
  pre { white-space: pre-wrap; }
}
"""
)
PRIMARY = "2"
TONES = {HELD: "held", FAILED: "failed", UNDECIDED: "open"}
SAID = {HELD: "held", FAILED: "did not hold", UNDECIDED: "undecided at this scale"}


def write_report(
    study: Study,
    claims: Sequence[Claim],
    images: Mapping[str, Path],
    path: Path,
    *,
    command: str | None = None,
) -> None:
    """Writes the report of a study to `path`, whole or not at all.

    images: the PNG of each figure by its name, `2`, `11a`; figures without one are named as not
    drawn. command: what draws them again, by default that of this package with its defaults.
    Every word of the records is escaped; nothing is loaded from outside the file.
    """
    command = command or f"python -m experiments.figures study={study.path} report={path}"
    write_bytes_atomic(path, page(study, claims, images, command).encode())


def page(study: Study, claims: Sequence[Claim], images: Mapping[str, Path], command: str) -> str:
    """Returns the HTML of the report; arguments as of `write_report`."""
    name = escape(f"Study {study.config.get('preset', study.path.resolve().name)}")
    facts = "".join(f"<li>{_words(fact)}</li>" for fact in _conditions(study))
    parts = (
        ("findings", "Findings", _findings(claims)),
        ("figures", "Figures", _figures(claims, images)),
        ("grid", "The grid", grid_tables(study)),
        ("pruning", "Giving up members early", pruning_table(study)),
        ("rerun", "How to run it again", _rerun(study, command)),
    )
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in parts)
    sections = "".join(
        f'<section aria-labelledby="{key}">\n<h2 id="{key}">{title}</h2>\n{body}</section>\n'
        for key, title, body in parts
    )
    nav = f'<nav aria-label="parts of this page">{links}</nav>\n'
    return frame(name, facts, sections, style=STYLE, links=nav)


def _conditions(study: Study) -> list[str]:
    chosen, config = study.chosen, study.config
    ended = sum(run.finished for run in chosen)
    gone = f", {len(study.given_up)} given up early" if study.given_up else ""
    rungs = dict.fromkeys(run.cell.rung for run in chosen)
    words = [
        f"{len(chosen)} runs, {ended} ended{gone}, "
        f"and {len(study.trials)} trials of learning rates",
        f"{len(rungs)} rungs: {', '.join(rungs)}",
        f"tiers {', '.join(dict.fromkeys(run.cell.tier for run in chosen))}",
        f"batches {', '.join(map(str, sorted({run.batch for run in chosen})))}",
        f"seeds {', '.join(map(str, sorted({run.seed for run in chosen})))}",
    ]
    if study.target_loss is not None:
        words.append(f"target validation loss {study.target_loss:g}")
    if "early_tokens" in config:
        words.append(f"primary test at {short_count(config['early_tokens'])} tokens")
    if "window" in config:
        first, last = config["window"]
        words.append(f"primary ranks {first}-{last} at width 768")
    return words


# Findings


def _findings(claims: Sequence[Claim]) -> str:
    if not claims:
        return '<p class="note">No figure could be drawn, so nothing is claimed.</p>'
    adjusted = benjamini_hochberg([claim.p for claim in claims])
    counts = ", ".join(
        f'<span class="verdict {TONES[v]}">{sum(c.verdict == v for c in claims)} {SAID[v]}</span>'
        for v in SAID
    )
    tests = sum(isfinite(claim.p) for claim in claims)
    pairs = list(zip(claims, adjusted, strict=True))
    first = "".join(_card(*pair) for pair in pairs if pair[0].figure == PRIMARY)
    others = "".join(_card(*pair) for pair in pairs if pair[0].figure != PRIMARY)
    return f"""<p>{counts}.</p>
<p class="note">Verdicts follow fixed rules. A claim decided by a test held with p \u2264 {LEVEL:g}
and the expected sign, it did not hold with p \u2264 {LEVEL:g} and the other sign, and all else is
undecided at this scale; tests are two-sided where they do not say otherwise, and one of a single
side can only hold or leave undecided. q is p adjusted by Benjamini and Hochberg over the {tests}
tests on this page: verdicts do not use it, and a claim that held with q above {LEVEL:g} deserves
less trust. Claims without a test are decided by the rule in their sentence.</p>
{_cards("The primary test, declared before the runs, and its control", first)}\
{_cards("All other findings, exploration", others)}"""


def _cards(title: str, cards: str) -> str:
    return f'<h3>{title}</h3>\n<div class="findings">\n{cards}</div>\n' if cards else ""


def _evidence(claim: Claim) -> str:
    """The sentence of a claim without its verdict and control, which stand beside it."""
    sentence = claim.sentence.removeprefix(f"{claim.verdict.capitalize()}: ")
    return _capital(sentence.replace(f"; {claim.control}", "") if claim.control else sentence)


def _card(claim: Claim, q: float) -> str:
    evidence = {
        "statistic": number(claim.statistic, ".3g"),
        "n": str(claim.n),
        "seeds": str(claim.seeds),
        "ranks": claim.window,
        "p": number(claim.p, ".2g") if isfinite(claim.p) else "no test",
        "q": number(q, ".2g"),
    }
    items = "".join(
        f"<div><dt>{name}</dt><dd>{_words(value)}</dd></div>"
        for name, value in evidence.items()
        if value and not (name == "q" and not isfinite(q))
    )
    name = escape(claim.figure)
    items += f'<div><dt>from</dt><dd><a href="#figure-{name}">figure {name}</a></dd></div>'
    tone, said = TONES[claim.verdict], SAID[claim.verdict]
    control = f"<p><strong>Null or control:</strong> {_words(claim.control)}.</p>"
    return f"""<article class="{tone}">
<h4>{_words(_capital(claim.claim))} <span class="verdict">{said}</span></h4>
<p>{_words(_evidence(claim))}</p>
{control if claim.control else ""}<dl class="facts">{items}</dl>
</article>
"""


# Figures


def _figures(claims: Sequence[Claim], images: Mapping[str, Path]) -> str:
    drawn = "".join(_figure(name, file, claims) for name, file in images.items())
    numbers = {int(re.match(r"\d+", name)[0]) for name in images}
    absent = [f"{n} ({place.subject})" for n, place in FIGURES.items() if n not in numbers]
    note = (
        f'<p class="note">Not drawn, since their runs are not in the study: '
        f"{_words('; '.join(absent))}.</p>\n"
        if absent
        else ""
    )
    return f'<div class="drawn">\n{drawn}</div>\n{note}'


def _figure(name: str, file: Path, claims: Sequence[Claim]) -> str:
    """A figure, which scrolls sideways on a narrow screen so that its letters stay legible."""
    data = file.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    source = base64.b64encode(data).decode("ascii")
    subject = FIGURES[int(re.match(r"\d+", name)[0])].subject
    caption = f"Figure {name}: {_words(subject)}."
    said = "".join(
        f'<li>{_words(_capital(own.claim))}: <span class="verdict {TONES[own.verdict]}">'
        f"{SAID[own.verdict]}</span></li>"
        for own in claims
        if own.figure == name
    )
    return f"""<figure id="figure-{escape(name)}">
<div class="scroll" role="region" aria-label="figure {escape(name)}" tabindex="0"><img
 src="data:image/png;base64,{source}" width="{width}" height="{height}" alt="{caption}"></div>
<figcaption><strong>{caption}</strong>{f"<ul>{said}</ul>" if said else ""}</figcaption>
</figure>
"""


# How to run it again


def _rerun(study: Study, command: str) -> str:
    preset = study.config.get("preset")
    trained = "" if preset is None else f"python -m experiments.study preset={preset}\n"
    note = (
        "The first command trains what is not there yet; keys of the study that differ from the "
        "preset are in its config.json. The second one draws figures and this page from the "
        "records alone."
        if preset
        else "This draws figures and this page from the records alone."
    )
    unfinished = "".join(f"<li>{_words(words)}</li>" for words in study.unfinished)
    waiting = f"<p>Not ended when this was written:</p><ul>{unfinished}</ul>" if unfinished else ""
    names = [f"<li>{_words(run.name)}: by prune={run.given_up}</li>" for run in study.given_up]
    waiting += (
        f"<p>Given up early, so of unknown cost:</p><ul>{''.join(names)}</ul>" if names else ""
    )
    return f"<p>{note}</p>\n<pre><code>{escape(trained + command)}</code></pre>\n{waiting}"


def _words(text: str) -> str:
    return greek(escape(text))


def _capital(text: str) -> str:
    """Begins with a capital, unless the first word is a name such as d12 or `muon:`."""
    return text[:1].upper() + text[1:] if text.partition(" ")[0].isalpha() else text
