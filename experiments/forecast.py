"""Forecast which members of a study will need the fewest tokens, from their early spectra.

    python -m experiments.forecast study=runs/study_laptop
    python -m experiments.forecast study=runs/study_laptop tokens=65536 out=forecast.csv

Within each family (a rung at a tier) its batches are ranked by the exponent of the last layer's
spectrum at a token budget, a larger one first, and beside it by the batch size itself and by the
early loss. What such rankings were worth on the members that have reached the target stands above:
mean rank correlation with token efficiency over families, its exact p with members permuted within
families, and beside it that of the families' own p together (Stouffer), which is the cautious one.
"""

import csv
import io
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import chz
import numpy as np

from experiments.efficiency import crossing_tokens
from experiments.pruning import RULES, early_scores
from experiments.rank_windows import check_window, window_of
from experiments.statistics import Prediction, predict
from experiments.study_records import Run, Study, read_study
from lens_jax.claims import number, p_text
from lens_jax.correlations import PermutationTest
from lens_jax.multiplicity import stouffer
from lens_jax.saved_run import short_count
from models.atomic_files import write_bytes_atomic, write_json
from models.command_line import UsageError, check_path, check_report, read_command, run_command

NAMES = {"alpha": "alpha", "loss": "early loss", "batch": "-log B"}


@chz.chz
class ForecastConfig:
    """The keys of the command."""

    study: str | None = chz.field(default=None, doc="folder of the study")
    tokens: int | None = chz.field(
        default=None, doc="token budget to look at; none: the study's early_tokens"
    )
    window: tuple[int, int] | None = chz.field(
        default=None, doc="rank window at width 768; none: the study's"
    )
    out: str | None = chz.field(default=None, doc="also as a file, .csv or .json")

    @chz.validate
    def _ranges(self):
        if self.study is not None:
            check_path("study", self.study)
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens={self.tokens}: give at least 1")
        if self.window is not None:
            check_window(self.window)
        if self.out is not None:
            check_report(self.out)
            if Path(self.out).suffix not in (".csv", ".json"):
                raise ValueError(f"out={self.out}: give a name that ends in .csv or .json")


class Row(NamedTuple):
    """One member: its scores, and its place in its family by each of them, 1 the most promising.

    crossing_tokens: to the target, None where it was not reached, or not yet. A score is None, and
    the place too, where the member has no state near the budget; a place also where no other has.
    """

    rung: str
    tier: str
    batch: int
    seed: int
    state: str
    crossing_tokens: float | None
    alpha: float | None
    alpha_place: int | None
    loss: float | None
    loss_place: int | None
    batch_place: int | None


class Forecast(NamedTuple):
    """Rows of all members by family, and the calibration.

    None where no family has three members with both an alpha and an outcome, one at the target.
    """

    rows: tuple[Row, ...]
    calibration: Prediction | None
    tokens: int
    window: tuple[int, int]


def forecast(study: Study, tokens: int, window: tuple[int, int]) -> Forecast:
    """Returns the ranking of all members of a study, finished ones too, at a token budget."""
    rows = []
    for family in study.families:
        for seed in sorted({run.seed for run in study.of(family)}):
            rows += _family_rows(study, study.of(family, seed), tokens, window)
    calibration = None
    if study.target_loss is not None:
        found = predict(study, tokens=tokens, window=window)
        calibration = found if isfinite(found.alpha.statistic) else None
    return Forecast(tuple(rows), calibration, tokens, window)


def _family_rows(study: Study, runs: list[Run], tokens: int, window) -> list[Row]:
    scores = {rule: early_scores(runs, rule, tokens, window) for rule in RULES}
    places = {rule: _places(own) for rule, own in scores.items()}
    rows = []
    for run in runs:
        crossing = None if study.target_loss is None else crossing_tokens(run, study.target_loss)
        loss = _finite(scores["loss"][run.name])
        rows.append(
            Row(
                *run.cell,
                run.seed,
                run.state,
                _finite(crossing),
                _finite(scores["alpha"][run.name]),
                places["alpha"].get(run.name),
                None if loss is None else -loss,
                places["loss"].get(run.name),
                places["batch"].get(run.name),
            )
        )
    return rows


def _places(scores: dict[str, float]) -> dict[str, int]:
    ranked = sorted((name for name in scores if isfinite(scores[name])), key=lambda n: -scores[n])
    if len(ranked) < 2:  # the first of one is no forecast
        return {}
    return {name: place for place, name in enumerate(ranked, start=1)}


def _finite(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None


def describe(found: Forecast) -> str:
    """The forecast in words for a terminal: calibration, then a line a member."""
    first, last = found.window
    lines = [
        f"at {short_count(found.tokens)} tokens, last layer, ranks {first}-{last} at width 768; "
        f"place 1 is forecast to need the fewest tokens"
    ]
    calibration = found.calibration
    if calibration is None:
        lines.append(
            "no calibration: it takes three members of a family that have ended, one of them at "
            "the target, and have a measured state near these tokens"
        )
    else:
        members, families = _counts(calibration)
        lines.append(
            f"calibration on {members} members of {families} "
            f"{'family' if families == 1 else 'families'}, mean rho with token efficiency: "
            + "; ".join(
                f"{NAMES[rule]} {number(test.statistic)} ({p_text(test)}, "
                f"Stouffer {number(together, '.2g')})"
                for rule, test, together in _tests(calibration)
            )
        )
    lines.append(
        f"{'member':<26}{'alpha':>8}{'place':>6}{'loss':>9}{'place':>6}{'-log B':>8}"
        f"{'to target':>11}  state"
    )
    for row in found.rows:
        name = f"{row.rung}-{row.tier}-b{row.batch}-s{row.seed}"
        crossing = "-" if row.crossing_tokens is None else short_count(row.crossing_tokens)
        lines.append(
            f"{name:<26}{_cell(row.alpha, '.3f'):>8}{_cell(row.alpha_place):>6}"
            f"{_cell(row.loss, '.4f'):>9}{_cell(row.loss_place):>6}{_cell(row.batch_place):>8}"
            f"{crossing:>11}  {row.state}"
        )
    return "\n".join(lines)


def _counts(calibration: Prediction) -> tuple[int, int]:
    """Members that have both an alpha and an outcome, and families of which enough have."""
    judged = [own for own in calibration.families if isfinite(own.rho_alpha.statistic)]
    members = [np.isfinite(own.alpha) & ~np.isnan(own.efficiency) for own in judged]
    return int(sum(own.sum() for own in members)), len(judged)


def _tests(calibration: Prediction) -> list[tuple[str, PermutationTest, float]]:
    """Of every rule its joint test, and the p of its families' own tests together."""
    found = []
    for rule in RULES:
        own = [getattr(family, f"rho_{rule}") for family in calibration.families]
        _, together = stouffer([test.p for test in own], [test.statistic for test in own])
        found.append((rule, getattr(calibration, rule), together))
    return found


def _cell(value, form: str = "d") -> str:
    return "-" if value is None else format(value, form)


def write_forecast(found: Forecast, path: Path) -> None:
    """Writes the rows, as JSON with the calibration beside them."""
    if path.suffix == ".json":
        document = {
            "tokens": found.tokens,
            "window": list(found.window),
            "calibration": _calibration(found.calibration),
            "members": [row._asdict() for row in found.rows],
        }
        write_json(path, document)
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, Row._fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row._asdict() for row in found.rows)
    write_bytes_atomic(path, text.getvalue().encode())


def _calibration(calibration: Prediction | None) -> dict | None:
    if calibration is None:
        return None
    members, families = _counts(calibration)
    tests = {
        rule: {
            "rho": _finite(test.statistic),
            "p": _finite(test.p),
            "p_stouffer": _finite(together),
        }
        for rule, test, together in _tests(calibration)
    }
    return {"members": members, "families": families, **tests}


def main(argv: list[str]) -> int:
    """The command; returns its exit code. Raises UsageError on bad words or a damaged study."""
    config = read_command(ForecastConfig, __doc__, argv, ("study",), "give the folder of a study")
    if config is None:
        return 0
    try:
        study = read_study(config.study)
        tokens = config.tokens or study.config.get("early_tokens")
        if tokens is None:
            raise ValueError(f"study={config.study}: it names no early_tokens; give tokens=")
        found = forecast(study, tokens, window_of(study, config.window))
        print(describe(found))
        if config.out is not None:
            write_forecast(found, Path(config.out))
            print(f"written to {config.out}")
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    return 0


if __name__ == "__main__":
    run_command(main)
