"""The lens against slow twins: looped autograd, NumPy float64, and itself on several devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lens_jax.gradients import Sink, per_sample_gradients
from lens_jax.lens import Lens, ProbeBatch, make_lens, split_windows
from lens_jax.probes import gradient_probe, spectra
from lens_jax.spectra import (
    covariance_eigenvalues,
    empty_covariance,
    gram_singular_values,
    gram_with_mean,
    matrix_singular_values,
    merge_covariance,
    pool,
    split_gram,
    widen_groups,
)
from lens_jax.step import (
    init_state,
    make_measure_step,
    make_train_step,
    measure_lens,
    measured_value_and_grad,
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


def full_lens(**settings):
    return make_lens(
        windows=SAMPLES,
        activations=("out/resid_post",),
        gradients=PATHS,
        weights=PATHS,
        **{"route": "one_backward"} | settings,
    )


def pooled(state):
    """A covariance that is not cut into groups, in single words."""
    return pool(widen_groups(jax.tree.map(lambda leaf: leaf[None], state), np), np)


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
        gram = split_gram(summaries[f"grad/{path}"], np)[centred]
        got = gram_singular_values(gram, np)
        np.testing.assert_allclose(got, expected, atol=3e-4 * expected[0])
        np.testing.assert_allclose(got[:4], expected[:4], rtol=1e-5)


def test_windows_of_one_row_can_be_the_samples(problem):
    params, batch = problem
    flat = jax.tree.map(lambda leaf: leaf.reshape(1, SAMPLES * TOKENS, WIDTH), batch)
    cut, rows = (
        measure_lens(
            small_loss,
            make_lens(windows=windows, gradients=PATHS, route="one_backward", pieces=pieces),
            params,
            ProbeBatch(data),
        )[0]
        for windows, pieces, data in ((1, SAMPLES, flat), (SAMPLES, 1, batch))
    )
    for path in PATHS:
        np.testing.assert_allclose(cut[f"grad/{path}"], rows[f"grad/{path}"], rtol=1e-4, atol=1e-5)


def test_samples_in_several_passes_give_the_same_spectra(problem):
    params, batch = problem
    split = full_lens(chunk=2, sweeps=2)
    assert (split.passes, len(split.sweeps), split.paths) == (4, 2, PATHS)
    whole, loss = make_measure_step(small_loss, full_lens())(params, ProbeBatch(batch))
    parts, loss_of_parts = make_measure_step(small_loss, split)(params, ProbeBatch(batch))
    np.testing.assert_allclose(loss_of_parts, loss, rtol=1e-6)
    same_spectra(spectra(parts), spectra(whole))


def test_activation_spectrum_is_numpys_over_all_chunks(problem):
    params, batch = problem
    lens = make_lens(
        windows=SAMPLES + 12, samples=SAMPLES, chunk=4, activations=("out/resid_post",)
    )
    rng = np.random.default_rng(1)
    more = {name: jnp.asarray(rng.normal(size=(12, TOKENS, WIDTH)), jnp.float32) for name in "xy"}
    windows = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), batch, more)
    probe_batch = split_windows(windows, SAMPLES, 4)
    assert probe_batch.more["x"].shape == (3, 4, TOKENS, WIDTH)
    summaries, _ = make_measure_step(small_loss, lens)(params, probe_batch)
    taps = [small_loss(params, windows)[1]["out/resid_post"]]
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
    got = covariance_eigenvalues(pooled(state), np)
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
    grams = split_gram(gram_with_mean(jnp.asarray(rows)), np)
    wide = rows.astype(np.float64)
    for centred, matrix in ((True, wide - wide.mean(0)), (False, wide)):
        expected = np.linalg.svd(matrix, compute_uv=False)
        got = gram_singular_values(grams[centred], np)
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


def same_spectra(got, expected):
    """Up to rounding of float32 Gram matrices and the signs of eigenvectors."""
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        values, found = (np.asarray(each, np.float64) for each in (values, got[name]))
        if name.startswith("act_cov_eigenvectors"):
            signs = np.sign((values * found).sum(0, keepdims=True))
            found = found * signs
        np.testing.assert_allclose(found, values, atol=3e-4 * np.abs(values).max(), err_msg=name)


@pytest.mark.parametrize("route", ["one_backward", "vmap_grad"])
@pytest.mark.parametrize("passes", [1, 4])
def test_the_training_batch_measures_itself(problem, passes, route):
    """probe_data=batch over micro-batches equals the held-out route on the same rows."""
    params, batch = problem
    tx = optax.sgd(0.1)
    lens = full_lens(chunk=SAMPLES // passes, route=route)
    step = make_train_step(small_loss, tx, lens, probe_data="batch")
    state = init_state(jax.tree.map(jnp.copy, params), tx)
    _, _, measured = step(state, stacked(batch, passes), None, measure=True)
    expected, _ = measure_lens(small_loss, full_lens(), params, ProbeBatch(batch))
    same_spectra(spectra(measured), spectra(expected))


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
    same_spectra(found["graph"], spectra(found["host"], resample=False))


def test_accumulated_gradients_are_those_of_the_whole_batch(problem):
    params, batch = problem
    tx = optax.sgd(1.0)
    step = make_train_step(small_loss, tx, Lens())
    ends = []
    for num_batches in (1, 4):
        state = init_state(jax.tree.map(jnp.copy, params), tx)
        state, metrics, measured = step(state, stacked(batch, num_batches), None, measure=False)
        assert measured == {}
        ends.append((state.params, metrics["loss"]))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *ends)


def test_gradients_of_bfloat16_parameters_are_summed_and_normed_in_float32():
    """Of 64 micro-batches one has a gradient of 256, whose bfloat16 is blind to the others' 1/2."""
    start = np.random.default_rng(6).normal(size=512).astype(jnp.bfloat16)
    slopes = np.full((64, 1, 1), 0.5, np.float32)
    slopes[0] = 256

    def line(params, batch):
        return jnp.mean(batch["slope"]) * jnp.sum(params["w"].astype(jnp.float32)), {}

    tx = optax.sgd(1.0)
    step = make_train_step(line, tx, Lens())
    state = init_state({"w": jnp.asarray(start)}, tx)
    new, metrics, _ = step(state, {"slope": jnp.asarray(slopes)}, None, measure=False)
    mean = (256 + 63 * 0.5) / 64
    np.testing.assert_allclose(metrics["grad_norm"], mean * 512**0.5, rtol=1e-6)
    norm = np.linalg.norm(start.astype(np.float64))
    np.testing.assert_allclose(metrics["param_norm"], norm, rtol=1e-6)
    assert new.params["w"].dtype == jnp.bfloat16
    expected = start - np.asarray(mean, jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(new.params["w"]), expected)
    lens = make_lens(windows=64)
    rows = {"slope": jnp.asarray(slopes[:, 0])}
    _, grads, _ = measured_value_and_grad(line, lens)({"w": jnp.asarray(start)}, rows)
    assert grads["w"].dtype == jnp.bfloat16


def test_a_step_that_is_not_finite_changes_nothing(problem):
    params, batch = problem
    tx = optax.adam(1.0)
    step = make_train_step(small_loss, tx, Lens())
    state = init_state(jax.tree.map(jnp.copy, params), tx)
    poisoned = batch | {"x": batch["x"].at[0, 0, 0].set(jnp.nan)}
    new, metrics, _ = step(state, stacked(poisoned, 1), None, measure=False)
    assert not metrics["finite"]
    assert int(new.step) == 0
    jax.tree.map(np.testing.assert_array_equal, new.params, params)


def test_weights_alone_need_no_data(problem):
    params, _ = problem
    lens = make_lens(windows=1, weights=PATHS)

    def never(params, batch):
        raise AssertionError("the model was run")

    summaries, loss = make_measure_step(never, lens)(params, None)
    assert loss is None
    assert summaries.keys() == {f"weight/{path}" for path in PATHS}


def test_a_step_of_ones_own_is_measured_in_its_own_passes(problem):
    params, batch = problem
    measured = jax.jit(measured_value_and_grad(small_loss, full_lens()))
    loss, grads, summaries = measured(params, batch)
    (expected_loss, _), expected = jax.value_and_grad(small_loss, has_aux=True)(params, batch)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), grads, expected)
    same_spectra(
        spectra(summaries),
        spectra(measure_lens(small_loss, full_lens(), params, ProbeBatch(batch))[0]),
    )
    with pytest.raises(ValueError, match="a lens of 2 sweeps cannot measure the training batch"):
        measured_value_and_grad(small_loss, full_lens(sweeps=2))
    with pytest.raises(ValueError, match="a lens of 4 passes cannot watch one batch"):
        measured_value_and_grad(small_loss, full_lens(chunk=2))


def test_a_kernel_that_one_backward_pass_cannot_see_is_refused(problem):
    """Zeros, or a sum of Gram matrices, would look like a measurement."""
    params, batch = problem

    def unseen(params, batch, linear=product):
        return small_loss(params, batch)

    def twice(params, batch, linear=product):
        kernel = params["first"]["kernel"]
        there, here = (linear(batch[name], kernel, "first/kernel") for name in "xy")
        return jnp.mean((there - here) ** 2), {}

    lens = make_lens(windows=SAMPLES, gradients=("first/kernel",), route="one_backward")
    with pytest.raises(ValueError, match=r"never called linear\(x, kernel, 'first/kernel'\)"):
        measure_lens(unseen, lens, params, ProbeBatch(batch))
    with pytest.raises(ValueError, match=r"'first/kernel'\) 2 times"):
        measure_lens(twice, lens, params, ProbeBatch(batch))


def test_bad_requests_are_named(problem):
    params, batch = problem
    lens = make_lens(windows=SAMPLES, activations=("h_9/resid_post",))
    with pytest.raises(ValueError, match=r"no tap named 'h_9/resid_post'"):
        measure_lens(small_loss, lens, params, ProbeBatch(batch))
    with pytest.raises(ValueError, match="no parameter at 'third/kernel'"):
        per_sample_gradients(small_loss, params, batch, ("third/kernel",))
    lens = make_lens(windows=SAMPLES - 1, activations=("out/resid_post",))
    with pytest.raises(ValueError, match="made for windows=7, the data has 8"):
        measure_lens(small_loss, lens, params, ProbeBatch(batch))
    lens = make_lens(windows=SAMPLES - 1, gradients=PATHS)
    with pytest.raises(ValueError, match="a pass of 8 rows, where the lens has 7 a pass"):
        measure_lens(small_loss, lens, params, ProbeBatch(batch))
    with pytest.raises(ValueError, match="pieces=2 of a row are samples to route='one_backward'"):
        make_lens(windows=SAMPLES, pieces=2)
    with pytest.raises(ValueError, match="chunk=3 does not divide samples=8"):
        make_lens(windows=SAMPLES, chunk=3)
    with pytest.raises(ValueError, match="samples=9: give 1 to windows=8"):
        make_lens(windows=SAMPLES, samples=9)
    with pytest.raises(ValueError, match="need sinks of the form 'rows'"):
        gradient_probe(PATHS, Sink(4), passes=2)
