"""Products of a float32 run in full: NVIDIA cards would take them through TF32, ten bits instead
of 23, and the dtype in the records would promise more than was computed."""

from collections.abc import Callable
from functools import wraps

import jax
import jax.numpy as jnp


def full_precision(jitted: Callable, dtype) -> Callable:
    """A jitted function whose float32 products are not rounded, where float32 is the run's dtype.

    Others are returned as they are. On CPUs the numbers are the same with and without. The setting
    must hold while the function is traced, backward passes and optimizer included, so it lies
    around every call; `lower` is that of the jitted function under the same setting.
    """
    if jnp.dtype(dtype) != jnp.float32:
        return jitted

    def under_setting(function):
        @wraps(function)
        def call(*args, **kwargs):
            with jax.default_matmul_precision("highest"):
                return function(*args, **kwargs)

        return call

    whole = under_setting(jitted)
    whole.lower = under_setting(jitted.lower)
    return whole
