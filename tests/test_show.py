"""The summary page: drawn from any part of a run folder, readable errors, no jax."""

import json
import struct
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from synthetic_run import make_run

from lens_jax import axis_style, panels
from lens_jax.fits import fit_power_law, rankme, topk_share
from lens_jax.jackknife import alpha_error, jackknife
from lens_jax.records import write_step
from lens_jax.saved_run import display_windows, layer_name, read_run, site_name
from lens_jax.show import draw_run, main

SMALL = {"width": 24, "num_layers": 4, "num_samples": 24, "steps": (0, 1, 2, 8)}
ALL_PANELS = (*panels.PANELS, panels.rankme_heat_map)
KINDS = (panels.ACTIVATION, panels.LAST_TOKEN, panels.GRADIENT, panels.CENTRED, panels.WEIGHT)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run") / "first", **SMALL)


def draw_panel(panel, run):
    ax = Figure().subplots()
    panel(ax, run)
    return ax


def all_text(ax):
    legend = ax.get_legend()
    return [text.get_text() for text in [*ax.texts, *(legend.get_texts() if legend else [])]]


def test_page_is_a_png_of_1920_by_1080(run_folder):
    path = draw_run(run_folder)
    assert path == run_folder / "summary.png"
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", head[16:]) == (1920, 1080)
    assert path.stat().st_size > 60_000
    assert not list(run_folder.glob(".*"))


def test_a_named_measurement_is_drawn_beside_the_runs_own(tmp_path, capsys):
    folder = make_run(tmp_path / "run", **SMALL)
    (folder / "spectra").rename(folder / "spectra_large")
    assert read_run(folder, "large").sites(panels.ACTIVATION)
    assert not read_run(folder).spectra
    assert main([str(folder), "name=large"]) == 0
    assert (folder / "summary_large.png").stat().st_size > 60_000
    assert main([str(folder), "name=paper"]) == 2
    assert capsys.readouterr().err.endswith("no spectra_paper; give one of large\n")


@pytest.mark.parametrize(
    "leave_out", [("config", "spectra"), ("metrics", panels.ACTIVATION), ("config", *KINDS)]
)
def test_page_with_missing_parts(tmp_path, leave_out):
    folder = make_run(tmp_path / "part", **SMALL, leave_out=leave_out)
    assert draw_run(folder, tmp_path / "page.png").stat().st_size > 20_000


@pytest.mark.parametrize("panel", ALL_PANELS)
def test_every_panel_says_what_was_not_measured(tmp_path, panel):
    folder = make_run(tmp_path / "none", **SMALL, leave_out=("config", *KINDS))
    (folder / "metrics.jsonl").write_text("")
    assert all_text(draw_panel(panel, read_run(folder))) == ["not measured"]


@pytest.mark.parametrize("panel", ALL_PANELS)
@pytest.mark.parametrize("steps", [(0,), (0, 1), (3,)])
def test_every_panel_draws_short_runs(tmp_path, panel, steps):
    folder = make_run(tmp_path / "short", **SMALL | {"steps": steps})
    ax = draw_panel(panel, read_run(folder))
    ax.figure.canvas.draw()
    gradient = panel in (panels.gradient_spectra, panels.gradient_concentration)
    assert (all_text(ax) == ["all zero"]) == (gradient and steps == (0,))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("panel", ALL_PANELS)
def test_panels_survive_spectra_that_are_not_finite(tmp_path, panel):
    folder = make_run(tmp_path / "bad", **SMALL)
    arrays = {f"{kind}/h_3/attn/c_q/kernel": np.full(24, np.nan) for kind in KINDS[2:]}
    arrays |= {f"{kind}/h_3/resid_post": np.full(24, np.nan) for kind in KINDS[:2]}
    arrays["act_cov_eigenvalues_left_out/h_3/resid_post"] = np.full((8, 24), np.nan)
    write_step(folder / "spectra", 9, arrays, {"tokens": 9 * 16_384})
    draw_panel(panel, read_run(folder)).figure.canvas.draw()


def degenerate(folder, spectra):
    """A run whose steps have one spectrum each for every kind."""
    for step, values in enumerate(spectra):
        arrays = {f"{kind}/h_3/attn/c_q/kernel": values for kind in KINDS[2:]}
        arrays |= {f"{kind}/h_3/resid_post": values for kind in KINDS[:2]}
        arrays["act_cov_eigenvalues_left_out/h_3/resid_post"] = np.stack([values] * 4)
        meta = {"tokens": step * 16_384, "width": values.size}
        write_step(folder / "spectra", step, arrays, meta)
    return read_run(folder)


LAW = np.arange(1, 25.0) ** -1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("spectra", "said"),
    [
        ([np.ones(1), np.ones(1)], "not measured: no exponent at width 1"),
        ([LAW[:2], LAW[:2]], "not measured: no exponent at width 2"),
        ([0 * LAW, 0 * LAW], "all zero"),
        ([0 * LAW[:2], 0 * LAW[:2]], "all zero"),
        ([0 * LAW, np.nan * LAW], "not measured: not finite"),
        ([np.nan * LAW[:2]], "not measured: not finite"),
        ([0 * LAW, np.nan * LAW, LAW], None),
        ([np.eye(24)[0], np.eye(24)[0]], None),
    ],
)
def test_what_can_be_drawn_of_a_poor_spectrum_is_drawn(tmp_path, spectra, said):
    run = degenerate(tmp_path, spectra)
    bare = {}
    for panel in ALL_PANELS[1:]:
        ax = draw_panel(panel, run)
        ax.figure.canvas.draw()
        if not ax.has_data():
            (bare[panel.__name__],) = all_text(ax)
    narrow = {"tail_exponents", "layer_heat_map"}
    if said is None:
        assert not bare
    elif "width" in said:
        assert bare == dict.fromkeys(narrow, said)
    else:
        assert set(bare.values()) == {said}
        assert {"activation_spectra", "tail_exponents", "rankme_trajectories"} <= bare.keys()


def test_page_report_and_table_of_a_run_of_width_two(tmp_path):
    degenerate(tmp_path, [LAW[:2], 0 * LAW[:2]])
    for ending in (".png", ".html", ".csv"):
        assert draw_run(tmp_path, tmp_path / f"page{ending}").stat().st_size > 300


def test_loss_panel_draws_yardsticks_and_skips_what_is_not_finite(run_folder, tmp_path):
    texts = all_text(draw_panel(panels.loss, read_run(run_folder)))
    assert "unigram entropy 6.48" in texts
    row = {"kind": "train", "step": 0, "tokens": 10, "loss": "nan"}
    rows = [row, row | {"loss": 4.0, "tokens": 20}, row | {"kind": "event", "loss": None}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.json").write_text(json.dumps({"stop": {"target_loss": 3.2}}))
    ax = draw_panel(panels.loss, read_run(tmp_path))
    assert "target 3.20" in all_text(ax)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [4.0])


def test_curves_are_the_statistics_of_the_records(run_folder):
    run = read_run(run_folder)
    records = run.records(panels.ACTIVATION, "h_3/resid_post")
    curves = draw_panel(panels.rankme_trajectories, run).lines
    np.testing.assert_array_equal(curves[1].get_ydata(), [rankme(r.values) for r in records])
    np.testing.assert_array_equal(curves[1].get_xdata(), [r.tokens for r in records])

    ax = draw_panel(panels.tail_exponents, run)
    lowest = min(display_windows("d12", 24).values())
    expected = [fit_power_law(r.values, *lowest).alpha for r in records]
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), expected)

    alphas = draw_panel(panels.layer_heat_map, run).collections[0].get_array()
    main_window = next(iter(display_windows("d12", 24).values()))
    assert alphas.shape == (4, 4)
    assert alphas[3, 2] == fit_power_law(records[2].values, *main_window).alpha
    ranks = draw_panel(panels.rankme_heat_map, run).collections[0].get_array()
    assert ranks[3, 2] == rankme(records[2].values)

    gradients = run.records(panels.GRADIENT, "h_3/attn/c_q/kernel")
    curve = draw_panel(panels.gradient_concentration, run).lines[2]
    np.testing.assert_allclose(curve.get_ydata(), [topk_share(r.values, 10) for r in gradients])
    assert np.isnan(curve.get_ydata()[0])


def test_last_fit_is_drawn_through_the_spectrum(run_folder):
    run = read_run(run_folder)
    ax = draw_panel(panels.activation_spectra, run)
    values = run.records(panels.ACTIVATION, "h_3/resid_post")[-1].values
    rank, line = ax.lines[-1].get_data()
    shares = values[rank - 1] / values.sum()
    np.testing.assert_allclose(np.log(line).mean(), np.log(shares).mean())
    fit = fit_power_law(values, rank[0], rank[-1])
    error = alpha_error(run.left_out(panels.ACTIVATION, "h_3/resid_post")[8], rank[0], rank[-1])
    assert ax.lines[-1].get_label() == (
        rf"last $\alpha$ = {fit.alpha:.2f} $\pm$ {error:.2f}, ranks {rank[0]}-{rank[-1]}"
    )


def test_fits_of_the_tails_are_drawn_above_the_spectrum(run_folder):
    run = read_run(run_folder)
    values = run.records(panels.ACTIVATION, "h_3/resid_post")[-1].values
    lines = draw_panel(panels.activation_spectra, run).lines[-4:-1]
    assert [tuple(line.get_xdata()[[0, -1]]) for line in lines] == sorted(
        list(display_windows("d12", 24).values())[1:]
    )
    for line in lines:
        rank, height = line.get_data()
        shares = values[rank - 1] / values.sum()
        raised = np.log(height).mean() - np.log(shares).mean()
        assert raised == pytest.approx(np.log(panels.RAISED))


def edges_of_bands(ax):
    """(lower, upper) of each shaded band, by x."""
    found = []
    for band in ax.collections:
        corners = band.get_paths()[0].vertices
        xs = np.unique(corners[:, 0])
        ends = [[pick(corners[corners[:, 0] == x, 1]) for x in xs] for pick in (min, max)]
        found.append(np.array(ends))
    return found


def test_bands_are_jackknife_errors(run_folder):
    run = read_run(run_folder)
    site = "h_3/resid_post"
    records, left_out = run.records(panels.ACTIVATION, site), run.left_out(panels.ACTIVATION, site)
    ax = draw_panel(panels.tail_exponents, run)
    assert "jackknife" in ax.get_ylabel()
    lowest = min(display_windows("d12", 24).values())
    alphas = np.array([fit_power_law(r.values, *lowest).alpha for r in records])
    errors = np.array([alpha_error(left_out[r.step], *lowest) for r in records])
    bands = edges_of_bands(ax)
    assert len(bands) == 3
    np.testing.assert_allclose(bands[0], [alphas - errors, alphas + errors])

    ax = draw_panel(panels.rankme_trajectories, run)
    ranks = np.array([rankme(r.values) for r in records])
    errors = np.array([jackknife(rankme, left_out[r.step]) for r in records])
    bands = edges_of_bands(ax)
    assert len(bands) == 2  # no error is known of the last tokens
    np.testing.assert_allclose(bands[1], [ranks - errors, ranks + errors])


def test_without_groups_the_panel_says_whose_errors_the_bars_are(tmp_path):
    run = read_run(make_run(tmp_path / "plain", **SMALL, groups=1))
    ax = draw_panel(panels.tail_exponents, run)
    assert "OLS slope" in ax.get_ylabel()
    bars = ax.containers[0].lines[2][0].get_segments()
    lowest = min(display_windows("d12", 24).values())
    fit = fit_power_law(run.records(panels.ACTIVATION, "h_3/resid_post")[0].values, *lowest)
    np.testing.assert_allclose(bars[0][:, 1], [fit.alpha - fit.se, fit.alpha + fit.se])
    ax = draw_panel(panels.rankme_trajectories, run)
    assert "no error bars" in ax.get_ylabel()
    assert not ax.collections
    assert "(OLS)" in draw_panel(panels.activation_spectra, run).lines[-1].get_label()


def test_one_measurement_with_groups_has_bars(tmp_path):
    run = read_run(make_run(tmp_path / "one", **SMALL | {"steps": (3,)}))
    assert len(draw_panel(panels.tail_exponents, run).containers) == 3


def test_windows_follow_tier_and_width():
    assert display_windows("d12", 768) == {
        "30-150": (30, 150), "10-40": (10, 40), "40-90": (40, 90), "90-200": (90, 200)
    }  # fmt: skip
    assert display_windows("d36", 1280)["200-400"] == (200, 400)
    assert next(iter(display_windows("d48", 1600))) == "200-400"
    assert display_windows(None, 96)["30-150"] == (4, 19)


def test_sites_are_ordered_by_layer_with_the_output_last(tmp_path):
    sites = ("final_norm", "h_2/resid_post", "h_10/z", "h_10/resid_post", "h_9/resid_post")
    arrays = {f"{panels.ACTIVATION}/{site}": np.ones(8) for site in sites}
    write_step(tmp_path / "spectra", 0, arrays, {"tokens": 0})
    run = read_run(tmp_path)
    assert run.final_site(panels.ACTIVATION) == "h_10/resid_post"
    assert run.layers(panels.ACTIVATION) == ["h_2/resid_post", "h_9/resid_post", "h_10/resid_post"]
    assert (layer_name("h_11/attn/c_q/kernel"), site_name("h_11/attn/c_q/kernel")) == (
        "h_11",
        "attn.c_q",
    )
    assert (layer_name("logits"), site_name("logits")) == ("logits", "logits")


def test_a_cut_last_line_is_left_out_and_a_bad_one_is_named(run_folder, tmp_path):
    lines = (run_folder / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(lines[:-20])
    whole, cut = read_run(run_folder), read_run(tmp_path)
    assert cut.val["loss"].size + cut.train["loss"].size == (
        whole.val["loss"].size + whole.train["loss"].size - 1
    )
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train"}\n' + lines)
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 1 "):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("config", "target"),
    [
        ({}, None),
        ({"target_loss": None}, None),
        ({"target_loss": 4.5}, 4.5),
        ({"target_loss": "published", "published_target": 3.2}, 3.2),
    ],
)
def test_target_loss_of_a_run(tmp_path, config, target):
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_run(tmp_path).target_loss == target


def test_shallow_settings_come_before_those_of_sections(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    config = {"data": {"seed": 7, "tier": "x"}, "seed": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = read_run(tmp_path)
    assert (run.fact("seed"), run.fact("tier"), run.fact("rung")) == (3, "x", None)


def test_tokens_are_labelled_for_people():
    shown = [axis_style.short_count(n) for n in (0, 950, 16_384, 8_192_000, 1.05e9)]
    assert shown == ["0", "950", "16.4k", "8.19M", "1.05B"]
    assert axis_style.round_ticks(4e5, 8e6) == [5e5, 1e6, 2e6, 5e6]
    assert axis_style.round_ticks(1e3, 1e6) == [1e3, 1e4, 1e5, 1e6]
    assert list(axis_style.strided(9, 5)) == [0, 2, 4, 6, 8]
    assert list(axis_style.strided(1, 5)) == [0]


def test_running_mean_against_a_loop():
    values = np.random.default_rng(0).normal(size=57)
    for index, smooth in enumerate(axis_style.running_mean(values)):
        reach = min(index // 10, 56 - index)
        assert smooth == pytest.approx(np.mean(values[index - reach : index + reach + 1]))


def run_main(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_command_draws_and_prints_the_path(run_folder, tmp_path, capsys):
    out = tmp_path / "page.svg"
    assert run_main(capsys, run_folder, f"out={out}") == (0, f"{out}\n", "")
    assert out.read_text().startswith("<?xml")
    for ending, start in ((".html", "<!doctype html>"), (".csv", "step,tokens,kind,site,")):
        out = tmp_path / f"page{ending}"
        assert run_main(capsys, run_folder, f"out={out}") == (0, f"{out}\n", "")
        assert out.read_text(encoding="utf-8").startswith(start)
    assert not list(tmp_path.glob(".*"))


def test_bad_arguments_end_in_one_line(run_folder, tmp_path, capsys):
    damaged = make_run(tmp_path / "damaged", **SMALL)
    (damaged / "spectra" / "step_00000001.npz").write_bytes(b"PK")
    no_json = make_run(tmp_path / "no_json", **SMALL, leave_out=("spectra",))
    (no_json / "config.json").write_text("{")
    for arguments, part in [
        (["nowhere"], "nowhere"),
        ([tmp_path], "no run folder"),
        ([run_folder, run_folder], "2 run folders"),
        (["out=a.png"], "0 run folders"),
        ([run_folder, "dpi=300"], "dpi=300"),
        ([run_folder, "--force"], "--force"),
        ([run_folder, "out=page.gif"], "end the name in .png, .pdf, .svg, .html, .csv"),
        ([run_folder, "out=missing/page.html"], "no such folder missing"),
        ([run_folder, "out=missing/page.png"], "no such folder missing"),
        ([damaged], "step_00000001.npz"),
        ([no_json], "config.json"),
    ]:
        code, printed, error = run_main(capsys, *arguments)
        assert (code, printed) == (2, "")
        assert error.startswith("error: ")
        assert part in error
        assert error.count("\n") == 1


def test_help_is_quick_and_nothing_imports_jax(run_folder, tmp_path):
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lens_jax.show", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.startswith("usage: python -m lens_jax.show RUN")
    assert ".html" in shown.stdout
    assert "matplotlib" not in shown.stderr
    assert loaded(run_folder, tmp_path / "a.csv") == "False False False"
    assert loaded(run_folder, tmp_path / "a.png", tmp_path / "a.html") == "False False True"


def loaded(run_folder, *outs):
    """Whether jax, pyplot and matplotlib are loaded after these files were written."""
    calls = "; ".join(f"assert main([{str(run_folder)!r}, 'out={out}']) == 0" for out in outs)
    names = "'jax', 'matplotlib.pyplot', 'matplotlib'"
    code = f"import sys; from lens_jax.show import main; {calls}; "
    code += f"print(*(name in sys.modules for name in ({names})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]
