"""Published checkpoint files: what is read, what is refused and how, and what a failure leaves."""

import json
import os
import pickle
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import flat, shake, tiny_model

from models.config import ArchConfig, SizeConfig
from models.gpt import init_params
from models.interop import COMPILED_PREFIX, from_published, to_published
from models.ladder import RUNGS
from models.published import load_published, read_published, save_published

UNTIED = ArchConfig(position="rope", head="untied")
ARRAYS = {
    "skip_weights": np.arange(3, dtype=np.float32),
    "transformer.h.0.attn.lamb": np.array(0.5, np.float32),
    "transformer.h.0.mlp.c_fc.weight": np.arange(6, dtype=np.float32).reshape(3, 2),
}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


def drawn(rung: str) -> tuple[ArchConfig, SizeConfig, dict]:
    """What a rung is made of and parameters of its shapes, without compiling its start."""
    model = tiny_model(rung).model
    shapes = jax.eval_shape(lambda: init_params(model, 0))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return model.arch, model.size, shake(zeros)


def refusal(path: Path) -> str:
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: ") as caught:
        read_published(path)
    said = str(caught.value)
    assert "\n" not in said
    return said


def raw_safetensors(path: Path, dtype: str, data: bytes, header_bytes: int = 0) -> Path:
    """The format by hand: length of the header, JSON header padded with blanks, data."""
    entry = {"dtype": dtype, "shape": [2], "data_offsets": [0, len(data)]}
    header = json.dumps({"skip_weights": entry}).encode().ljust(header_bytes)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


# What is read


def test_safetensors_and_npz_hold_the_same(tmp_path):
    save_file(ARRAYS, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", **ARRAYS)
    np.savez_compressed(tmp_path / "b.npz", **ARRAYS)
    for name in ("a.safetensors", "a.npz", "b.npz"):
        assert_same(read_published(str(tmp_path / name)), ARRAYS)


def test_of_a_fixture_only_the_parameters_are_read(tmp_path):
    others = {"meta": np.zeros(3, np.uint8), "tokens": np.zeros(3, int), "grad/skip_weights": 1.0}
    params = {f"param/{name}": array for name, array in ARRAYS.items()}
    np.savez(tmp_path / "a.npz", **others, **params)
    assert_same(read_published(tmp_path / "a.npz"), ARRAYS)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_other_precisions_come_as_float32(dtype, tmp_path):
    rounded = {
        name: np.asarray(array * np.float32(1.1)).astype(dtype) for name, array in ARRAYS.items()
    }
    expected = {name: array.astype(np.float32) for name, array in rounded.items()}
    save_file(rounded, tmp_path / "a.safetensors")
    assert_same(read_published(tmp_path / "a.safetensors"), expected)
    if dtype is not ml_dtypes.bfloat16:
        np.savez(tmp_path / "a.npz", **{name: a.astype(a.dtype) for name, a in rounded.items()})
        assert_same(read_published(tmp_path / "a.npz"), expected)


def test_bits_of_bfloat16(tmp_path):
    data = np.array([0x3F80, 0xC049], "<u2").tobytes()  # 1 and -3.140625
    (array,) = read_published(raw_safetensors(tmp_path / "a", "BF16", data)).values()
    np.testing.assert_array_equal(array, np.array([1.0, -3.140625], np.float32), strict=True)


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_as_long_as_a_pickle_mark_is_no_pickle(length, tmp_path):
    data = np.array([1.5, -2.0], np.float32).tobytes()
    path = raw_safetensors(tmp_path / "a.safetensors", "F32", data, length)
    assert path.read_bytes()[:2] in (b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5")
    np.testing.assert_array_equal(read_published(path)["skip_weights"], [1.5, -2.0])


# What is refused


class Bomb:
    """Leaves a file behind when unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def pickled(path: Path, trace: Path, protocol: int) -> None:
    path.write_bytes(pickle.dumps({"model": Bomb(trace)}, protocol))


def zipped(path: Path, trace: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("step/data.pkl", pickle.dumps(Bomb(trace)))
        archive.writestr("step/data/0", b"\0" * 8)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        *((f"a{suffix}", zipped) for suffix in (".pt", ".pth", ".bin", ".ckpt", ".PT", ".npz")),
        *(("a b.safetensors", lambda p, t, n=n: pickled(p, t, n)) for n in (2, 3, 4, 5)),
        ("it's.npz", lambda p, t: pickled(p, t, 2)),
        ("plain.pt", lambda p, t: save_file(ARRAYS, p)),
        ("no_suffix", zipped),
    ],
)
def test_pickles_are_refused_unopened_with_the_command_that_converts(name, write, tmp_path):
    path, trace = tmp_path / name, tmp_path / "trace"
    write(path, trace)
    said = refusal(path)
    assert "pickled PyTorch file" in said
    assert "another key for model" in said
    assert not trace.exists()
    command = re.search(r"python -c .*\.safetensors'?", said)[0]
    python, flag, code, source, target = shlex.split(command)
    assert (python, flag, source, target) == ("python", "-c", str(path), f"{path}.safetensors")
    assert "weights_only=True" in code
    compile(code, "command", "exec")


def test_the_command_converts(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is no dependency")
    tied = torch.arange(6.0).reshape(3, 2)
    state = {
        f"{COMPILED_PREFIX}{name}": tied for name in ("transformer.wte.weight", "lm_head.weight")
    }
    state["transformer.h.0.lambdas"] = torch.tensor([1.0, -2.0], dtype=torch.bfloat16)
    state["transformer.h.0.mlp.c_fc.weight"] = torch.arange(8.0).reshape(2, 4).T
    expected = {name: tensor.float().numpy() for name, tensor in state.items()}
    for number, saved in enumerate((state, {"model": state, "step": 7})):
        path = tmp_path / f"it's step {number}.pt"
        torch.save(saved, path)
        _, *words = shlex.split(re.search(r"python -c .*\.safetensors'?", refusal(path))[0])
        subprocess.run([sys.executable, *words], check=True)
        assert_same(read_published(words[-1]), expected)


def test_objects_in_an_npz_are_refused_unopened(tmp_path):
    trace = tmp_path / "trace"
    np.savez(tmp_path / "a.npz", skip_weights=np.array([Bomb(trace)], object))
    assert "skip_weights cannot be read (Object arrays" in refusal(tmp_path / "a.npz")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("gone.npz", lambda path: None),
        ("folder.safetensors", Path.mkdir),
        ("array.npy", lambda path: np.save(path, ARRAYS["skip_weights"])),
        ("short.npz", lambda path: path.write_bytes(b"PK\3\4" + b"\0" * 40)),
        ("short.safetensors", lambda path: raw_safetensors(path, "F32", b"1234")),
    ],
)
def test_what_is_no_checkpoint_is_refused(name, write, tmp_path):
    write(tmp_path / name)
    said = refusal(tmp_path / name)
    assert "cannot be read" in said
    assert said.endswith("give a .safetensors or .npz file")


def test_a_damaged_archive_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, skip_weights=np.ones(500, np.float32))
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    assert "cannot be read (Bad CRC-32" in refusal(path)


def test_what_is_no_real_number_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    for value, dtype in (
        (np.arange(3), "int64"),
        (np.array([True]), "bool"),
        (np.ones(2, np.complex64), "complex64"),
        (np.ones(2, ml_dtypes.bfloat16), "void16"),  # numpy's own format forgets the name
    ):
        np.savez(path, skip_weights=value)
        assert f"skip_weights has dtype {dtype}; store it as float32" in refusal(path)
    for dtype, width in (("F8_E4M3", 1), ("I32", 4), ("BOOL", 1)):
        raw_safetensors(tmp_path / "a", dtype, bytes(2 * width))
        assert f"skip_weights has dtype {dtype}; store it" in refusal(tmp_path / "a")


# The parameters of a model


@pytest.mark.parametrize("rung", RUNGS)
def test_a_model_is_saved_and_loaded(rung, tmp_path):
    arch, size, params = drawn(rung)
    path = tmp_path / "a.safetensors"
    save_published(path, jax.tree.map(jax.numpy.asarray, params), arch)
    assert_same(load_file(path), to_published(params, arch))
    loaded = load_published(path, arch, size)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    assert_same(flat(loaded), flat(params))


def test_a_compiled_tied_model_in_half_precision_is_loaded(tmp_path):
    arch, size, params = drawn("muon")
    published = to_published(params, arch)
    published["lm_head.weight"] = published["transformer.wte.weight"]
    half = {
        COMPILED_PREFIX + name: np.asarray(array, order="C").astype(ml_dtypes.bfloat16)
        for name, array in published.items()
    }
    path = tmp_path / "a.safetensors"
    save_file(half, path)
    expected = {
        name: leaf.astype(ml_dtypes.bfloat16).astype(np.float32)
        for name, leaf in flat(params).items()
    }
    assert_same(flat(load_published(path, arch, size)), expected)
    half[f"{COMPILED_PREFIX}lm_head.weight"][0, 0] += 1
    save_file(half, path)
    with pytest.raises(ValueError, match=rf"^{path}: _orig_mod\..* differs from _orig_mod\."):
        load_published(path, arch, size)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda a: a.pop("transformer.h.1.mlp.c_fc.weight"),
            "h_1/mlp/c_fc/kernel (published as transformer.h.1.mlp.c_fc.weight): absent in the "
            "file, shape (32, 128) in the model; check arch and size",
        ),
        (
            lambda a: a.update({"transformer.h.99.lambdas": np.ones(2)}),
            "h_99/lambdas (published as transformer.h.99.lambdas): shape (2,) in the file, absent "
            "in the model; check arch and size",
        ),
        (
            lambda a: a.update({"transformer.h.0.attn.c_attn.weight": np.ones((48, 32))}),
            "h_0/attn/c_k/kernel (published as transformer.h.0.attn.c_attn.weight): shape "
            "(32, 16) in the file, shape (32, 32) in the model; check arch and size",
        ),
        (
            lambda a: a.update({"transformer.ln_f.weight": np.ones(32)}),
            "transformer.ln_f.weight: no parameter of the ladder has this published name",
        ),
    ],
)
def test_weights_of_another_model_are_refused(change, said, tmp_path):
    arch, size, params = drawn("baseline")
    arrays = to_published(params, arch)
    change(arrays)
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {said}") + "$"):
        load_published(path, arch, size)


def test_the_vocabulary_must_be_known():
    with pytest.raises(ValueError, match=r"^size\.vocab_size=None: give the number of rows"):
        load_published("a.safetensors", ArchConfig(), SizeConfig(vocab_size=None))


# What a save leaves


@pytest.fixture
def params():
    return from_published(ARRAYS, UNTIED)


def test_a_save_replaces_and_leaves_nothing_else(params, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_text("old")
    mode = path.stat().st_mode
    save_published(str(path), jax.tree.map(lambda p: p.astype(ml_dtypes.bfloat16), params), UNTIED)
    assert_same(read_published(path), ARRAYS)
    assert path.stat().st_mode == mode
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("step", ["models.published.save_file", "os.fsync", "os.replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_leaves_the_old_file_alone(step, error, params, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_text("old")

    def fail(*args):
        if step.endswith("save_file"):
            Path(args[1]).write_text("half")
        raise error

    monkeypatch.setattr(step, fail)
    expected, said = type(error), None
    if isinstance(error, OSError):
        expected, said = ValueError, rf"^{path}: cannot be written \(.*No space left.*another place"
    with pytest.raises(expected, match=said):
        save_published(path, params, UNTIED)
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert path.read_text() == "old"


def test_places_that_take_no_file_are_refused(params, tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").touch()
    for place in ("folder.safetensors", "gone/a.safetensors", "file/a.safetensors"):
        with pytest.raises(ValueError, match=f"^{tmp_path / place}: cannot be written "):
            save_published(tmp_path / place, params, UNTIED)
    for name in ("a.npz", "a.pt", "a"):
        with pytest.raises(ValueError, match=f"^{tmp_path / name}: give a name that ends in"):
            save_published(tmp_path / name, params, UNTIED)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.safetensors"]


def test_unknown_parameters_are_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"^h_0/odd: no parameter"):
        save_published(tmp_path / "a.safetensors", {"h_0": {"odd": np.ones(2)}}, UNTIED)
    assert os.listdir(tmp_path) == []
