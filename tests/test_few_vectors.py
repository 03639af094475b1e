"""Measurements with fewer vectors than directions, with next to none, and with numbers that are not
finite: what is known is recorded, the rest is 0 or NaN, and nothing raises."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from synthetic_run import make_run

from lens_jax.fits import GRAM_FLOOR, fit_power_law, rankme
from lens_jax.jackknife import alpha_error
from lens_jax.lens import ProbeBatch, make_lens
from lens_jax.probes import spectra
from lens_jax.records import read_step, step_path, write_step
from lens_jax.saved_run import read_run
from lens_jax.step import init_state, make_measure_step, make_train_step
from lens_jax.table import table_rows

WIDTH = 24


def loss_fn(params, batch):
    out = batch["x"] @ params["kernel"]
    shifted = out + jnp.broadcast_to(params["bias"], out.shape)
    return jnp.mean(shifted**2), {"out": out}


def problem(rows, tokens=None, width=WIDTH, seed=0):
    rng = np.random.default_rng(seed)
    shape = (rows, width) if tokens is None else (rows, tokens, width)
    params = {
        "kernel": jnp.asarray(np.linalg.qr(rng.normal(size=(width, width)))[0], jnp.float32),
        "bias": jnp.asarray(rng.normal(size=width), jnp.float32),
    }
    return params, {"x": jnp.asarray(rng.normal(size=shape), jnp.float32)}


def measured(params, batch, xp=np, **settings):
    what = {"activations": ["out"], "gradients": ["kernel", "bias"], "weights": ["kernel"]}
    lens = make_lens(windows=len(batch["x"]), **what | settings)
    return spectra(make_measure_step(loss_fn, lens)(params, ProbeBatch(batch))[0], xp)


@pytest.mark.parametrize("xp", [np, jnp])
def test_more_directions_than_vectors_are_exactly_zero(xp):
    """64 vectors of width 256: eigenvalues beyond the 63rd were rounding that fits a power law."""
    params, batch = problem(64, width=256)
    found = measured(params, batch, xp, gradients=["bias"], normalise=False)
    eigenvalues = np.asarray(found["act_cov_eigenvalues/out"], np.float64)
    vectors = np.asarray(batch["x"] @ params["kernel"], np.float64)
    expected = np.linalg.eigvalsh(np.cov(vectors.T))[::-1]
    np.testing.assert_allclose(eigenvalues[:63], expected[:63], rtol=1e-4)
    assert not eigenvalues[63:].any()
    assert np.isnan(fit_power_law(eigenvalues, 64, 150).alpha)
    assert fit_power_law(eigenvalues, 10, 150).last == 63
    if xp is np:
        left_out = found["act_cov_eigenvalues_left_out/out"]  # 62 vectors each
        assert left_out[:, 60].all()
        assert not left_out[:, 61:].any()
        assert np.isnan(alpha_error(left_out, 10, 150))
        assert alpha_error(left_out, 10, 40) > 0


@pytest.mark.parametrize("xp", [np, jnp])
def test_gradients_have_no_more_singular_values_than_entries(xp):
    """40 samples of a bias of 24 entries."""
    params, batch = problem(40, 3)
    found = measured(params, batch, xp)
    rows = 2 * np.asarray(batch["x"] @ params["kernel"] + params["bias"][None, None], np.float64)
    rows = rows.mean(1) / WIDTH
    for ending, matrix in (("", rows), ("_centred", rows - rows.mean(0))):
        values = np.asarray(found[f"grad_singular_values{ending}/bias"], np.float64)
        assert values.shape == (40,)
        expected = np.linalg.svd(matrix, compute_uv=False)
        np.testing.assert_allclose(values[:WIDTH], expected, rtol=2e-3)
        assert not values[WIDTH:].any()
        assert rankme(values) == pytest.approx(rankme(expected), rel=1e-4)
        assert fit_power_law(values, 2, 40, GRAM_FLOOR).last == WIDTH
        if xp is np:
            left_out = found[f"grad_singular_values{ending}_left_out/bias"]
            assert left_out[:, WIDTH - 1].all()
            assert not left_out[:, WIDTH:].any()
    kernel = np.asarray(found["grad_singular_values_centred/kernel"])  # 576 entries
    assert kernel[38] > 0
    assert kernel[39] == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_next_to_no_vectors(rows):
    params, batch = problem(rows, width=3)
    found = measured(params, batch, normalise=False)
    eigenvalues = found["act_cov_eigenvalues/out"]
    assert eigenvalues.shape == (3,)
    assert np.isnan(eigenvalues).all() == (rows == 1)
    assert np.isnan(found["act_cov_eigenvectors/out"]).all() == (rows == 1)
    has = {name.partition("/")[0] for name in found}
    # left out: groups of one window; halves of three windows are two and one
    assert ("act_cov_eigenvalues_left_out" in has) == (rows >= 3)
    assert ("act_cov_eigenvalues_halves" in has) == (rows >= 4)
    assert ("grad_singular_values_left_out" in has) == (rows >= 3)
    assert found["grad_singular_values/kernel"].shape == (rows,)
    vectors = np.asarray(batch["x"] @ params["kernel"], np.float64)
    if rows > 1:
        expected = np.linalg.eigvalsh(np.cov(vectors.T))[::-1]
        np.testing.assert_allclose(eigenvalues, expected, atol=1e-6 * expected[0])
    if rows == 3:
        left_out = found["act_cov_eigenvalues_left_out/out"]
        expected = [((vectors[i] - vectors[j]) ** 2).sum() / 2 for i, j in ((1, 2), (0, 2), (0, 1))]
        np.testing.assert_allclose(left_out[:, 0], expected, rtol=1e-4)


def test_last_positions_of_one_window_have_no_covariance():
    found = measured(*problem(1, 5))
    assert np.isnan(found["act_last_cov_eigenvalues/out"]).all()
    assert np.isfinite(found["act_cov_eigenvalues/out"]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_what_is_not_finite_is_nan_in_its_own_place(bad):
    """In an activation and with it the gradients, or in a weight; shapes are as ever."""
    params, batch = problem(8, 4)
    whole = measured(params, batch, normalise=False)
    spoilt = {"x": batch["x"].at[3, 1, 2].set(bad)}
    for kind, found in (
        ("data", measured(params, spoilt, normalise=False)),
        ("weight", measured(params | {"kernel": params["kernel"].at[0, 0].set(bad)}, batch)),
    ):
        assert found.keys() == whole.keys()
        for name, values in whole.items():
            assert found[name].shape == values.shape, name
        assert np.isnan(found["act_cov_eigenvalues/out"]).all() or bad == 1e30
        if not np.isfinite(bad):
            assert np.isnan(found["grad_singular_values/bias"]).all()
            weights = found["weight_singular_values/kernel"]
            assert np.isnan(weights).all() == (kind == "weight")


def test_training_goes_on_after_a_batch_that_is_not_finite():
    params, batch = problem(8, 4)
    lens = make_lens(windows=8, activations=["out"], gradients=["kernel"], weights=["kernel"])
    tx = optax.sgd(0.1)
    step = make_train_step(loss_fn, tx, lens, probe_data="batch")
    state = init_state(params, tx)
    for value in (jnp.nan, 1.0):
        batches = jax.tree.map(lambda leaf, v=value: leaf.at[0, 0, 0].set(v)[None], batch)
        state, metrics, summaries = step(state, batches, None, measure=True)
        found = spectra(summaries)
        assert np.isfinite(found["grad_mean_sq/kernel"]) == bool(metrics["finite"])
        assert np.isfinite(found["weight_singular_values/kernel"]).all()


def test_a_table_has_no_exponent_of_rounding(tmp_path):
    """Ranks 4-19 of a run whose last spectra end at rank 12."""
    small = {"width": 96, "num_layers": 2, "num_samples": 64, "steps": (0, 8)}
    folder = make_run(tmp_path / "run", **small)
    meta, arrays = read_step(step_path(folder / "spectra", 8))
    site, path = "h_1/resid_post", "h_0/attn/c_q/kernel"
    kinds = {f"act_cov_eigenvalues/{site}": 2e-8, f"grad_singular_values/{path}": 2e-4}
    for name, rounding in kinds.items():
        values = arrays[name].copy()
        values[12:] = rounding * values[0] * np.linspace(1, 0.5, len(values) - 12)
        arrays[name] = values
    write_step(folder / "spectra", 8, arrays, meta)
    rows = {(row.step, row.site, row.kind): row.statistics for row in table_rows(read_run(folder))}
    act, grad = rows[8, site, "activation"], rows[8, path, "gradient"]
    for found, name in ((act, "act_lambda_alpha_30_150"), (grad, "grad_sigma_alpha")):
        assert np.isnan([found[f"{name}{end}"].value for end in ("", "_r2", "_ols_se")]).all()
        assert found[f"{name}_last"].value == 12
    assert np.isfinite(act["act_lambda_alpha_10_40"].value)  # ranks 1-5
    assert np.isnan(act["act_alpha_req"].value)
    assert act["act_widest_last"].value <= 12
    assert np.isfinite(rows[0, site, "activation"]["act_lambda_alpha_30_150"].value)
