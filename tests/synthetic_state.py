"""A small training state with everything a real one has, and how to compare two of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.checksums import leaves_by_path

META = {"step": 3, "sample_index": 24, "config": {"optim": {"embed_lr": 3e-4}}, "devices": 1}


@functools.cache
def make_state(seed: int = 0) -> dict:
    """A small state with everything a real one has: partitioned Adam, counters, odd dtypes."""
    key = jax.random.split(jax.random.key(seed), 3)
    params = {
        "wte": {"embedding": jax.random.normal(key[0], (16, 8))},
        "h_0": {
            "attn": {"c_q": {"kernel": jax.random.normal(key[1], (8, 64))}},
            "lamb": jnp.float32(0.5),
            "half": jax.random.normal(key[2], (8,), jnp.bfloat16),
        },
    }
    labels = {
        "wte": {"embedding": "adam"},
        "h_0": {"attn": {"c_q": {"kernel": "sgd"}}, "lamb": "adam", "half": "sgd"},
    }
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    tx = optax.partition({"adam": clipped, "sgd": optax.trace(0.9, nesterov=True)}, labels)
    opt_state = tx.init(params)
    grads = jax.tree.map(lambda x: x * 0.3, params)
    _, opt_state = tx.update(grads, opt_state, params)
    return {
        "params": params,
        "opt_state": opt_state,
        "step": jnp.int32(3),
        "seen": jnp.array([0, 2**32 - 1], jnp.uint32),
        "flag": jnp.array(True),
    }


def abstract(state):
    return jax.eval_shape(lambda: state)


def assert_bitwise(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for path, leaf in leaves_by_path(expected).items():
        other = leaves_by_path(got)[path]
        assert (other.dtype, other.shape) == (leaf.dtype, leaf.shape), path
        assert np.asarray(other).tobytes() == np.asarray(leaf).tobytes(), path


def one_line(excinfo) -> str:
    message = str(excinfo.value)
    assert "\n" not in message
    assert len(message) < 700, message
    return message
