"""When things happen in a run: its length, its validations, measurements and checkpoints.

Everything is laid out in training tokens, the same for every batch tier, and then in steps: an
event at n tokens happens at the first step that has seen at least n. The event of step s sees the
state after s updates.
"""

from collections.abc import Iterable
from typing import NamedTuple

from experiments.config import RunConfig
from optim.schedules import Horizon


class Schedule(NamedTuple):
    """Steps of a run. num_steps updates are made; the events are sets of steps in 0..num_steps."""

    num_steps: int
    horizon: Horizon
    window_steps: int  # of the attention window's ramp
    validate: frozenset[int]
    measure: frozenset[int]
    checkpoint: frozenset[int]


def make_schedule(config: RunConfig) -> Schedule:
    """The schedule that a configuration asks for; the last step validates, measures and saves."""
    num_steps = config.num_steps
    length = num_steps if config.anneal == "budget" else config.published_steps
    horizon = Horizon(length, config.run_steps(config.optim.momentum_steps))
    tokens = num_steps * config.tokens_per_step
    linear_from = max(config.probes.linear_from, config.tokens_per_step)
    measure = _steps(config, doubling_grid(config.probes.first, linear_from, tokens))
    if config.probes.every is not None:
        measure |= set(range(0, num_steps, config.probes.every))
    end = {num_steps}
    return Schedule(
        num_steps=num_steps,
        horizon=horizon,
        window_steps=config.run_steps(config.arch.window_steps),
        validate=frozenset(_steps(config, _every(config, config.val_every, tokens)) | end),
        measure=frozenset(measure | end) if config.probes.names else frozenset(),
        checkpoint=frozenset(_steps(config, _every(config, config.checkpoint_every, tokens)) | end),
    )


def _every(config: RunConfig, spacing: int, tokens: int) -> range:
    """Multiples of a spacing below `tokens`; one below a step's worth means every step."""
    return range(0, tokens, max(spacing, config.tokens_per_step))


def doubling_grid(first: int, linear_from: int, end: int) -> list[int]:
    """0, first, 2 first, 4 first ... then linear_from and its multiples, all below end."""
    grid, tokens = [0], first
    while tokens < end:
        grid.append(tokens)
        if tokens < linear_from:
            tokens = min(2 * tokens, linear_from)
        else:
            tokens = (tokens // linear_from + 1) * linear_from
    return grid


def _steps(config: RunConfig, tokens: Iterable[int]) -> set[int]:
    return {-(-count // config.tokens_per_step) for count in tokens}
