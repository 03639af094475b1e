"""The table of a run: every number against its formula written out, and what is missing."""

import csv
import math
from dataclasses import replace

import numpy as np
import pytest
from synthetic_run import make_run

from lens_jax.records import read_step, write_step
from lens_jax.saved_run import display_windows, gradient_window, read_run, weight_window
from lens_jax.table import KINDS, Statistic, table_columns, table_rows, write_csv

SMALL = {"width": 24, "num_layers": 4, "num_samples": 24, "steps": (0, 1, 2, 8)}
SITE, PATH = "h_3/resid_post", "h_3/attn/c_v/kernel"
ACT = "act_cov_eigenvalues"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run") / "first", **SMALL)


@pytest.fixture(scope="module")
def rows(folder):
    return table_rows(read_run(folder))


def arrays_of(folder, step, site):
    """{kind: values} of a site as the file has them."""
    _, arrays = read_step(folder / "spectra" / f"step_{step:08d}.npz")
    return {n.partition("/")[0]: v for n, v in arrays.items() if n.partition("/")[2] == site}


def statistics_of(rows, step, site, kind):
    (row,) = [r for r in rows if (r.step, r.site, r.kind) == (step, site, kind)]
    return row.statistics


def slope(values, first, last):
    rank = np.arange(first, last + 1)
    return -np.polyfit(np.log(rank), np.log(np.float64(values)[first - 1 : last]), 1)[0]


def r2(values, first, last):
    x, y = np.log(np.arange(first, last + 1)), np.log(np.float64(values)[first - 1 : last])
    return np.corrcoef(x, y)[0, 1] ** 2


def entropy_rank(values):
    return math.exp(-sum(v / sum(values) * math.log(v / sum(values)) for v in values if v > 0))


def top(values, k):
    return sum(list(values)[:k]) / sum(values)


def participation(values):
    return sum(values) ** 2 / sum(v * v for v in values)


def spread(statistic, *left_out):
    """Delete-one standard error, by its definition."""
    found = [statistic(*(np.float64(part) for part in parts)) for parts in zip(*left_out)]  # noqa: B905
    mean = sum(found) / len(found)
    return math.sqrt((len(found) - 1) / len(found) * sum((value - mean) ** 2 for value in found))


def check(found, statistic, values, left_out):
    np.testing.assert_allclose(found.value, statistic(values), rtol=1e-9)
    np.testing.assert_allclose(found.error, spread(statistic, left_out), rtol=1e-6)


def test_a_row_for_every_measurement_in_order(rows, folder):
    keys = [(row.kind, row.step, row.site) for row in rows]
    assert len(keys) == len(set(keys)) == 4 * (4 + 8 + 8)  # probed layers: 0 and 3
    assert keys[:5] == [
        *(("activation", 0, f"h_{layer}/resid_post") for layer in range(4)),
        ("activation", 1, "h_0/resid_post"),
    ]
    kinds = [row.kind for row in rows]
    assert kinds == sorted(kinds, key=list(KINDS).index)
    assert {row.step: row.tokens for row in rows} == {s: s * 16_384 for s in SMALL["steps"]}


def test_activations_against_formulas(rows, folder):
    found, arrays = statistics_of(rows, 2, SITE, "activation"), arrays_of(folder, 2, SITE)
    values, left_out = arrays["act_cov_eigenvalues"], arrays["act_cov_eigenvalues_left_out"]
    for published, (first, last) in display_windows("d12", 24).items():
        name = f"act_lambda_alpha_{published.replace('-', '_')}"
        check(found[name], lambda s, w=(first, last): slope(s, *w), values, left_out)
        assert found[f"{name}_r2"].value == pytest.approx(r2(values, first, last))
        assert (found[f"{name}_first"].value, found[f"{name}_last"].value) == (first, last)
        x = np.log(np.arange(first, last + 1))
        y = np.log(values[first - 1 : last])
        if last - first > 2:
            covariance = np.polyfit(x, y, 1, cov=True)[1]
            assert found[f"{name}_ols_se"].value == pytest.approx(covariance[0, 0] ** 0.5)
            assert found[f"{name}_ols_se"].value != pytest.approx(found[name].error, rel=1e-2)
    check(found["act_rankme_lambda"], entropy_rank, values, left_out)
    check(found["act_rankme_sigma"], lambda s: entropy_rank(np.sqrt(s)), values, left_out)
    check(found["act_top1_share"], lambda s: top(s, 1), values, left_out)
    check(found["act_top10_share"], lambda s: top(s, 10), values, left_out)
    check(found["act_participation_ratio"], participation, values, left_out)

    def weighted(s):
        rank = np.arange(6, 25)
        return -np.polyfit(np.log(rank), np.log(s[5:24]), 1, w=rank**-0.5)[0]

    check(found["act_alpha_req"], weighted, values, left_out)
    last = entropy_rank(arrays["act_last_cov_eigenvalues"])
    assert found["act_last_rankme_lambda"] == (pytest.approx(last), None)
    mean, count = arrays["act_mean_sq"], 8192
    share = mean / (mean + values.sum() * (count - 1) / count)
    assert found["act_mean_fraction"] == (pytest.approx(share), None)


def test_widest_range_by_trying_all(rows, folder):
    found = statistics_of(rows, 8, SITE, "activation")
    values = arrays_of(folder, 8, SITE)["act_cov_eigenvalues"]
    ranges = [(a, b) for a in range(1, 25) for b in range(a + 9, 25) if r2(values, a, b) >= 0.99]
    widest = max(ranges, key=lambda ends: (math.log(ends[1] / ends[0]), ends[1] - ends[0]))
    assert (found["act_widest_first"].value, found["act_widest_last"].value) == widest
    assert found["act_widest_alpha"].value == pytest.approx(slope(values, *widest))
    assert found["act_widest_r2"].value == pytest.approx(r2(values, *widest))


def test_nulls_of_the_divergence(rows, folder):
    found, arrays = statistics_of(rows, 2, SITE, "activation"), arrays_of(folder, 2, SITE)
    p, q = (np.float64(half) / np.float64(half).sum() for half in arrays[f"{ACT}_halves"])
    middle = (p + q) / 2
    divergence = (p @ np.log(p / middle) + q @ np.log(q / middle)) / 2
    assert found["act_jsd_halves"].value == pytest.approx(divergence)
    shares = np.float64(arrays[f"{ACT}_left_out"])
    shares /= shares.sum(axis=1)[:, None]
    variance = len(shares) - 1
    floor = variance * shares.var(axis=0) / shares.mean(axis=0) / 4
    assert found["act_jsd_floor"].value == pytest.approx(floor.sum())


def test_overlaps_with_the_step_before_and_the_last(rows, folder):
    frames = [arrays_of(folder, step, SITE)["act_cov_eigenvectors"] for step in SMALL["steps"]]
    found = [statistics_of(rows, step, SITE, "activation") for step in SMALL["steps"]]

    def share(u, v):
        return sum((u[:, i] @ v[:, j]) ** 2 for i in range(10) for j in range(10)) / 10

    assert "act_overlap_before" not in found[0]
    assert "act_overlap_last" not in found[3]
    for step in (1, 2, 3):
        before = share(frames[step], frames[step - 1])
        assert found[step]["act_overlap_before"].value == pytest.approx(before, rel=1e-5)
    for step in (0, 1, 2):
        last = share(frames[step], frames[3])
        assert found[step]["act_overlap_last"].value == pytest.approx(last, rel=1e-5)


def test_gradients_and_weights_against_formulas(rows, folder):
    found, arrays = statistics_of(rows, 2, PATH, "gradient"), arrays_of(folder, 2, PATH)
    window = gradient_window(24)
    for ending in ("", "_centred"):
        values = arrays[f"grad_singular_values{ending}"]
        left_out = arrays[f"grad_singular_values{ending}_left_out"]
        alpha = found[f"grad_sigma_alpha{ending}"]
        check(alpha, lambda s: slope(s, *window), values, left_out)
        # of singular values: half of what their squares have
        assert slope(values**2, *window) == pytest.approx(2 * alpha.value)
        check(found[f"grad_rankme_sigma{ending}"], entropy_rank, values, left_out)
        check(found[f"grad_top10_share{ending}"], lambda s: top(s, 10), values, left_out)

    def noise(sigma, mean_sq):
        trace = sum(sigma**2) / (len(sigma) - 1)
        true = mean_sq - trace / len(sigma)
        return trace / true if true > 0 else math.inf

    names = ("grad_singular_values_centred", "grad_mean_sq")
    scale = noise(*(arrays[name] for name in names))
    error = spread(noise, *(arrays[f"{name}_left_out"] for name in names))
    assert found["grad_noise_scale_samples"] == pytest.approx((scale, error), nan_ok=True)
    tokens = (128 * scale, 128 * error)
    assert found["grad_noise_scale_tokens"] == pytest.approx(tokens, nan_ok=True)

    found, arrays = statistics_of(rows, 2, PATH, "weight"), arrays_of(folder, 2, PATH)
    values = arrays["weight_singular_values"]
    assert found["weight_sigma_alpha"] == (pytest.approx(slope(values, *weight_window(24))), None)
    assert found["weight_rankme_sigma"].value == pytest.approx(entropy_rank(values))
    assert found["weight_top10_share"].value == pytest.approx(top(values, 10))


def test_windows_of_gradients_go_with_the_samples_and_of_weights_with_the_width():
    assert (gradient_window(512), gradient_window(2048)) == ((30, 150), (30, 150))
    assert (gradient_window(64), gradient_window(256)) == ((4, 19), (15, 75))
    assert (weight_window(768), weight_window(1600), weight_window(96)) == (
        (30, 150), (30, 150), (4, 19)
    )  # fmt: skip
    for count in range(1, 40):
        assert gradient_window(count)[0] <= max(count, 1) >= weight_window(count)[0]


def test_without_groups_no_error_takes_the_place_of_the_jackknife(tmp_path):
    rows = table_rows(read_run(make_run(tmp_path / "plain", **SMALL, groups=1)))
    assert {found.error for row in rows for found in row.statistics.values()} == {None}
    found = statistics_of(rows, 2, SITE, "activation")
    assert found["act_lambda_alpha_30_150_ols_se"].value > 0
    assert not {"act_jsd_floor", "act_jsd_halves"} & set(found)
    assert np.isfinite(found["act_rankme_lambda"].value)


def test_what_zero_gradients_do_not_define_is_nan(rows):
    found = statistics_of(rows, 0, PATH, "gradient")
    for name in ("grad_sigma_alpha", "grad_rankme_sigma_centred", "grad_noise_scale_tokens"):
        assert np.isnan(found[name].value), name
        assert np.isnan(found[name].error), name


@pytest.mark.filterwarnings("error")
def test_odd_records_give_rows_and_no_exception(tmp_path):
    arrays = {
        "act_cov_eigenvalues/h_0/z": np.array([2.0, 1.0]),  # too narrow for any fit
        "act_cov_eigenvalues/h_1/z": np.full(24, np.nan),
        "act_cov_eigenvalues_left_out/h_1/z": np.full((4, 24), np.nan),
        "act_last_cov_eigenvalues/h_2/z": np.arange(5.0, 0, -1),
        "act_cov_eigenvectors/h_0/z": np.eye(2),
        "grad_singular_values/h_0/w": np.array([1.0]),
        "grad_singular_values_centred/h_1/w": np.array([3.0, 2.0, 0.0]),
        "grad_mean_sq/h_1/w": np.array(0.1),  # below what noise alone would make of it
        "weight_singular_values/h_0/w": np.array([1.0]),
        "own_measure/h_0/w": np.ones(3),
    }
    write_step(tmp_path / "spectra", 3, arrays, {"tokens": 9, "sample_tokens": 2})
    run = read_run(tmp_path)
    rows = table_rows(run)
    assert {(row.kind, row.site) for row in rows} == {
        *(("activation", f"h_{layer}/z") for layer in range(3)),
        ("gradient", "h_0/w"),
        ("gradient", "h_1/w"),
        ("weight", "h_0/w"),
    }
    narrow = statistics_of(rows, 3, "h_0/z", "activation")
    assert narrow["act_rankme_lambda"].value == pytest.approx(entropy_rank([2.0, 1.0]))
    assert not any(name.startswith(("act_lambda", "act_widest", "act_overlap")) for name in narrow)
    assert set(statistics_of(rows, 3, "h_2/z", "activation")) == {"act_last_rankme_lambda"}
    swamped = statistics_of(rows, 3, "h_1/w", "gradient")
    assert swamped["grad_noise_scale_tokens"] == Statistic(math.inf)
    for kind in KINDS:
        assert table_columns(run, rows, kind)


def test_columns_are_what_rows_have(rows, folder):
    run = read_run(folder)
    for kind in KINDS:
        columns = {column.name: column for column in table_columns(run, rows, kind)}
        own = [row for row in rows if row.kind == kind]
        assert set(columns) == {name for row in own for name in row.statistics}
        for row in own:
            for name, found in row.statistics.items():
                assert found.error is None or columns[name].has_error
        for column in columns.values():
            on_sigma = column.name.startswith(("grad_sigma_alpha", "weight_sigma_alpha"))
            if on_sigma and column.has_error:
                assert "half the alpha of sigma^2" in column.title


def test_headings_name_the_ranks_in_use(rows, folder):
    run = read_run(folder)
    first = table_columns(run, rows, "activation")[0]
    assert first.title == "alpha of lambda, ranks 1-5 (30-150 scaled)"
    wide = replace(run, config=run.config | {"tier": "d36"}, spectra={})
    assert table_columns(wide, [], "activation")[0].name == "act_lambda_alpha_200_400"


def test_csv_holds_every_number_in_full(rows, folder, tmp_path):
    path = tmp_path / "table.csv"
    write_csv(read_run(folder), path)
    with open(path, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert (int(line["step"]), line["kind"], line["site"]) == (row.step, row.kind, row.site)
        filled = {name for name, text in line.items() if text}
        errors = {f"{name}_se" for name, s in row.statistics.items() if s.error is not None}
        assert filled == {"step", "tokens", "kind", "site", *row.statistics, *errors}
        for name, found in row.statistics.items():
            np.testing.assert_equal(float(line[name]), float(found.value))
            if found.error is not None:
                np.testing.assert_equal(float(line[f"{name}_se"]), found.error)
