"""From a parameter's path to its group, and from the groups to one optimizer (ladder spec 5.3).

Four groups, each with its own rate: embed (tables, tied head), head (untied head), matrix (2-D
weights inside the blocks) and scalar (biases, lambdas, skip weights). Only matrices may use Muon.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim.config import OptimConfig
from optim.muon import scale_by_muon
from optim.schedules import Horizon, learning_rate_factor, momentum

GROUPS = ("embed", "head", "matrix", "scalar")

_OUTSIDE_BLOCKS = (
    (re.compile(r"(wte|wpe|value_embed\w*)/"), "embed"),
    (re.compile(r"lm_head/"), "head"),
    (re.compile(r"skip_weights$"), "scalar"),
)
_IN_BLOCK = re.compile(r"h_\d+/")


def group_of(path: str, ndim: int) -> str:
    """Return the group of the parameter at a slash-joined path, one of GROUPS.

    Raises ValueError for a path that no group claims: a parameter that is in no group would
    silently stay at its initial value, or silently train at somebody else's rate.
    """
    if _IN_BLOCK.match(path):
        return "matrix" if ndim == 2 else "scalar"
    for pattern, group in _OUTSIDE_BLOCKS:
        if pattern.match(path):
            return group
    raise ValueError(
        f"parameter {path!r} belongs to no optimizer group: name it like wte/, wpe/, "
        "value_embed_0/, lm_head/, h_0/ or skip_weights, or extend optim.groups"
    )


def group_labels(params):
    """Return a tree of the structure of `params` (arrays or shapes) with the group of each leaf."""

    def label(path, leaf):
        return group_of(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.ndim)

    return jax.tree_util.tree_map_with_path(label, params)


def make_optimizer(
    config: OptimConfig,
    horizon: Horizon,
    params,
    *,
    split: jax.sharding.NamedSharding | None = None,
    joined: jax.sharding.NamedSharding | None = None,
) -> optax.GradientTransformation:
    """Build clip -> {embed, head, matrix, scalar}, each group with its rule and its learning rate.

    `params` gives paths and shapes only, so a tree of ShapeDtypeStruct will do; a group may be
    empty. split, joined: see `optim.muon.scale_by_muon`. Adam is torch's: epsilon outside the root
    of the bias-corrected second moment, decoupled decay p <- p (1 - lr wd) at the rate of the same
    step, and no decay on Muon's matrices. The clip is over all parameters at once, before any rule;
    unlike torch's it adds no 1e-6 to the norm. Raises ValueError for a parameter of no group.
    Source: ladder spec 5.1 to 5.3; AdamW is arXiv 1711.05101.
    """
    # The factor comes last and lives in the state: it multiplies step and decay alike, as one on
    # all rates would, and runs that differ in it alone share a compiled program.
    rules = {
        group: optax.chain(
            _direction(config, horizon, group, split, joined),
            optax.scale_by_learning_rate(_rate(config, horizon, group)),
        )
        for group in GROUPS
    }
    grouped = optax.chain(
        optax.partition(rules, group_labels(params)), scale_by_stored(config.lr_scale)
    )
    if config.clip is None:
        return grouped
    return optax.chain(optax.clip_by_global_norm(config.clip), grouped)


class StoredScale(NamedTuple):
    """The state of `scale_by_stored`: a float32 scalar."""

    lr_scale: jax.Array


def scale_by_stored(factor: float) -> optax.GradientTransformation:
    """Multiply updates by a factor that is kept in the optimizer's state."""

    def init(params):
        del params
        return StoredScale(jnp.asarray(factor, jnp.float32))

    def update(updates, state, params=None):
        del params
        return jax.tree.map(lambda u: u * state.lr_scale.astype(u.dtype), updates), state

    return optax.GradientTransformation(init, update)


def learning_rates(config: OptimConfig, horizon: Horizon, step) -> dict:
    """Return the rates that the update of 0-based step `step` uses, for the metrics.

    Keys lr_embed, lr_head, lr_matrix, lr_scalar, and momentum, which is None without Muon.
    """
    rates = {
        f"lr_{group}": _rate(config, horizon, group)(step) * config.lr_scale for group in GROUPS
    }
    rates["momentum"] = None
    if config.matrices == "muon":
        rates["momentum"] = momentum(config, horizon.momentum_steps)(step)
    return rates


def _rate(config: OptimConfig, horizon: Horizon, group: str) -> Callable:
    peak = getattr(config, f"{group}_lr")
    factor = learning_rate_factor(config, horizon.num_steps)
    return lambda step: peak * factor(step)


def _direction(
    config: OptimConfig, horizon: Horizon, group: str, split, joined
) -> optax.GradientTransformation:
    if group == "matrix" and config.matrices == "muon":
        return scale_by_muon(
            momentum(config, horizon.momentum_steps),
            ns_steps=config.ns_steps,
            ns_dtype=config.ns_dtype,
            split=split,
            joined=joined,
        )
    b1, b2 = getattr(config, f"{group}_betas")
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=config.eps)
    if config.weight_decay == 0:
        return adam
    # Added to Adam's direction before the rate, so that decay and step share one learning rate.
    mask = None if config.decay == "all" else _has_two_axes
    return optax.chain(adam, optax.add_decayed_weights(config.weight_decay, mask=mask))


def _has_two_axes(params):
    return jax.tree.map(lambda p: p.ndim >= 2, params)
