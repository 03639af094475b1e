"""The chunked head against float64 twins and against autodiff of the plain formula."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import quick_compiler
from twins_head import (
    BF16,
    F32,
    LENGTH,
    ROWS,
    VOCAB,
    WIDTH,
    by_both,
    distance,
    gradients_of,
    inputs,
    naive,
    traced,
    twin,
)

from models.head import chunk_length, head_logits, head_loss


@pytest.fixture(scope="module", autouse=True)
def _quick_compiler():
    with quick_compiler():
        yield


# The loss and its gradients


@pytest.mark.parametrize("softcap", [None, 30.0, 15.0])
@pytest.mark.parametrize("chunk", [None, 1, 5, 7, 13, 99])  # divides, does not, once and a rest
def test_loss_and_gradients_are_numpys(softcap, chunk):
    def tripled(*arrays):  # a cotangent other than 1
        return 3 * head_loss(*arrays, softcap=softcap, dtype="float32", chunk=chunk)

    arrays = inputs()
    loss, grads = by_both(tripled)(*arrays)
    expected, expected_grads = twin(*arrays, softcap)
    assert loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(3 * expected, rel=2e-6)
    for got, want, array in zip(grads, expected_grads, arrays, strict=False):
        assert got.dtype == array.dtype
        np.testing.assert_allclose(got, 3 * want, rtol=1e-5, atol=1e-6)


def test_large_logits_do_not_overflow():
    x, kernel, targets = inputs()
    loss, grads = by_both(head_loss, **F32, chunk=5)(100 * x, kernel, targets)
    expected, expected_grads = twin(100 * x, kernel, targets, None)
    assert expected > 500
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    for got, want in zip(grads, expected_grads, strict=True):
        assert distance(got, want) < 1e-4


def test_loss_alone_is_the_loss_with_gradients():
    arrays = inputs()
    rule = {"softcap": 15.0, "dtype": jnp.float32, "chunk": 7}
    alone = jax.jit(partial(head_loss, **rule))(*arrays)
    assert float(alone) == pytest.approx(float(by_both(head_loss, **rule)(*arrays)[0]), rel=1e-6)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_tied_kernel_gets_the_gradient_of_the_naive_formula(softcap):
    x, kernel, targets = inputs()
    rule = {"softcap": softcap, "dtype": jnp.float32}

    def tied(loss_fn, x, table, **rule):
        return loss_fn(x, table.T, targets, **rule)

    table = np.ascontiguousarray(kernel.T)  # (V, D)
    loss, grads = by_both(partial(tied, head_loss), **rule, chunk=6)(x, table)
    expected, expected_grads = by_both(partial(tied, naive), **rule)(x, table)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    for got, want in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_logits_are_the_capped_product():
    x, kernel, _ = inputs()
    product = x.astype(np.float64) @ kernel
    for softcap, expected in ((None, product), (15.0, 15 * np.tanh(product / 15))):
        got = head_logits(x, kernel, softcap=softcap, dtype=jnp.float32)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    half = head_logits(x, kernel, **BF16)
    assert half.dtype == jnp.float32
    assert 1e-4 < distance(half, expected) < 0.01


def test_bfloat16_is_close_and_keeps_the_dtypes_of_its_inputs():
    x, kernel, targets = inputs()
    expected, expected_grads = twin(x, kernel, targets, 15.0)
    half = by_both(head_loss, **BF16, chunk=5)
    for width in (jnp.float32, jnp.bfloat16):
        loss, grads = half(jnp.asarray(x, width), kernel, targets)
        assert float(loss) == pytest.approx(expected, rel=0.01)
        assert [each.dtype for each in grads] == [width, jnp.float32]
        for got, want in zip(grads, expected_grads, strict=True):
            assert 1e-4 < distance(got, want) < 0.02


@pytest.mark.parametrize("outside", [VOCAB, -1, 2**31 - 1])
@pytest.mark.parametrize("chunk", [None, 7])
def test_a_target_outside_the_vocabulary_gives_nan(outside, chunk):
    x, kernel, targets = inputs()
    targets[1, 11] = outside
    loss, (dx, dw) = by_both(head_loss, **F32, chunk=chunk)(x, kernel, targets)
    assert np.isnan(loss)
    assert np.argwhere(np.isnan(dx).all(-1)).tolist() == [[1, 11]]
    assert np.isnan(dw).all()
    assert np.isnan(jax.jit(partial(head_loss, **F32, chunk=chunk))(x, kernel, targets))


@pytest.mark.parametrize("float8", [False, True])
def test_a_nan_comes_through(float8):
    x, kernel, targets = inputs()
    x[2, 3, 1] = np.nan
    loss, (dx, dw) = by_both(head_loss, **BF16, float8=float8, chunk=5)(x, kernel, targets)
    assert np.isnan(loss)
    assert np.isnan(dx[2, 3]).all()
    assert np.isnan(dw).any()
    assert np.isfinite(dx[0]).all()


@pytest.mark.parametrize("chunk", [None, 7])
def test_rows_mapped_over_are_rows_one_at_a_time(chunk):
    x, kernel, targets = inputs()

    def of_row(x, targets):
        loss_fn = partial(head_loss, softcap=15.0, dtype=jnp.float32, chunk=chunk)
        return jax.value_and_grad(loss_fn, (0, 1))(x[None], kernel, targets[None])

    losses, (dx, dw) = jax.jit(jax.vmap(of_row))(x, targets)
    listed = jax.jit(lambda *arrays: jax.lax.map(lambda row: of_row(*row), arrays))(x, targets)
    for row in range(ROWS):
        expected, (x_twin, kernel_twin) = twin(x[row, None], kernel, targets[row, None], 15.0)
        assert float(losses[row]) == pytest.approx(expected, rel=2e-6)
        np.testing.assert_allclose(dx[row], x_twin, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(dw[row], kernel_twin, rtol=1e-5, atol=1e-6)
    for got, want in zip(jax.tree.leaves(listed), (losses, dx, dw), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_wrong_arguments_say_so():
    x, kernel, targets = inputs()
    with pytest.raises(ValueError, match="chunk=0: give at least 1"):
        head_loss(x, kernel, targets, **F32, chunk=0)
    with pytest.raises(ValueError, match=r"targets of shape \(3, 19\)"):
        head_loss(x, kernel, targets[:, 1:], **F32)


# What is never made


def largest(found, looped):
    return max(v.aval.size for eqn, inside in found if inside == looped for v in eqn.outvars)


@pytest.mark.parametrize("rule", [F32, BF16, BF16 | {"float8": True}], ids=["f32", "bf16", "f8"])
@pytest.mark.parametrize("chunk", [4, 7])
def test_no_logits_of_all_positions_exist(rule, chunk):
    of_chunk = ROWS * chunk * VOCAB
    for function in (head_loss, gradients_of):
        found = traced(function, **rule, chunk=chunk)
        assert largest(found, looped=True) == of_chunk
        # outside the loop: x, the kernel, and the logits of a rest
        assert largest(found, looped=False) <= max(of_chunk, ROWS * LENGTH * WIDTH)
        whole = traced(function, **rule, chunk=LENGTH)
        assert largest(whole, looped=False) == ROWS * LENGTH * VOCAB  # and no loop at all
        assert not any(inside for _, inside in whole)


def test_logits_are_computed_once_and_gradients_only_when_asked_for():
    products = {
        function: [eqn.primitive.name for eqn, _ in traced(function, **BF16, chunk=5)].count(
            "dot_general"
        )
        for function in (head_loss, gradients_of)
    }
    assert products == {head_loss: 1, gradients_of: 3}


def test_chunk_lengths(monkeypatch):
    assert chunk_length(8, 512, 96, 1024) == 32  # by the logits
    assert chunk_length(1, 2048, 256, 50_304) == 512  # by the width
    assert chunk_length(1, 64, 96, 1024) == 64
    assert chunk_length(4096, 512, 96, 1024) == 1  # more rows than a chunk should have positions
    assert chunk_length(8, 509, 96, 1024) == 32  # a prime length: 15 chunks and a rest of 29
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert chunk_length(1, 65_536, 768, 50_304) == 2048
    assert chunk_length(64, 1024, 768, 50_304) == 32
