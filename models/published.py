"""Published checkpoints in and out of files, without ever unpickling one.

Weights of the released PyTorch code come as .safetensors, or as .npz under the same names. A file
that torch pickled can run any code when it is opened, so it is refused with the command that
converts it. Names and layouts are those of `models.interop`.
"""

import contextlib
import os
import shlex
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import chz
import jax  # also teaches numpy the name bfloat16, which safetensors asks for
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from models.config import ArchConfig, SizeConfig
from models.gpt import GPT, init_params
from models.interop import by_path, from_published, published_name, to_published

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
ZIP_MARK = b"PK\x03\x04"
FIXTURE_PREFIX = "param/"
# As numpy names them, and as safetensors does.
FLOATS = frozenset({"float16", "bfloat16", "float32", "float64", "F16", "BF16", "F32", "F64"})
# Tied weights share their storage, which save_file refuses: hence a copy of each.
CONVERT = (
    "import sys, torch; from safetensors.torch import save_file; "
    's = torch.load(sys.argv[1], map_location="cpu", weights_only=True); s = s.get("model", s); '
    "save_file({k: v.contiguous().clone() for k, v in s.items()}, sys.argv[2])"
)
UNREADABLE = (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, SafetensorError)


def read_published(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Stored name -> float32 array of a .safetensors or .npz file.

    Half and double formats are cast: master weights are float32. Of an .npz that has names under
    `param/`, those are read, without that prefix, and the rest is left alone. Raises ValueError for
    a pickled file, with the command that converts it, for a file that cannot be read, and for an
    array that is not of real numbers.
    """
    path = Path(path)
    try:
        start = _first_bytes(path)
        zipped = start.startswith(ZIP_MARK)
        if _is_pickled(path, start, zipped):
            raise ValueError(_how_to_convert(path))
        return _read_npz(path) if zipped else _read_safetensors(path)
    except UNREADABLE as error:
        raise ValueError(
            f"{path}: cannot be read ({error}); give a .safetensors or .npz file"
        ) from None


def load_published(path: str | os.PathLike, arch: ArchConfig, size: SizeConfig) -> dict:
    """The nested float32 parameters of `GPT(arch, size)` from a published file.

    Names may carry the prefix of a compiled model, and a tied matrix either or both of its names.
    Raises ValueError as `read_published` and `from_published` do, and for the first parameter that
    is missing, not the model's, or of another shape.
    """
    if size.vocab_size is None:
        raise ValueError("size.vocab_size=None: give the number of rows of the embedding")
    arrays = read_published(path)
    try:
        params = from_published(arrays, arch)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    _check_shapes(path, params, arch, size)
    return params


def save_published(path: str | os.PathLike, params: Mapping, arch: ArchConfig) -> None:
    """Write our nested parameters as a .safetensors file of float32 under published names.

    The inverse of `load_published`; a tied matrix is stored once, so that torch needs
    `load_state_dict(..., strict=False)` for it. The file is whole or absent: it is written beside
    its place and renamed. Raises ValueError for another suffix, a parameter that no rung has, and a
    file that cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: give a name that ends in .safetensors")
    # save_file takes the memory as it lies, and would store a transposed view wrongly
    arrays = {
        name: np.asarray(array, np.float32, order="C")
        for name, array in to_published(params, arch).items()
    }
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode
        save_file(arrays, unfinished)
        unfinished.chmod(mode)  # some versions of safetensors leave it to the owner alone
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be written ({error}); choose another place") from error
    finally:
        with contextlib.suppress(OSError):  # renamed, or never there
            unfinished.unlink()


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(9)


def _is_pickled(path: Path, start: bytes, zipped: bool) -> bool:
    if path.suffix.lower() in PICKLE_SUFFIXES:
        return True
    if zipped:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    # A safetensors file starts with the length of its header, which may happen to be the two bytes
    # of a pickle protocol (640 is), but then a brace follows the eight bytes of that length.
    return start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5") and start[8:] != b"{"


def _how_to_convert(path: Path) -> str:
    words = ("python", "-c", CONVERT, str(path), f"{path}.safetensors")
    return (
        f"{path}: a pickled PyTorch file, which could run code when opened; convert it where torch "
        f"is installed: {shlex.join(words)} (put another key for model if the state is under one)"
    )


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    arrays = {}
    with safe_open(path, framework="np") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            _require_float(path, name, file.get_slice(name).get_dtype())
            arrays[name] = file.get_tensor(name).astype(np.float32, copy=False)
    return arrays


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    arrays = {}
    with np.load(path, allow_pickle=False) as archive:
        wanted = [name for name in archive.files if name.startswith(FIXTURE_PREFIX)]
        for name in wanted or archive.files:
            try:
                array = np.asarray(archive[name])
            except ValueError as error:  # numpy's, for a pickled object too
                raise ValueError(f"{path}: {name} cannot be read ({error})") from None
            _require_float(path, name, array.dtype.name)
            arrays[name.removeprefix(FIXTURE_PREFIX)] = array.astype(np.float32, copy=False)
    return arrays


def _require_float(path: Path, name: str, dtype: str) -> None:
    if dtype not in FLOATS:
        raise ValueError(f"{path}: {name} has dtype {dtype}; store it as float32")


def _check_shapes(path, params: Mapping, arch: ArchConfig, size: SizeConfig) -> None:
    # weights do not depend on which token opens a document, so the caller need not say
    model = GPT(arch, chz.replace(size, eot_token=size.eot_token or 0))
    expected = {
        name: leaf.shape for name, leaf in by_path(jax.eval_shape(lambda: init_params(model, 0)))
    }
    found = {name: leaf.shape for name, leaf in by_path(params)}
    for name in [*expected, *found]:
        if found.get(name) == expected.get(name):
            continue
        here, there = (
            f"shape {side[name]}" if name in side else "absent" for side in (found, expected)
        )
        raise ValueError(
            f"{path}: {name} (published as {published_name(name, arch)}): {here} in the file, "
            f"{there} in the model; check arch and size"
        )
