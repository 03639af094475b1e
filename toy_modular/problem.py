"""What training needs to know of a task: a model, its loss, its data. One `Problem` a task."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

Rows = Mapping[str, Any]
"""Arrays whose leading axis is that of sequences."""


class Data(NamedTuple):
    """The splits of a task; test is None where the task has none."""

    train: Rows
    val: Rows
    test: Rows | None = None


class Problem(NamedTuple):
    """A task and a model for it; all functions are pure.

    init(key) -> params.
    loss(params, rows) -> (mean loss, taps), as `lens_jax.lens` takes it.
    score(params, rows) -> {"loss": mean, ...} scalars over the rows, "accuracy" where there is one.
    tx: the optimizer for a rate of 1; its updates are multiplied by a run's rate.
    activations, gradients, weights: what the lens looks at.
    score_train: whether scores of all training rows belong in the curve, as on a task that is about
    the gap between the two.
    """

    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, Rows], tuple[jax.Array, Mapping[str, jax.Array]]]
    score: Callable[[Any, Rows], Mapping[str, jax.Array]]
    tx: optax.GradientTransformation
    activations: tuple[str, ...]
    gradients: tuple[str, ...]
    weights: tuple[str, ...]
    score_train: bool = False
