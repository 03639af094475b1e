"""What one backward pass would misread is refused, and what it reads is the definition's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lens_jax.lens import ProbeBatch, make_lens
from lens_jax.probes import spectra
from lens_jax.records import read_records, write_step
from lens_jax.step import (
    init_state,
    make_measure_step,
    make_train_step,
    measure_lens,
    measured_value_and_grad,
)

ROWS, TOKENS, WIDTH, LAYERS = 8, 6, 5, 3


def product(x, kernel, path):
    del path
    return x @ kernel


def draw(tokens=TOKENS):
    rng = np.random.default_rng(1)
    return {n: jnp.asarray(rng.normal(size=(ROWS, tokens, WIDTH)), jnp.float32) for n in "xy"}


def weights(*shape):
    rng = np.random.default_rng(0)
    return {"w": jnp.asarray(rng.normal(size=shape or (WIDTH, WIDTH)) / 3, jnp.float32)}


def squares(out, batch):
    return jnp.mean((out - batch["y"]) ** 2), {}


def plain(params, batch, linear=product):
    return squares(jnp.tanh(linear(batch["x"], params["w"], "w")), batch)


def by_example(wrap, params, batch, linear=product):
    """A model of one row, (T, D), mapped over rows."""
    one = wrap(lambda x: jnp.tanh(linear(x, params["w"], "w")))
    return squares(jax.vmap(one)(batch["x"]), batch)


def times_first(params, batch, linear=product):
    out = linear(jnp.swapaxes(batch["x"], 0, 1), params["w"], "w")
    return squares(jnp.swapaxes(jnp.tanh(out), 0, 1), batch)


def flattened(params, batch, linear=product):
    out = linear(batch["x"].reshape(-1, WIDTH), params["w"], "w")
    return squares(jnp.tanh(out).reshape(batch["x"].shape), batch)


def row_by_row(params, batch, linear=product):
    out = [linear(batch["x"][i, 0], params["w"], "w") for i in range(ROWS)]
    return squares(jnp.tanh(jnp.stack(out)[:, None]), batch | {"y": batch["y"][:, :1]})


def tied_scan(params, batch, linear=product):
    def layer(x, _):
        return jnp.tanh(linear(x, params["w"], "w")), None

    return squares(jax.lax.scan(layer, batch["x"], length=LAYERS)[0], batch)


def stacked_scan(params, batch, linear=product):
    def layer(x, kernel):
        return jnp.tanh(linear(x, kernel, "w")), None

    return squares(jax.lax.scan(layer, batch["x"], params["w"])[0], batch)


def stacked_loop(params, batch, linear=product):
    x = batch["x"]
    for i in range(LAYERS):
        x = jnp.tanh(linear(x, params["w"][i], "w"))
    return squares(x, batch)


def scaled(params, batch, linear=product):
    return squares(jnp.tanh(linear(batch["x"], 0.3 * params["w"], "w")), batch)


def also_elsewhere(params, batch, linear=product):
    out = linear(batch["x"], params["w"], "w") + batch["x"] @ params["w"]
    return squares(jnp.tanh(out), batch)


def half(params, batch, linear=product):
    out = linear(batch["x"], params["w"][:, :3], "w")
    return squares(jnp.tanh(out), batch | {"y": batch["y"][..., :3]})


def turned(params, batch, linear=product):
    return squares(jnp.tanh(linear(batch["x"], params["w"].T, "w")), batch)


def lens(route="one_backward", **settings):
    return make_lens(windows=ROWS, gradients=["w"], route=route, **settings)


def measured(loss_fn, params, batch, **settings):
    return spectra(make_measure_step(loss_fn, lens(**settings))(params, ProbeBatch(batch))[0])


def trained_on(loss_fn, params, batch, chunk=ROWS, **settings):
    """Spectra of the passes of training itself."""
    look = lens(chunk=chunk)
    tx = optax.sgd(0.1)
    step = make_train_step(loss_fn, tx, look, probe_data="batch", **settings)
    batches = jax.tree.map(lambda leaf: leaf.reshape(-1, chunk, *leaf.shape[1:]), batch)
    state = init_state(jax.tree.map(jnp.copy, params), tx)
    return step(state, batches, None, measure=True)[2]


@pytest.mark.parametrize(
    ("loss_fn", "shape"),
    [
        (partial(by_example, lambda model: model), f"{TOKENS}, {WIDTH}"),
        (times_first, f"{TOKENS}, {ROWS}, {WIDTH}"),
        (flattened, f"{ROWS * TOKENS}, {WIDTH}"),
        (row_by_row, f"{WIDTH},"),
    ],
)
def test_inputs_without_the_rows_in_front_are_refused(loss_fn, shape):
    with pytest.raises(ValueError, match=rf"'w'\) got x of shape \({shape}\) in a pass of 8 rows"):
        measured(loss_fn, weights(), draw())


@pytest.mark.parametrize("chunk", [ROWS, ROWS // 2])
@pytest.mark.parametrize("wrap", [lambda model: model, jax.jit, jax.checkpoint])
def test_a_model_under_vmap_is_found_out_by_its_runs(wrap, chunk):
    """With as many positions as rows its inputs have the shape of rows."""
    with pytest.raises(ValueError, match=r"linear\(x, kernel, 'w'\) did not run once"):
        measured(partial(by_example, wrap), weights(), draw(chunk), chunk=chunk)


def test_a_kernel_that_the_steps_of_a_scan_share_is_refused():
    for look in (measured, lambda *a: spectra(trained_on(*a))):
        with pytest.raises(ValueError, match=r"linear\(x, kernel, 'w'\) did not run once"):
            look(tied_scan, weights(), draw())
    inside = trained_on(tied_scan, weights(), draw(), eigen="graph")
    assert np.isnan(inside["grad_singular_values/w"]).all()


@pytest.mark.parametrize("loss_fn", [scaled, also_elsewhere])
@pytest.mark.parametrize("chunk", [ROWS, 2])
def test_a_gradient_that_is_not_the_parameters_is_refused(loss_fn, chunk):
    with pytest.raises(ValueError, match=r"mean of norm [\d.e-]+, its own gradient has [\d.e-]+"):
        spectra(trained_on(loss_fn, weights(), draw(), chunk))
    summaries = jax.jit(measured_value_and_grad(loss_fn, lens()))(weights(), draw())[2]
    with pytest.raises(ValueError, match="pass the parameter itself"):
        spectra(summaries)


def test_low_precision_and_few_rows_are_no_reason_to_refuse():
    def rounded(params, batch, linear=product):
        out = linear(batch["x"].astype(jnp.bfloat16), params["w"].astype(jnp.bfloat16), "w")
        return squares(jnp.tanh(out).astype(jnp.float32), batch)

    half_words = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), weights())
    for params in (weights(), half_words):
        for chunk in (1, ROWS):
            spectra(trained_on(rounded, params, draw(), chunk))


def test_another_kernel_than_the_parameter_is_refused():
    with pytest.raises(ValueError, match=r"kernel of shape \(5, 3\), the parameter there is \(5, "):
        measured(half, weights(), draw())


@pytest.mark.parametrize(
    ("loss_fn", "shape"),
    [
        (plain, ()),
        (turned, ()),
        (stacked_scan, (LAYERS, WIDTH, WIDTH)),
        (stacked_loop, (LAYERS, WIDTH, WIDTH)),
    ],
)
def test_what_is_not_refused_is_the_definition(loss_fn, shape):
    params, batch = weights(*shape), draw()
    expected = measured(loss_fn, params, batch, route="vmap_grad")
    for found in (measured(loss_fn, params, batch), spectra(trained_on(loss_fn, params, batch))):
        for name, values in expected.items():
            atol = 4e-4 * np.abs(values).max()
            np.testing.assert_allclose(found[name], values, rtol=0, atol=atol, err_msg=name)


def test_models_under_vmap_as_a_whole_are_measured():
    """Several models at once: the lens is inside, and nothing runs twice in any of them."""
    params = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), weights())
    summaries = jax.vmap(make_measure_step(plain, lens()), (0, None))(params, ProbeBatch(draw()))[0]
    for i in range(2):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], (params, summaries))
        expected = measured(plain, own[0], draw())["grad_singular_values/w"]
        np.testing.assert_allclose(spectra(own[1])["grad_singular_values/w"], expected, rtol=1e-3)


def test_a_stack_of_kernels_needs_a_single_pass():
    params = weights(LAYERS, WIDTH, WIDTH)
    with pytest.raises(ValueError, match=r"'w' is a stack of 3 kernels, \(3, 5, 5\).*give no chun"):
        measured(stacked_scan, params, draw(), chunk=2)


def test_pieces_divide_the_positions_of_a_row():
    with pytest.raises(ValueError, match=r"pieces=4 do not cut x of shape \(8, 6, 5\)"):
        measured(plain, weights(), draw(), pieces=4)


def test_pieces_of_one_row_are_left_out_together():
    """12 rows of 3 pieces: groups of a row, where 36 samples would make groups of 2."""
    batch = jax.tree.map(lambda leaf: jnp.concatenate([leaf, 2 * leaf[:4]]), draw())
    look = make_lens(windows=12, gradients=["w"], pieces=3, route="one_backward")
    summaries = make_measure_step(plain, look)(weights(), ProbeBatch(batch))[0]
    found = spectra(summaries)
    cut = jax.tree.map(lambda leaf: leaf.reshape(36, 2, WIDTH), batch)
    rows = np.stack(
        [
            jax.grad(lambda p, i=i: plain(p, jax.tree.map(lambda leaf: leaf[i : i + 1], cut))[0])(
                weights()
            )["w"].ravel()
            for i in range(36)
        ]
    ).astype(np.float64)
    left_out = found["grad_singular_values_left_out/w"]
    assert left_out.shape == (12, 33)
    for row in range(12):
        rest = np.delete(rows, range(3 * row, 3 * row + 3), axis=0)
        expected = np.linalg.svd(rest, compute_uv=False)
        np.testing.assert_allclose(left_out[row][:10], expected[:10], rtol=1e-3)


@pytest.mark.parametrize("name", ["windows", "chunk", "pieces", "sweeps", "groups"])
@pytest.mark.parametrize("count", [0, -1])
def test_counts_below_one_are_refused(name, count):
    with pytest.raises(ValueError, match=f"{name}={count}: give at least 1"):
        make_lens(**{"windows": ROWS, "gradients": ["w"], "route": "one_backward"} | {name: count})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("layer 0/out", "has ' ' in it"),
        ("h_0/['w']", r"has '\[' in it"),
        ("h:0/w", "has ':' in it"),
        ("h_0//w", "has an empty part"),
        ("", "has an empty part"),
    ],
)
@pytest.mark.parametrize("kind", ["activations", "gradients", "weights"])
def test_names_that_no_record_may_have_are_refused_before_the_measurement(kind, name, said):
    with pytest.raises(ValueError, match=said):
        make_lens(windows=ROWS, **{kind: [name]})


def test_a_module_named_by_a_tilde_is_recorded(tmp_path):
    """As Haiku names parameters: mlp/~/linear_0."""
    site = "mlp/~/linear_0/w"
    found = measure_lens(
        lambda params, batch: plain({"w": params["mlp/~/linear_0"]["w"]}, batch),
        make_lens(windows=ROWS, gradients=[site], weights=[site]),
        {"mlp/~/linear_0": weights()},
        ProbeBatch(draw()),
    )[0]
    write_step(tmp_path, 0, spectra(found), {"tokens": 0})
    (record,) = read_records(tmp_path, kind="weight_singular_values")
    assert record.site == site


@pytest.mark.parametrize("tap", [(1.0, 2.0), {"inner": jnp.ones((ROWS, 2))}, [jnp.ones(3)]])
def test_a_tap_that_is_no_array_is_refused(tap):
    def nested(params, batch):
        return plain(params, batch)[0], {"out": tap}

    look = make_lens(windows=ROWS, activations=["out"])
    with pytest.raises(ValueError, match=f"tap 'out' is a {type(tap).__name__}: give arrays"):
        measure_lens(nested, look, weights(), ProbeBatch(draw()))
