"""The walks as a language-model problem: the GPT of the ladder at toy size (toy spec section 2)."""

import jax
import jax.numpy as jnp

from models.gpt import GPT, head_kernel, init_params
from models.head import head_loss
from optim.groups import make_optimizer
from optim.schedules import Horizon
from toy_modular.banded import make_splits
from toy_modular.problem import Data, Problem
from toy_modular.run_config import RunConfig

POSITION_STD = 0.02


def make_model(config: RunConfig) -> GPT:
    """The model of a run, in float32 throughout."""
    return GPT(config.arch, config.size)


def make_problem(config: RunConfig) -> Problem:
    """Model, loss and optimizer of a run on the walks; rows are {"tokens": (N, T + 1) int32}."""
    model = make_model(config)
    shapes = jax.eval_shape(lambda: init_params(model, 0))
    matrices = tuple(
        f"h_{i}/{part}/c_proj/kernel"
        for i in sorted({0, config.size.n_layer - 1})
        for part in ("attn", "mlp")
    )
    heads = ("wte/embedding",) + (("lm_head/kernel",) if config.arch.head == "untied" else ())
    loss = _make_loss(model)
    return Problem(
        init=lambda key: start(model, config.embed_std, key),
        loss=loss,
        score=lambda params, rows: {"loss": loss(params, rows)[0]},
        tx=make_optimizer(config.optim, Horizon(config.max_steps), shapes),
        activations=tuple(
            f"{what}/{where}"
            for what, pools in (("final_norm", POOLS), ("residual_proxy", POOLS[:2]))
            for where in pools
        ),
        gradients=heads + matrices,
        weights=heads + matrices,
    )


POOLS = ("last", "mean", "tokens")


def start(model: GPT, embed_std: float, key: jax.Array) -> dict:
    """Initial parameters: the ladder's, with tables redrawn as the toy has them.

    The embedding is N(0, embed_std^2) even where it is tied, which starts a tied model at a loss of
    the width in nats: the logit of the current token is about its squared norm. Positions are
    N(0, 0.02^2).
    """
    ours, tokens_key, positions_key = jax.random.split(key, 3)
    tokens = jnp.zeros((1, model.size.block), jnp.int32)
    params = model.init(ours, tokens)["params"]
    table = params["wte"]["embedding"]
    params["wte"] = {"embedding": embed_std * jax.random.normal(tokens_key, table.shape)}
    if "wpe" in params:
        shape = params["wpe"]["embedding"].shape
        params["wpe"] = {"embedding": POSITION_STD * jax.random.normal(positions_key, shape)}
    return params


def _make_loss(model: GPT):
    """(params, rows) -> (mean cross-entropy in nats a token, taps pooled over positions)."""

    def loss_fn(params, rows):
        inputs, targets = rows["tokens"][:, :-1], rows["tokens"][:, 1:]
        _, taps = model.apply({"params": params}, inputs)
        h = taps["final_norm"]  # (B, T, D)
        kernel = head_kernel(params, model.arch)
        loss = head_loss(h, kernel, targets, softcap=model.arch.softcap, dtype=model.dtype)
        return loss, _pooled(h, taps["logits"], targets)

    return loss_fn


def _pooled(h, logits, targets) -> dict:
    """Representations by pooling, and the residual proxy (p_true - 1) h, which is no gradient.

    The proxy is the slice of the head's gradient at the true class (toy spec section 4).
    """
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)  # (B, T, 1)
    residual = jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True)) - 1
    proxy = residual * h
    return {
        "final_norm/last": h[:, -1],
        "final_norm/mean": jnp.mean(h, axis=1),
        "final_norm/tokens": h,
        "residual_proxy/last": proxy[:, -1],
        "residual_proxy/mean": jnp.mean(residual, axis=1) * jnp.mean(h, axis=1),
    }


def load_data(config: RunConfig) -> Data:
    """The walks of a seed; all stages, batches and rates of the seed have the same."""
    return Data(*({"tokens": split.tokens} for split in make_splits(config.banded, config.seed)))
