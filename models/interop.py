"""Published PyTorch parameter names and layouts, to our tree and back (ladder spec section 3).

Published linear weights are (out, in), ours (in, out); the baseline's fused c_attn (3D, D) holds
our c_q, c_k and c_v; tied models may store the tied matrix under both of its names.
"""

import re
from collections.abc import Mapping

import numpy as np

from models.config import ArchConfig

COMPILED_PREFIX = "_orig_mod."
TABLES = {"transformer.wte.weight": "wte", "transformer.wpe.weight": "wpe"}
BLOCK = re.compile(
    r"transformer\.h\.(\d+)\.(?:(attn)\.(c_attn|c_q|c_k|c_v|c_proj)|(mlp)\.(c_fc|c_proj))"
    r"\.(weight|bias)"
)
FUSED = ("c_q", "c_k", "c_v")


def from_published(arrays: Mapping[str, np.ndarray], arch: ArchConfig) -> dict:
    """Published name -> array as a nested parameter dict; raises ValueError on an unknown name."""
    params: dict = {}
    for name, array in arrays.items():
        name = name.removeprefix(COMPILED_PREFIX)
        if name == "lm_head.weight" and arch.head == "tied":
            continue  # the same array stands under transformer.wte.weight
        for path, value in _to_ours(name, np.asarray(array)).items():
            branch = params
            *parents, leaf = path.split("/")
            for part in parents:
                branch = branch.setdefault(part, {})
            branch[leaf] = value
    return params


def _to_ours(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    if name in TABLES:
        return {f"{TABLES[name]}/embedding": array}
    if name == "lm_head.weight":
        return {"lm_head/kernel": array.T}
    match = BLOCK.fullmatch(name)
    if match is None:
        raise ValueError(f"{name}: no parameter of the ladder has this published name")
    layer, part, matrix, kind = (group for group in match.groups() if group is not None)
    home = f"h_{layer}/{part}"
    if kind == "bias":
        return {f"{home}/{matrix}/bias": array}
    if matrix == "c_attn":
        pieces = zip(FUSED, np.split(array, 3), strict=True)
        return {f"{home}/{each}/kernel": piece.T for each, piece in pieces}
    return {f"{home}/{matrix}/kernel": array.T}


def to_published(params: Mapping, arch: ArchConfig) -> dict[str, np.ndarray]:
    """Our nested parameter dict as published name -> array, the inverse of `from_published`."""
    names = {ours: published for published, ours in TABLES.items()}
    arrays = {}
    for part, branch in params.items():
        if part in names:
            arrays[names[part]] = np.asarray(branch["embedding"])
        elif part == "lm_head":
            arrays["lm_head.weight"] = np.asarray(branch["kernel"]).T
        else:
            arrays |= _block_to_published(part.removeprefix("h_"), branch, arch)
    return arrays


def _block_to_published(layer: str, block: Mapping, arch: ArchConfig) -> dict[str, np.ndarray]:
    arrays = {}
    for part, matrices in block.items():
        home = f"transformer.h.{layer}.{part}"
        matrices = dict(matrices)
        if part == "attn" and arch.position == "learned":
            fused = [np.asarray(matrices.pop(each)["kernel"]).T for each in FUSED]
            arrays[f"{home}.c_attn.weight"] = np.concatenate(fused)
        for matrix, leaves in matrices.items():
            arrays[f"{home}.{matrix}.weight"] = np.asarray(leaves["kernel"]).T
            if "bias" in leaves:
                arrays[f"{home}.{matrix}.bias"] = np.asarray(leaves["bias"])
    return arrays
