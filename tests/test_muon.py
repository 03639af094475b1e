"""Newton-Schulz and Muon against SVD, a torch-layout twin (twins_optim) and pieces of optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import twins_optim
from hypothesis import given, settings
from hypothesis import strategies as st

from optim.config import OptimConfig
from optim.muon import newton_schulz, scale_by_muon
from optim.schedules import momentum

orthogonalise = jax.jit(newton_schulz, static_argnums=(1, 2))


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def relative(a, b):
    return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)


# Newton-Schulz


@pytest.mark.parametrize("shape", [(24, 24), (16, 64), (64, 16)])
def test_newton_schulz_approaches_the_polar_factor(shape):
    # Singular values up to condition number 20: five iterations lift all of them into the band.
    left, _, right = np.linalg.svd(normal(0, *shape), full_matrices=False)
    values = np.geomspace(1.0, 0.05, min(shape))
    out = np.asarray(orthogonalise(jnp.asarray(left * values @ right), 5, "float32"), np.float64)
    core = left.T @ out @ right.T
    np.testing.assert_allclose(core, np.diag(np.diag(core)), atol=1e-4)  # same singular vectors
    np.testing.assert_allclose(left @ core @ right, out, atol=1e-4)  # and no others
    assert 0.6 < np.diag(core).min() <= np.diag(core).max() < 1.25


@settings(max_examples=20)
@given(
    shape=st.sampled_from([(1, 1), (1, 7), (5, 5), (4, 9), (9, 4)]),
    steps=st.sampled_from([1, 5]),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_newton_schulz_maps_each_singular_value(shape, steps, scale, seed):
    u = scale * normal(seed, *shape)
    left, values, right = np.linalg.svd(u.astype(np.float64), full_matrices=False)
    mapped = twins_optim.singular_value_map(values / (np.sqrt((values**2).sum()) + 1e-7), steps)
    out = orthogonalise(jnp.asarray(u), steps, "float32")
    # Five iterations amplify the rounding next to a tiny singular value by up to 3.4445^5 = 485.
    np.testing.assert_allclose(out, (left * mapped) @ right, atol=1e-3)


@pytest.mark.parametrize("shape", [(6, 6), (5, 12), (12, 5)])
def test_newton_schulz_is_the_torch_rule_transposed(shape):
    u = normal(3, *shape)
    twin = twins_optim.newton_schulz(u.T, 5).T
    np.testing.assert_allclose(orthogonalise(jnp.asarray(u), 5, "float32"), twin, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stack_equals_its_matrices(dtype):
    stack = jnp.asarray(normal(4, 3, 12, 5) * np.array([1e-3, 1.0, 1e3], np.float32)[:, None, None])
    together = orthogonalise(stack, 5, dtype)
    alone = jnp.stack([orthogonalise(matrix, 5, dtype) for matrix in stack])
    np.testing.assert_allclose(together, alone, atol=1e-5 if dtype == "float32" else 0.03)


@pytest.mark.parametrize("shape", [(96, 96), (48, 192), (192, 48)])
def test_bfloat16_stays_near_float32(shape):
    u = jnp.asarray(normal(5, *shape))
    low, high = (orthogonalise(u, 5, dtype) for dtype in ("bfloat16", "float32"))
    assert low.dtype == jnp.float32
    assert 1e-4 < relative(low, np.asarray(high)) < 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero_gives_zero(dtype):
    np.testing.assert_array_equal(newton_schulz(jnp.zeros((2, 4, 8)), 5, dtype), 0.0)


def test_newton_schulz_refuses_a_vector():
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        newton_schulz(jnp.ones(3), 5, "float32")


# Muon

KERNELS = {"q": (6, 6), "k": (6, 6), "fc": (6, 24), "proj": (24, 6)}


def kernel_grads(step):
    return {name: normal(100 * step + i, *KERNELS[name]) for i, name in enumerate(KERNELS)}


def test_muon_equals_its_torch_twin_through_a_momentum_warmup():
    config = OptimConfig(momentum_start=0.85, momentum_steps=5)
    warming = momentum(config, 5)
    tx = optax.chain(
        scale_by_muon(warming, ns_steps=5, ns_dtype="float32"), optax.scale_by_learning_rate(0.02)
    )
    params = {name: normal(i, *shape) for i, (name, shape) in enumerate(KERNELS.items())}
    twin = twins_optim.Muon([params[name].T for name in KERNELS], steps=5)
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(8):
        grads = kernel_grads(step)
        updates, state = update(grads, state)
        params = optax.apply_updates(params, updates)
        mu = 0.85 + 0.10 * min(step / 5, 1)
        twin.step([grads[name].T for name in KERNELS], lr=0.02, mu=mu)
    assert int(state[0].count) == 8
    for name, weight in zip(KERNELS, twin.weights, strict=True):
        np.testing.assert_allclose(params[name], weight.T, atol=1e-5)


def test_muon_equals_the_sum_form_built_from_optax():
    # optax.contrib.muon itself bias-corrects its momentum; with beta = 0 only its Newton-Schulz is
    # left, and optax.trace is the sum form (ecosystem spec 2.1).
    dimensions = dict.fromkeys(KERNELS, optax.contrib.MuonDimensionNumbers(0, 1))
    reference = optax.chain(
        optax.trace(0.95, nesterov=True),
        optax.contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=dimensions),
    )
    ours = scale_by_muon(0.95, ns_steps=5, ns_dtype="float32")
    zeros = {name: np.zeros(shape, np.float32) for name, shape in KERNELS.items()}
    ours_state, reference_state = ours.init(zeros), reference.init(zeros)
    update, reference_update = jax.jit(ours.update), jax.jit(reference.update)
    for step in range(5):
        grads = jax.tree.map(jnp.asarray, kernel_grads(step))
        out, ours_state = update(grads, ours_state)
        expected, reference_state = reference_update(grads, reference_state)
        for name, (fan_in, fan_out) in KERNELS.items():
            scaled = max(1, fan_out / fan_in) ** 0.5 * expected[name]
            np.testing.assert_allclose(out[name], scaled, atol=1e-5)


def test_muon_stacks_equal_shapes_and_keeps_every_matrix_in_its_place():
    tx = scale_by_muon(0.9, ns_steps=2, ns_dtype="float32")
    grads = jax.tree.map(jnp.asarray, kernel_grads(0))
    first_update = jax.jit(lambda g: tx.update(g, tx.init(g))[0])
    out = first_update(grads)
    program = str(jax.make_jaxpr(first_update)(grads))
    # Three shapes, not four matrices; 3 products in 2 iterations; none of them in TF32.
    assert program.count("dot_general") == 3 * 3 * 2
    assert program.count("HIGHEST") >= 3 * 3 * 2
    for name, grad in grads.items():
        np.testing.assert_allclose(out[name], first_update({name: grad})[name], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_muon_survives_zero_and_low_precision_gradients(dtype):
    tx = scale_by_muon(0.95, ns_dtype=dtype)
    state = tx.init({"q": np.zeros((4, 4), np.float32)})
    out, state = tx.update({"q": jnp.zeros((4, 4))}, state)
    np.testing.assert_array_equal(out["q"], 0.0)
    out, state = tx.update({"q": jnp.asarray(normal(0, 4, 4), jnp.bfloat16)}, state)
    assert out["q"].dtype == state.buffer["q"].dtype == jnp.float32
    assert np.isfinite(out["q"]).all()


def test_muon_refuses_a_vector():
    tx = scale_by_muon(0.95)
    with pytest.raises(ValueError, match="use Adam"):
        tx.update({"bias": jnp.ones(4)}, tx.init({"bias": jnp.ones(4)}))
