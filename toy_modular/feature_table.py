"""What was found in every probed band at the end of every run, as a table (toy spec 5).

A row a run, band and table (by current or next state): H_peak with its mode and frequency, the
three H_S, Gini, effective modes and first principal component; beside them what codes without
structure have, of either state (H_peak with its selection at the width of the band's h, the others
at the expected shares of many directions), and what H_peak a probe of the published size would have
of such a code; and what keeping or dropping the key mode does to the loss of the last position,
beside controls (`edits`). NumPy.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from lens_jax.plain_rows import csv_text
from toy_modular.edit_names import EDIT_NAMES, SPANS
from toy_modular.features import (
    effective_modes,
    gini,
    h_peak,
    mode_shares,
    pair_masses,
    principal_modes,
)
from toy_modular.mode_tables import TABLES, chance_peaks, fixed_modes, null_shares, scores
from toy_modular.nulls import sampled_null
from toy_modular.records import LAW, Run, band_numbers

PUBLISHED_WALKS = 12_000
"""Walks of the published probe of a band."""


def feature_rows(runs: Sequence[Run], k: int) -> Iterator[dict]:
    """Yields the rows of finished runs; k: modes of H_S. NaN for what was not recorded."""
    for run in runs:
        if not (run.finished and run.features):
            continue
        last = run.features[-1]
        names = {key: getattr(run, key) for key in ("name", "stage", "batch", "seed")}
        for band in run.bands:
            for table in TABLES:
                yield {
                    **names,
                    "lr": run.config.get("lr"),
                    "step": last.step,
                    "band": band.replace("_", ":"),
                    "table": table,
                    **_modes(last, table, band, k),
                    **_nulls(last, table, band, k),
                    **_edits(last, table, band),
                }


def _modes(row, table: str, band: str, k: int) -> dict[str, float]:
    values = row.array(table, band)
    c, _ = band_numbers(band)
    peak, shares = h_peak(values), mode_shares(values)
    found = scores(row, table, band, fixed_modes(row, band, k, table), k)
    first = principal_modes(values, 1)
    whole = bool(first.modes.size)
    return {
        "h_peak": peak.share,
        "mode": peak.mode,
        "frequency": peak.mode / c,
        "h_s_dominant": found.dominant,
        f"h_s_greatest_{k}": found.greatest,
        "gini": gini(pair_masses(shares)),
        "effective_modes": effective_modes(shares),
        "pc1_share": float(first.shares[0]) if whole else np.nan,
        "pc1_mode": int(first.modes[0]) if whole else 0,
    }


def _nulls(row, table: str, band: str, k: int) -> dict[str, float]:
    found = {}
    for code in TABLES:
        shares = null_shares(row, table, band, code)
        masses = np.sort(pair_masses(shares))[::-1]
        found |= {
            f"null_{code}_h_s_dominant": float(masses[0]),
            f"null_{code}_h_s_greatest_{k}": float(masses[:k].sum()),
            f"null_{code}_gini": gini(masses),
            f"null_{code}_effective_modes": effective_modes(shares),
        }
    if row.has("covariance", band):
        for code, null in chance_peaks(row, table, band).items():
            found |= {f"null_{code}": null.mean, f"null_{code}_upper": null.upper}
    if table == TABLES[0]:
        c, _ = band_numbers(band)
        published = sampled_null(c, row.array(LAW, band), PUBLISHED_WALKS)
        found["null_next_published_walks"] = published.share
    return found


def _edits(row, table: str, band: str) -> dict[str, float]:
    if not row.has("edits", band):
        return {}
    values = dict(zip(EDIT_NAMES, row.array("edits", band).tolist(), strict=True))
    found = {"base_loss": values["base_loss"]}
    for span in SPANS:
        start = f"{table}_{span}_"
        own = {name: v for name, v in values.items() if name.startswith(start)}
        found |= {name.removeprefix(f"{table}_"): value for name, value in own.items()}
    if table == TABLES[0]:
        found |= {name: v for name, v in values.items() if name.startswith("embedding_")}
    return {name: value for name, value in found.items() if not name.endswith("_diluted")}


def features_csv(rows: Sequence[dict]) -> str:
    """The rows as CSV, the columns of all of them; empty for what is not finite or not there."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    short = ({name: _rounded(value) for name, value in row.items()} for row in rows)
    return csv_text(short, names)


def _rounded(value):
    return f"{value:.6g}" if isinstance(value, float) and np.isfinite(value) else value
