"""Checksums of array trees that do not depend on how the arrays are laid out over devices.

The checksum of a leaf with elements u_0, u_1, ... (its bits read as unsigned integers, row-major)
is sum_i u_i * (2 i + 1) modulo 2^32.  Every weight is odd, hence invertible modulo 2^32, so a
change of any single element (any bits of it) always changes the sum; two elements that trade places
are seen unless (u_i - u_j) (i - j) is a multiple of 2^31.  An integer sum does not depend on the
order of summation: one device, eight devices and NumPy give the same number.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

_BLOCK = 1 << 22  # elements that the NumPy twin weighs at a time, to bound its memory
_UNSIGNED = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint32"}  # 8-byte elements count as two


def leaf_path(path) -> str:
    """Slash-joined name of a leaf, `params/h_0/attn/c_q/kernel`, from a jax key path.

    A field of a NamedTuple and a dictionary key of the same name give the same path.
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_by_path(tree) -> dict[str, object]:
    """Leaves of a tree by slash-joined path, in the tree's own order; None is no leaf.

    Raises ValueError when two leaves have one path (a key that holds a slash).
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {leaf_path(path): leaf for path, leaf in flat}
    if len(leaves) != len(flat):
        raise ValueError("two leaves of the state have the same slash-joined path")
    return leaves


def tree_checksums(tree) -> dict[str, int]:
    """Checksum of every leaf by path, computed where the arrays are (one small program per shape).

    Works across hosts: the sums are replicated.  Blocks until the arrays are ready.
    """
    sums = {path: device_checksum(leaf) for path, leaf in leaves_by_path(tree).items()}
    return {path: int(value) for path, value in jax.device_get(sums).items()}


@jax.jit
def device_checksum(x: jax.Array) -> jax.Array:
    """Checksum () uint32 of one array of real numbers, integers or booleans of any shape."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    # An 8-byte element becomes two words along a new last axis.
    words = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    # One index per axis instead of a flat arange: no reshape, so a sharded array stays where it is.
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = np.uint32(math.prod(words.shape[axis + 1 :]) % 2**32)
        index += stride * jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words * (2 * index + 1), dtype=jnp.uint32)


def host_checksum(array: np.ndarray) -> int:
    """The same checksum in NumPy, for tools that never put the arrays on a device."""
    words = np.ascontiguousarray(array).reshape(-1).view(_UNSIGNED[array.dtype.itemsize])
    total = 0
    for start in range(0, words.size, _BLOCK):
        block = words[start : start + _BLOCK].astype(np.uint32)
        index = np.arange(start, start + block.size).astype(np.uint32)
        total += int(np.sum(block * (2 * index + np.uint32(1)), dtype=np.uint32))
    return total % 2**32
