"""Every rung of the ladder at a size that compiles in a second or two."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property

import jax
import numpy as np

from experiments.config import RunConfig
from experiments.loss import make_loss
from lens_jax.lens import Lens
from lens_jax.step import init_state, make_train_step
from lens_jax.taps import parameter_paths
from models.command_line import Layer, build
from models.gpt import GPT, init_params
from models.ladder import rung_values
from optim.groups import make_optimizer
from optim.schedules import Horizon

VOCAB, ROW, WIDTH, LAYERS = 97, 32, 32, 4  # encoder and decoder of two layers
EOT = VOCAB - 1
TINY = {
    "size.n_layer": LAYERS,
    "size.n_head": 2,
    "size.n_embd": WIDTH,
    "size.vocab_size": VOCAB,
    "size.eot_token": EOT,
    "size.block": 16,
    "size.short_row": ROW,
    "size.long_row": 2 * ROW,
    "probes.window": ROW,
}


@contextmanager
def quick_compiler() -> Iterator[None]:
    """Compile as fast as XLA can instead of for speed: a third of the time at these sizes."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def tiny_config(rung: str, **values) -> RunConfig:
    """The configuration of a rung at tiny size; values by name, dots written as two underscores."""
    values = {key.replace("__", "."): value for key, value in values.items()}
    return build(RunConfig, [Layer("rung", rung_values(rung)), Layer("tiny", TINY | values)])[0]


def flat(tree) -> dict[str, np.ndarray]:
    """Parameters by path."""
    return dict(zip(parameter_paths(tree), map(np.asarray, jax.tree.leaves(tree)), strict=True))


def shake(params, seed: int = 1):
    """Parameters moved away from their start, so that none is zero and no gradient vanishes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: np.asarray(p) + np.float32(0.15) * rng.normal(size=p.shape).astype(np.float32),
        params,
    )


def random_tokens(rows: int = 4, length: int = ROW + 1, seed: int = 0) -> np.ndarray:
    """Rows of a single document each: no token opens another."""
    return np.random.default_rng(seed).integers(0, EOT, (rows, length), dtype=np.int32)


class TinyModel:
    """One rung: its model, its starts, and its compiled functions, each compiled when first used.

    All token arrays are (4, ROW + 1), so that nothing is compiled twice.
    """

    def __init__(self, rung: str, **values):
        self.config = tiny_config(rung, **values)
        self.model = GPT(self.config.arch, self.config.size)
        self.loss_fn = make_loss(self.model)

    @cached_property
    def start_of(self):
        """seed -> fresh parameters."""
        return jax.jit(lambda seed: init_params(self.model, seed))

    @cached_property
    def start(self):
        return self.start_of(0)

    @cached_property
    def shaken(self):
        return shake(self.start)

    @cached_property
    def loss_and_grads(self):
        """(params, tokens) -> ((loss, taps), grads)."""
        return jax.jit(
            jax.value_and_grad(lambda p, t: self.loss_fn(p, {"tokens": t}), has_aux=True)
        )

    def taps(self, params, tokens) -> dict[str, np.ndarray]:
        (_, taps), _ = self.loss_and_grads(params, tokens)
        return jax.tree.map(np.asarray, taps)

    @cached_property
    def two_steps(self):
        """Parameters after the first of two steps on one batch, and the metrics of both."""
        tx = make_optimizer(self.config.optim, Horizon(1000), self.start)
        step = make_train_step(self.loss_fn, tx, Lens())
        batches = {"tokens": random_tokens()[None]}
        state = init_state(jax.tree.map(jax.numpy.copy, self.start), tx)
        state, first, _ = step(state, batches, None, measure=False)
        params = jax.tree.map(np.asarray, state.params)
        _, second, _ = step(state, batches, None, measure=False)
        return params, first, second


@cache
def tiny_model(rung: str) -> TinyModel:
    """One model a rung for all test files of a process."""
    return TinyModel(rung)
