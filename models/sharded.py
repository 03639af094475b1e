"""Functions of rows on several devices, each on the rows that it has.

XLA splits plain JAX by itself, but it gathers all rows for a kernel that it cannot see into, and it
sums the gradient of a shared matrix as often as a loop adds to it.
"""

from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def whole(array: jax.Array, mesh: Mesh | None) -> jax.Array:
    """The array with all of it on every device, where it is about to be used.

    Weights that lie cut among devices are gathered here, and not their products pieced together,
    which XLA might hold to be cheaper; for weights that lie whole nothing changes.
    """
    if mesh is None or mesh.size == 1:
        return array
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec()))


def splits(mesh: Mesh | None, rows: int) -> bool:
    """Whether there are several devices and each can have as many of the rows."""
    return mesh is not None and mesh.size > 1 and rows % mesh.size == 0


def on_own_rows(function: Callable, mesh: Mesh | None, *arrays: jax.Array) -> jax.Array:
    """function(*arrays), all of it by rows (the leading axis), without talk between devices."""
    if not splits(mesh, arrays[0].shape[0]):
        return function(*arrays)
    rows = PartitionSpec(mesh.axis_names)
    split = jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    return split(*arrays)


def mean_over_rows(
    function: Callable, mesh: Mesh | None, x: jax.Array, shared: jax.Array, y: jax.Array
) -> jax.Array:
    """function(x, shared, y), a mean over the rows of x and y, as the mean of every device's own.

    Its gradient by `shared` is summed over devices once, after every device has all of its own.
    """
    if not splits(mesh, x.shape[0]):
        return function(x, shared, y)
    rows, axes = PartitionSpec(mesh.axis_names), mesh.axis_names

    def own_mean(x, shared, y):
        return jax.lax.pmean(function(x, shared, y), axes)

    return jax.shard_map(
        own_mean,
        mesh=mesh,
        in_specs=(rows, PartitionSpec(), rows),
        out_specs=PartitionSpec(),
        check_vma=False,
    )(x, shared, y)
