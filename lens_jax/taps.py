"""Names of what a model shows of itself: taps of the forward pass and paths of parameters.

A tap is an entry of the dict a forward pass returns, `h_3/resid_post` for the residual stream after
block 3; a site is a tap that is measured. A parameter path is the slash-joined key path of a leaf,
`h_3/attn/c_q/kernel`. Both are plain strings and are the only things the lens knows of a model.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax


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
