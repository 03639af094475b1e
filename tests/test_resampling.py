"""Spectra with parts left out, against NumPy on the vectors and gradients that remain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lens_jax.lens import make_lens, split_windows
from lens_jax.probes import spectra
from lens_jax.resampling import even_groups
from lens_jax.step import make_measure_step

WIDTH, TOKENS, WINDOWS = 5, 3, 48


def loss_fn(params, batch):
    out = batch["x"] @ params["kernel"]
    return jnp.mean((out - batch["y"]) ** 2), {"out": out}


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(WIDTH, WIDTH)), jnp.float32)}
    shape = (WINDOWS, TOKENS, WIDTH)
    batch = {name: jnp.asarray(rng.normal(size=shape) + 2, jnp.float32) for name in "xy"}
    return params, batch


def measure(problem, **settings):
    params, batch = problem
    lens = make_lens(
        windows=WINDOWS, activations=("out",), gradients=("kernel",), normalise=False, **settings
    )
    chunk = settings.get("chunk", WINDOWS)
    probe_batch = split_windows(batch, settings.get("samples", WINDOWS), chunk)
    return spectra(make_measure_step(loss_fn, lens)(params, probe_batch)[0])


def eigenvalues(vectors):
    return np.linalg.eigvalsh(np.cov(vectors.reshape(-1, WIDTH).T))[::-1]


def test_eigenvalues_without_a_group_are_those_of_the_other_windows(problem):
    params, batch = problem
    vectors = np.asarray(loss_fn(params, batch)[1]["out"], np.float64)
    # 24 groups of two windows, filled by passes of four, six and eight windows
    for settings in ({}, {"samples": 24, "chunk": 6}, {"samples": 16, "chunk": 8}):
        found = measure(problem, **settings)
        left_out = found["act_cov_eigenvalues_left_out/out"]
        assert left_out.shape == (24, WIDTH)
        assert left_out.dtype == np.float32
        for group in range(24):
            rest = np.delete(vectors, [2 * group, 2 * group + 1], axis=0)
            np.testing.assert_allclose(left_out[group], eigenvalues(rest), rtol=1e-5)
        windows = np.arange(WINDOWS)
        halves = [vectors[windows // 2 % 2 == half] for half in (0, 1)]
        expected = [eigenvalues(half) for half in halves]
        np.testing.assert_allclose(found["act_cov_eigenvalues_halves/out"], expected, rtol=1e-5)


def test_passes_from_all_over_the_data_fill_every_group(problem):
    """Two passes, of the even windows and of the odd ones, in 24 groups of neighbours."""
    params, batch = problem
    lens = make_lens(
        windows=WINDOWS, samples=24, chunk=24, activations=("out",), spread=True, normalise=False
    )
    dealt = jax.tree.map(lambda leaf: jnp.concatenate([leaf[0::2], leaf[1::2]]), batch)
    found = spectra(make_measure_step(loss_fn, lens)(params, split_windows(dealt, 24, 24))[0])
    expected = measure(problem)
    for name in ("eigenvalues", "eigenvalues_left_out", "eigenvalues_halves"):
        np.testing.assert_allclose(
            found[f"act_cov_{name}/out"], expected[f"act_cov_{name}/out"], rtol=1e-5
        )


def test_a_group_may_take_several_passes(problem):
    """Groups of three windows, one window at a time."""
    params, batch = problem
    lens = make_lens(windows=45, samples=3, chunk=1, activations=("out",), normalise=False)
    first = jax.tree.map(lambda leaf: leaf[:45], batch)
    found = spectra(make_measure_step(loss_fn, lens)(params, split_windows(first, 3, 1))[0])
    vectors = np.asarray(loss_fn(params, first)[1]["out"], np.float64)
    assert even_groups(45, 1) == 15
    expected = eigenvalues(vectors[:-3])
    np.testing.assert_allclose(found["act_cov_eigenvalues_left_out/out"][-1], expected, rtol=1e-5)


def test_leading_eigenvectors_are_numpys_up_to_sign(problem):
    params, batch = problem
    vectors = np.asarray(loss_fn(params, batch)[1]["out"], np.float64).reshape(-1, WIDTH)
    expected = np.linalg.eigh(np.cov(vectors.T))[1][:, ::-1]
    found = measure(problem)["act_cov_eigenvectors/out"]
    np.testing.assert_allclose(np.abs(expected.T @ found), np.eye(WIDTH), atol=1e-4)


def test_gradient_spectra_without_a_group_are_those_of_the_other_samples(problem):
    params, batch = problem
    rows = []
    for i in range(WINDOWS):
        one = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch)
        rows.append(np.asarray(jax.grad(lambda p, b=one: loss_fn(p, b)[0])(params)["kernel"]))
    rows = np.stack(rows).reshape(WINDOWS, -1).astype(np.float64)
    found = measure(problem)
    np.testing.assert_allclose(found["grad_mean_sq/kernel"], (rows.mean(0) ** 2).sum(), rtol=1e-5)
    for group in range(24):
        rest = np.delete(rows, [2 * group, 2 * group + 1], axis=0)
        mean = rest.mean(0)
        for name, matrix in (("", rest), ("_centred", rest - mean)):
            expected = np.linalg.svd(matrix, compute_uv=False)
            got = found[f"grad_singular_values{name}_left_out/kernel"][group]
            assert got.shape == (46,)
            np.testing.assert_allclose(got[:8], expected[:8], rtol=1e-4)
        got = found["grad_mean_sq_left_out/kernel"][group]
        np.testing.assert_allclose(got, (mean**2).sum(), rtol=1e-4)


def test_without_groups_nothing_is_left_out(problem):
    params, batch = problem
    first = jax.tree.map(lambda leaf: leaf[:37], batch)  # a prime number of windows
    lens = make_lens(
        windows=37, samples=5, chunk=8, activations=("out",), gradients=("kernel",), normalise=False
    )
    found = spectra(make_measure_step(loss_fn, lens)(params, split_windows(first, 5, 8))[0])
    expected = eigenvalues(np.asarray(loss_fn(params, first)[1]["out"], np.float64))
    np.testing.assert_allclose(found["act_cov_eigenvalues/out"], expected, rtol=1e-5)
    assert not [name for name in found if name.startswith("act") and "left_out" in name]


def test_groups_of_a_spread_set_have_an_equal_share_of_every_pass():
    assert even_groups(128, 64, 64, spread=True) == 32
    assert even_groups(1024, 64, spread=True) == 32
    assert even_groups(40, 8, 16, spread=True) == 8
    assert even_groups(41, 1, 8, spread=True) == 1


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 40))
def test_groups_are_filled_evenly_by_every_pass(passes, first, chunk):
    first = min(first, chunk)
    items = first + passes * chunk
    groups = even_groups(items, first, chunk)
    assert 1 <= groups <= 32
    assert items % groups == 0
    filled, size = 0, items // groups
    for rows in (first, *[chunk] * passes) if groups > 1 else ():
        assert rows % size == 0 or (size % rows == 0 and filled % size + rows <= size)
        assert rows < size or filled % size == 0
        filled += rows
