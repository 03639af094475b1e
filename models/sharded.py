"""Functions of rows on several devices, each on the rows that it has.

XLA splits plain JAX by itself, but it gathers all rows for a kernel that it cannot see into, and it
sums the gradient of a shared matrix as often as a loop adds to it.
"""

from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def whole(array: jax.Array, mesh: Mesh, near: jax.Array) -> jax.Array:
    """A weight that lies cut among devices, with all of it on every device.

    Not before `near` is known, something that the product needs too: a loop over micro-batches or a
    block that is computed again would else have its weights gathered once for all, and kept.
    """
    array, _ = jax.lax.optimization_barrier((array, jax.lax.stop_gradient(near)))
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec()))


def rows_of_cut_table(take: Callable, table: jax.Array, ids: jax.Array, mesh: Mesh) -> jax.Array:
    """take(table, ids) (B, T, D) of a table (V, D) whose columns lie cut among devices.

    Every device looks up all ids in its columns, and then rows are exchanged for columns; neither
    the table nor its gradient is ever whole. Ids that devices cannot share are looked up in all of
    the table.
    """
    if not (splits(mesh, ids.shape[0]) and table.shape[1] % mesh.size == 0):
        return take(whole(table, mesh, ids), ids)
    (axis,) = mesh.axis_names

    def exchange(columns, ids):
        ids = jax.lax.all_gather(ids, axis, tiled=True)  # (B, T)
        found = take(columns, ids)  # (B, T, D / devices)
        return jax.lax.all_to_all(found, axis, split_axis=0, concat_axis=2, tiled=True)

    by_columns, by_rows = PartitionSpec(None, axis), PartitionSpec(axis)
    return jax.shard_map(
        exchange, mesh=mesh, in_specs=(by_columns, by_rows), out_specs=by_rows, check_vma=False
    )(table, ids)


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
