"""Tables of a study's report, as HTML whose rows can be sorted: grid, trials, pruning."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from experiments.pruning import Pruned, retrospective
from experiments.study.table import table_rows
from experiments.study_records import GIVEN_UP, NOT_ENDED, Run, Study
from lens_jax.claims import number

NONE = "\u2013"
Row = Sequence[tuple[str, float | None]]

GRID = (
    ("run", "rung of the ladder, tier of size, batch and seed"),
    ("lr_scale", "multiplier on the published rates; * at an end of its search"),
    ("tokens to target", "interpolated crossing of the target loss"),
    ("excess", "tokens to target against the least of its family and seed, minus 1"),
    ("val loss", "last validation loss"),
    ("steps", "updates made"),
    ("reason", "why the run ended"),
    ("batch", "long rows a step"),
    ("seed", "of initial weights and order of data"),
)


def grid_tables(study: Study) -> str:
    rows = [_grid_row(row) for row in table_rows(study)]
    trials = [_trial_row(run) for run in study.trials]
    text = _table("chosen", "Runs at the rate chosen for their cell", GRID, rows)
    if trials:
        heads = [column for column in GRID if column[0] not in ("tokens to target", "excess")]
        text += (
            "<details><summary>Trials of other learning rates, stopped early</summary>\n"
            f"{_table('trials', 'Trials of other learning rates', heads, trials)}</details>\n"
        )
    return text


PRUNING = (
    ("rule", "what members are ranked by at the early tokens; chance: by nothing, expectations"),
    ("kept", "members that go on in each family, at each seed by itself"),
    ("tokens saved", "share of the tokens of all members to their targets"),
    (
        "regret",
        "tokens of the best member kept over those of the best of all, minus 1; mean over families "
        "and seeds",
    ),
    ("best kept", "share of families and seeds whose best member was kept"),
    ("families", "families with more members of a seed that ended than are kept"),
    ("cases", "families times their seeds, each judged by itself; what the means are over"),
)
RULE_NAMES = {"alpha": "alpha", "loss": "early loss", "batch": "-log B", "chance": "chance"}
KEPT = (1, 2)


def pruning_table(study: Study) -> str:
    """What giving up members early would have saved and cost, by rule; says where nothing is known.

    In hindsight: every member was trained, and the rules look at the early tokens of the study, at
    one seed at a time; numbers are means over seeds and families.
    """
    try:
        found = [own for keep in KEPT for own in retrospective(study, keep)]
    except ValueError as reason:  # no early tokens, or no target
        return f'<p class="note">{escape(str(reason))}</p>\n'
    if not found:
        return '<p class="note">No family has more ended members than would be kept.</p>\n'
    return _table(
        "pruned", "Rules, in hindsight: means over seeds", PRUNING, map(_pruning_row, found)
    )


def _pruning_row(own: Pruned) -> Row:
    shares = (number(own.saved, ".1%"), number(own.regret, ".1%"), number(own.kept_best, ".0%"))
    words = (RULE_NAMES[own.rule], str(own.keep), *shares, str(own.families), str(own.cases))
    return [(word, None) for word in words]


def _grid_row(row: Mapping) -> Row:
    """Cells of a chosen run; a run that missed the target sorts behind those that reached it."""
    tokens, excess = row.get("crossing_tokens"), row.get("excess")
    missed = row["reason"] not in (NOT_ENDED, GIVEN_UP) and tokens is None
    cells = [
        (f"{row['lr_scale']:.3g}{'*' if row['edge'] else ''}", None),
        ("not reached", float("inf")) if missed else _count(tokens),
        (NONE, None) if excess is None else (f"{excess:+.1%}", None),
        (number(row.get("val_loss", float("nan")), ".4f"), None),
        (f"{row['step']:,}", row["step"]),
        (row["reason"], None),
    ]
    return _named(row["rung"], row["tier"], row["batch"], row["seed"], cells)


def _trial_row(run: Run) -> Row:
    loss = run.val["loss"][-1] if run.val["loss"].size else float("nan")
    step = int(run.val["step"][-1]) if run.val["step"].size else None
    cells = [
        (f"{run.lr_scale:.3g}", None),
        (number(loss, ".4f"), None),
        _count(step),
        (run.result.get("reason", GIVEN_UP), None),
    ]
    return _named(*run.cell, run.seed, cells)


def _named(rung: str, tier: str, batch: int, seed: int, cells: Row) -> Row:
    name = f"{rung}-{tier}-b{batch}-s{seed}"
    return [(name, None), *cells, (str(batch), None), (str(seed), None)]


def _count(tokens: float | None) -> tuple[str, float | None]:
    return (NONE, None) if tokens is None else (f"{tokens:,.0f}", float(tokens))


def _table(key: str, title: str, heads: Iterable[tuple[str, str]], rows: Iterable[Row]) -> str:
    head = "".join(
        f'<th scope="col" aria-sort="none" title="{escape(note)}">'
        f'<button type="button">{escape(name)}</button></th>'
        for name, note in heads
    )
    body = "\n".join(_line(cells) for cells in rows)
    meanings = "".join(f"<dt>{escape(name)}</dt><dd>{escape(note)}</dd>" for name, note in heads)
    return f"""<h3 id="{key}">{escape(title)}</h3>
<div class="scroll" role="region" aria-labelledby="{key}" tabindex="0"><table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody></table></div>
<details><summary>What the columns are</summary><dl>{meanings}</dl></details>
"""


def _line(cells: Row) -> str:
    (first, _), *others = cells
    texts = "".join(
        f"<td>{escape(text)}</td>"
        if number is None
        else f'<td data-number="{"Infinity" if number == float("inf") else number}">'
        f"{escape(text)}</td>"
        for text, number in others
    )
    return f'<tr><th scope="row">{escape(first)}</th>{texts}</tr>'
