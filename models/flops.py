"""Arithmetic of a model per token, for MFU and for judging what attention wastes."""

import numpy as np

from models.config import ArchConfig, SizeConfig
from models.layers import layer_plan
from models.masks import document_ids, first_keys
from models.windows import layer_window


def mean_keys(
    arch: ArchConfig, size: SizeConfig, tokens, window: int | None, *, long_window: bool = True
) -> float:
    """Keys that a query of tokens (B, T) sees on average in a long or a short layer, exactly."""
    rows, length = tokens.shape
    documents = document_ids(tokens, size.eot_token) if arch.documents else None
    window = layer_window(arch, size, window, long_window)
    if window is not None:
        window = np.full((rows,), window, np.int32)
    first = first_keys((rows, length), documents, window, rule=arch.window, block=size.block)
    return float(np.mean(np.arange(length)[None, :] - np.asarray(first) + 1))


def flops_per_token(arch: ArchConfig, size: SizeConfig, tokens, window: int | None = None) -> float:
    """Forward and backward FLOP per token of the matrix products, attention by its exact mask.

    6 per weight of the blocks and the head, and 12 D per key that a query sees, in every layer with
    attention; keys are counted on tokens (B, T) at a window in tokens (None: no window).
    """
    keys = {
        long: mean_keys(arch, size, tokens, window, long_window=long)
        for long in ((True, False) if arch.long_short else (True,))
    }
    width = size.n_embd
    total = 6 * width * size.vocab_size
    for layer in layer_plan(arch, size.n_layer):
        total += 6 * 2 * width * size.mlp_width
        if layer.attention:
            total += 6 * 4 * width**2 + 12 * width * keys[layer.long_window]
    return total
