"""Masks against a double loop, and every implementation of attention against the dense one."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import quick_compiler

from models import blocked_attention as blocked
from models.attention import attention, choose
from models.flash import flash_attention
from models.masks import document_ids, first_keys, visible_pairs

BLOCK, WIDEST = 16, 96
LENGTHS = (48, 97, 150)  # a short row, and two that end within a block of queries
RULES = ("none", "token", "token_block", "block")
FORWARD, BACKWARD = 1e-6, 1e-5


@pytest.fixture(scope="module", autouse=True)
def _quick_compiler():
    with quick_compiler():
        yield


@pytest.fixture(scope="module", autouse=True)
def _small_blocks():
    """Blocks of queries so small that all but the shortest row need the loop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "SHORT_ROW", 64)
        patch.setattr(blocked, "QUERY_BLOCK", 32)
        yield


def allowed(query: int, key: int, documents, window: int, rule: str) -> bool:
    """The table of ladder spec 3.4, one pair at a time."""
    if key > query or documents[query] != documents[key]:
        return False
    apart = query // BLOCK - key // BLOCK
    return {
        "none": True,
        "token": query - key < window,
        "token_block": query - key < window and apart < -(-window // BLOCK),
        "block": apart < max(1, window // BLOCK),
    }[rule]


# Rows and windows of every size, and documents that start nowhere, anywhere, on edges, in crowds.
starts = st.one_of(
    st.just([]),
    st.lists(st.integers(0, max(LENGTHS) - 1), max_size=40),
    st.lists(st.integers(0, max(LENGTHS) // BLOCK).map(lambda b: b * BLOCK), max_size=4),
)
masks = st.fixed_dictionaries(
    {
        "length": st.sampled_from(LENGTHS),
        "rule": st.sampled_from(RULES),
        "windows": st.tuples(st.integers(1, WIDEST), st.integers(1, WIDEST)),
        "starts": st.tuples(starts, starts),
        "seed": st.integers(0, 1000),
    }
)


def build(draw) -> tuple[jax.Array, jax.Array]:
    """Document ids (2, length) and windows (2,) of a draw."""
    length = draw["length"]
    tokens = np.ones((2, length), np.int32)
    for row, places in zip(tokens, draw["starts"], strict=True):
        row[[place for place in places if place < length]] = 0
    return document_ids(jnp.asarray(tokens), 0), jnp.asarray(draw["windows"], jnp.int32)


PAIRS, FIRST = (
    jax.jit(function, static_argnums=0, static_argnames=("rule", "block"))
    for function in (visible_pairs, first_keys)
)


@settings(max_examples=200)
@given(masks)
def test_masks_are_the_double_loop(draw):
    documents, windows = build(draw)
    mask = {"rule": draw["rule"], "block": BLOCK}
    pairs = np.asarray(PAIRS(documents.shape, documents, windows, **mask))
    first = np.asarray(FIRST(documents.shape, documents, windows, **mask))
    assert (np.diff(first, axis=1) >= 0).all()
    rng, numbers = np.random.default_rng(draw["seed"]), np.asarray(documents)
    length = draw["length"]
    for row, query in zip(rng.integers(0, 2, 25), rng.integers(0, length, 25), strict=True):
        ids, window = numbers[row].tolist(), int(windows[row])
        expected = [allowed(query, key, ids, window, draw["rule"]) for key in range(length)]
        np.testing.assert_array_equal(pairs[row, query], expected)
        interval = (np.arange(length) >= first[row, query]) & (np.arange(length) <= query)
        np.testing.assert_array_equal(interval, expected)


def grads_of(function):
    """q, k, v, cotangent, documents, windows -> output and the gradients of q, k and v."""

    @partial(jax.jit, static_argnames="rule")
    def run(arrays, cotangent, documents, windows, rule):
        out, pull_back = jax.vjp(
            lambda q, k, v: function(q, k, v, documents, windows, rule), *arrays
        )
        return out, pull_back(cotangent)

    return run


def masked(implementation, q, k, v, documents, windows, rule):
    return attention(
        q, k, v, documents, windows, rule=rule, block=BLOCK, widest=WIDEST, scale=0.4,
        implementation=implementation,
    )  # fmt: skip


def interpreted(q, k, v, documents, windows, rule):
    """The kernel as `attention` calls it, off the GPU."""
    first = first_keys(q.shape[:2], documents, windows, rule=rule, block=BLOCK)
    return flash_attention(q, k, v, first, scale=0.4, interpret=True)


ROUTES = {
    name: grads_of(partial(masked, name)) if name != "pallas" else grads_of(interpreted)
    for name in ("dense", "blocked", "pallas")
}


@settings(max_examples=200)
@given(masks)
def test_every_implementation_is_the_dense_one(draw):
    documents, windows = build(draw)
    rng = np.random.default_rng(draw["seed"])
    *arrays, cotangent = rng.normal(size=(4, 2, draw["length"], 2, 16)).astype(np.float32)
    arguments = arrays, cotangent, documents, windows, draw["rule"]
    expected, wanted = ROUTES["dense"](*arguments)
    for name in ("blocked", "pallas"):
        out, grads = ROUTES[name](*arguments)
        np.testing.assert_allclose(out, expected, rtol=FORWARD, atol=2 * FORWARD, err_msg=name)
        for grad, want in zip(grads, wanted, strict=True):
            np.testing.assert_allclose(grad, want, rtol=BACKWARD, atol=BACKWARD, err_msg=name)


@pytest.mark.parametrize("length", [1, 2, 5, 33, 64])
def test_short_rows_are_a_masked_softmax_in_float64(length):
    rng = np.random.default_rng(length)
    q, k, v = rng.normal(size=(3, 2, length, 3, 4)) * 2
    expected = np.zeros(q.shape)
    for b, t, h in np.ndindex(2, length, 3):
        scores = k[b, : t + 1, h] @ q[b, t, h] / 2
        weights = np.exp(scores - scores.max())
        expected[b, t, h] = weights @ v[b, : t + 1, h] / weights.sum()
    got = jax.jit(attention)(*(jnp.asarray(each, jnp.float32) for each in (q, k, v)))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_short_rows_have_the_gradients_of_the_dense_one():
    rng = np.random.default_rng(0)
    *arrays, cotangent = rng.normal(size=(4, 2, 53, 2, 8)).astype(np.float32)
    windows = jnp.asarray([9, 30])
    for rule in RULES:
        arguments = arrays, cotangent, None, windows, rule
        (_, wanted), (_, grads) = ROUTES["dense"](*arguments), ROUTES["blocked"](*arguments)
        for grad, want in zip(grads, wanted, strict=True):
            np.testing.assert_allclose(grad, want, rtol=BACKWARD, atol=BACKWARD)


def test_blocked_holds_no_array_of_all_pairs():
    """Neither the compiled forward nor the backward pass; memory is that of a block's reach."""
    length, reach = 4096, 64
    q = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    first = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def total(q, k, v, first):
        return jnp.sum(blocked.blocked_attention(q, k, v, first, 1.0, reach))

    compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(q, q, q, first).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * length * length / 10
    assert f"{length},{length}" not in compiled.as_text()


def test_half_precision_keeps_scores_and_sums_in_float32():
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(3, 1, 150, 2, 16)).astype(np.float32)
    half = [jnp.asarray(each, jnp.bfloat16) for each in arrays]
    rounded = [each.astype(jnp.float32) for each in half]
    got, expected = attention(*half), attention(*rounded)
    assert got.dtype == jnp.bfloat16
    # one rounding of the weights and one of the result, not one a step
    assert np.abs(np.asarray(got, np.float32) - expected).max() < 2.0**-7 * np.abs(expected).max()


def test_a_choice_that_cannot_run_is_refused_and_auto_runs_anywhere():
    assert choose("auto", True, jnp.float32, 16) == "blocked"
    assert choose("dense", True, jnp.float32, 16) == "dense"
    with pytest.raises(ValueError, match="attention=cudnn needs an NVIDIA GPU"):
        choose("cudnn", False, jnp.bfloat16, 64)
    with pytest.raises(
        ValueError, match="attention=pallas needs a GPU, and heads of a power of two"
    ):
        choose("pallas", True, jnp.bfloat16, 64)


def test_a_gpu_takes_the_kernel_that_the_mask_allows(monkeypatch):
    def card(capability):
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        device = SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "devices", lambda: [device])

    card("gfx942")  # of AMD, where neither kernel has been tried
    assert choose("auto", False, jnp.bfloat16, 128) == "blocked"
    card("7.5")  # without bfloat16 units
    assert choose("auto", True, jnp.bfloat16, 128) == "blocked"
    card("8.0")
    assert choose("auto", False, jnp.bfloat16, 256) == "pallas"
    card("9.0")
    assert choose("auto", False, jnp.bfloat16, 256) == "cudnn"
    assert choose("auto", False, jnp.bfloat16, 10) == "blocked"
    with pytest.raises(ValueError, match="heads of 10"):
        choose("cudnn", False, jnp.bfloat16, 10)
    assert choose("auto", False, jnp.bfloat16, 128) == "cudnn"
    assert choose("auto", True, jnp.bfloat16, 128) == "pallas"
    assert choose("auto", True, jnp.float32, 128) == "blocked"
    assert choose("auto", True, jnp.bfloat16, 12) == "blocked"
    assert choose("pallas", True, jnp.float32, 64) == "pallas"
    with pytest.raises(ValueError, match="masked"):
        choose("cudnn", True, jnp.bfloat16, 128)
