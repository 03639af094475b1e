"""The float8 rules of the head against numpy and ml_dtypes, and what a GPU is given of them."""

import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny_models import quick_compiler
from twins_head import (
    BF16,
    LENGTH,
    ROWS,
    VOCAB,
    by_both,
    distance,
    gradients_of,
    inputs,
    naive,
    softmax_twin,
    traced,
    twin,
)

from models import float8, head
from models.head import head_loss

TYPES = [
    (float8.FORWARD, ml_dtypes.float8_e4m3fn, 448.0),
    (float8.BACKWARD, ml_dtypes.float8_e5m2, 57_344.0),
]


@pytest.fixture(scope="module", autouse=True)
def _quick_compiler():
    with quick_compiler():
        yield


def quantized(x, scale, dtype, limit):
    """numpy's: the scaled values rounded to float8, as float32."""
    return np.clip(x * np.float32(scale), -limit, limit).astype(dtype).astype(np.float32)


@pytest.mark.parametrize(("dtype", "numpys", "limit"), TYPES)
def test_quantize_rounds_to_nearest_and_saturates(dtype, numpys, limit):
    every = np.arange(256, dtype=np.uint8).view(numpys).astype(np.float32)
    every = np.unique(every[np.isfinite(every)])
    ties = (every[1:] + every[:-1]) / 2
    near = [np.nextafter(ties, np.float32(side)) for side in (-np.inf, np.inf)]
    wild = np.random.default_rng(0).normal(size=5000).astype(np.float32) * limit
    x = np.concatenate([every, ties, *near, wild, [np.inf, -np.inf, 1e-30]]).astype(np.float32) / 2
    got = jax.jit(lambda x: float8.quantize(x, 2.0, dtype))(x)
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.float32(got), quantized(x, 2, numpys, limit))
    assert np.abs(np.float32(got)).max() == limit
    assert np.isnan(np.float32(float8.quantize(jnp.float32(np.nan), 2.0, dtype)))


def bfloat16(x):
    """numpy's rounding to bfloat16, in float64."""
    return np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float64)


def float8_operands(x, kernel):
    pairs = (x, 2), (kernel, 32)
    return tuple(quantized(np.float32(bfloat16(a)), s, *TYPES[0][1:]) for a, s in pairs)


def float8_gradients(g, x8, w8, num_tokens):
    """numpy's dx before its rounding, and dw, from g in its own dtype."""
    scale = 2.0**29 * num_tokens / 65_536
    g8 = quantized(g.astype(np.float32), scale, *TYPES[1][1:]).astype(np.float64)
    return g8 @ w8.T / (scale * 32), np.einsum("btd,btv->dv", x8, g8) / (scale * 2)


def test_float8_product_is_numpys():
    x, kernel, _ = inputs()
    kernel[0] *= 10  # some beyond 448 / 32
    x8, w8 = float8_operands(x, kernel)
    z = x8.astype(np.float64) @ w8 / 64
    assert np.abs(kernel).max() > 14
    rounded = jax.jit(partial(float8.float8_linear, num_tokens=60, native=False))(x, kernel)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float64(rounded), bfloat16(z))


def test_float8_gradients_are_numpys():
    x, kernel, targets = inputs()
    _, g = softmax_twin(x.astype(np.float64) @ kernel, targets, None)
    g = g.astype(ml_dtypes.bfloat16)
    linear = partial(float8.float8_linear, num_tokens=60, native=False)
    dx, dw = jax.jit(lambda x, w, g: jax.vjp(linear, x, w)[1](g))(x, kernel, g)
    expected_dx, expected_dw = float8_gradients(g, *float8_operands(x, kernel), 60)
    assert dx.dtype == dw.dtype == jnp.float32
    np.testing.assert_array_equal(dx, np.float32(expected_dx.astype(ml_dtypes.bfloat16)))
    np.testing.assert_allclose(dw, expected_dw, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("chunk", [None, 7])
def test_float8_loss_and_gradients_are_numpys_and_the_naive_ones(chunk):
    x, kernel, targets = inputs()
    x8, w8 = float8_operands(x, kernel)
    z = bfloat16(x8.astype(np.float64) @ w8 / 64)
    capped = bfloat16(15 * bfloat16(np.tanh(bfloat16(z / 15))))
    expected, g = softmax_twin(capped, targets, None)
    g = g * (1 - (capped / 15) ** 2)
    expected_grads = float8_gradients(g.astype(ml_dtypes.bfloat16), x8, w8, targets.size)
    # float8 means bfloat16 around it, whatever the model's dtype
    loss, grads = by_both(head_loss, **BF16 | {"dtype": jnp.float32}, float8=True, chunk=chunk)(
        x, kernel, targets
    )
    plain, plain_grads = by_both(naive, **BF16, float8=True)(x, kernel, targets)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(plain) == pytest.approx(expected, rel=1e-5)
    for got, same, want in zip(grads, plain_grads, expected_grads, strict=True):
        # a slope next to a rounding edge of e5m2 may fall on the other side
        assert distance(got, want) < 0.01
        # autodiff rounds the cotangent of every operation of the cap to bfloat16 on its way
        assert distance(same, want) < 0.05


def test_float8_gradient_scale_follows_the_tokens_of_the_mean():
    assert float8.gradient_scale(65_536) == 2.0**29
    assert float8.gradient_scale(512) == 2.0**22
    x, kernel, targets = inputs()
    grads = by_both(head_loss, **BF16, float8=True)
    _, (dx, dw) = grads(x, kernel, targets)
    twice = (np.concatenate([each, each]) for each in (x, targets))
    x, targets = twice
    _, (dx_twice, dw_twice) = grads(x, kernel, targets)
    np.testing.assert_array_equal(dx_twice, np.concatenate([dx, dx]) / 2)
    np.testing.assert_allclose(dw_twice, dw, rtol=1e-5, atol=1e-9)


def test_float8_does_not_saturate_at_512_tokens():
    x, kernel, targets = inputs(rows=4, length=128)
    _, grads = by_both(head_loss, **BF16, float8=True)(x, kernel, targets)
    for got, want in zip(grads, twin(x, kernel, targets, 15.0)[1], strict=True):
        assert distance(got, want) < 0.15
    steepest = jnp.float32(-1 / 512)
    kept = float8.quantize(steepest, float8.gradient_scale(512), float8.BACKWARD)
    assert float(kept) == -8192
    assert float(float8.quantize(steepest, 2.0**29, float8.BACKWARD)) == -57_344


def test_native_products_reach_cuda_in_float8():
    def both_ways(x, kernel, g):
        linear = partial(float8.float8_linear, num_tokens=60, native=True)
        z, back = jax.vjp(linear, x, kernel)
        return z, back(g)

    x, kernel, _ = inputs()
    g = jnp.zeros((ROWS, LENGTH, VOCAB), jnp.bfloat16)
    lowered = jax.jit(both_ways).trace(x, kernel, g).lower(lowering_platforms=("cuda",))
    found = re.findall(
        r"dot_general.*precision = \[(\w+), \w+\].*\(tensor<\S*x(\w+)>, tensor<\S*x(\w+)>\)"
        r" -> tensor<\S*x(\w+)>",
        lowered.as_text(),
    )
    assert sorted(found) == [
        ("DEFAULT", "f8E4M3FN", "f8E4M3FN", "bf16"),
        ("HIGHEST", "f8E4M3FN", "f8E5M2", "f32"),
        ("HIGHEST", "f8E5M2", "f8E4M3FN", "f32"),
    ]


@pytest.mark.parametrize(
    ("backend", "capability", "native"),
    [
        ("cpu", None, False),
        ("gpu", "8.0", False),
        ("gpu", "8.9", True),
        ("gpu", "9.0", True),
        ("gpu", "10.0", True),
        ("gpu", "gfx942", False),
    ],
)
def test_native_float8_asks_the_card(monkeypatch, backend, capability, native):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)])
    assert float8.has_native_float8() is native


def test_the_head_hands_the_choice_to_the_product(monkeypatch):
    monkeypatch.setattr(head, "has_native_float8", lambda: True)
    for function in (head_loss, gradients_of):
        found = traced(function, **BF16, float8=True, chunk=5)
        products = [eqn for eqn, _ in found if eqn.primitive.name == "dot_general"]
        operands = {str(v.aval.dtype)[:6] for eqn in products for v in eqn.invars}
        assert operands == {"float8"}


def test_native_products_are_counted_in_compiled_text():
    line = (
        '%c.{} = (bf16[8,8], s8[64]) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul{}"'
    )
    lines = [line.format(1, "$f8"), line.format(2, ""), line.format(3, "$f8")]
    assert float8.native_float8_products("\n".join(lines)) == 2
    assert float8.native_float8_products(line.format(1, "")) == 0
