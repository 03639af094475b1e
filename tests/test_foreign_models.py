"""The lens on models that are not ours: one computation in four dialects against NumPy in float64.

The computation is y = x + tanh(x W1 + b) W2 on rows of vectors, with its mean squared error; every
spectrum and gradient below is written out by hand.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lens_jax.lens import ProbeBatch, make_lens, split_windows
from lens_jax.probes import NORM_EPS, spectra
from lens_jax.step import (
    init_state,
    make_measure_step,
    make_train_step,
    measure_lens,
    measured_value_and_grad,
)
from lens_jax.taps import parameter_paths

ROWS, TOKENS, WIDTH, HIDDEN = 8, 5, 6, 10
TOLERANCE = 1e-5  # of the largest value
rng = np.random.default_rng(0)
FIRST, BIAS, SECOND = (
    rng.normal(size=shape).astype(np.float32)
    for shape in ((WIDTH, HIDDEN), (HIDDEN,), (HIDDEN, WIDTH))
)
BATCH = {name: rng.normal(size=(ROWS, TOKENS, WIDTH)).astype(np.float32) for name in "xy"}


class Dialect(NamedTuple):
    """A model as its users write it, and where it keeps W1, b and W2."""

    loss_fn: Callable
    params: Any
    first: str = "first/kernel"
    bias: str = "first/bias"
    second: str = "second/kernel"


def error_and_tap(out, batch):
    return jnp.mean((out - batch["y"]) ** 2), {"out": out}


def product(x, kernel, path):
    del path
    return x @ kernel


def plain_loss(params, batch, linear=product):
    first, second = params["first"], params["second"]
    inner = linear(batch["x"], first["kernel"], "first/kernel") + first["bias"][None, None]
    out = batch["x"] + linear(jnp.tanh(inner), second["kernel"], "second/kernel")
    return error_and_tap(out, batch)


def plain_params():
    return {
        "first": {"kernel": jnp.asarray(FIRST), "bias": jnp.asarray(BIAS)},
        "second": {"kernel": jnp.asarray(SECOND)},
    }


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):  # (B, T, D)
        inner = jnp.tanh(nn.Dense(HIDDEN, name="first")(x))
        return x + nn.Dense(WIDTH, use_bias=False, name="second")(inner)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.second = nnx.Linear(HIDDEN, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):  # (B, T, D)
        return x + self.second(jnp.tanh(self.first(x)))


@jax.tree_util.register_dataclass
@dataclass
class FieldModel:
    """A module that is its own pytree, as in Equinox: arrays are leaves, the rest is static."""

    inside: jax.Array
    shift: jax.Array
    outside: jax.Array
    activation: Callable = field(default=jnp.tanh, metadata={"static": True})

    def __call__(self, x):  # (B, T, D)
        return x + self.activation(x @ self.inside + self.shift[None, None]) @ self.outside


def linen_loss(params, batch):
    return error_and_tap(LinenModel().apply({"params": params}, batch["x"]), batch)


def nnx_dialect():
    graph, state = nnx.split(NnxModel(nnx.Rngs(0)))
    nnx.replace_by_pure_dict(state, plain_params())

    def loss_fn(state, batch):
        return error_and_tap(nnx.merge(graph, state)(batch["x"]), batch)

    return Dialect(loss_fn, state, "first/kernel/value", "first/bias/value", "second/kernel/value")


def field_loss(model, batch):
    return error_and_tap(model(batch["x"]), batch)


def field_model():
    return FieldModel(*(jnp.asarray(leaf) for leaf in (FIRST, BIAS, SECOND)))


DIALECTS = {
    "plain": Dialect(plain_loss, plain_params()),
    "linen": Dialect(linen_loss, plain_params()),
    "nnx": nnx_dialect(),
    "fields": Dialect(field_loss, field_model(), "inside", "shift", "outside"),
}


@cache
def measured(name: str) -> dict[str, np.ndarray]:
    """What the lens says of a model, by the names of the plain one."""
    dialect = DIALECTS[name]
    own = (dialect.first, dialect.bias, dialect.second)
    lens = make_lens(
        windows=ROWS,
        activations=("out",),
        gradients=own,
        weights=(dialect.first, dialect.second),
    )
    measure = make_measure_step(dialect.loss_fn, lens)
    found = spectra(measure(dialect.params, ProbeBatch(BATCH))[0])
    names = dict(zip(own, ("first/kernel", "first/bias", "second/kernel"), strict=True))
    parts = [name.partition("/") for name in found]
    return {f"{kind}/{names.get(site, site)}": found[f"{kind}/{site}"] for kind, _, site in parts}


def float64_model() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Outputs (B, T, D) and every row's own gradients (B, size), derived by hand."""
    first, bias, second, x, y = (
        array.astype(np.float64) for array in (FIRST, BIAS, SECOND, BATCH["x"], BATCH["y"])
    )
    inner = np.tanh(x @ first + bias)
    out = x + inner @ second
    slope = 2 * (out - y) / (TOKENS * WIDTH)  # of a row's mean over tokens and components
    back = (slope @ second.T) * (1 - inner**2)
    gradients = {
        "first/kernel": np.einsum("nti,ntj->nij", x, back),
        "first/bias": back.sum(1),
        "second/kernel": np.einsum("nti,ntj->nij", inner, slope),
    }
    return out, {path: rows.reshape(ROWS, -1) for path, rows in gradients.items()}


def expected() -> dict[str, np.ndarray]:
    """The arrays of a record that numpy.linalg gives directly."""
    out, gradients = float64_model()
    vectors = out / np.sqrt((out**2).mean(-1, keepdims=True) + NORM_EPS)
    arrays = {}
    for kind, part in (("act_cov", vectors), ("act_last_cov", vectors[:, -1])):
        covariance = np.cov(part.reshape(-1, WIDTH).T)
        arrays[f"{kind}_eigenvalues/out"] = np.linalg.eigvalsh(covariance)[::-1]
    arrays["act_mean_sq/out"] = (vectors.mean((0, 1)) ** 2).sum()
    for path, rows in gradients.items():
        centred = rows - rows.mean(0)
        arrays[f"grad_singular_values/{path}"] = np.linalg.svd(rows, compute_uv=False)
        arrays[f"grad_singular_values_centred/{path}"] = np.linalg.svd(centred, compute_uv=False)
        arrays[f"grad_mean_sq/{path}"] = (rows.mean(0) ** 2).sum()
    for path, matrix in (("first/kernel", FIRST), ("second/kernel", SECOND)):
        arrays[f"weight_singular_values/{path}"] = np.linalg.svd(matrix, compute_uv=False)
    return arrays


def close(got, values, name):
    """To TOLERANCE of the largest value; centred rows have one singular value fewer than rows."""
    if "grad_singular_values_centred" in name:
        got, values = got[..., :-1], values[..., :-1]
    if "eigenvectors" in name:
        got, values = np.abs(got), np.abs(values)  # signs are arbitrary
    atol = TOLERANCE * np.abs(values).max()
    np.testing.assert_allclose(got, values, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_shows_the_spectra_of_numpy(name):
    found = measured(name)
    for array, values in expected().items():
        close(found[array], values, array)


@pytest.mark.parametrize("name", ["linen", "nnx", "fields"])
def test_every_dialect_makes_the_same_record(name):
    """All arrays, those with parts left out too."""
    plain, found = measured("plain"), measured(name)
    assert found.keys() == plain.keys()
    assert "act_cov_eigenvalues_left_out/out" in found
    for array, values in plain.items():
        close(found[array], values, array)


def test_one_backward_pass_shows_them_too():
    """Of kernels that are multiplied through linear(x, kernel, path); a bias is not."""
    kernels = ("first/kernel", "second/kernel")
    lens = make_lens(windows=ROWS, gradients=kernels, route="one_backward")
    measure = make_measure_step(plain_loss, lens)
    found = spectra(measure(plain_params(), ProbeBatch(BATCH))[0])
    for array, values in expected().items():
        if array.startswith("grad") and not array.endswith("bias"):
            close(found[array], values, array)


class NnxDropout(nnx.Module):
    def __init__(self, rngs):
        self.model = NnxModel(rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):  # (B, T, D)
        return self.dropout(self.model(x))


@pytest.mark.parametrize("training", [False, True])
def test_a_model_with_random_state_is_split_into_parameters_and_the_rest(training):
    model = NnxDropout(nnx.Rngs(0))
    nnx.replace_by_pure_dict(state := nnx.state(model.model, nnx.Param), plain_params())
    nnx.update(model.model, state)
    model.train() if training else model.eval()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(params, batch):
        return error_and_tap(nnx.merge(graph, params, rest, copy=True)(batch["x"]), batch)

    path = "model/first/kernel/value"
    assert path in parameter_paths(params)
    lens = make_lens(windows=ROWS, activations=("out",), gradients=(path,))
    both = [measure_lens(loss_fn, lens, params, ProbeBatch(BATCH)) for _ in range(2)]
    assert both[0][1] == both[1][1]
    loss, grads, _ = jax.jit(measured_value_and_grad(loss_fn, lens))(params, BATCH)
    np.testing.assert_allclose(loss, both[0][1], rtol=1e-6)
    assert parameter_paths(grads) == parameter_paths(params)
    found = spectra(both[0][0])[f"grad_singular_values/{path}"]
    if training:
        assert np.isfinite(found).all()
    else:
        close(found, expected()["grad_singular_values/first/kernel"], path)


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_trains_under_the_lens(name):
    """A step of one's own and make_train_step descend alike, measuring or not."""
    dialect, tx = DIALECTS[name], optax.sgd(0.5)
    lens = make_lens(windows=ROWS, activations=("out",), gradients=(dialect.first,))
    value_and_grad = jax.jit(measured_value_and_grad(dialect.loss_fn, lens))
    loss, grads, seen = value_and_grad(dialect.params, BATCH)
    out, gradients = float64_model()
    close(loss, ((out - BATCH["y"]) ** 2).mean(), "loss")
    by_path = dict(zip(parameter_paths(grads), jax.tree.leaves(grads), strict=True))
    mean = gradients["second/kernel"].mean(0).reshape(HIDDEN, WIDTH)
    close(by_path[dialect.second], mean, "mean gradient")
    eigenvalues = spectra(seen)["act_cov_eigenvalues/out"]
    close(eigenvalues, expected()["act_cov_eigenvalues/out"], "of the batch itself")

    step = make_train_step(dialect.loss_fn, tx, lens)
    state = init_state(jax.tree.map(jnp.copy, dialect.params), tx)
    batches = jax.tree.map(lambda leaf: leaf[None], BATCH)
    state, _, seen = step(state, batches, ProbeBatch(BATCH), measure=True)
    close(spectra(seen)["act_cov_eigenvalues/out"], eigenvalues, "of the probe set")
    after = dict(zip(parameter_paths(state.params), jax.tree.leaves(state.params), strict=True))
    close(after[dialect.second], SECOND - 0.5 * mean, "updated kernel")


def test_paths_are_those_a_user_would_write():
    paths = {name: parameter_paths(dialect.params) for name, dialect in DIALECTS.items()}
    assert paths["linen"] == paths["plain"] == ["first/bias", "first/kernel", "second/kernel"]
    assert paths["nnx"] == [f"{path}/value" for path in paths["plain"]]
    assert paths["fields"] == ["inside", "shift", "outside"]
    pure = nnx.to_pure_dict(DIALECTS["nnx"].params)
    assert parameter_paths(pure) == paths["plain"]


def run(loss_fn, params, batch=BATCH, **what):
    lens = make_lens(**{"windows": ROWS} | what)
    return spectra(make_measure_step(loss_fn, lens)(params, ProbeBatch(batch))[0])


def test_a_name_that_is_not_there_is_answered_with_those_that_are():
    state = DIALECTS["nnx"]
    with pytest.raises(ValueError, match=r"no tap named 'h_9'; the forward pass returns \['out'\]"):
        run(plain_loss, plain_params(), activations=("h_9",))
    # the paths of a State end in /value
    for what in ("gradients", "weights"):
        with pytest.raises(ValueError, match=r"at 'first/kernel'; .*'first/kernel/value'"):
            run(state.loss_fn, state.params, **{what: ("first/kernel",)})


def test_rows_that_the_lens_was_not_made_for_are_refused():
    fewer = jax.tree.map(lambda leaf: leaf[:5], BATCH)
    with pytest.raises(ValueError, match="made for windows=8, the data has 5"):
        run(plain_loss, plain_params(), fewer, activations=("out",))
    with pytest.raises(ValueError, match="a pass of 5 rows, where the lens has 8 a pass"):
        run(plain_loss, plain_params(), fewer, gradients=("first/kernel",))
    lens = make_lens(windows=ROWS, activations=("out",))
    with pytest.raises(ValueError, match="made for windows=8, the data has 5"):
        measured_value_and_grad(plain_loss, lens)(plain_params(), fewer)


@pytest.mark.parametrize("what", [{"activations": ("out",)}, {"gradients": ("first/kernel",)}])
def test_a_loss_without_taps_is_refused(what):
    def bare(params, batch):
        return plain_loss(params, batch)[0]

    said = r"loss_fn returned \(\) in shapes: give \(loss, taps\)"
    with pytest.raises(ValueError, match=said):
        run(bare, plain_params(), **what)
    with pytest.raises(ValueError, match=said):
        measured_value_and_grad(bare, make_lens(windows=ROWS, **what))(plain_params(), BATCH)


@jax.tree_util.register_dataclass
@dataclass
class Counted:
    """A model with a whole number among its leaves, as a field that was not declared static."""

    model: FieldModel
    count: int

    def __call__(self, x):
        return self.model(x)


def test_a_leaf_that_is_no_real_number_is_measured_around_and_not_trained():
    counted = Counted(field_model(), 3)
    found = run(field_loss, counted, activations=("out",), gradients=("model/inside",))
    for array, values in expected().items():
        if array.endswith(("/out", "/first/kernel")) and not array.startswith("weight"):
            close(found[array.replace("first/kernel", "model/inside")], values, array)
    lens = make_lens(windows=ROWS, activations=("out",))
    with pytest.raises(ValueError, match=r"parameter at 'count' is int.*has no gradient"):
        measured_value_and_grad(field_loss, lens)(counted, BATCH)
    with pytest.raises(ValueError, match=r"parameter at 'count' is int.*has no gradient"):
        run(field_loss, counted, gradients=("count",))


def test_a_leaf_of_any_shape_has_gradients_and_only_a_matrix_has_singular_values():
    """A convolution (3, 3, in, out): its rows of the gradient matrix are 9 in out long."""
    kernel = np.random.default_rng(1).normal(size=(3, 3, 1, 4)).astype(np.float32)

    def conv_loss(params, batch):
        out = jax.lax.conv_general_dilated(
            batch["x"][..., None],
            params["kernel"],
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jnp.mean(out**2), {"map": out}

    params = {"kernel": jnp.asarray(kernel)}
    found = run(conv_loss, params, activations=("map",), gradients=("kernel",))
    # patches (N, T, D, 9), so that the convolution is a matrix product
    padded = np.pad(BATCH["x"].astype(np.float64), ((0, 0), (1, 1), (1, 1)))
    views = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
    patches = views.reshape(ROWS, TOKENS, WIDTH, 9)
    out = patches @ kernel.reshape(9, 4).astype(np.float64)  # (N, T, D, 4)
    vectors = out / np.sqrt((out**2).mean(-1, keepdims=True) + NORM_EPS)
    eigenvalues = np.linalg.eigvalsh(np.cov(vectors.reshape(-1, 4).T))[::-1]
    close(found["act_cov_eigenvalues/map"], eigenvalues, "map")
    slope = 2 * out / (TOKENS * WIDTH * 4)
    rows = np.einsum("ntdk,ntdc->nkc", patches, slope).reshape(ROWS, -1)
    close(found["grad_singular_values/kernel"], np.linalg.svd(rows, compute_uv=False), "kernel")
    with pytest.raises(ValueError, match=r"'kernel' has shape \(3, 3, 1, 4\), and singular values"):
        run(conv_loss, params, weights=("kernel",))


def test_a_tap_without_the_rows_in_front_is_refused():
    def turned(params, batch):
        loss, taps = plain_loss(params, batch)
        return loss, {"out": jnp.swapaxes(taps["out"], 0, 1), "flat": taps["out"].reshape(-1)}

    for site, shape in (("out", f"{TOKENS}, {ROWS}, "), ("flat", "")):
        with pytest.raises(ValueError, match=rf"tap '{site}' has shape \({shape}.* of {ROWS} rows"):
            run(turned, plain_params(), activations=(site,))


def test_what_would_be_measured_wrongly_is_refused():
    def two(params, batch):
        return plain_loss(params, batch)

    kernel = ("first/kernel",)
    with pytest.raises(ValueError, match="route='vmapgrad': give one of one_backward, vmap_grad"):
        make_lens(windows=ROWS, gradients=kernel, route="vmapgrad")
    with pytest.raises(ValueError, match="activations='out' is one name: give a list"):
        make_lens(windows=ROWS, activations="out")
    lens = make_lens(windows=ROWS, gradients=kernel, route="one_backward")
    with pytest.raises(ValueError, match=r"the lens calls loss_fn\(params, batch, linear\)"):
        measure_lens(two, lens, plain_params(), ProbeBatch(BATCH))
    with pytest.raises(ValueError, match=r"a probe set is a ProbeBatch\(batch\)"):
        measure_lens(plain_loss, lens, plain_params(), BATCH)
    half = jax.tree.map(lambda leaf: leaf[: ROWS // 2], BATCH)
    with pytest.raises(ValueError, match=f"a pass of {ROWS // 2} rows, where the lens has {ROWS}"):
        measure_lens(plain_loss, lens, plain_params(), ProbeBatch(half))
    with pytest.raises(ValueError, match="rows are not 6 samples and whole chunks of 3"):
        split_windows(BATCH, 6, 3)
    with pytest.raises(ValueError, match="give every leaf the same rows"):
        split_windows(BATCH | {"x": BATCH["x"][:3]}, 2, 1)
    tx = optax.sgd(0.1)
    step = make_train_step(plain_loss, tx, lens)
    state = init_state(plain_params(), tx)
    with pytest.raises(ValueError, match="give batches a leading axis of micro-batches"):
        step(state, BATCH, ProbeBatch(BATCH), measure=True)
