"""Damaged checkpoints, disks that fail, and what the user is told: one line each."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from synthetic_state import META, abstract, assert_bitwise, make_state, one_line

from experiments.checkpoints import Checkpoints
from experiments.checksums import leaves_by_path, tree_checksums
from models.command_line import UsageError


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


def refused_or_equal(folder: Path, expected: dict[str, int]) -> str | None:
    """Message of the refusal, or None if everything that was saved came back."""
    messages = []
    with Checkpoints(folder, read_only=True) as checkpoints:
        for read in (
            lambda: tree_checksums(checkpoints.restore(3, make_state())) == expected,
            lambda: checkpoints.read_meta(3) == META,
            lambda: leaves_by_path(checkpoints.restore_numpy(3)).keys() == expected.keys(),
        ):
            try:
                assert read(), "wrong data came back without a word"
            except UsageError as error:
                messages.append(str(error))
    for message in messages:
        assert "\n" not in message
        assert "step 3" in message
        assert str(folder) in message
        assert len(message) < 700
        assert "tensorstore_spec" not in message
    return messages[0] if messages else None


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_flipped_bit_anywhere_is_refused_or_harmless(saved, copy):
    expected = tree_checksums(make_state())
    refused = set()
    for path in files_below(copy / "3"):
        whole = path.read_bytes()
        for position in sorted({len(whole) // 3, len(whole) // 2, len(whole) - 5}):
            data = bytearray(whole)
            data[position] ^= 4
            path.write_bytes(data)
            if refused_or_equal(copy, expected):
                refused.add(str(path.relative_to(copy / "3")))
        path.write_bytes(whole)
    assert {"state/manifest.ocdbt", "sums/metadata", "meta/metadata"} <= refused
    assert any("/d/" in name for name in refused)


def test_every_bit_of_a_weight_counts(copy):
    """Flips inside the values themselves, where orbax sees nothing."""
    weights = np.asarray(make_state()["params"]["h_0"]["attn"]["c_q"]["kernel"]).tobytes()
    [path] = [path for path in files_below(copy / "3/state") if weights in path.read_bytes()]
    whole = path.read_bytes()
    start = whole.index(weights)
    for offset in (0, 1, 1000, len(weights) - 1):
        for bit in (0, 7):
            data = bytearray(whole)
            data[start + offset] ^= 1 << bit
            path.write_bytes(data)
            with (
                Checkpoints(copy, read_only=True) as checkpoints,
                pytest.raises(UsageError) as excinfo,
            ):
                checkpoints.restore(3, make_state())
            message = one_line(excinfo)
            assert "the checksum of params/h_0/attn/c_q/kernel does not match" in message
            assert f"delete {copy / '3'} to fall back to step 0" in message


@pytest.mark.parametrize("how", ["emptied", "cut", "removed"])
def test_files_that_are_gone_or_short_are_refused_or_harmless(copy, how, capfd):
    expected = tree_checksums(make_state())
    refused = set()
    for path in files_below(copy / "3"):
        whole = path.read_bytes()
        if how == "removed":
            path.unlink()
        else:
            path.write_bytes(whole[: len(whole) // 2 if how == "cut" else 0])
        if refused_or_equal(copy, expected):
            refused.add(str(path.relative_to(copy / "3")))
        path.write_bytes(whole)
    assert {"state/manifest.ocdbt", "state/_METADATA", "sums/metadata"} <= refused
    assert any("/d/" in name for name in refused)
    assert refused_or_equal(copy, expected) is None  # all put back
    assert "Traceback" not in capfd.readouterr().err  # no wall of text from orbax's threads


@pytest.mark.parametrize("item", ["state", "sums", "meta"])
def test_an_item_that_is_gone_is_named(copy, item):
    shutil.rmtree(copy / "3" / item)
    message = refused_or_equal(copy, tree_checksums(make_state()))
    assert f"{copy / '3' / item}" in message


def test_deleting_the_damaged_step_is_the_mend(copy):
    (copy / "3/state/manifest.ocdbt").write_bytes(b"")
    with (
        Checkpoints(copy) as checkpoints,
        pytest.raises(UsageError, match="to fall back to step 0"),
    ):
        checkpoints.restore(3, make_state())
    shutil.rmtree(copy / "3")
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.latest() == 0
        assert_bitwise(checkpoints.restore(0, make_state()), make_state(1))
        assert checkpoints.save(3, make_state(), META)
    (copy / "0/sums/metadata").write_bytes(b"")
    with Checkpoints(copy) as checkpoints, pytest.raises(UsageError, match="no earlier step"):
        checkpoints.restore(0, make_state())


def test_another_model_or_optimizer_is_refused_by_leaf(saved):
    state = make_state()
    wider = state | {"params": state["params"] | {"wte": {"embedding": jnp.ones((16, 9))}}}
    half = state | {"seen": state["seen"].astype(jnp.int32)}
    plain = state | {"opt_state": optax.sgd(0.1).init(state["params"])}
    with Checkpoints(saved, read_only=True) as checkpoints:
        for other, said in [
            (wider, "params/wte/embedding is float32[16, 8] there and float32[16, 9] here"),
            (half, "seen is uint32[2] there and int32[2] here"),
            (plain, "opt_state/inner_states/adam/inner_state/1/0/count is int32[] there and abs"),
        ]:
            with pytest.raises(UsageError) as excinfo:
                checkpoints.restore(3, abstract(other))
            assert said in one_line(excinfo)


# A disk that fails


def test_full_disk_is_said_before_writing(tmp_path, monkeypatch):
    state = make_state()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=500_000))
        with pytest.raises(UsageError) as excinfo:
            checkpoints.save(2, state, {})
        message = one_line(excinfo)
        assert "checkpoint of step 2" in message
        assert "disk full, free 0.5 MB, needed 1.1 MB; step 1 is still whole" in message
        monkeypatch.undo()
        assert checkpoints.save(2, state, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_a_background_error_comes_out_of_the_next_call_and_the_state_lives(tmp_path, monkeypatch):
    """The disk fills while orbax writes: simulated in the last thing it does, the rename."""
    state = make_state()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()

        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", full)
            patch.setattr(os, "replace", full)
            assert checkpoints.save(4, state, {})
            with pytest.raises(UsageError) as excinfo:
                checkpoints.wait()
        message = one_line(excinfo)
        assert "checkpoint of step 4" in message
        assert "disk full, free" in message
        assert "step 1 is still whole" in message
        assert checkpoints.steps() == [1]
        assert not list(tmp_path.glob("*tmp*"))  # its space is given back
        assert checkpoints.save(4, state, {})  # and saving goes on
        checkpoints.wait()
        assert_bitwise(checkpoints.restore(4, state), state)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("options", ["size=10m", "ro"])
def test_real_full_and_read_only_disks(tmp_path, options):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(tmp_path)])
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        if options == "ro":
            with pytest.raises(UsageError, match="Read-only file system; choose another out="):
                Checkpoints(tmp_path / "checkpoints")
            return
        state = {"w": jax.random.normal(jax.random.key(0), (1000, 1000))}
        with Checkpoints(tmp_path / "checkpoints") as checkpoints:
            checkpoints.save(1, state, {})
            checkpoints.wait()
            checkpoints.save(2, state, {})
            with pytest.raises(UsageError) as excinfo:
                checkpoints.save(3, state, {})
            assert "disk full, free" in one_line(excinfo)
            assert "needed 5.0 MB; step 2 is still whole" in one_line(excinfo)
            # And when orbax itself meets the full disk, halfway through writing.
            checkpoints._refuse_full_disk = lambda *_: None
            with pytest.raises(UsageError) as excinfo:  # noqa: PT012 the error may be late
                checkpoints.save(4, state, {})
                checkpoints.wait()
            assert "disk full, free" in one_line(excinfo)
            assert checkpoints.steps() == [1, 2]
            assert_bitwise(checkpoints.restore(2, state), state)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError) as excinfo:
        Checkpoints(tmp_path / "file/checkpoints")
    assert "Not a directory; choose another out=" in one_line(excinfo)


# The log


def test_orbax_warnings_go_and_its_errors_stay_in_one_line(saved, caplog):
    Checkpoints(saved, read_only=True).close()
    logger = logging.getLogger("absl")
    here = ("x/orbax/checkpoint/a.py", 1)
    with caplog.at_level(logging.DEBUG):
        logger.handle(logger.makeRecord("absl", logging.WARNING, *here, "soft", (), None))
        try:
            raise ValueError("deep")
        except ValueError:
            info = sys.exc_info()
        logger.handle(logger.makeRecord("absl", logging.ERROR, *here, "bad %s\nwall", ("x",), info))
        logger.handle(logger.makeRecord("absl", logging.WARNING, "y.py", 1, "other", (), None))
    assert [record.getMessage() for record in caplog.records] == ["bad x", "other"]
    assert "deep" not in caplog.text


def test_sums_are_plain_json_with_shapes_and_types(saved):
    sums = json.loads((saved / "3/sums/metadata").read_text())
    assert sums["leaves"]["params/wte/embedding"][:2] == ["float32", [16, 8]]
    assert sums["leaves"]["params/h_0/half"][0] == "bfloat16"
