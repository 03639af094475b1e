"""How well the lens recovers spectra that were planted: exponents, ranks, error bars, known traps.

    python benchmarks/planted_spectra.py out=benchmarks/results/planted_spectra.json
    python benchmarks/planted_spectra.py vectors=65536,1048576 draws=100
    python benchmarks/planted_spectra.py --help

Where the project is not installed, set PYTHONPATH to its folder. The default command takes 400 s of
processor time, 6 to 7 minutes on two cores that did other work too. Vectors of known covariance,
float32, with a mean of three times the largest standard deviation in every coordinate, go through
the activation probe in 32 groups.

  alpha       Eigenvalues rank^-alpha at width=: |fitted - planted| < 0.01 with the most vectors=.
              Fewer show their bias. Its sign depends on the law: flat ones come out too flat, steep
              ones too steep. It falls as 1/n; first-order theory (Lawley 1956) stands beside it,
              marked ~ where sampling swaps ranks (gaps below a standard error); of flat laws it
              is no longer true at 5 vectors per direction.
  rank        r equal eigenvalues or singular values, the rest zero: RankMe within 1 % of r. Limit:
              RankMe_sigma of gradients is 12 % high at rank 1, 5 % at 4, 1 % at 32, for float32
              products give each zero singular value some 1e-4 of the largest and all of them
              count. Without those below 2^-11.5 of the largest (the floor) the rank is right.
  error_bars  Width 96, the probe set of the laptop profile (128 windows of 128 tokens), drawn
              draws= times: the root mean square of jackknife errors within 15 % of the spread.
              That holds from 60 effective tokens per direction if alpha is 0.5, from 25 if it is
              1, from 12 if it is 2. With fewer the errors are too large, at high ranks first;
              there they are some 10 % too large at these limits, and the ratio of 400 draws, whose
              own error is 3.5 %, may miss by chance. Where two groups share documents the errors
              are too small, by a tenth here. The least-squares error is right only for an exact
              power law whose ranks sampling does not swap: a bend in the law inflates it several
              times, swapped ranks deflate it.
  traps       rank^-2 by float32 products that are not centred, which grows worse with the number of
              vectors summed, and from taps rounded to bfloat16.

Of n tokens with correlations r the effective number is n / sum_s r(s, t)^2: as many independent
ones would tell the covariance as well. A row that fails its claim makes the exit code 1, one under
a known limit does not. Ratios of few draws= scatter, as their table says. The document is saved
after every section.
"""

import shlex
import time
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import chz

from experiments.host_threads import one_blas_thread
from models.atomic_files import write_json
from models.command_line import check_report, flatten, read_command, run_command

Row = Mapping[str, Any]
Rows = Sequence[Row]
LABELS = {
    "alpha": ("planted_alpha", "window"),
    "rank": ("quantity", "planted_rank"),
    "error_bars": ("planted_alpha", "correlation", "statistic"),
    "traps": ("way", "vectors"),
}
PLAIN_WIDTH = 150  # of tables where no terminal says how wide it is


@chz.chz
class PlantedConfig:
    """The keys of the command."""

    out: str | None = chz.field(default=None, doc="file for the JSON document, beside the tables")
    width: int = chz.field(default=768, doc="width of the vectors of alpha, rank and traps")
    vectors: tuple[int, ...] = chz.field(
        default=(4096, 16_384, 65_536, 262_144), doc="numbers of vectors, powers of two"
    )
    draws: int = chz.field(default=400, doc="repeated measurements of every row of error_bars")
    seed: int = chz.field(default=0, doc="seed of all that is drawn")

    @chz.validate
    def _ranges(self):
        if not 16 <= self.width <= 4096:
            raise ValueError(f"width={self.width}: give 16 to 4096")
        given = ",".join(map(str, self.vectors))
        if not self.vectors or len(set(self.vectors)) < len(self.vectors):
            raise ValueError(f"vectors={given}: name at least one number, and none twice")
        for count in self.vectors:
            if count < max(64, self.width + 1) or count & (count - 1):
                raise ValueError(
                    f"vectors={given}: give powers of two above width={self.width}, from 64 on"
                )
        if self.draws < 2:
            raise ValueError(f"draws={self.draws}: a spread needs at least 2")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: give 0 or more")
        if self.out is not None:
            check_report(self.out)


def main(argv: list[str]) -> int:
    """The command; returns its exit code. Raises UsageError."""
    plan = read_command(PlantedConfig, __doc__, argv)
    if plan is None:
        return 0
    one_blas_thread()  # the draws have a thread each
    from first_gpu import environment
    from planted_sections import SECTIONS

    document = {"command": shlex.join(["python", "benchmarks/planted_spectra.py", *argv])}
    document |= {**flatten(plan), "environment": environment(), "results": {}, "seconds": {}}
    document["failed"] = []
    for name, section in SECTIONS.items():
        began = time.monotonic()
        rows = document["results"][name] = list(section(plan))
        document["seconds"][name] = round(time.monotonic() - began, 1)
        document["failed"] += [label(name, row) for row in rows if verdict(row) == "FAILED"]
        if plan.out is not None:
            write_json(plan.out, document)
        PRINTED[name](rows)
    print(f"failed claims: {len(document['failed']) or 'none'}")
    return 1 if document["failed"] else 0


def verdict(row: Row) -> str:
    """Whether a claim holds, fails, or was never made for such a row."""
    return "ok" if row["passed"] else "limit" if row["limit"] else "FAILED"


def label(section: str, row: Row) -> str:
    """A row in a few words."""
    return " ".join([section, *(str(row[key]) for key in LABELS[section])])


def show(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print one table; the columns after the first are numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False)
    if not console.is_terminal:
        console = Console(width=PLAIN_WIDTH, markup=False)
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    for k, name in enumerate(columns):
        table.add_column(name, justify="right" if k else "left")
    for line in lines:
        table.add_row(*line)
    console.print(table)


def grouped(rows: Rows, *keys: str) -> list[Rows]:
    """Neighbouring rows that agree in some keys, together."""
    return [list(same) for _, same in groupby(rows, key=lambda row: [row[key] for key in keys])]


def print_alpha(rows: Rows) -> None:
    """The exponents of the most vectors, the bias of all numbers, and how many are enough."""
    from planted_sections import vectors_needed

    most = max(row["vectors"] for row in rows)
    lines = [
        [
            f"{row['planted_alpha']:g}",
            window(row),
            f"{row['fitted_alpha']:.5f}",
            f"{row['error']:+.5f}",
            f"{row['jackknife_se']:.5f}",
            f"{row['minus_float64']:+.1e}",
            verdict(row),
        ]
        for row in rows
        if row["vectors"] == most
    ]
    columns = "alpha", "ranks", "fitted", "error", "jackknife SE", "- float64", "claim"
    show(f"Exponent from {most:,} vectors", columns, lines)

    cases = grouped(rows, "planted_alpha", "vectors")
    lines = [
        [
            f"{case[0]['planted_alpha']:g}",
            f"{case[0]['vectors']:,}",
            f"{case[0]['vectors_per_direction']:.1f}",
            *(
                f"{row['mean_error']:+.4f}±{row['mean_error_se']:.4f} "
                f"({'~' if row['resolution'] < 1 else ''}{row['first_order_bias']:+.4f})"
                for row in case
            ),
        ]
        for case in cases
    ]
    columns = "alpha", "vectors", "per direction", *map(window, cases[0])
    show("Bias of the exponent: mean error±its error (first-order theory)", columns, lines)
    needed = vectors_needed(rows)
    print(
        "vectors from which |first-order bias| + 2 standard errors stay below 0.01 in all windows:"
    )
    print("  " + ", ".join(f"alpha {a:g}: {n or 'more than here'}" for a, n in needed.items()))


def window(row: Row) -> str:
    """The ranks of a row."""
    return "{}-{}".format(*row["ranks"])


def print_rank(rows: Rows) -> None:
    """One line a quantity, one column a rank."""
    ranks = sorted({row["planted_rank"] for row in rows})
    lines = []
    for quantity in dict.fromkeys(row["quantity"] for row in rows):
        found = {row["planted_rank"]: row for row in rows if row["quantity"] == quantity}
        cells = [rank_cell(found[rank]) if rank in found else "" for rank in ranks]
        lines.append([quantity, *cells])
    show("RankMe of planted ranks, and its error", ["quantity", *map(str, ranks)], lines)


def rank_cell(row: Row) -> str:
    return f"{row['rankme']:.4f} {row['relative_error']:+.2%} {verdict(row)}"


def print_error_bars(rows: Rows) -> None:
    """One line a cell; of every statistic the two ratios."""
    cases = grouped(rows, "planted_alpha", "correlation", "tokens")
    lines = []
    for case in cases:
        first, verdicts = case[0], {verdict(row) for row in case}
        law = "bent" if first["planted_alpha"] is None else f"{first['planted_alpha']:g}"
        worst = next(each for each in ("FAILED", "limit", "ok") if each in verdicts)
        lines.append(
            [
                f"{law}, {first['correlation']}",
                f"{first['tokens']:,}",
                f"{first['effective_tokens_per_direction']:.1f}",
                *map(ratio_cell, case),
                f"{worst}: {first['limit']}" if worst == "limit" else worst,
            ]
        )
    heads = [row["statistic"] if row["ranks"] is None else window(row) for row in cases[0]]
    columns = "law, tokens", "tokens", "effective/direction", *heads, "claim"
    uncertain = f"each ± {rows[0]['uncertainty']:.1%}"
    show(f"Reported error / spread over draws, jackknife (OLS), {uncertain}", columns, lines)


def ratio_cell(row: Row) -> str:
    ols = row["ols_over_spread"]
    return f"{row['jackknife_over_spread']:.2f}" + ("" if ols is None else f" ({ols:.2f})")


def print_traps(rows: Rows) -> None:
    """One line a way, one column a number of vectors."""
    counts = sorted({row["vectors"] for row in rows})
    lines = []
    for way in dict.fromkeys(row["way"] for row in rows):
        found = [row for row in rows if row["way"] == way]
        lines.append([way, *(f"{row['fitted_alpha']:.3f} {verdict(row)}" for row in found)])
    columns = "way", *(f"{count:,} vectors" for count in counts)
    show(f"Exponent 2 on ranks {window(rows[0])}, by ways of summing", columns, lines)


PRINTED = {
    "alpha": print_alpha,
    "rank": print_rank,
    "error_bars": print_error_bars,
    "traps": print_traps,
}

if __name__ == "__main__":
    run_command(main)
