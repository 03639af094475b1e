"""Learning-rate and momentum schedules, pure functions of the 0-based step (ladder spec 5.1, 5.3).

Step s is the update that turns the state after s updates into the state after s + 1. Every schedule
takes a Python int, a numpy array or a traced value; host values are computed in numpy (float64), so
that logging a rate never waits for a device.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from optim.config import OptimConfig


@dataclass(frozen=True)
class Horizon:
    """Schedule lengths in steps of this run, after `optim.config.reference_to_run_steps`."""

    num_steps: int
    momentum_steps: int = 0


def learning_rate_factor(config: OptimConfig, num_steps: int) -> Callable:
    """Return f(s) in [0, 1], the factor on every group's rate; 1 at s = 0, 0 from `num_steps` on.

    cosine: (1 + cos(pi s / N)) / 2. trapezoid: with W = round(warmdown N), 1 while s < N - W, then
    (N - s) / W. Raises ValueError when `num_steps` is below 1. Source: ladder spec 5.3.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}: a schedule needs at least 1 step")

    def cosine(step):
        xp = _namespace(step)
        return 0.5 * (1.0 + xp.cos(xp.pi * xp.clip(step / num_steps, 0.0, 1.0)))

    # With no steps to come down in, a divisor of 1 gives 1 up to the last step and 0 after it.
    warmdown_steps = max(1, round(config.warmdown * num_steps))

    def trapezoid(step):
        return _namespace(step).clip((num_steps - step) / warmdown_steps, 0.0, 1.0)

    return {"cosine": cosine, "trapezoid": trapezoid}[config.schedule]


def momentum(config: OptimConfig, num_steps_warm: int) -> Callable:
    """Return mu(s), linear from `momentum_start` at s = 0 to `momentum` at s = `num_steps_warm`.

    Constant when there is no start or no warm-up step. Source: ladder spec 5.1.
    """
    end = config.momentum
    start = end if config.momentum_start is None or num_steps_warm == 0 else config.momentum_start
    divisor = max(1, num_steps_warm)

    def mu(step):
        return start + (end - start) * _namespace(step).clip(step / divisor, 0.0, 1.0)

    return mu


def _namespace(step):
    return jnp if isinstance(step, jax.Array) else np
