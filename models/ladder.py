"""The ladder: every rung is a diff over the rung before it, in the words of the command line.

`change` is what the rung is named for and the first key of `diff`; the other keys are its riders,
changes that came along with it in the published code. Riders are kept, so that each rung is
numerically the published model, and stand in the open, so that they can be undone one at a time.
Source: the released code of arXiv 2605.05683.

Of the defects of that code, those that are part of its numbers are kept and named at their rung.
Those that spoil a run are mended for all: step 0 is saved before the first update, validation has
the dtype of training, there is one window rule in all commands, the clip sees the gradient of all
devices, and no attention forms all pairs of a long row.

    python -m models.ladder [ladder=clean]        the table; clean: the ladder without riders
    python -m models.ladder rung=muon [tier=d24]  every key of one rung and the layer that set it

The diffs are printed at once. Numbers of parameters, for which every rung is traced at every tier,
take 20 s more on two idle cores, a minute on busy ones.
"""

from typing import Any, Literal

import chz

from models.clean_ladder import CLEAN_CONTROLS, CLEAN_LADDER
from models.command_line import Layer, UsageError, cast_words, parse_words, run_command
from models.config import TIERS
from models.rung import Rung

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
    # Published defect kept: the cap on logits comes here, not with the rung that is named for it.
    Rung(
        "valuemix",
        "values of the first layer in all layers",
        {
            "arch.value": "residual",
            "arch.x0_skip": True,
            "arch.softcap": 30.0,
            "optim.scalar_lr": 0.02,
            "optim.momentum_start": 0.85,
            "optim.momentum_steps": 500,
            "optim.warmdown": 0.03,
            "optim.num_steps": 50_000,
        },
    ),
    # The norm's epsilon is this rung's alone. Its published norm also left queries and keys in
    # float32 under bfloat16 compute; here they are rounded as in every rung.
    Rung(
        "unet",
        "skips from encoder to decoder",
        {
            "arch.unet": True,
            "arch.norm_eps": 1e-6,
            "optim.embed_lr": 0.6,
            "optim.head_lr": 0.008,
            "optim.matrix_lr": 0.04,
            "optim.scalar_lr": 0.04,
            "optim.warmdown": 0.1,
            "optim.num_steps": 20_000,
        },
    ),
    # The published window is 1,024 tokens whatever its option says: 8 blocks.
    Rung(
        "fixedwin",
        "a sliding window of 8 blocks",
        {
            "arch.window": "token",
            "arch.window_blocks": 8,
            "arch.row": "long",
            "arch.documents": True,
            "arch.norm_eps": 2.0**-23,
        },
    ),
    # Published at batch 32 with 10,000 steps and a ramp of 1,000: four times that at batch 8. The
    # target is 3.2 here and 3.3 in the next rung. Validation uses the window of its step, as
    # published; the loss at the widest window is logged beside it.
    Rung(
        "flexwin",
        "a window growing to 14 blocks",
        {
            "arch.window_ramp": "half_blocks",
            "arch.window_blocks": 14,
            "arch.window_steps": 4000,
            "optim.num_steps": 40_000,
            "published_target": 3.2,
        },
    ),
    # Published at batch 32 with 2,500 steps and a ramp of 750. Value embeddings train with wte.
    Rung(
        "vte",
        "value embeddings in every layer",
        {
            "arch.value": "embed",
            "arch.window_steps": 3000,
            "optim.num_steps": 10_000,
            "published_target": 3.3,
        },
    ),
    # The block mask cuts the far end of the token window, to half of it at 128 tokens: kept.
    Rung(
        "betterwin",
        "a window by blocks as well",
        {
            "arch.window": "token_block",
            "arch.value": "embed_mirrored",
            "arch.window_steps": 4000,
            "optim.num_steps": 20_000,
        },
    ),
    # Only embeddings and scalars get the lower beta, the head does not; layers without a value
    # embedding still multiply their values by mix[0]. Lengths jump for no reason of architecture.
    Rung(
        "sparsev",
        "three value embeddings, outer layers",
        {
            "arch.value": "embed_outer",
            "arch.value_mix": "pair",
            "arch.drop_attention": True,
            "arch.window": "block",
            "arch.window_ramp": "floor",
            "arch.window_steps": 2000,
            "optim.embed_betas": (0.8, 0.95),
            "optim.scalar_betas": (0.8, 0.95),
            "optim.momentum_steps": 300,
            "optim.num_steps": 3000,
        },
    ),
    Rung(
        "truncrope",
        "half-truncated rotary positions",
        {
            "arch.position": "half_rope",
            "arch.rope_table": "float32",
            "arch.rope_sign": -1,
            "arch.window_steps": 3000,
            "optim.num_steps": 10_000,
        },
    ),
    Rung("softcap", "logits capped at 15 instead of 30", {"arch.softcap": 15.0}),
    # Training and validation alike. The gradient's scale follows the tokens of a mean, since the
    # published 2^29 belongs to 65,536 of them.
    Rung("fp8head", "output head in float8", {"arch.head_dtype": "float8"}),
    Rung(
        "lswa",
        "long and short windows",
        {"arch.long_short": True, "arch.window_ramp": "ceil"},
    ),
    # Published at d12 only: with heads of 64, from d24 on, the default scale is 0.125.
    Rung("attnscale", "attention scores times 0.12", {"arch.attn_scale": 0.12}),
)
CONTROLS = (
    Rung(
        "lswa_adam",
        "control: Adam on the matrices",
        {
            "optim.matrices": "adam",
            "optim.matrix_lr": 0.004,
            "optim.momentum_start": None,
            "optim.momentum_steps": 0,
        },
        over="lswa",
    ),
)
DEFAULT_RUNG = "attnscale"  # the top of the published ladder; the control stands beside it
# controls last, so that a rung appended to a ladder is laid over the one that stands before it
LADDERS = {
    "published": (*LADDER, *CONTROLS),
    "clean": (*CLEAN_LADDER, *CLEAN_CONTROLS),
}
RUNGS = tuple(rung.name for rung in LADDERS["published"])
ALL_RUNGS = tuple(dict.fromkeys(rung.name for ladder in LADDERS.values() for rung in ladder))


def rungs_up_to(name: str, ladder: str = "published") -> list[Rung]:
    """The rungs whose diffs make up a rung, bottom first; raises UsageError for no rung."""
    rungs = LADDERS[ladder]
    names = [rung.name for rung in rungs]
    if name not in names:
        where = "of the ladder" if ladder == "published" else f"of ladder={ladder}"
        raise UsageError(f"rung={name} is no rung {where}; choose one of {', '.join(names)}")
    index = names.index(name)
    rung = rungs[index]
    if rung.over is None:
        below = rungs_up_to(names[index - 1], ladder) if index else []
    else:
        below = rungs_up_to(rung.over, ladder)
    return [*below, rung]


def rung_layers(name: str, ladder: str = "published") -> list[Layer]:
    """The diffs from the bottom of a ladder up to a rung; raises UsageError for no rung."""
    return [Layer(f"rung={rung.name}", rung.diff) for rung in rungs_up_to(name, ladder)]


def rung_values(name: str, ladder: str = "published") -> dict[str, Any]:
    """All keys a rung sets, its own diff laid over those of every rung below it."""
    values: dict[str, Any] = {}
    for layer in rung_layers(name, ladder):
        values |= layer.values
    return values


@chz.chz
class LadderWords:
    """The keys of the command."""

    rung: str = "all"
    ladder: Literal[tuple(LADDERS)] = "published"
    tier: Literal[tuple(TIERS)] = "d12"


def main(argv: list[str]) -> int:
    """The command; returns its exit code. Raises UsageError on bad words."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    words = LadderWords(**cast_words(LadderWords, parse_words(argv)))
    if words.rung == "all" and any(word.startswith("tier=") for word in argv):
        raise UsageError(f"tier={words.tier} needs a rung; add for example rung={DEFAULT_RUNG}")
    from models.ladder_table import print_ladder, print_rung

    if words.rung == "all":
        print_ladder(words.ladder)
    else:
        print_rung(words.rung, words.tier, words.ladder)
    return 0


if __name__ == "__main__":
    run_command(main)
