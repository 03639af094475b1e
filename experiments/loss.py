"""The training loss of the ladder in the form the lens takes: (params, batch) to (loss, taps)."""

from collections.abc import Callable

import jax.numpy as jnp

from models.gpt import GPT, dot, token_loss


def make_loss(model: GPT) -> Callable:
    """loss_fn(params, batch, linear) -> (mean cross-entropy in nats per token, taps).

    batch: {"tokens": (B, T+1) int32}; position t predicts token t+1.
    """

    def loss_fn(params, batch, linear=dot):
        tokens = batch["tokens"]
        logits, taps = model.apply({"params": params}, tokens[:, :-1], linear)
        return jnp.mean(token_loss(logits, tokens[:, 1:])), taps

    return loss_fn
