"""What each layer of a model has, as a pattern over the depth (ladder spec 3.2 to 3.4 and 10).

The first half of the layers is the encoder, the second the decoder.
"""

from typing import NamedTuple

from models.config import ArchConfig

LONG_SHORT = (True, False, False, False)  # the motif of long windows, repeated down the encoder
OUTER_TABLES = 3


class Layer(NamedTuple):
    """One layer. `skip_from` is the encoder layer whose output is added to the input, `value_from`
    the piece of the value embedding that is mixed into the values; None for neither."""

    attention: bool
    long_window: bool
    skip_from: int | None
    value_from: int | None


def layer_plan(arch: ArchConfig, n_layer: int) -> tuple[Layer, ...]:
    """The layers of a model, first to last."""
    dropped = min(n_layer - 1, n_layer // 2 + 1) if arch.drop_attention else None
    return tuple(
        Layer(
            attention=i != dropped,
            long_window=not arch.long_short or LONG_SHORT[_depth(i, n_layer) % len(LONG_SHORT)],
            skip_from=n_layer - 1 - i if arch.unet and i >= n_layer // 2 else None,
            value_from=_value_piece(arch, i, n_layer),
        )
        for i in range(n_layer)
    )


def num_value_pieces(arch: ArchConfig, n_layer: int) -> int:
    """Into how many (V, D) pieces the value embeddings fall."""
    counts = {"embed": n_layer, "embed_mirrored": n_layer // 2, "embed_outer": OUTER_TABLES}
    return counts.get(arch.value, 0)


def _depth(i: int, n_layer: int) -> int:
    """Distance from the nearer end, so that the decoder mirrors the encoder."""
    return min(i, n_layer - 1 - i)


def _value_piece(arch: ArchConfig, i: int, n_layer: int) -> int | None:
    if arch.value == "embed":
        return i
    if arch.value == "embed_mirrored":
        return _depth(i, n_layer)
    if arch.value == "embed_outer":
        # both ends count their tables from 0: 012...012, not mirrored
        end = min(max(round(n_layer / 4), OUTER_TABLES), n_layer // 2)
        if i < end:
            return i % OUTER_TABLES
        if i >= n_layer - end:
            return (i - (n_layer - end)) % OUTER_TABLES
    return None
