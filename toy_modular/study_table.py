"""The table of a study: every run a row, beside what the authors report where they do."""

import csv
import io
import json
from pathlib import Path

from models.atomic_files import write_bytes_atomic
from toy_modular.published import RUNS
from toy_modular.stages import CORE

COLUMNS = (
    *("stage", "batch", "seed", "lr", "reason", "steps", "tokens", "val_loss", "test_loss"),
    *("tokens_to_target", "crossing_tokens", "published_lr", "published_tokens"),
    *("published_val_loss", "published_reached", "seconds"),
)


def read_table(path: Path) -> list[dict]:
    """Rows of all ended runs by stage, batch and seed; published columns for published sizes."""
    rows = []
    for file in sorted((path / "runs").glob("*/result.json")):
        result = json.loads(file.read_bytes())
        config = json.loads((file.parent / "config.json").read_bytes())
        row = {name: config.get(name) for name in ("stage", "batch", "seed", "lr")}
        row |= {name: result.get(name) for name in COLUMNS if name in result}
        row["steps"] = result["step"]
        known = RUNS.get((row["stage"], row["batch"]))
        if known is not None and _is_published(config):
            row |= {f"published_{name}": getattr(known, name) for name in ("lr", "tokens")}
            row |= {"published_val_loss": known.val_loss, "published_reached": known.reached}
        rows.append(row)
    order = {stage: place for place, stage in enumerate(CORE)}
    rows.sort(
        key=lambda r: (order.get(r["stage"], len(CORE)), r["stage"], r["batch"] or 0, r["seed"])
    )
    return rows


def _is_published(config: dict) -> bool:
    laws, size = config["banded"], config["size"]
    return (
        config["task"] == "banded"
        and (laws["vocab_size"], laws["seq_len"], size["n_embd"]) == (1024, 64, 128)
        and (config["target_loss"], config["max_steps"]) == (2.0, 5000)
    )


def write_table(path: Path) -> Path:
    """Writes table.csv and returns its path."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="")
    writer.writeheader()
    writer.writerows(read_table(path))
    write_bytes_atomic(path / "table.csv", text.getvalue().encode())
    return path / "table.csv"


def _loss(row: dict) -> str:
    return f"{row['val_loss']:.4f}" if row.get("val_loss") is not None else "-"


def describe_runs(path: Path) -> str:
    """The table in words for a terminal: tokens to the target, ours and the authors'."""
    lines = [
        f"{'stage':<28}{'batch':>6}{'seed':>5}{'lr':>10}{'val loss':>10}{'steps':>7}"
        f"{'tokens':>10}{'end':>12}{'published':>22}"
    ]
    for row in read_table(path):
        published = ""
        if row.get("published_tokens"):
            end = "target" if row["published_reached"] else f"{row['published_val_loss']:.3f}"
            published = f"{row['published_tokens'] / 1e6:.2f}M {end}"
        lines.append(
            f"{row['stage']:<28}{row['batch'] or 'all':>6}{row['seed']:>5}{row['lr']:>10.3g}"
            f"{_loss(row):>10}{row['steps']:>7}{row['tokens'] / 1e6:>9.2f}M"
            f"{row['reason']:>12}{published:>22}"
        )
    return "\n".join(lines)
