"""The control rung, which has no reference fixture: lswa's model, trained by Adam everywhere."""

import jax
import numpy as np
import optax
from tiny_models import flat, quick_compiler, random_tokens, tiny_model
from twins_optim import AdamW, clip_gradients

from models.command_line import flatten
from optim.groups import group_labels, make_optimizer
from optim.schedules import Horizon

STEPS = 3


def test_the_model_is_that_of_lswa():
    assert tiny_model("lswa_adam").config.arch == tiny_model("lswa").config.arch
    ours, muons = (flatten(tiny_model(name).config.optim) for name in ("lswa_adam", "lswa"))
    changed = {key for key, value in ours.items() if muons[key] != value}
    assert changed == {"matrices", "matrix_lr", "momentum_start", "momentum_steps"}


def test_three_updates_are_those_of_a_float64_adam():
    """Gradients are the model's own at every step; the rule and the clip are numpy's."""
    with quick_compiler():
        model = tiny_model("lswa_adam")
        config, tokens, params = model.config.optim, random_tokens(), model.shaken
        tx = make_optimizer(config, Horizon(10_000), params)
        state = tx.init(params)
        update = jax.jit(tx.update)
        groups = jax.tree.leaves(group_labels(params))
        betas = [getattr(config, f"{group}_betas") for group in groups]
        rates = [getattr(config, f"{group}_lr") for group in groups]
        found = dict(zip(groups, rates, strict=True))
        assert found == {"embed": 0.6, "head": 0.008, "matrix": 0.004, "scalar": 0.04}
        twin = AdamW(jax.tree.leaves(params), betas, config.eps, [0.0] * len(groups))
        start = flat(params)
        for _ in range(STEPS):
            _, grads = model.loss_and_grads(params, tokens)
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            twin.step(clip_gradients(jax.tree.leaves(grads), config.clip), rates)
    for (path, got), want in zip(flat(params).items(), twin.params, strict=True):
        scale = max(np.abs(want - start[path]).max(), 1e-12)
        # Adam divides a gradient of rounding size by its own size
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-3 * scale + 1e-6, err_msg=path)
