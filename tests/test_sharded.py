"""Head, attention kernel and Muon on four devices: the numbers of one, and who talks to whom."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = """
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.devices import replicated, split_leading, state_sharding
from experiments.program_text import talk_between_devices
from models.flash import flash_attention
from models.head import head_loss
from models.sharded import on_own_rows
from optim.muon import scale_by_muon

jax.config.update("jax_numpy_rank_promotion", "raise")
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
by_rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
rng = np.random.default_rng(0)


def compare(function, mesh_function, shared, *arrays):
    one = jax.jit(jax.value_and_grad(function, tuple(range(len(arrays) + len(shared)))))
    four = jax.jit(jax.value_and_grad(mesh_function, tuple(range(len(arrays) + len(shared)))))
    placed = [jax.device_put(each, by_rows) for each in arrays]
    compiled = four.lower(*placed, *shared).compile()
    for got, want in zip(jax.tree.leaves(compiled(*placed, *shared)),
                         jax.tree.leaves(one(*arrays, *shared)), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-5)
    return compiled.as_text()


x = rng.normal(size=(8, 20, 6)).astype(np.float32)
kernel = rng.normal(size=(6, 11)).astype(np.float32)
targets = rng.integers(0, 11, (8, 20))
for rule in ({"dtype": jnp.float32}, {"dtype": jnp.bfloat16, "float8": True}):
    loss = partial(head_loss, targets=targets, softcap=15.0, chunk=5, **rule)
    text = compare(loss, partial(loss, mesh=mesh), [kernel], x)
    assert list(talk_between_devices(text)) == ["all-reduce"]
    loops = [part for part in re.split(r"\\n\\n", text) if "all-reduce" in part]
    assert len(loops) == 1 and "ENTRY" in loops[0], "sums over devices belong outside the loop"

q, k, v = rng.normal(size=(3, 4, 32, 2, 16)).astype(np.float32)
first = np.zeros((4, 32), np.int32)
attend = partial(flash_attention, scale=0.3, interpret=True)
text = compare(
    lambda q, k, v: jnp.sum(attend(q, k, v, first) ** 2),
    lambda q, k, v: jnp.sum(on_own_rows(attend, mesh, q, k, v, jnp.asarray(first)) ** 2),
    [], q, k, v,
)
assert list(talk_between_devices(text)) == ["all-reduce"]
# rows that cannot be dealt out evenly are computed as on one device
three = jax.jit(partial(head_loss, softcap=None, dtype=jnp.float32, mesh=mesh))
np.testing.assert_allclose(
    three(x[:3], kernel, targets[:3]),
    head_loss(x[:3], kernel, targets[:3], softcap=None, dtype=jnp.float32), rtol=1e-6,
)

# Muon: 5 matrices of one shape and 3 of another; small ones are not cut, so these are large
grads = {i: rng.normal(size=(64, 64) if i < 5 else (64, 128)) for i in range(8)}
grads = jax.tree.map(lambda leaf: leaf.astype(np.float32), grads)


def update(cut, **how):
    tx, lies = scale_by_muon(0.9, **how), state_sharding(mesh, grads, cut=cut)
    run = jax.jit(lambda grads: tx.update(grads, tx.init(grads))[0], out_shardings=lies)
    compiled = run.lower(jax.device_put(grads, lies)).compile()
    return compiled(jax.device_put(grads, lies)), talk_between_devices(compiled.as_text())


expected, talk = update(False)
assert talk == {}
split = split_leading(mesh)
for got, talk in (update(False, split=split, joined=replicated(mesh)), update(True, split=split)):
    for i in grads:
        np.testing.assert_allclose(got[i], expected[i], rtol=0, atol=2e-2)
    print(sorted((kind, each.count) for kind, each in talk.items()))
print("done")
"""


def test_four_devices_compute_what_one_does_and_sum_once():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    # once a shape where matrices are whole, there and back where they are cut
    *talk, last = done.stdout.splitlines()
    assert talk == ["[('all-gather', 2)]", "[('all-to-all', 4)]"]
    assert last == "done"
