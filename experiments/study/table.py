"""The table of a study: every chosen run a row, the best batch of each family marked."""

from pathlib import Path

from experiments.efficiency import crossing_tokens, excess_tokens, first_below_tokens
from experiments.study_records import NoRuns, Run, Study, read_study
from lens_jax.plain_rows import csv_text
from lens_jax.saved_run import short_count
from models.atomic_files import write_bytes_atomic

COLUMNS = (
    *("rung", "tier", "batch", "tokens_per_step", "seed", "lr_scale", "edge", "reason", "step"),
    *("tokens", "val_loss", "crossing_tokens", "first_below_tokens", "excess", "tokens_per_s"),
    "run",
)


def table_rows(study: Study) -> list[dict]:
    """One row a chosen run, in the order of rungs, tiers, batches and seeds.

    excess: tokens to the target against the least of its family and seed, minus 1. Empty where
    there is no number: a run that has not ended, or has not reached the target, or no other batch
    to compare with.
    """
    excess = {}
    if study.target_loss is not None:
        for family, seed in {(run.family, run.seed) for run in study.chosen}:
            runs = study.of(family, seed)
            excess |= excess_tokens(runs, study.target_loss) if len(runs) > 1 else {}
    return [_row(study, run, excess) for run in study.chosen]


def _row(study: Study, run: Run, excess: dict[str, float]) -> dict:
    val, result = run.val, run.result
    row = dict(zip(("rung", "tier", "batch"), run.cell, strict=True))
    row |= {"tokens_per_step": run.tokens_per_step, "seed": run.seed, "lr_scale": run.lr_scale}
    row["edge"] = bool(study.selected.get(run.cell.name, {}).get("edge"))
    row["reason"] = run.state
    last = {} if not len(val["step"]) else {key: val[key][-1] for key in ("step", "tokens")}
    row["step"] = int(result.get("step", last.get("step", 0)))
    row["tokens"] = int(result.get("tokens", last.get("tokens", 0)))
    row["val_loss"] = val["loss"][-1] if len(val["loss"]) else None
    if run.finished and study.target_loss is not None:
        row["crossing_tokens"] = crossing_tokens(run, study.target_loss)
        row["first_below_tokens"] = first_below_tokens(run, study.target_loss)
        row["excess"] = excess.get(run.name)
    row["tokens_per_s"] = result.get("tokens_per_s")
    row["run"] = run.name
    return {key: value for key, value in row.items() if not _missing(value)}


def _missing(value) -> bool:
    return value is None or (isinstance(value, float) and not abs(value) < float("inf"))


def write_table(path: Path) -> Path:
    """Writes table.csv of a study's folder and returns its path."""
    write_bytes_atomic(path / "table.csv", csv_text(_rows_of(path), COLUMNS).encode())
    return path / "table.csv"


def _rows_of(path: Path) -> list[dict]:
    """Rows of a study's folder, none while every run of it broke off before it began."""
    try:
        return table_rows(read_study(path))
    except NoRuns:
        return []


def describe(path: Path) -> str:
    """The table in words for a terminal."""
    lines = [
        f"{'rung':<12}{'tier':<6}{'batch':>6}{'seed':>5}{'lr x':>8}{'val loss':>10}{'tokens':>9}"
        f"{'to target':>11}{'excess':>8}  end"
    ]
    for row in _rows_of(path):
        crossing, excess = row.get("crossing_tokens"), row.get("excess")
        edge = " (lr at its edge)" if row["edge"] else ""
        lines.append(
            f"{row['rung']:<12}{row['tier']:<6}{row['batch']:>6}{row['seed']:>5}"
            f"{row['lr_scale']:>8.3g}{row.get('val_loss', float('nan')):>10.4f}"
            f"{short_count(row['tokens']):>9}"
            f"{'-' if crossing is None else short_count(crossing):>11}"
            f"{'-' if excess is None else f'{excess:+.0%}':>8}  {row['reason']}{edge}"
        )
    return "\n".join(lines)
