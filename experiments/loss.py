"""The training loss of the ladder in the form the lens takes: (params, batch) to (loss, taps)."""

from collections.abc import Callable

import jax.numpy as jnp

from models.gpt import GPT, head_kernel, head_path, token_loss
from models.head import head_loss
from models.linear import dot
from models.sharded import whole


def make_loss(model: GPT) -> Callable:
    """loss_fn(params, batch, linear) -> (mean cross-entropy in nats per token, taps).

    batch: {"tokens": (B, T+1) int32}, position t predicting token t+1, and for the windowed rungs
    {"window": (B,) int32 tokens}, the widest window where it is absent. The loss is taken chunk by
    chunk, except for a `linear` whose `watched` names the head's kernel, as a library caller may
    ask: that one gets the product to itself. Raises ValueError when such a head is float8.
    """

    def loss_fn(params, batch, linear=dot):
        inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        logits, taps = model.apply({"params": params}, inputs, linear, batch.get("window"))
        kernel, path = head_kernel(params, model.arch), head_path(model.arch)
        float8 = model.arch.head_dtype == "float8"
        if path in getattr(linear, "watched", ()):
            if float8:
                raise ValueError(f"{path} is multiplied in float8 and cannot be watched")
            return jnp.mean(token_loss(logits, targets)), taps
        if model.cut:
            kernel = whole(kernel, model.mesh, taps["final_norm"])
        loss = head_loss(
            taps["final_norm"],
            kernel,
            targets,
            softcap=model.arch.softcap,
            dtype=model.dtype,
            float8=float8,
            mesh=model.mesh,
        )
        return loss, taps

    return loss_fn
