"""The lens against slow twins: looped autograd, NumPy float64, and itself on several devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lens_jax.gradients import Sink, per_sample_gradients
from lens_jax.probes import activation_probe, gradient_probe, spectra, weight_probe
from lens_jax.spectra import (
    covariance_eigenvalues,
    empty_covariance,
    gram_singular_values,
    gram_with_mean,
    matrix_singular_values,
    merge_covariance,
)
from lens_jax.step import (
    Lens,
    ProbeBatch,
    init_state,
    make_measure_step,
    make_train_step,
    measure_lens,
)

WIDTH, HIDDEN, TOKENS, SAMPLES = 6, 10, 5, 8
PATHS = ("first/kernel", "second/kernel")


def product(x, kernel, path):
    del path
    return x @ kernel


def small_loss(params, batch, linear=product):
    """A two-layer regression on rows of vectors with one residual connection and one tap."""
    hidden = jnp.tanh(linear(batch["x"], params["first"]["kernel"], "first/kernel"))
    stream = batch["x"] + linear(hidden, params["second"]["kernel"], "second/kernel")
    return jnp.mean((stream - batch["y"]) ** 2), {"out/resid_post": stream}


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    params = {
        "first": {"kernel": jnp.asarray(rng.normal(size=(WIDTH, HIDDEN)), jnp.float32)},
        "second": {"kernel": jnp.asarray(rng.normal(size=(HIDDEN, WIDTH)), jnp.float32)},
    }
    batch = {
        name: jnp.asarray(rng.normal(size=(SAMPLES, TOKENS, WIDTH)), jnp.float32) for name in "xy"
    }
    return params, batch


def looped_gradients(params, batch, path):
    rows = []
    for i in range(SAMPLES):
        one = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch)
        grads = jax.grad(lambda p, one=one: small_loss(p, one)[0])(params)
        layer, leaf = path.split("/")
        rows.append(np.asarray(grads[layer][leaf], np.float64).ravel())
    return np.stack(rows)


def full_lens(form="gram", passes=1):
    sink = Sink(SAMPLES // passes, form)
    probes = (
        activation_probe(("out/resid_post",)),
        gradient_probe(PATHS, sink, passes),
        weight_probe(PATHS),
    )
    return Lens(probes, PATHS, sink)


def test_vmap_of_grad_is_the_looped_gradient(problem):
    params, batch = problem
    rows = per_sample_gradients(small_loss, params, batch, PATHS)
    for path in PATHS:
        flat = rows[path].reshape(SAMPLES, -1)
        np.testing.assert_allclose(
            flat, looped_gradients(params, batch, path), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("centred", [False, True])
def test_one_backward_gives_the_singular_values_of_the_looped_gradients(problem, centred):
    params, batch = problem
    summaries, _ = measure_lens(small_loss, full_lens(), params, ProbeBatch(batch))
    for path in PATHS:
        rows = looped_gradients(params, batch, path)
        rows = rows - rows.mean(0) if centred else rows
        expected = np.linalg.svd(rows, compute_uv=False)
        got = gram_singular_values(summaries[f"grad/{path}"], np, centred=centred)
        np.testing.assert_allclose(got, expected, atol=3e-4 * expected[0])
        np.testing.assert_allclose(got[:4], expected[:4], rtol=1e-5)


def test_windows_of_one_row_can_be_the_samples(problem):
    params, batch = problem
    flat = jax.tree.map(lambda leaf: leaf.reshape(1, SAMPLES * TOKENS, WIDTH), batch)
    lens = full_lens()
    cut, _ = measure_lens(small_loss, lens, params, ProbeBatch(flat))
    rows, _ = measure_lens(small_loss, lens, params, ProbeBatch(batch))
    for path in PATHS:
        np.testing.assert_allclose(cut[f"grad/{path}"], rows[f"grad/{path}"], rtol=1e-4, atol=1e-5)


def test_samples_in_several_passes_give_the_same_spectra(problem):
    params, batch = problem
    split = full_lens("rows", 4)._replace(passes=4)
    whole, loss = make_measure_step(small_loss, full_lens())(params, ProbeBatch(batch))
    parts, loss_of_parts = make_measure_step(small_loss, split)(params, ProbeBatch(batch))
    np.testing.assert_allclose(loss_of_parts, loss, rtol=1e-6)
    whole, parts = spectra(whole, np), spectra(parts, np)
    assert whole.keys() == parts.keys()
    for name, values in whole.items():
        np.testing.assert_allclose(parts[name], values, atol=3e-4 * values.max(), err_msg=name)


def test_activation_spectrum_is_numpys_over_all_chunks(problem):
    params, batch = problem
    lens = Lens((activation_probe(("out/resid_post",)),))
    rng = np.random.default_rng(1)
    more = {name: jnp.asarray(rng.normal(size=(3, 4, TOKENS, WIDTH)), jnp.float32) for name in "xy"}
    summaries, _ = make_measure_step(small_loss, lens)(params, ProbeBatch(batch, more))
    taps = [small_loss(params, batch)[1]["out/resid_post"]]
    for i in range(3):
        chunk = jax.tree.map(lambda leaf, i=i: leaf[i], more)
        taps.append(small_loss(params, chunk)[1]["out/resid_post"])
    for kind, pick in (("act_cov", np.s_[:, :]), ("act_last_cov", np.s_[:, -1:])):
        x = np.concatenate([np.asarray(t, np.float64)[pick].reshape(-1, WIDTH) for t in taps])
        x /= np.sqrt((x**2).mean(-1, keepdims=True) + 2.0**-23)
        expected = np.linalg.eigvalsh(np.cov(x.T))[::-1]
        got = spectra(summaries, np)[f"{kind}_eigenvalues/out/resid_post"]
        np.testing.assert_allclose(got, expected, rtol=1e-5)
    all_tokens = np.concatenate([np.asarray(t, np.float64).reshape(-1, WIDTH) for t in taps])
    all_tokens /= np.sqrt((all_tokens**2).mean(-1, keepdims=True) + 2.0**-23)
    mean_square = (all_tokens.mean(0) ** 2).sum()
    got = spectra(summaries, np)["act_mean_sq/out/resid_post"]
    np.testing.assert_allclose(got, mean_square, rtol=1e-5)


def test_covariance_keeps_a_steep_tail_under_a_strong_mean():
    """The planted case of float32 cancellation: spectrum i^-2, every mean 3 x the top deviation."""
    width, chunks, rows = 128, 64, 512
    rng = np.random.default_rng(2)
    basis, _ = np.linalg.qr(rng.normal(size=(width, width)))
    scale = np.arange(1, width + 1) ** -1.0
    x = (rng.normal(size=(chunks, rows, width)) * scale) @ basis.T + 3.0
    x = x.astype(np.float32)
    merge = jax.jit(merge_covariance)
    state = empty_covariance(width)
    for chunk in x:
        state = merge(state, jnp.asarray(chunk))
    flat = x.reshape(-1, width).astype(np.float64)
    expected = np.linalg.eigvalsh(np.cov(flat.T))[::-1]
    got = covariance_eigenvalues(state, np)
    np.testing.assert_allclose(got, expected, rtol=2e-4)
    assert int(state.count) == chunks * rows


def test_compensated_sums_are_far_closer_to_float64_than_plain_ones():
    rng = np.random.default_rng(3)
    chunks = rng.normal(size=(2000, 4, 3)).astype(np.float32)
    merge = jax.jit(merge_covariance)
    state = empty_covariance(3)
    for chunk in chunks:
        state = merge(state, jnp.asarray(chunk))
    x = chunks.reshape(-1, 3).astype(np.float64)
    exact = (x - x.mean(0)).T @ (x - x.mean(0))
    error = np.abs(np.asarray(state.scatter, np.float64).sum(0) - exact).max() / exact.max()
    plain = np.float32(0) + np.zeros((3, 3), np.float32)
    for chunk in chunks:
        plain = plain + chunk.T @ chunk
    plain_error = np.abs(plain - x.T @ x).max() / exact.max()
    assert error < 1e-7
    assert error < plain_error / 3


def test_gram_of_rows_with_a_dominating_mean_keeps_the_centred_spectrum():
    rng = np.random.default_rng(4)
    rows = rng.normal(size=(12, 400)).astype(np.float32) + 300.0
    gram = gram_with_mean(jnp.asarray(rows))
    wide = rows.astype(np.float64)
    for centred, matrix in ((True, wide - wide.mean(0)), (False, wide)):
        expected = np.linalg.svd(matrix, compute_uv=False)
        got = gram_singular_values(gram, np, centred=centred)
        keep = expected > 1e-6 * expected[0]
        keep[-1] = keep[-1] and not centred
        np.testing.assert_allclose(got[keep], expected[keep], rtol=1e-4)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7)])
def test_weight_singular_values(shape):
    matrix = np.random.default_rng(5).normal(size=shape).astype(np.float32)
    expected = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(matrix_singular_values(matrix, np), expected, rtol=1e-8)
    np.testing.assert_allclose(
        matrix_singular_values(jnp.asarray(matrix), jnp), expected, rtol=1e-5
    )


def stacked(batch, num_batches):
    return jax.tree.map(lambda leaf: leaf.reshape(num_batches, -1, *leaf.shape[1:]), batch)


@pytest.mark.parametrize(("passes", "form"), [(1, "gram"), (1, "rows"), (4, "rows")])
def test_the_training_batch_measures_itself(problem, passes, form):
    """probe_data=batch over micro-batches equals the held-out route on the same rows."""
    params, batch = problem
    tx = optax.sgd(0.1)
    step = make_train_step(small_loss, tx, full_lens(form, passes), probe_data="batch")
    state = init_state(jax.tree.map(jnp.copy, params), tx)
    _, _, measured = step(state, stacked(batch, passes), None, measure=True)
    expected, _ = measure_lens(small_loss, full_lens(), params, ProbeBatch(batch))
    got, expected = spectra(measured, np), spectra(expected, np)
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(got[name], values, atol=3e-4 * values.max(), err_msg=name)


@pytest.mark.parametrize("probe_data", ["fixed", "batch"])
def test_parameters_are_bitwise_the_same_with_and_without_probes(problem, probe_data):
    params, batch = problem
    tx = optax.adam(1e-2)
    step = make_train_step(small_loss, tx, full_lens(), probe_data=probe_data)
    results = []
    for measure in (False, True):
        state = init_state(jax.tree.map(jnp.copy, params), tx)
        for _ in range(5):
            state, _, _ = step(state, stacked(batch, 1), ProbeBatch(batch), measure=measure)
        results.append(state.params)
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_eigenvalues_inside_the_step_are_those_of_the_host(problem):
    params, batch = problem
    tx = optax.sgd(0.1)
    found = {}
    for eigen in ("host", "graph"):
        step = make_train_step(small_loss, tx, full_lens(), eigen=eigen)
        state = init_state(jax.tree.map(jnp.copy, params), tx)
        _, _, found[eigen] = step(state, stacked(batch, 1), ProbeBatch(batch), measure=True)
    host = spectra(found["host"], np)
    assert host.keys() == found["graph"].keys()
    for name, values in host.items():
        np.testing.assert_allclose(
            found["graph"][name], values, atol=3e-4 * values.max(), err_msg=name
        )


def test_accumulated_gradients_are_those_of_the_whole_batch(problem):
    params, batch = problem
    tx = optax.sgd(1.0)
    step = make_train_step(small_loss, tx, Lens(()))
    ends = []
    for num_batches in (1, 4):
        state = init_state(jax.tree.map(jnp.copy, params), tx)
        state, metrics, measured = step(state, stacked(batch, num_batches), None, measure=False)
        assert measured == {}
        ends.append((state.params, metrics["loss"]))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *ends)


def test_a_step_that_is_not_finite_changes_nothing(problem):
    params, batch = problem
    tx = optax.adam(1.0)
    step = make_train_step(small_loss, tx, Lens(()))
    state = init_state(jax.tree.map(jnp.copy, params), tx)
    poisoned = batch | {"x": batch["x"].at[0, 0, 0].set(jnp.nan)}
    new, metrics, _ = step(state, stacked(poisoned, 1), None, measure=False)
    assert not metrics["finite"]
    assert int(new.step) == 0
    jax.tree.map(np.testing.assert_array_equal, new.params, params)


def test_bad_requests_are_named(problem):
    params, batch = problem
    with pytest.raises(ValueError, match=r"no tap named 'h_9/resid_post'"):
        measure_lens(
            small_loss, Lens((activation_probe(("h_9/resid_post",)),)), params, ProbeBatch(batch)
        )
    with pytest.raises(ValueError, match="no parameter at 'third/kernel'"):
        per_sample_gradients(small_loss, params, batch, ("third/kernel",))
    with pytest.raises(ValueError, match="need sinks of the form 'rows'"):
        gradient_probe(PATHS, Sink(4), passes=2)
