"""The ladder: every rung is a diff over the rung before it, in the words of the command line.

`change` is what the rung is named for and the first key of `diff`; the other keys are its riders,
changes that came along with it in the published code. Riders are kept, so that each rung is
numerically the published model, and stand in the open, so that they can be undone one at a time.
Source: the released code of arXiv 2605.05683 as recorded in the ladder spec, sections 1 to 5.

    python -m models.ladder                      the table
    python -m models.ladder rung=muon [tier=d24] every key of one rung and the layer that set it
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import chz

from models.command_line import Layer, UsageError, cast_words, parse_words, run_command
from models.config import TIERS


class Rung(NamedTuple):
    """One step of the ladder; `diff` maps dotted configuration keys to new values."""

    name: str
    change: str
    diff: Mapping[str, Any]


LADDER = (
    # Published defects kept: target 3.2 here and in rope, 3.3 from muon on; everything decays.
    # The published attention holds q, k and v in one matrix; three matrices compute the same.
    Rung("baseline", "tied GPT, learned positions, ReLU squared, AdamW, cosine", {}),
    Rung(
        "rope",
        "rotary positions",
        {
            "arch.position": "rope",
            "arch.rope_table": "bfloat16",
            "arch.qk_norm": True,
            "arch.proj_bias": True,
            "arch.init": "gpt2",
            "arch.zero_proj": False,
            "optim.embed_lr": 6e-4,
            "optim.head_lr": 6e-4,
            "optim.matrix_lr": 6e-4,
            "optim.scalar_lr": 6e-4,
            "optim.weight_decay": 0.0,
            "optim.decay": "matrices",
            "optim.clip": 1.0,
            "optim.num_steps": 50_000,
        },
    ),
    # The Muon rate was tuned for updates sqrt(max(out, in)) larger than these and is kept as run:
    # the step is 28 times (55 times for mlp.c_proj) smaller than in the record it imitates.
    Rung(
        "muon",
        "Muon on the matrices of the blocks",
        {
            "optim.matrices": "muon",
            "optim.embed_lr": 0.0036,
            "optim.matrix_lr": 0.00036,
            "arch.rope_sign": 1,
            "arch.rope_table": "compute",
            "arch.proj_bias": False,
            "arch.init": "torch",
            "arch.zero_proj": True,
            "optim.schedule": "trapezoid",
            "published_target": 3.3,
        },
    ),
    Rung(
        "untied",
        "an output head of its own",
        {
            "arch.head": "untied",
            "arch.zero_head": True,
            "arch.embed_norm": True,
            "optim.embed_lr": 0.3,
            "optim.head_lr": 0.002,
            "optim.matrix_lr": 0.02,
            "optim.num_steps": 30_000,
        },
    ),
)
RUNGS = tuple(rung.name for rung in LADDER)

# The published rungs that are not built yet, so that a request for one is answered plainly.
PLANNED = (
    *("valuemix", "unet", "fixedwin", "flexwin", "vte", "betterwin", "sparsev", "truncrope"),
    *("softcap", "fp8head", "lswa", "attnscale", "lswa_adam"),
)


def rung_layers(name: str) -> list[Layer]:
    """The diffs from the bottom of the ladder up to a rung; raises UsageError for no rung."""
    if name not in RUNGS:
        built = "is not built yet" if name in PLANNED else "is no rung of the ladder"
        raise UsageError(f"rung={name} {built}; choose one of {', '.join(RUNGS)}")
    return [Layer(f"rung={rung.name}", rung.diff) for rung in LADDER[: RUNGS.index(name) + 1]]


def rung_values(name: str) -> dict[str, Any]:
    """All keys a rung sets, its own diff laid over those of every rung below it."""
    values: dict[str, Any] = {}
    for layer in rung_layers(name):
        values |= layer.values
    return values


@chz.chz
class LadderWords:
    """The keys of the command."""

    rung: str = "all"
    tier: Literal[tuple(TIERS)] = "d12"


def main(argv: list[str]) -> int:
    """The command; returns its exit code. Raises UsageError on bad words."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    words = LadderWords(**cast_words(LadderWords, parse_words(argv)))
    if words.rung == "all" and any(word.startswith("tier=") for word in argv):
        raise UsageError(f"tier={words.tier} needs a rung; add for example rung={RUNGS[-1]}")
    from models.ladder_table import print_ladder, print_rung

    if words.rung == "all":
        print_ladder()
    else:
        print_rung(words.rung, words.tier)
    return 0


if __name__ == "__main__":
    run_command(main)
