"""The head and the attention kernel on four devices: the numbers of one, and who talks to whom."""

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

from models.flash import flash_attention
from models.head import head_loss
from models.sharded import on_own_rows

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


def talk(text, kind):
    return len(re.findall(rf"= \\S+ {kind}(?:-start)?\\(|= \\(.*\\) {kind}(?:-start)?\\(", text))


x = rng.normal(size=(8, 20, 6)).astype(np.float32)
kernel = rng.normal(size=(6, 11)).astype(np.float32)
targets = rng.integers(0, 11, (8, 20))
for rule in ({"dtype": jnp.float32}, {"dtype": jnp.bfloat16, "float8": True}):
    loss = partial(head_loss, targets=targets, softcap=15.0, chunk=5, **rule)
    text = compare(loss, partial(loss, mesh=mesh), [kernel], x)
    assert talk(text, "all-gather") == 0
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
assert talk(text, "all-gather") == 0
# rows that cannot be dealt out evenly are computed as on one device
three = jax.jit(partial(head_loss, softcap=None, dtype=jnp.float32, mesh=mesh))
np.testing.assert_allclose(
    three(x[:3], kernel, targets[:3]),
    head_loss(x[:3], kernel, targets[:3], softcap=None, dtype=jnp.float32), rtol=1e-6,
)
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
    assert done.stdout.strip() == "done"
