"""How every parameter starts (ladder spec 2 and 3)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.config import ArchConfig


def uniform_fan_in(key, shape, dtype=jnp.float32):
    """torch's default for a linear layer, uniform within +- 1/sqrt(in) of an (in, out) kernel."""
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def tied_embedding(key, shape, dtype=jnp.float32):
    """A tied (V, D) matrix starts as the head's linear layer does: uniform within +- 1/sqrt(D)."""
    bound = shape[1] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def keep_stream(key, shape, dtype=jnp.float32):
    """Weights (2,) of a block's input and of the embedding: the block starts without the latter."""
    del key, shape
    return jnp.asarray([1, 0], dtype)


class Initializers:
    """How each parameter starts.

    | parameter            | init=torch                  | init=gpt2                     |
    |----------------------|-----------------------------|-------------------------------|
    | wte, tied            | uniform +- 1/sqrt(D)        | normal(0.02)                  |
    | wte, untied; wpe     | normal(1)                   | normal(0.02)                  |
    | value embeddings     | normal(1)                   | normal(0.02)                  |
    | c_q, c_k, c_v, c_fc  | uniform +- 1/sqrt(in)       | normal(0.02)                  |
    | attn and mlp c_proj  | as above, or 0 (zero_proj)  | normal(0.02/sqrt(2L)), or 0   |
    | lm_head              | as above, or 0 (zero_head)  | normal(0.02), or 0            |
    | biases               | 0                           | 0                             |
    | skip_weights         | 1                           | 1                             |
    | lambdas              | 1, 0                        | 1, 0                          |
    | lamb; mix            | 0.5; 0.5, 0.5               | 0.5; 0.5, 0.5                 |
    """

    def __init__(self, arch: ArchConfig, n_layer: int):
        torch = arch.init == "torch"
        normal = nn.initializers.normal
        self.hidden = uniform_fan_in if torch else normal(0.02)
        self.proj = self.hidden if torch else normal(0.02 / (2 * n_layer) ** 0.5)
        if arch.zero_proj:
            self.proj = nn.initializers.zeros
        self.head = nn.initializers.zeros if arch.zero_head else self.hidden
        self.table = normal(1.0) if torch else normal(0.02)
        self.wte = tied_embedding if torch and arch.head == "tied" else self.table
