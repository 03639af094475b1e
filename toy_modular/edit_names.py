"""Names of the numbers that the edits of a band give; readable without importing jax."""

from itertools import product

LABELS = ("current", "next")
SPANS = ("modes", "components")
WHO = ("key", "control", "random")


def _names() -> tuple[str, ...]:
    names = ["base_loss", "positions", *(f"{label}_mode" for label in LABELS)]
    for label, span in product(LABELS, SPANS):
        start = f"{label}_{span}"
        names += [f"{start}_dimension"]
        names += [f"{start}_{who}_{what}" for who in WHO for what in ("variance", "keep", "drop")]
        names += advantage_names(start)
        names += [f"{name}_diluted" for name in advantage_names(start)]
    names += [f"embedding_{who}_mode" for who in WHO[:2]]
    names += [f"embedding_{who}_{what}" for who in WHO[:2] for what in ("energy", "keep", "drop")]
    return tuple(names + advantage_names("embedding"))


def advantage_names(start: str) -> list[str]:
    """Names of what an edit of the key mode costs more than that of its control."""
    return [f"{start}_{action}_advantage" for action in ("keep", "drop")]


EDIT_NAMES = _names()
"""What the numbers of a stored array of kind `edits` are, in order (`edits.edit_array`)."""
