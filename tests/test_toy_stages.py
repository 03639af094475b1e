"""Stages of the toy against the toy spec: what each changes, how it starts, how it is updated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_toy import tiny_member

from models.command_line import UsageError, flatten
from optim.muon import newton_schulz
from toy_modular.language import load_data, make_model, make_problem, start
from toy_modular.stages import CELLS, STAGES, stage_values
from toy_modular.study_config import Kind, resolve

COUNTS = {"baseline": 401_408, "rope": 393_216, "muon": 393_216, "untied": 524_288}
"""Weights of toy spec 2: V D = 131,072 an embedding, 65,536 + 65,536 a layer, 64 D positions."""


def published(stage: str, **words):
    typed = {"profile": "paper", "stages": stage, "rates": "1e-3", **words}
    return resolve(typed).member(Kind(stage, 32), 0, 1e-3)


@pytest.mark.parametrize(("stage", "count"), COUNTS.items())
def test_parameter_counts_are_the_published(stage, count):
    problem = make_problem(published(stage))
    shapes = jax.eval_shape(problem.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize(
    ("stage", "loss", "within"),
    [("baseline", 128.0, 4.0), ("rope", 128.0, 4.0), ("untied", np.log(1024), 1e-5)],
)
def test_initial_losses_are_the_width_tied_and_ln_v_untied(stage, loss, within):
    """Tied, the logit of the current token is its squared norm, which a draw of the embedding moves

    by some nats: few tokens make up most of the data.
    """
    config = published(stage, **{"banded.train": "1024", "banded.val": "64", "banded.test": "1"})
    problem = make_problem(config)
    rows = load_data(config).val
    found = jax.jit(lambda key: problem.score(problem.init(key), rows)["loss"])(jax.random.key(0))
    assert abs(found - loss) < within


def test_tables_start_as_the_toy_has_them_and_matrices_as_torch_does():
    model = make_model(published("baseline"))
    params = start(model, 1.0, jax.random.key(3))
    assert abs(np.std(params["wte"]["embedding"]) - 1) < 0.01
    assert abs(np.std(params["wpe"]["embedding"]) - 0.02) < 0.001
    block = params["h_1"]
    for kernel in (block["attn"]["c_q"]["kernel"], block["mlp"]["c_fc"]["kernel"]):
        assert abs(np.max(np.abs(kernel)) - 128**-0.5) < 1e-3
    for part in ("attn", "mlp"):
        assert not np.any(block[part]["c_proj"]["kernel"])
    assert block["mlp"]["c_fc"]["kernel"].shape == (128, 256)


def test_each_stage_keeps_all_before_it():
    before = {}
    for rung in STAGES:
        values = dict(stage_values(rung.name))
        assert values.pop("stage") == rung.name
        assert values == before | values, rung.name
        changed = {key for key in values if values[key] != before.get(key)}
        assert not before or changed == set(rung.diff), rung.name
        before = values


def test_window_of_eight_and_scale():
    config = published("attn_scale")
    assert config.arch.attn_scale == 0.12
    assert (config.arch.window, config.arch.window_blocks * config.size.block) == ("token", 8)
    assert (config.arch.softcap, config.arch.unet, config.arch.x0_skip) == (30.0, True, True)


def test_the_factorial_has_every_combination_once():
    seen = set()
    for cell in CELLS:
        config = published(cell.name)
        arch = config.arch
        seen.add((arch.head, config.embed_std, arch.embed_norm, arch.zero_head))
        assert config.optim.matrices == "muon"
        assert config.arch.qk_norm
    assert len(seen) == len(CELLS) == 12
    ends = {("tied", 1.0, False, False): "muon", ("untied", 1.0, True, True): "untied"}
    for cell in CELLS:
        config = published(cell.name)
        arch = config.arch
        twin = ends.get((arch.head, config.embed_std, arch.embed_norm, arch.zero_head))
        if twin is not None:  # the corners are the stages themselves
            other = flatten(published(twin))
            assert {k: v for k, v in flatten(config).items() if k != "stage"} == {
                k: v for k, v in other.items() if k != "stage"
            }


def test_one_muon_step_against_the_rule_written_out():
    config = tiny_member("untied")
    problem = make_problem(config)
    params = problem.init(jax.random.key(0))
    params = jax.tree.map(
        lambda leaf: leaf + 0.01 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params
    )
    rows = jax.tree.map(lambda leaf: leaf[:4], load_data(config).train)
    grads = jax.grad(lambda p: problem.loss(p, rows)[0])(params)
    updates, _ = problem.tx.update(grads, problem.tx.init(params), params)
    eta = 0.1
    kernel = grads["h_0"]["mlp"]["c_fc"]["kernel"]  # (16, 32), torch's rows over columns are 2
    wanted = -50 * eta * 2**0.5 * newton_schulz(1.95 * kernel, 5, "bfloat16")
    np.testing.assert_allclose(eta * updates["h_0"]["mlp"]["c_fc"]["kernel"], wanted, rtol=1e-5)
    table, slope = params["wte"]["embedding"], np.asarray(grads["wte"]["embedding"], np.float64)
    adam = slope / (np.abs(slope) + 1e-8)  # the first step, bias corrected
    wanted = -eta * (adam + 0.01 * np.asarray(table))
    np.testing.assert_allclose(eta * updates["wte"]["embedding"], wanted, rtol=1e-4, atol=1e-6)


def test_an_unknown_stage_is_named():
    with pytest.raises(UsageError, match="stages=unity: no such stage; give some of baseline"):
        resolve({"stages": "unity"})
