"""Schedules at their corners, and the optimizer of all groups against slow twins (twins_optim)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import twins_optim
from hypothesis import given
from hypothesis import strategies as st

from optim.config import OptimConfig, reference_to_run_steps
from optim.groups import GROUPS, group_labels, group_of, learning_rates, make_optimizer
from optim.muon import newton_schulz
from optim.schedules import Horizon, learning_rate_factor, momentum

D, V, T = 8, 20, 6


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model_tree(seed, *, blocks=("h_0",), untied=True, late=True):
    """A parameter tree with every kind of parameter that a rung can have."""

    def block(s):
        attn = {f"c_{n}": {"kernel": normal(s + i, D, D)} for i, n in enumerate("qkv")}
        attn["c_proj"] = {"kernel": normal(s + 3, D, D), "bias": normal(s + 4, D)}
        mlp = {
            "c_fc": {"kernel": normal(s + 5, D, 4 * D)},
            "c_proj": {"kernel": normal(s + 6, 4 * D, D)},
        }
        tree = {"attn": attn, "mlp": mlp}
        if late:
            attn["lamb"] = normal(s + 7)
            tree["lambdas"] = normal(s + 8, 2)
        return tree

    tree = {
        "wte": {"embedding": normal(seed, V, D)},
        "wpe": {"embedding": normal(seed + 1, T, D)},
    }
    tree |= {name: block(seed + 10 * (i + 1)) for i, name in enumerate(blocks)}
    if untied:
        tree["lm_head"] = {"kernel": normal(seed + 2, D, V)}
    if late:
        tree["skip_weights"] = normal(seed + 3, 1)
        tree["value_embed_0"] = {"embedding": normal(seed + 4, V, D)}
    return tree


def one_of_each(seed):
    """One parameter of every group."""
    return {
        "wte": {"embedding": normal(seed, V, D)},
        "h_0": {"mlp": {"c_fc": {"kernel": normal(seed + 1, D, 4 * D)}}},
        "skip_weights": normal(seed + 2, 1),
        "lm_head": {"kernel": normal(seed + 3, D, V)},
    }


# Schedules


@pytest.mark.parametrize(
    ("schedule", "step", "factor"),
    [
        ("cosine", 0, 1.0),
        ("cosine", 50, 0.5),
        ("cosine", 25, 0.5 * (1 + np.cos(np.pi / 4))),
        ("cosine", 100, 0.0),
        ("cosine", 150, 0.0),
        ("trapezoid", 0, 1.0),
        ("trapezoid", 89, 1.0),
        ("trapezoid", 90, 1.0),
        ("trapezoid", 91, 0.9),
        ("trapezoid", 99, 0.1),
        ("trapezoid", 100, 0.0),
        ("trapezoid", 150, 0.0),
    ],
)
def test_learning_rate_factor_at_its_corners(schedule, step, factor):
    f = learning_rate_factor(OptimConfig(schedule=schedule, warmdown=0.1), 100)
    assert f(step) == pytest.approx(factor, abs=1e-12)
    assert float(jax.jit(f)(jnp.int32(step))) == pytest.approx(factor, abs=1e-6)
    assert not isinstance(f(step), jax.Array)


@given(
    schedule=st.sampled_from(["cosine", "trapezoid"]),
    warmdown=st.floats(0, 1),
    num_steps=st.integers(1, 100_000),
    steps=st.lists(st.integers(0, 200_000), min_size=2),
)
def test_learning_rate_factor_never_rises_and_stays_in_the_unit_interval(
    schedule, warmdown, num_steps, steps
):
    f = learning_rate_factor(OptimConfig(schedule=schedule, warmdown=warmdown), num_steps)
    values = f(np.array(sorted(steps)))
    assert ((values >= 0) & (values <= 1)).all()
    assert (np.diff(values) <= 0).all()
    assert f(0) == 1
    assert f(num_steps) == 0


@pytest.mark.parametrize("warmdown", [0.0, 0.04])
def test_a_warmdown_of_no_steps_is_a_plateau(warmdown):
    f = learning_rate_factor(OptimConfig(schedule="trapezoid", warmdown=warmdown), 10)
    np.testing.assert_array_equal(f(np.arange(12)), [1.0] * 10 + [0.0] * 2)


def test_a_schedule_of_no_steps_is_refused():
    with pytest.raises(ValueError, match="num_steps=0"):
        learning_rate_factor(OptimConfig(), 0)


def test_momentum_warms_up_and_stays():
    mu = momentum(OptimConfig(momentum_start=0.85), 300)
    np.testing.assert_allclose(mu(np.array([0, 150, 300, 900])), [0.85, 0.9, 0.95, 0.95])
    assert float(jax.jit(mu)(jnp.int32(150))) == pytest.approx(0.9, abs=1e-6)


@pytest.mark.parametrize(("start", "num_steps"), [(None, 300), (0.85, 0)])
def test_momentum_without_a_warmup_is_constant(start, num_steps):
    mu = momentum(OptimConfig(momentum_start=start), num_steps)
    np.testing.assert_array_equal(mu(np.arange(5)), 0.95)


@pytest.mark.parametrize(
    ("reference_steps", "batch", "time_scale", "run_steps"),
    [
        (500, 8, 1.0, 500),
        (500, 32, 1.0, 125),
        (500, 4, 1.0, 1000),
        (4000, 32, 0.75, 750),
        (60_000, 8, 0.001, 60),
        (3, 32, 0.01, 1),
        (0, 32, 1.0, 0),
    ],
)
def test_lengths_are_constant_in_tokens(reference_steps, batch, time_scale, run_steps):
    converted = reference_to_run_steps(reference_steps, batch=batch, time_scale=time_scale)
    assert converted == run_steps


@pytest.mark.parametrize(
    ("steps", "batch", "time_scale", "key"),
    [(-1, 8, 1.0, "reference_steps"), (1, 0, 1.0, "batch"), (1, 8, 0.0, "time_scale")],
)
def test_bad_lengths_are_refused_by_name(steps, batch, time_scale, key):
    with pytest.raises(ValueError, match=f"^{key}="):
        reference_to_run_steps(steps, batch=batch, time_scale=time_scale)


# Groups


def test_labels_cover_every_leaf_and_only_block_matrices_are_matrices():
    params = model_tree(0, blocks=("h_0", "h_11"))
    labels = group_labels(jax.eval_shape(lambda: params))
    by_path = {
        jax.tree_util.keystr(path, simple=True, separator="/"): label
        for path, label in jax.tree_util.tree_leaves_with_path(labels)
    }
    assert len(by_path) == len(jax.tree.leaves(params))
    outside = {path: label for path, label in by_path.items() if not path.startswith("h_")}
    assert outside == {
        "wte/embedding": "embed",
        "wpe/embedding": "embed",
        "value_embed_0/embedding": "embed",
        "lm_head/kernel": "head",
        "skip_weights": "scalar",
    }
    for path in by_path.keys() - outside.keys():
        assert by_path[path] == ("matrix" if path.endswith("kernel") else "scalar"), path


@pytest.mark.parametrize(
    "path",
    ["encoder/kernel", "h_x/attn/c_q/kernel", "h_1", "lm_head_2/kernel", "wte", "params/wte/x"],
)
def test_an_unknown_path_is_refused_in_one_line(path):
    with pytest.raises(ValueError, match="belongs to no optimizer group") as error:
        group_of(path, 2)
    assert repr(path) in str(error.value)
    assert "\n" not in str(error.value)


def steady(**changes):
    """A configuration whose groups all differ and whose rate does not move in the first steps."""
    defaults = {
        "embed_lr": 0.6,
        "head_lr": 0.008,
        "matrix_lr": 0.04,
        "scalar_lr": 0.02,
        "schedule": "trapezoid",
        "weight_decay": 0.0,
        "ns_steps": 2,
        "ns_dtype": "float32",
    }
    return OptimConfig(**(defaults | changes))


@pytest.mark.parametrize(("matrices", "lr_scale"), [("adam", 0.5), ("muon", 1.0)])
def test_each_group_moves_at_its_own_rate(matrices, lr_scale):
    config = steady(matrices=matrices, lr_scale=lr_scale)
    params, grads = model_tree(0), jax.tree.map(jnp.asarray, model_tree(50))
    tx = make_optimizer(config, Horizon(100), params)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    labels = group_labels(params)
    rates = learning_rates(config, Horizon(100), 0)
    for label, update, grad in zip(*map(jax.tree.leaves, (labels, updates, grads)), strict=True):
        if label == "matrix" and matrices == "muon":
            # The first step of momentum 0.95 is 1.95 g.
            scale = max(1, grad.shape[1] / grad.shape[0]) ** 0.5
            direction = scale * newton_schulz(1.95 * grad, 2, "float32")
        else:
            direction = np.sign(grad)  # Adam's first step, up to epsilon
        np.testing.assert_allclose(update, -rates[f"lr_{label}"] * direction, rtol=1e-4, atol=1e-6)
    assert rates["lr_embed"] == pytest.approx(0.6 * lr_scale)
    assert rates["momentum"] == (0.95 if matrices == "muon" else None)


@pytest.mark.parametrize("decay", ["all", "matrices"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_adamw_equals_its_torch_twin(decay, clip):
    rates = {"embed": 4e-3, "head": 1e-3, "matrix": 3e-3, "scalar": 2e-3}
    betas = {"embed": (0.8, 0.95), "head": (0.9, 0.95), "matrix": (0.9, 0.99), "scalar": (0.7, 0.9)}
    by_name = {f"{group}_lr": rate for group, rate in rates.items()}
    by_name |= {f"{group}_betas": pair for group, pair in betas.items()}
    config = OptimConfig(decay=decay, clip=clip, **by_name)
    params = model_tree(0)
    leaves, treedef = jax.tree.flatten(params)
    labels = jax.tree.leaves(group_labels(params))
    assert set(labels) == set(GROUPS)
    twin = twins_optim.AdamW(
        leaves,
        betas=[betas[label] for label in labels],
        eps=1e-8,
        decays=[0.1 if decay == "all" or leaf.ndim >= 2 else 0.0 for leaf in leaves],
    )
    tx = make_optimizer(config, Horizon(12), params)
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(14):  # two steps past the horizon change nothing
        # Norms on both sides of the clip: 40 and more, then about 0.4.
        grads = [normal(1000 * step + i, *p.shape) for i, p in enumerate(leaves)]
        grads = [g * np.float32(1.0 if step % 2 else 0.01) for g in grads]
        updates, state = update(jax.tree.unflatten(treedef, grads), state, params)
        params = jax.tree.map(np.add, params, updates)
        clipped = grads if clip is None else twins_optim.clip_gradients(grads, clip)
        factor = 0.5 * (1 + np.cos(np.pi * min(step, 12) / 12))
        twin.step(clipped, lrs=[rates[label] * factor for label in labels])
    for ours, expected in zip(jax.tree.leaves(params), twin.params, strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-6, rtol=2e-6)


def test_clip_is_over_all_groups_at_once():
    params, grads = one_of_each(0), jax.tree.map(lambda g: 10 * g, one_of_each(50))
    config = steady(matrices="muon", clip=1.0)
    tx = make_optimizer(config, Horizon(100), params)
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    buffer = optax.tree.get(state, "buffer")
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
    ours, theirs = buffer["h_0"]["mlp"]["c_fc"]["kernel"], grads["h_0"]["mlp"]["c_fc"]["kernel"]
    np.testing.assert_allclose(ours, theirs / norm, rtol=1e-5)


def test_muon_matrices_do_not_decay():
    params = one_of_each(0)
    zeros = jax.tree.map(np.zeros_like, params)
    tx = make_optimizer(steady(matrices="muon", weight_decay=0.1), Horizon(100), params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    np.testing.assert_array_equal(updates["h_0"]["mlp"]["c_fc"]["kernel"], 0.0)
    expected = -0.6 * 0.1 * params["wte"]["embedding"]
    np.testing.assert_allclose(updates["wte"]["embedding"], expected, rtol=1e-5)


@pytest.mark.parametrize("matrices", ["adam", "muon"])
@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_absent_groups_do_not_break(matrices, decay):
    config = steady(matrices=matrices, weight_decay=0.1, decay=decay, clip=1.0)
    for params in (
        {"wte": {"embedding": normal(0, V, D)}},
        {"lm_head": {"kernel": normal(0, D, V)}},
    ):
        shapes = jax.eval_shape(lambda tree: tree, params)
        tx = make_optimizer(config, Horizon(10), shapes)
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


def test_only_the_head_moves_when_only_its_gradient_is_not_zero():
    # The first step of every rung with a zero-initialised head.
    params = one_of_each(0)
    grads = jax.tree.map(np.zeros_like, params)
    grads["lm_head"]["kernel"] = np.ones_like(params["lm_head"]["kernel"])
    config = steady(matrices="muon", ns_dtype="bfloat16", clip=1.0)
    tx = make_optimizer(config, Horizon(100), params)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert np.all(np.asarray(updates.pop("lm_head")["kernel"]) < 0)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates))


def test_logged_rates_are_those_of_the_update():
    config = steady(matrices="muon", momentum_start=0.85, warmdown=0.5)
    horizon = Horizon(num_steps=4, momentum_steps=2)
    params = {"wte": {"embedding": normal(0, V, D)}}
    tx = make_optimizer(config, horizon, params)
    state, grads = tx.init(params), {"wte": {"embedding": np.ones((V, D), np.float32)}}
    for step in range(6):
        rates = learning_rates(config, horizon, step)
        assert set(rates) == {f"lr_{group}" for group in GROUPS} | {"momentum"}
        updates, state = tx.update(grads, state, params)  # Adam on a constant gradient: -lr
        np.testing.assert_allclose(updates["wte"]["embedding"], -rates["lr_embed"], atol=1e-5)
        assert rates["momentum"] == pytest.approx(0.85 + 0.1 * min(step / 2, 1))
