"""Spectrum files: round trips, damage, atomic replacement, and the writer thread."""

import json
import os
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest

from lens_jax.records import RecordWriter, read_records, read_step, write_step

META = {"tokens": 4096, "rung": "untied", "loss": 4.5}


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "act_cov_eigenvalues/h_0/resid_post": np.sort(rng.lognormal(size=16))[::-1],
        "act_mean_sq/h_0/resid_post": np.array(1.5),
        "grad_singular_values/h_0/attn/c_proj/kernel": np.arange(8.0)[::-1],
    }


def test_round_trip_is_exact(tmp_path):
    path = write_step(tmp_path / "spectra", 250, arrays(), META)
    assert path == tmp_path / "spectra" / "step_00000250.npz"
    meta, found = read_step(path)
    assert meta == META | {"step": 250}
    assert found.keys() == arrays().keys()
    for name, values in arrays().items():
        assert found[name].dtype == np.float64
        np.testing.assert_array_equal(found[name], values)
    assert os.listdir(path.parent) == ["step_00000250.npz"]


def test_compressed_records_are_smaller_and_read_the_same(tmp_path):
    arrays = {"act_cov_eigenvalues/h_0": np.zeros(500, np.float32)}
    sizes = []
    for compress in (False, True):
        path = write_step(tmp_path / str(compress), 1, arrays, {"tokens": 5}, compress=compress)
        sizes.append(path.stat().st_size)
        meta, found = read_step(path)
        np.testing.assert_array_equal(found["act_cov_eigenvalues/h_0"], np.zeros(500))
        assert meta["tokens"] == 5
    assert sizes[1] < sizes[0] / 2


def test_file_opens_with_plain_numpy(tmp_path):
    with np.load(write_step(tmp_path, 1, arrays(), META)) as file:
        assert file["act_mean_sq/h_0/resid_post"] == 1.5
        assert json.loads(file["meta"].tobytes())["tokens"] == 4096


def test_small_floats_are_widened_exactly(tmp_path):
    import ml_dtypes

    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.int32):
        values = np.array([3.0, 2.5, 0.125]).astype(dtype)
        _, found = read_step(write_step(tmp_path, 1, {"kind/site": values}, META))
        np.testing.assert_array_equal(found["kind/site"], values.astype(np.float64))


@pytest.mark.parametrize(
    ("step", "extra", "meta", "message"),
    [
        (-1, {}, META, "step=-1"),
        (1, {}, {}, "tokens"),
        (1, {}, META | {"step": 2}, "step 2"),
        (1, {"no_site": np.ones(2)}, META, "no_site"),
        (1, {"../up": np.ones(2)}, META, "up"),
        (1, {"kind/text": np.array(["a"])}, META, "kind/text"),
        (1, {"kind/objects": np.array([{}], dtype=object)}, META, "kind/objects"),
        (1, {"kind/complex": np.array([1j])}, META, "kind/complex"),
    ],
)
def test_what_is_no_record_is_refused_and_leaves_nothing(tmp_path, step, extra, meta, message):
    with pytest.raises(ValueError, match=message):
        write_step(tmp_path, step, arrays() | extra, meta)
    assert not list(tmp_path.iterdir())


def test_records_are_selected_and_sorted_by_step(tmp_path):
    for step in (300, 20, 100_000_000, 0):
        write_step(tmp_path, step, arrays(step), META | {"tokens": 10 * step})
    (tmp_path / ".step_00000007.npz.tmp").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("not a record")
    records = read_records(tmp_path, kind="act_cov_eigenvalues")
    assert [record.step for record in records] == [0, 20, 300, 100_000_000]
    assert records[2].tokens == 3000
    assert records[2].site == "h_0/resid_post"
    assert records[2].meta["rung"] == "untied"
    np.testing.assert_array_equal(
        records[1].values, arrays(20)["act_cov_eigenvalues/h_0/resid_post"]
    )
    assert len(read_records(tmp_path)) == 12
    assert len(read_records(tmp_path, site="h_0/resid_post")) == 8
    assert read_records(tmp_path, kind="act_cov") == []


def test_missing_folder_and_file_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        read_records(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"step_00000001\.npz: no such file"):
        read_step(tmp_path / "step_00000001.npz")


def test_cut_files_are_refused_by_name(tmp_path):
    path = write_step(tmp_path, 7, arrays(), META)
    whole = path.read_bytes()
    for length in [0, 1, 40, *np.linspace(41, len(whole) - 1, 30).astype(int)]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"step_00000007\.npz") as caught:
            read_records(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_flipped_bit_is_refused_or_harmless(tmp_path):
    path = write_step(tmp_path, 7, arrays(), META)
    whole, (meta, expected) = path.read_bytes(), read_step(path)
    rng = np.random.default_rng(0)
    refusals = []
    for place in rng.choice(8 * len(whole), size=400, replace=False):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            found_meta, found = read_step(path)
        except ValueError as error:
            refusals.append(str(error))
            continue
        # The rest sits where nothing is stored: time stamps, attributes, the second name.
        assert found_meta == meta
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)
    assert len(refusals) > 300
    assert all(path.name in refusal for refusal in refusals)


def test_pickled_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "step_00000001.npz"
    np.savez(path, meta=np.array([{"step": 1}], dtype=object))
    with pytest.raises(ValueError, match="step_00000001"):
        read_step(path)
    np.savez(path, values=np.ones(3))
    with pytest.raises(ValueError, match="step_00000001"):
        read_step(path)
    np.savez(path, meta=np.frombuffer(b"[1, 2]", dtype=np.uint8))
    with pytest.raises(ValueError, match="step_00000001"):
        read_step(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("meta.npy", b"text")
    with pytest.raises(ValueError, match="step_00000001"):
        read_step(path)


KILLED = """
import os, sys
import numpy as np
from lens_jax.records import write_step
os.replace = lambda *paths: os._exit(9)   # dies between the write and the rename
write_step(sys.argv[1], 7, {"kind/site": np.zeros(3)}, {"tokens": 0})
"""


def test_death_before_the_rename_leaves_the_old_file(tmp_path):
    path = write_step(tmp_path, 7, arrays(), META)
    old = path.read_bytes()
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)]).returncode == 9
    assert path.read_bytes() == old
    assert len(list(tmp_path.iterdir())) == 2  # what it left is no record
    assert {record.step for record in read_records(tmp_path)} == {7}
    write_step(tmp_path, 7, {"kind/site": np.ones(3)}, META)  # and is overwritten
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000007.npz"]


def test_failed_write_cleans_up_and_keeps_the_old_file(tmp_path, monkeypatch):
    path = write_step(tmp_path, 7, arrays(), META)
    old = path.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_step(tmp_path, 7, arrays(1), META)
    assert path.read_bytes() == old
    assert len(list(tmp_path.iterdir())) == 1


def test_writer_keeps_the_order_and_runs_pending_on_its_thread(tmp_path):
    order = []

    def pending(step):
        order.append((step, threading.current_thread().name))
        return arrays(step)

    with RecordWriter(tmp_path, max_pending=2) as writer:
        for step in range(6):
            writer.submit(step, META, lambda step=step: pending(step))
        writer.drain()
        assert len(list(tmp_path.iterdir())) == 6
        writer.submit(6, META, lambda: pending(6))
    assert order == [(step, "record-writer") for step in range(7)]
    assert [r.step for r in read_records(tmp_path, kind="act_mean_sq")] == list(range(7))
    with pytest.raises(RuntimeError, match="closed"):
        writer.submit(7, META, arrays)


def test_pending_may_complete_the_meta(tmp_path):
    meta = {"tokens": 5}
    with RecordWriter(tmp_path) as writer:
        writer.submit(1, meta, lambda: meta.update(loss=2.5) or arrays())
    assert read_step(tmp_path / "step_00000001.npz")[0] == {"step": 1, "tokens": 5, "loss": 2.5}


def fail():
    raise ArithmeticError("eigenvalues did not converge")


def test_drain_raises_the_first_error_once_and_writes_the_rest(tmp_path):
    with RecordWriter(tmp_path) as writer:
        released = threading.Event()
        writer.submit(1, META, lambda: released.wait(10) and fail())
        writer.submit(2, {}, arrays)
        writer.submit(3, META, arrays)
        released.set()
        with pytest.raises(ArithmeticError, match="converge") as caught:
            writer.drain()
        assert any("step 1" in note for note in caught.value.__notes__)
        writer.drain()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003.npz"]


def test_leaving_the_block_raises_the_writer_error(tmp_path):
    with pytest.raises(ArithmeticError), RecordWriter(tmp_path) as writer:
        writer.submit(1, META, fail)


def test_submit_raises_an_error_of_before(tmp_path):
    writer = RecordWriter(tmp_path, max_pending=1)
    writer.submit(1, META, fail)
    writer._queue.join()
    with pytest.raises(ArithmeticError):
        writer.submit(2, META, arrays)
    writer.submit(3, META, arrays)
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003.npz"]


def test_an_error_of_the_block_is_not_hidden(tmp_path):
    def block():
        with RecordWriter(tmp_path) as writer:
            writer.submit(1, META, fail)
            raise KeyError("the block")

    with pytest.raises(KeyError, match="the block") as caught:
        block()
    assert any("did not converge" in note for note in caught.value.__notes__)
