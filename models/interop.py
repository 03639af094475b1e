"""Published PyTorch parameter names and layouts, to our tree and back (ladder spec section 3).

Published linear weights are (out, in), our kernels (in, out); tables, vectors and scalars have one
layout. The baseline's fused c_attn (3D, D) holds our c_q, c_k and c_v; a tied model may store the
tied matrix under both of its names, and a compiled one puts a prefix before every name.
"""

import re
from collections.abc import Iterator, Mapping

import numpy as np

from models.config import ArchConfig

COMPILED_PREFIX = "_orig_mod."
TIED, TIED_AS = "lm_head.weight", "transformer.wte.weight"
FUSED, PIECES = ".c_attn.weight", (".c_q.weight", ".c_k.weight", ".c_v.weight")

# Published name to our path; what ends in kernel is transposed.
OUTSIDE_BLOCKS = {
    "transformer.wte.weight": "wte/embedding",
    "transformer.wpe.weight": "wpe/embedding",
    "transformer.vte.weight": "value_embed/embedding",
    **{f"value_embeds.emb.{n}.weight": f"value_embed_{n}/embedding" for n in range(3)},
    "skip_weights": "skip_weights",
    "lm_head.weight": "lm_head/kernel",
}
# What follows transformer.h.i. there and h_i/ here.
INSIDE_BLOCKS = {
    "lambdas": "lambdas",
    "attn.lamb": "attn/lamb",
    "attn.mix": "attn/mix",
    **{f"attn.{name}.weight": f"attn/{name}/kernel" for name in ("c_q", "c_k", "c_v", "c_proj")},
    "attn.c_proj.bias": "attn/c_proj/bias",
    **{f"mlp.{name}.weight": f"mlp/{name}/kernel" for name in ("c_fc", "c_proj")},
}
OUTSIDE_BLOCKS_BACK = {ours: name for name, ours in OUTSIDE_BLOCKS.items()}
INSIDE_BLOCKS_BACK = {ours: name for name, ours in INSIDE_BLOCKS.items()}
PUBLISHED_BLOCK = re.compile(r"transformer\.h\.(0|[1-9][0-9]*)\.(.+)")
OUR_BLOCK = re.compile(r"h_(0|[1-9][0-9]*)/(.+)")


def from_published(arrays: Mapping[str, np.ndarray], arch: ArchConfig) -> dict:
    """Published name -> array as a nested parameter dict.

    Raises ValueError on a name that no rung has, on a c_attn that is no three matrices, and where
    two names of one parameter hold different numbers.
    """
    leaves: dict[str, np.ndarray] = {}
    stored_as: dict[str, str] = {}
    for stored, array in arrays.items():
        name = stored.removeprefix(COMPILED_PREFIX)
        if name == TIED and arch.head == "tied":
            name = TIED_AS
        for path, value in _to_ours(name, np.asarray(array)).items():
            first = stored_as.setdefault(path, stored)
            # a run that diverged holds NaN under both names
            if path in leaves and not np.array_equal(leaves[path], value, equal_nan=True):
                raise ValueError(
                    f"{stored}: differs from {first}, and with arch.head={arch.head} both are "
                    f"{path}; keep one, or set arch.head to what the file is"
                )
            leaves[path] = value
    return _nested(leaves)


def to_published(params: Mapping, arch: ArchConfig) -> dict[str, np.ndarray]:
    """Our nested parameter dict as published name -> array, the inverse of `from_published`.

    A tied matrix stands once, as transformer.wte.weight. Arrays may be views. Raises ValueError on
    a parameter that no rung has and on a part of what c_attn holds.
    """
    arrays = {}
    for path, leaf in by_path(params):
        array = np.asarray(leaf)
        arrays[_plain_name(path)] = array.T if path.endswith("/kernel") else array
    return _with_fused(arrays) if arch.position == "learned" else arrays


def published_name(path: str, arch: ArchConfig) -> str:
    """The published name of the array that holds our parameter; raises ValueError for no path."""
    name = _plain_name(path)
    if arch.position == "learned" and name.endswith(PIECES):
        return _home(name) + FUSED
    return name


def by_path(params: Mapping, home: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Paths such as h_3/attn/c_proj/kernel and leaves of a nested dict, in its own order."""
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from by_path(value, f"{home}{key}/")
        else:
            yield f"{home}{key}", value


def _to_ours(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    if name.endswith(FUSED):
        if array.ndim != 2 or len(array) % 3:
            raise ValueError(f"{name}: shape {array.shape}: give q, k and v as one (3D, D) matrix")
        pieces = zip(PIECES, np.split(array, 3), strict=True)
        return {_our_path(_home(name) + piece): part.T for piece, part in pieces}
    path = _our_path(name)
    return {path: array.T if path.endswith("/kernel") else array}


def _with_fused(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    arrays = dict(arrays)
    for home in dict.fromkeys(_home(name) for name in arrays if name.endswith(PIECES)):
        missing = [home + piece for piece in PIECES if home + piece not in arrays]
        if missing:
            raise ValueError(f"{missing[0]}: missing, and {home}{FUSED} is made of all three")
        arrays[home + FUSED] = np.concatenate([arrays.pop(home + piece) for piece in PIECES])
    return arrays


def _home(name: str) -> str:
    return name.rpartition(".c_")[0]


def _our_path(name: str) -> str:
    block = PUBLISHED_BLOCK.fullmatch(name)
    if block and block[2] in INSIDE_BLOCKS:
        return f"h_{block[1]}/{INSIDE_BLOCKS[block[2]]}"
    if name not in OUTSIDE_BLOCKS:
        raise ValueError(f"{name}: no parameter of the ladder has this published name")
    return OUTSIDE_BLOCKS[name]


def _plain_name(path: str) -> str:
    block = OUR_BLOCK.fullmatch(path)
    if block and block[2] in INSIDE_BLOCKS_BACK:
        return f"transformer.h.{block[1]}.{INSIDE_BLOCKS_BACK[block[2]]}"
    if path not in OUTSIDE_BLOCKS_BACK:
        raise ValueError(f"{path}: no parameter of the ladder has this path")
    return OUTSIDE_BLOCKS_BACK[path]


def _nested(leaves: Mapping[str, np.ndarray]) -> dict:
    params: dict = {}
    for path, leaf in leaves.items():
        branch = params
        *parents, last = path.split("/")
        for part in parents:
            branch = branch.setdefault(part, {})
        branch[last] = leaf
    return params
