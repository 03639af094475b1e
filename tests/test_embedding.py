"""The lookup and both ways to sum its gradient, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import embedding
from models.embedding import scan_rows, scatter_rows, take_rows

VOCAB, WIDTH = 7, 3
WAYS = {
    name: jax.jit(way, static_argnums=2)
    for name, way in (("scan", scan_rows), ("scatter", scatter_rows))
}


@settings(max_examples=60)
@given(st.lists(st.integers(0, VOCAB - 1), min_size=24, max_size=24), st.integers(0, 99))
def test_rows_are_summed_by_id(ids, seed):
    rows = np.random.default_rng(seed).normal(size=(24, WIDTH)).astype(np.float32)
    expected = np.zeros((VOCAB, WIDTH))
    np.add.at(expected, ids, rows)
    for name, way in WAYS.items():
        got = way(jnp.asarray(ids), rows, VOCAB)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5, err_msg=name)


def scanned(columns, vocab, shape, monkeypatch):
    """The compiled scan that takes so many columns at a time, and random ids and rows for it."""
    monkeypatch.setattr(embedding, "COLUMNS", columns)
    rng = np.random.default_rng(2)
    ids = jnp.asarray(rng.integers(0, vocab, shape[0]))
    rows = jnp.asarray(rng.normal(size=shape), jnp.float32)
    scan = jax.jit(lambda ids, rows: scan_rows(ids, rows, vocab))
    return scan.lower(ids, rows).compile(), (ids, rows)


@pytest.mark.parametrize("columns", [1, 5, 6])  # of 12: twelve times 1, three times 4, twice 6
def test_columns_taken_some_at_a_time_have_the_same_sums(columns, monkeypatch):
    whole, arguments = scanned(12, VOCAB, (40, 12), monkeypatch)
    some, _ = scanned(columns, VOCAB, (40, 12), monkeypatch)
    np.testing.assert_array_equal(some(*arguments), whole(*arguments))


def test_columns_taken_some_at_a_time_need_less_memory(monkeypatch):
    needed = [
        scanned(columns, 64, (4096, 512), monkeypatch)[0].memory_analysis().temp_size_in_bytes
        for columns in (512, 64)
    ]
    assert needed[1] < needed[0] / 4


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_the_gradient_is_that_of_the_lookup(backend, monkeypatch):
    monkeypatch.setattr(embedding.jax, "default_backend", lambda: backend)
    rng = np.random.default_rng(0)
    table, weights = rng.normal(size=(VOCAB, WIDTH)), rng.normal(size=(2, 5, WIDTH))
    ids = rng.integers(0, VOCAB, (2, 5))
    table, weights = (jnp.asarray(each, jnp.float32) for each in (table, weights))
    total = lambda lookup: lambda table: jnp.vdot(lookup(table, ids), weights)  # noqa: E731
    got = jax.grad(total(take_rows))(table)
    want = jax.grad(total(lambda table, ids: table[ids]))(table)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_ids_outside_the_table_are_dropped_and_looked_up_as_nan(way):
    rows = jnp.ones((4, WIDTH))
    got = WAYS[way](jnp.asarray([0, VOCAB, 2, 2]), rows, VOCAB)
    assert np.asarray(got).sum(1).tolist() == [3, 0, 6, 0, 0, 0, 0]
    looked_up = take_rows(jnp.ones((VOCAB, WIDTH)), jnp.asarray([[0, VOCAB, -1]]))
    assert np.isnan(looked_up[0, 1:]).all()
    assert not np.isnan(looked_up[0, 0]).any()


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_rows_may_be_mapped_over(backend, monkeypatch):
    monkeypatch.setattr(embedding.jax, "default_backend", lambda: backend)
    rng = np.random.default_rng(1)
    ids = jnp.asarray(rng.integers(0, VOCAB, (3, 1, 6)))
    table = jnp.asarray(rng.normal(size=(VOCAB, WIDTH)), jnp.float32)
    slope = jax.grad(lambda table, ids: jnp.sum(take_rows(table, ids) ** 2))
    mapped = jax.vmap(slope, (None, 0))(table, ids)
    for got, row in zip(mapped, ids, strict=True):
        np.testing.assert_allclose(got, slope(table, row), rtol=1e-6)
