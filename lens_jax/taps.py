"""Names of what a model shows of itself: taps of the forward pass and paths of parameters.

A tap is an entry of the dict a forward pass returns, `h_3/resid_post` for the residual stream after
block 3; a site is a tap that is measured. A parameter path is the slash-joined key path of a leaf,
`h_3/attn/c_q/kernel`. Both are plain strings and are the only things the lens knows of a model.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def call_loss(loss_fn: Callable, params: Any, batch: Any, *linear) -> tuple[jax.Array, Mapping]:
    """loss_fn(params, batch, *linear), checked to be a scalar loss and a dict of taps."""
    try:
        inspect.signature(loss_fn).bind(params, batch, *linear)
    except TypeError as error:
        more = ", linear" if linear else ""
        raise ValueError(f"the lens calls loss_fn(params, batch{more}): {error}") from None
    result = loss_fn(params, batch, *linear)
    two = isinstance(result, tuple) and len(result) == 2
    if not two or not isinstance(result[1], Mapping) or jnp.ndim(result[0]):
        raise ValueError(
            f"loss_fn returned {jax.tree.map(jnp.shape, result)} in shapes: give (loss, taps), a "
            f"scalar and a dict of arrays (B, ..., D), which may be empty"
        )
    return result


def num_rows(batch: Any, axis: int = 0) -> int:
    """Rows of a batch; raises ValueError where its leaves differ in them or have none."""
    rows = {leaf.shape[axis : axis + 1] for leaf in jax.tree.leaves(batch)}
    if len(rows) != 1 or () in rows:
        shapes = sorted({str(leaf.shape) for leaf in jax.tree.leaves(batch)})
        raise ValueError(
            f"a batch with leaves of shapes {', '.join(shapes)}: give every leaf the same rows in "
            f"axis {axis}"
        )
    return rows.pop()[0]


def check_taps(taps: Mapping[str, jax.Array], sites: Iterable[str], rows: int) -> None:
    """Raises ValueError for a tap that is measured and is not an array (rows, ..., D)."""
    for site, tap in select(taps, sites).items():
        if not hasattr(tap, "ndim"):
            raise ValueError(
                f"tap {site!r} is a {type(tap).__name__}: give arrays, each under a name of its own"
            )
        if tap.ndim < 2 or tap.shape[0] != rows:
            raise ValueError(
                f"tap {site!r} has shape {tap.shape} for a batch of {rows} rows: give (B, ..., D)"
            )


def check_trainable(params: Any, paths: Iterable[str] | None = None) -> None:
    """Raises ValueError for a parameter (at one of the paths) that has no gradient."""
    leaves = get_parameters(params, parameter_paths(params) if paths is None else paths)
    for path, leaf in leaves.items():
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(
                f"the parameter at {path!r} is {dtype}, which has no gradient: make it a "
                f"static field, or keep it out of params"
            )


def select(taps: Mapping[str, jax.Array], sites: Iterable[str]) -> dict[str, jax.Array]:
    """The taps at `sites`; raises ValueError naming a site that the forward pass did not return."""
    chosen = {}
    for site in sites:
        if site not in taps:
            raise ValueError(f"no tap named {site!r}; the forward pass returns {sorted(taps)}")
        chosen[site] = taps[site]
    return chosen


def parameter_paths(params: Any) -> list[str]:
    """The path of every leaf of a parameter pytree, in the order of `jax.tree.leaves`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]


def get_parameters(params: Any, paths: Iterable[str]) -> dict[str, jax.Array]:
    """Leaves of a pytree by path; raises ValueError naming a path that is not there."""
    known = dict(zip(parameter_paths(params), jax.tree.leaves(params), strict=True))
    chosen = {}
    for path in paths:
        if path not in known:
            raise ValueError(f"no parameter at {path!r}; the paths are {list(known)}")
        chosen[path] = known[path]
    return chosen


def replace_parameters(params: Any, values: Mapping[str, jax.Array]) -> Any:
    """The same pytree with the leaves at the given paths replaced."""
    leaves, structure = jax.tree.flatten(params)
    paths = parameter_paths(params)
    swapped = [values.get(path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
    return jax.tree.unflatten(structure, swapped)
