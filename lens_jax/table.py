"""Every statistic of a run with its error: a row per measured step and site, for CSV and report.

Three kinds of rows are never mixed, for their numbers do not compare: activations are described by
the eigenvalues of a covariance, gradients and weights by singular values, whose alpha is half the
alpha of the eigenvalues that are their squares (protocol spec 1.5). A column belongs to one kind.

A statistic is None where the record does not hold what it needs, and NaN where the spectrum does
not define it, as an exponent on ranks that hold nothing but rounding. Errors are jackknife standard
errors over left-out groups, or None: the standard error of a least-squares slope is a column of its
own and never stands in for them. numpy only.
"""

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lens_jax.comparisons import subspace_overlap
from lens_jax.fits import (
    COVARIANCE_FLOOR,
    GRAM_FLOOR,
    REFERENCE_WIDTH,
    fit_alpha_req,
    fit_power_law,
    gradient_noise_scale,
    mean_fraction,
    participation_ratio,
    rankme,
    rankme_sigma,
    topk_share,
    widest_power_law,
)
from lens_jax.jackknife import alpha_error, expected_jsd, jackknife, jsd_null
from lens_jax.saved_run import SavedRun, depth, display_windows, gradient_window, weight_window

KINDS = {"activation": "act_", "gradient": "grad_", "weight": "weight_"}
"""Kinds of rows and how the kinds of their records begin."""

EIGENVECTORS = "act_cov_eigenvectors"
REQ_FIRST, REQ_LAST = 6, 100  # ranks of alpha-ReQ
WIDEST_RANKS = 10  # shorter spectra have no such fit

Arrays = Mapping[str, np.ndarray]


class Statistic(NamedTuple):
    """A number and its jackknife standard error; None is what the record cannot tell."""

    value: float | None = None
    error: float | None = None


class Row(NamedTuple):
    """One measurement; `statistics` has the columns of its kind, the missing ones left out."""

    step: int
    tokens: int
    kind: str
    site: str
    statistics: dict[str, Statistic]


class Column(NamedTuple):
    """A statistic of one kind of rows: its name in a CSV file, its heading, what it means.

    has_error: whether it may carry an error, which has a column `<name>_se` of its own in a file;
    shown: whether a report has it.
    """

    name: str
    title: str
    note: str
    has_error: bool = False
    shown: bool = True


def table_rows(run: SavedRun) -> list[Row]:
    """Returns a row for every measured step, kind and site: by kind, then step, then depth."""
    measured: dict[tuple[str, str], dict[int, Arrays]] = {}
    seen = {}
    for array_kind, sites in run.spectra.items():
        kind = next((kind for kind, start in KINDS.items() if array_kind.startswith(start)), None)
        if kind is None:
            continue
        for site, records in sites.items():
            for record in records:
                steps = measured.setdefault((kind, site), {})
                steps.setdefault(record.step, {})[array_kind] = record.values
                seen[record.step] = (record.tokens, record.meta)

    describe = {"activation": _activation, "gradient": _gradient, "weight": _weight}
    tier = run.fact("tier")
    rows = []
    for (kind, site), steps in measured.items():
        for step, arrays in steps.items():
            tokens, meta = seen[step]
            found = describe[kind](arrays, meta, tier)
            if kind == "activation":
                found |= _overlaps(steps, step)
            rows.append(Row(step, tokens, kind, site, found))
    order = list(KINDS)
    return sorted(rows, key=lambda row: (order.index(row.kind), row.step, depth(row.site)))


def _activation(arrays: Arrays, meta: dict, tier: str | None) -> dict[str, Statistic]:
    spectrum, left_out = _with_left_out(arrays, "act_cov_eigenvalues")
    last = arrays.get("act_last_cov_eigenvalues")
    found = {} if last is None else {"act_last_rankme_lambda": Statistic(rankme(last))}
    if spectrum is None:
        return found
    for name, window in display_windows(tier, spectrum.size).items():
        found |= _power_law(_alpha_name(name), spectrum, left_out, window)
    for name, statistic in _ACTIVATION_STATISTICS.items():
        found[name] = _statistic(statistic, spectrum, left_out=left_out)
    if spectrum.size >= REQ_FIRST:
        found["act_alpha_req"] = _statistic(_alpha_req, spectrum, left_out=left_out)
    if spectrum.size >= WIDEST_RANKS:
        widest = widest_power_law(spectrum)
        for part in ("alpha", "r2", "first", "last"):
            value = getattr(widest, part) if np.isfinite(widest.alpha) else np.nan
            found[f"act_widest_{part}"] = Statistic(value)
    if "act_mean_sq" in arrays and meta.get("act_tokens", 0) > 1:
        fraction = mean_fraction(spectrum, float(arrays["act_mean_sq"]), meta["act_tokens"])
        found["act_mean_fraction"] = Statistic(fraction)
    if left_out is not None:
        found["act_jsd_floor"] = Statistic(expected_jsd(left_out))
    if "act_cov_eigenvalues_halves" in arrays:
        found["act_jsd_halves"] = Statistic(jsd_null(arrays["act_cov_eigenvalues_halves"]))
    return found


def _alpha_req(values) -> float:
    """NaN where the spectrum ends before the ranks do, as all exponents here."""
    return fit_alpha_req(values).on_whole(REQ_LAST, values.size).alpha


_ACTIVATION_STATISTICS = {
    "act_rankme_lambda": rankme,
    "act_rankme_sigma": rankme_sigma,
    "act_top1_share": lambda values: topk_share(values, 1),
    "act_top10_share": lambda values: topk_share(values, 10),
    "act_participation_ratio": participation_ratio,
}


def _overlaps(steps: dict[int, Arrays], step: int) -> dict[str, Statistic]:
    """Overlap of the leading eigenvectors with those of the step before and of the last step."""
    known = [other for other in sorted(steps) if EIGENVECTORS in steps[other]]
    if step not in known or step == known[0] == known[-1]:
        return {}
    others = {"act_overlap_before": known[known.index(step) - 1], "act_overlap_last": known[-1]}
    found = {}
    for name, other in others.items():
        u, v = steps[step][EIGENVECTORS], steps[other][EIGENVECTORS]
        first = name == "act_overlap_before" and step == known[0]
        if not first and other != step and u.shape == v.shape:
            found[name] = Statistic(subspace_overlap(u, v))
    return found


def _gradient(arrays: Arrays, meta: dict, tier: str | None) -> dict[str, Statistic]:
    found = {}
    for ending in ("", "_centred"):
        spectrum, left_out = _with_left_out(arrays, f"grad_singular_values{ending}")
        if spectrum is not None:
            window = gradient_window(spectrum.size)
            name = f"grad_sigma_alpha{ending}"
            found |= _power_law(name, spectrum, left_out, window, GRAM_FLOOR)
            found |= _shares("grad", ending, spectrum, left_out)
    centred, centred_left_out = _with_left_out(arrays, "grad_singular_values_centred")
    mean_sq, mean_left_out = _with_left_out(arrays, "grad_mean_sq")
    if centred is None or mean_sq is None:
        return found
    both = centred_left_out is not None and mean_left_out is not None
    noise = Statistic(
        _noise_scale(centred, mean_sq),
        jackknife(_noise_scale, centred_left_out, mean_left_out) if both else None,
    )
    found["grad_noise_scale_samples"] = noise
    length = meta.get("sample_tokens")
    if length is not None:
        error = None if noise.error is None else noise.error * length
        found["grad_noise_scale_tokens"] = Statistic(noise.value * length, error)
    return found


def _noise_scale(centred, mean_sq) -> float:
    return gradient_noise_scale(centred, mean_sq).b_simple


def _weight(arrays: Arrays, meta: dict, tier: str | None) -> dict[str, Statistic]:
    spectrum = arrays.get("weight_singular_values")
    if spectrum is None:
        return {}
    window = weight_window(spectrum.size)
    found = _power_law("weight_sigma_alpha", spectrum, None, window)
    return found | _shares("weight", "", spectrum, None)


def _shares(kind: str, ending: str, spectrum, left_out) -> dict[str, Statistic]:
    floor = GRAM_FLOOR if kind == "grad" else 0.0
    return {
        f"{kind}_rankme_sigma{ending}": _statistic(
            lambda values: rankme(values, floor), spectrum, left_out=left_out
        ),
        f"{kind}_top10_share{ending}": _statistic(
            lambda values: topk_share(values, 10), spectrum, left_out=left_out
        ),
    }


def _power_law(
    name: str, spectrum, left_out, window: tuple[int, int], floor: float = COVARIANCE_FLOOR
) -> dict[str, Statistic]:
    """Alpha with its error, and what belongs to the fit as columns beside it.

    NaN where the spectrum ends inside the window, with its last rank: a column has one window.
    """
    if spectrum.size < window[0]:
        return {}
    fit = fit_power_law(spectrum, *window, floor).on_whole(window[1], spectrum.size)
    error = None if left_out is None else alpha_error(left_out, *window, floor)
    beside = {"r2": fit.r2, "ols_se": fit.se, "first": fit.first, "last": fit.last}
    parts = {f"{name}_{part}": Statistic(value) for part, value in beside.items()}
    return {name: Statistic(fit.alpha, error), **parts}


def _statistic(function: Callable[..., float], spectrum, *, left_out) -> Statistic:
    error = None if left_out is None else jackknife(function, left_out)
    return Statistic(function(spectrum), error)


def _with_left_out(arrays: Arrays, kind: str):
    """Returns an array and its replicates, which are None unless there are two groups or more."""
    left_out = arrays.get(f"{kind}_left_out")
    return arrays.get(kind), left_out if left_out is not None and len(left_out) > 1 else None


def _alpha_name(window: str) -> str:
    return f"act_lambda_alpha_{window.replace('-', '_')}"


def table_columns(run: SavedRun, rows: list[Row], kind: str) -> list[Column]:
    """Returns the columns of one kind of rows, in the order of a report."""
    if kind == "activation":
        # Their names do not depend on the width, only on the tier.
        names = display_windows(run.fact("tier"), REFERENCE_WIDTH)
        alphas = [c for n in names for c in _alpha_columns(rows, _alpha_name(n), n, "lambda")]
        return [*alphas, *(Column(*column) for column in _ACTIVATION_COLUMNS)]
    if kind == "weight":
        alpha = _alpha_columns(rows, "weight_sigma_alpha", "30-150", _SIGMA)
        return [*alpha, *_share_columns("weight", has_error=False)]
    columns = []
    for ending, words in (("", "uncentred"), ("_centred", "mean gradient removed")):
        columns += _alpha_columns(rows, f"grad_sigma_alpha{ending}", "30-150", _SIGMA, words)
        columns += _share_columns("grad", ending, words, has_error=True)
    return [*columns, *(Column(*column) for column in _NOISE_COLUMNS)]


def write_csv(run: SavedRun, path: str | Path) -> None:
    """Writes the table of a run: UTF-8, a header line, numbers in full precision.

    A cell is empty where the record cannot tell the number, `nan` where it is not defined and
    `inf` for a noise scale beyond what the samples can tell. The error of `<name>` is `<name>_se`.
    """
    rows = table_rows(run)
    columns = [column for kind in KINDS for column in table_columns(run, rows, kind)]
    names = [n for c in columns for n in ((c.name, f"{c.name}_se") if c.has_error else (c.name,))]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["step", "tokens", "kind", "site", *names])
        writer.writeheader()
        for row in rows:
            cells = {"step": row.step, "tokens": row.tokens, "kind": row.kind, "site": row.site}
            for name, (value, error) in row.statistics.items():
                cells[name] = value
                if error is not None:
                    cells[f"{name}_se"] = error
            writer.writerow(cells)


def _alpha_columns(rows: list[Row], name: str, window: str, values: str, *words) -> list[Column]:
    """Alpha in one published rank window and the columns that belong to its fit."""
    ends = [f"{name}_{end}" for end in ("first", "last")]
    found = [row.statistics for row in rows if name in row.statistics]
    whole = [statistics for statistics in found if np.isfinite(statistics[name].value)] or found
    used = {"-".join(str(statistics[end].value) for end in ends) for statistics in whole}
    here = used.pop() if len(used) == 1 else None
    ranks = (
        window if here == window else f"{here} ({window} scaled)" if here else f"{window} scaled"
    )
    title = ", ".join([f"alpha of {values}", *words, f"ranks {ranks}"])
    note = f"minus the least-squares slope of ln {values.split()[0]} on ln rank, ends included"
    return [
        Column(name, title, note, True),
        Column(f"{name}_r2", "R2", "of the fit to its left"),
        Column(f"{name}_ols_se", "OLS s.e.", "if residuals were independent", shown=False),
        Column(ends[0], "first rank", "of the window used", shown=False),
        Column(ends[1], "last rank", "of the window used", shown=False),
    ]


def _share_columns(kind: str, ending: str = "", *words: str, has_error: bool) -> list[Column]:
    titles = [", ".join([title, *words]) for title in ("RankMe of sigma", "top-10 share")]
    share = "share of the sum of sigma that the ten largest hold"
    return [
        Column(f"{kind}_rankme_sigma{ending}", titles[0], f"{_RANKME} of sigma", has_error),
        Column(f"{kind}_top10_share{ending}", titles[1], share, has_error),
    ]


_SIGMA = "sigma (half the alpha of sigma^2)"
_RANKME = "directions filled: exp of the entropy of the shares"
_JSD = "divergence in nats by sampling alone,"
_SPAN = "of the span of the leading eigenvectors (10) with that of"
# As arguments of `Column`.
_ACTIVATION_COLUMNS = (
    ("act_rankme_lambda", "RankMe of lambda", f"{_RANKME} of lambda; the primary form", True),
    ("act_rankme_sigma", "RankMe of root lambda", "the same of the roots of lambda", True),
    ("act_last_rankme_lambda", "RankMe, last tokens", "of each window's last token, eigenvalues"),
    ("act_top1_share", "top-1 share", "share of the trace in the largest lambda", True),
    ("act_top10_share", "top-10 share", "share of the trace in the ten largest", True),
    ("act_participation_ratio", "participation ratio", "(sum lambda)^2 / sum lambda^2", True),
    ("act_mean_fraction", "mean direction", "share of the mean vector in the mean squared norm"),
    ("act_alpha_req", "alpha-ReQ", "slope with weights 1 / rank, ranks 6-100, any width", True),
    ("act_widest_alpha", "alpha, widest range", "of the widest ranks with R2 of 0.99 or more"),
    ("act_widest_r2", "R2", "of the fit to its left"),
    ("act_widest_first", "from rank", "first rank of the widest range"),
    ("act_widest_last", "to rank", "last rank of the widest range"),
    ("act_jsd_floor", "JSD floor", f"{_JSD} of two measurements of this model"),
    ("act_jsd_halves", "JSD of halves", f"{_JSD} of two halves; about twice the floor"),
    ("act_overlap_before", "overlap, step before", f"{_SPAN} the measured step before"),
    ("act_overlap_last", "overlap, last step", f"{_SPAN} the last step; unrelated: 10 / width"),
)
_NOISE_COLUMNS = (
    ("grad_noise_scale_samples", "noise scale, samples", "tr Sigma / |G|^2 without bias", True),
    ("grad_noise_scale_tokens", "noise scale, tokens", "the same times a sample's tokens", True),
)
