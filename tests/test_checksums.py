"""Leaf checksums against a literal twin, and what they must notice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import checksums
from experiments.checksums import device_checksum, host_checksum, leaves_by_path, tree_checksums

ARRAYS = {
    "float32": jnp.linspace(-3, 7, 60, dtype=jnp.float32).reshape(3, 4, 5),
    "bfloat16": jnp.linspace(-3, 7, 12, dtype=jnp.bfloat16).reshape(4, 3),
    "float16": jnp.linspace(-3, 7, 5, dtype=jnp.float16),
    "float8": jnp.linspace(-3, 7, 6, dtype=jnp.float8_e4m3fn),
    "int32": jnp.arange(-4, 4, dtype=jnp.int32).reshape(2, 4),
    "uint32": jnp.array([0, 1, 2**32 - 1, 2**31], jnp.uint32),
    "int8": jnp.arange(-3, 3, dtype=jnp.int8),
    "bool": jnp.array([[True, False], [False, True]]),
    "scalar": jnp.float32(-1.5),
    "count": jnp.int32(7),
    "nan": jnp.array([jnp.nan, -0.0, jnp.inf]),
}


def literal_checksum(array) -> int:
    """Sum over elements one by one, in Python integers."""
    array = np.asarray(array)
    size = array.dtype.itemsize
    data = array.tobytes()
    words = [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)]
    return sum(word * (2 * i + 1) for i, word in enumerate(words)) % 2**32


@pytest.mark.parametrize("name", ARRAYS)
def test_device_and_host_agree_with_the_literal_sum(name):
    array = ARRAYS[name]
    expected = literal_checksum(array)
    assert int(device_checksum(array)) == expected
    assert host_checksum(np.asarray(array)) == expected


def test_eight_byte_elements_count_as_two_words():
    array = np.array([1.5, -2.0, 3e300])
    assert host_checksum(array) == literal_checksum(array.view(np.uint32))
    with jax.enable_x64(True):
        assert int(device_checksum(jnp.asarray(array))) == host_checksum(array)


def test_host_blocks_do_not_change_the_sum(monkeypatch):
    array = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    whole = host_checksum(array)
    monkeypatch.setattr(checksums, "_BLOCK", 7)
    assert host_checksum(array) == whole == literal_checksum(array)


def test_a_strided_array_counts_in_row_major_order():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert host_checksum(array.T) == host_checksum(np.ascontiguousarray(array.T))
    assert host_checksum(array.T) != host_checksum(array)


@settings(max_examples=200)
@given(
    words=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40),
    position=st.integers(0, 39),
    change=st.integers(1, 2**32 - 1),
)
def test_any_change_of_one_element_is_noticed(words, position, change):
    array = np.array(words, np.uint32)
    changed = array.copy()
    changed[position % len(words)] ^= np.uint32(change)
    assert host_checksum(changed) != host_checksum(array)


def test_paths_are_slash_joined_and_named_tuples_look_like_dicts():
    from typing import NamedTuple

    class State(NamedTuple):
        count: jax.Array
        mu: dict

    one, two = jnp.float32(1), jnp.float32(2)
    tree = {"h_0": {"attn": {"kernel": one}}, "opt": (State(two, {"b": one}), None)}
    paths = ["h_0/attn/kernel", "opt/0/count", "opt/0/mu/b"]
    assert list(leaves_by_path(tree)) == paths
    as_dicts = {"h_0": {"attn": {"kernel": one}}, "opt": [{"count": two, "mu": {"b": one}}, None]}
    assert tree_checksums(as_dicts) == tree_checksums(tree)


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(ValueError, match="same slash-joined path"):
        leaves_by_path({"a/b": 1, "a": {"b": 2}})
