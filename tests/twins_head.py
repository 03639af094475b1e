"""Slow twins of the output head, its inputs at tiny size, and a walk over what it traces."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from models.gpt import token_loss
from models.head import head_logits, head_loss

ROWS, LENGTH, WIDTH, VOCAB = 3, 20, 8, 37
F32 = {"softcap": None, "dtype": jnp.float32}
BF16 = {"softcap": 15.0, "dtype": jnp.bfloat16}


def inputs(rows=ROWS, length=LENGTH, width=WIDTH, vocab=VOCAB, seed=0):
    """x, kernel and targets, with logits of deviation 6, so that a cap of 15 bends them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, length, width)).astype(np.float32)
    kernel = (6 * width**-0.5 * rng.normal(size=(width, vocab))).astype(np.float32)
    return x, kernel, rng.integers(0, vocab, (rows, length), dtype=np.int32)


def softmax_twin(z, targets, softcap):
    """Mean loss of logits z before the cap, and its gradient by z, in float64."""
    capped = z if softcap is None else softcap * np.tanh(z / softcap)
    highest = capped.max(-1, keepdims=True)
    powers = np.exp(capped - highest)
    total = powers.sum(-1, keepdims=True)
    hit = np.eye(z.shape[-1])[targets]
    loss = (np.log(total) + highest - (capped * hit).sum(-1, keepdims=True)).mean()
    bend = 1 if softcap is None else 1 / np.cosh(z / softcap) ** 2
    return loss, (powers / total - hit) * bend / targets.size


def twin(x, kernel, targets, softcap):
    """Loss and gradients by x and kernel in float64."""
    x, kernel = x.astype(np.float64), kernel.astype(np.float64)
    loss, g = softmax_twin(x @ kernel, targets, softcap)
    return loss, (g @ kernel.T, np.einsum("btd,btv->dv", x, g))


def naive(x, kernel, targets, **rule):
    return jnp.mean(token_loss(head_logits(x, kernel, **rule), targets))


def by_both(loss_fn, **rule):
    return jax.jit(jax.value_and_grad(partial(loss_fn, **rule), (0, 1)))


def distance(a, b):
    """Of a from b, as a share of b."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def gradients_of(*arrays, **rule):
    return jax.value_and_grad(partial(head_loss, **rule), (0, 1))(*arrays)


def equations(jaxpr, looped=False):
    """(equation, whether inside a scan) of a jaxpr and everything it calls."""
    for eqn in jaxpr.eqns:
        inner = looped or eqn.primitive.name == "scan"
        called = [getattr(value, "jaxpr", value) for value in eqn.params.values()]
        for sub in called:
            if hasattr(sub, "eqns"):
                yield from equations(sub, inner)
        yield eqn, looped


def traced(function, **rule):
    closed = jax.make_jaxpr(partial(function, **rule))(*inputs())
    return list(equations(closed.jaxpr))
