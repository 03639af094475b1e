"""Checkpoints: bitwise round trips, donated buffers, the keep rule, device counts, a kill."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic_state import META, abstract, assert_bitwise, make_state, one_line

from experiments.checkpoints import Checkpoints
from experiments.checksums import host_checksum, leaves_by_path, tree_checksums
from models.command_line import UsageError

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with whole checkpoints of steps 0 and 3, not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(0, make_state(1), {"step": 0})
        checkpoints.save(3, make_state(), META)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


# Round trips


def test_round_trip_is_bitwise_and_keeps_the_tree(saved):
    state = make_state()
    with Checkpoints(saved, read_only=True) as checkpoints:
        assert checkpoints.steps() == [0, 3]
        assert checkpoints.latest() == 3
        assert checkpoints.read_meta(3) == META
        assert_bitwise(checkpoints.restore(3, abstract(state)), state)
        assert_bitwise(checkpoints.restore(0, state), make_state(1))


def test_restored_arrays_train_on_like_the_saved_ones(saved):
    state = make_state()
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 2 if x.dtype == jnp.float32 else x, s))
    with Checkpoints(saved, read_only=True) as checkpoints:
        assert_bitwise(step(checkpoints.restore(3, abstract(state))), step(state))


def test_numpy_restore_needs_no_target(saved):
    with Checkpoints(saved, read_only=True) as checkpoints:
        got = checkpoints.restore_numpy(3)
        params = checkpoints.restore_numpy(3, part="params")
        with pytest.raises(ValueError, match="part='parms'"):
            checkpoints.restore_numpy(3, part="parms")
    expected = leaves_by_path(make_state())
    assert leaves_by_path(got).keys() == expected.keys()
    for path, leaf in leaves_by_path(got).items():
        assert type(leaf) is np.ndarray
        assert leaf.tobytes() == np.asarray(expected[path]).tobytes(), path
    assert got["opt_state"]["inner_states"]["adam"]["inner_state"][1][0]["count"] == 1
    assert_bitwise(params, got["params"])


def test_meta_is_the_one_of_the_moment_of_saving(tmp_path):
    meta = {"step": 1, "betas": (0.9, 0.95)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(), meta)
        meta["step"] = 2
        checkpoints.wait()
        assert checkpoints.read_meta(1) == {"step": 1, "betas": [0.9, 0.95]}
        with pytest.raises(ValueError, match="JSON"):
            checkpoints.save(2, make_state(), {"loss": float("nan")})
        assert checkpoints.steps() == [1]


def test_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    make = jax.jit(lambda i: {"w": i + jnp.arange(3_000_000.0), "n": i})
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 7, s), donate_argnums=0)
    expected = {i: jax.device_get(make(jnp.float32(i))) for i in range(3)}
    with Checkpoints(tmp_path) as checkpoints:
        for i in range(3):
            state = make(jnp.float32(i))
            checkpoints.save(i, state, {})
            for _ in range(5):
                state = overwrite(state)
            jax.block_until_ready(state)
        checkpoints.wait()
        for i in range(3):
            assert_bitwise(checkpoints.restore_numpy(i), expected[i])


def test_a_relative_folder_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints("run/checkpoints") as checkpoints:
        checkpoints.save(0, make_state(), {})
    assert (tmp_path / "run/checkpoints/0/meta").is_dir()


# Which steps are there


def test_every_save_is_taken_and_a_second_one_of_a_step_is_not(tmp_path):
    first, second = make_state(0), make_state(1)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
        for step in (0, 1, 2, 7):
            assert checkpoints.save(step, first, {"step": step})
        assert not checkpoints.save(7, second, {"step": -1})
        checkpoints.wait()
        assert checkpoints.steps() == [0, 1, 2, 7]
        assert not checkpoints.save(2, second, {})
        assert_bitwise(checkpoints.restore(7, second), first)
        assert checkpoints.read_meta(7) == {"step": 7}


@pytest.mark.parametrize(
    ("keep", "order", "expected"),
    [
        (2, [0, 5, 10, 15], [0, 10, 15]),
        (1, [3, 5], [5]),
        (2, [20, 23, 12, 25], [23, 25]),
        (None, [0, 1, 2, 3], [0, 1, 2, 3]),
    ],
)
def test_keep_rule(tmp_path, keep, order, expected):
    with Checkpoints(tmp_path, keep=keep) as checkpoints:
        for step in order:
            checkpoints.save(step, {"w": jnp.ones(3)}, {})
    with Checkpoints(tmp_path, keep=keep) as checkpoints:
        assert checkpoints.steps() == expected
        if keep == 2 and 0 in order:
            checkpoints.save(20, {"w": jnp.ones(3)}, {})  # counts the steps of earlier starts
            checkpoints.wait()
            assert checkpoints.steps() == [0, 15, 20]


def test_keep_must_keep_something(tmp_path):
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


def test_a_step_that_is_not_there_is_named(saved):
    with Checkpoints(saved, read_only=True) as checkpoints:
        for ask in (checkpoints.read_meta, checkpoints.restore_numpy):
            with pytest.raises(UsageError) as excinfo:
                ask(4)
            assert "no checkpoint of step 4" in one_line(excinfo)
            assert "there are: 0, 3" in one_line(excinfo)


def test_read_only_changes_nothing_and_cannot_save(saved, copy):
    (copy / "7.orbax-checkpoint-tmp").mkdir()
    before = sorted(copy.rglob("*"))
    with Checkpoints(copy, read_only=True) as checkpoints:
        checkpoints.restore_numpy(3)
        with pytest.raises(ValueError, match="read_only"):
            checkpoints.save(4, make_state(), {})
    assert sorted(copy.rglob("*")) == before
    with pytest.raises(UsageError, match=r"no checkpoints: .*absent"):
        Checkpoints(copy / "absent", read_only=True)
    assert not (copy / "absent").exists()


def test_half_written_steps_are_ignored_and_removed(copy):
    shutil.copytree(copy / "3", copy / "7.orbax-checkpoint-tmp")
    shutil.rmtree(copy / "7.orbax-checkpoint-tmp/meta")
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.steps() == [0, 3]
        checkpoints.save(7, make_state(2), {})
        checkpoints.wait()
        assert_bitwise(checkpoints.restore(7, make_state()), make_state(2))
    assert not list(copy.glob("*tmp*"))


def test_a_step_that_is_no_longer_kept_goes_as_a_whole(tmp_path, monkeypatch):
    states = [make_state(seed) for seed in range(3)]
    with monkeypatch.context() as patched:  # as if killed before anything of them was removed
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)
        with Checkpoints(tmp_path, keep=1) as checkpoints:
            for step, state in enumerate(states, start=1):
                checkpoints.save(step, state, {})
            checkpoints.wait()
            assert checkpoints.steps() == [3]
    assert sorted(path.name for path in (tmp_path / "dropped").iterdir()) == ["1", "2"]
    shutil.rmtree(tmp_path / "dropped" / "1" / "sums")  # killed half way
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert not (tmp_path / "dropped").exists()
        assert checkpoints.steps() == [3]
        assert_bitwise(checkpoints.restore(3, states[2]), states[2])


# Other processes


def run_python(code: str, *arguments, devices: int = 1) -> subprocess.CompletedProcess:
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    env.pop("XLA_FLAGS", None)
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=TESTS,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )


EIGHT_DEVICES = """
import sys, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from experiments.checkpoints import Checkpoints
from experiments.checksums import leaves_by_path, tree_checksums, host_checksum
from synthetic_state import make_state, assert_bitwise

assert jax.device_count() == 8
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
def place(leaf):
    spec = PartitionSpec("data") if leaf.ndim and leaf.shape[0] % 8 == 0 else PartitionSpec()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

with Checkpoints(sys.argv[1], read_only=True) as one:
    state = one.restore(3, jax.tree.map(place, make_state()))
    assert_bitwise(one.restore_numpy(3)["params"], jax.device_get(make_state()["params"]))
assert_bitwise(state, make_state())
assert len(state["params"]["wte"]["embedding"].sharding.device_set) == 8
assert {k: host_checksum(np.asarray(v)) for k, v in leaves_by_path(state).items()} \\
    == tree_checksums(state)
with Checkpoints(sys.argv[2]) as eight:
    eight.save(3, state, {"devices": 8})
"""


def test_device_counts_may_differ(saved, tmp_path):
    ran = run_python(EIGHT_DEVICES, saved, tmp_path, devices=8)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    state = make_state()
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert_bitwise(checkpoints.restore(3, abstract(state)), state)
        found = leaves_by_path(checkpoints.restore_numpy(3))
        assert {path: host_checksum(leaf) for path, leaf in found.items()} == tree_checksums(state)
        assert checkpoints.read_meta(3) == {"devices": 8}


KILLED_WHILE_SAVING = """
import sys, jax, jax.numpy as jnp
from experiments.checkpoints import Checkpoints
state = {"w": jnp.arange(2_000_000.0), "n": jnp.int32(0)}
with Checkpoints(sys.argv[1], keep=2) as checkpoints:
    for step in range(100_000):
        checkpoints.save(step, {"w": state["w"] + step, "n": state["n"] + step}, {"step": step})
        print(step, flush=True)
"""


def test_a_kill_while_saving_leaves_whole_steps_only(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_WHILE_SAVING, tmp_path],
        cwd=TESTS,
        stdout=subprocess.PIPE,
        text=True,
    )
    for _ in range(4):
        process.stdout.readline()
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with Checkpoints(tmp_path) as checkpoints:
        latest = checkpoints.latest()
        assert latest >= 2
        for step in checkpoints.steps():
            got = checkpoints.restore_numpy(step)
            np.testing.assert_array_equal(got["w"], np.arange(2e6, dtype=np.float32) + step)
            assert checkpoints.read_meta(step) == {"step": step}
        checkpoints.save(latest + 1, {"w": jnp.ones(3)}, {})
    assert not list(tmp_path.glob("*tmp*"))
