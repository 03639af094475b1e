"""Modules that hold a matrix, and the product that a caller may replace to observe it."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

Linear = Callable[[jnp.ndarray, jnp.ndarray, str], jnp.ndarray]


def dot(x: jnp.ndarray, kernel: jnp.ndarray, path: str) -> jnp.ndarray:
    """The plain linear map of x (..., in) by kernel (in, out); `path` names the kernel."""
    del path
    return x @ kernel


class Dense(nn.Module):
    """A linear layer whose product goes through the caller's `linear`."""

    features: int
    start: Callable
    dtype: jnp.dtype
    bias: bool = False

    @nn.compact
    def __call__(self, x, linear: Linear):  # (..., in) -> (..., features)
        kernel = self.param("kernel", self.start, (x.shape[-1], self.features))
        path = "/".join((*self.path, "kernel"))
        y = linear(x.astype(self.dtype), kernel.astype(self.dtype), path)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + jnp.broadcast_to(bias.astype(self.dtype), y.shape)
        return y


class Table(nn.Module):
    """An embedding table (rows, features); calling it gives the table itself."""

    rows: int
    features: int
    start: Callable

    @nn.compact
    def __call__(self):
        return self.param("embedding", self.start, (self.rows, self.features))


class Head(nn.Module):
    """The kernel (D, V) of an output head of its own; calling it gives the kernel itself."""

    width: int
    features: int
    start: Callable

    @nn.compact
    def __call__(self):
        return self.param("kernel", self.start, (self.width, self.features))
