"""The clean ladder: the same fields, and no riders.

Every rung changes the one thing it is named for. Where that takes more than one key, a rule and its
learning rate for instance, the keys are a group declared in GROUPS. What the published ladder
changes on the way, QK norm or the skip from the embedding, is a step of its own here; and what it
changes back and forth stays as the first rung sets it: initial weights, norm epsilon, precision and
direction of RoPE, shape and length of the schedule, betas, momentum, clipping, target, and one rule
for windows, by blocks, growing in whole blocks rounded up. The published `betterwin` changes that
rule and mirrors the value embeddings; only the latter is left of it, as `mirrorvte`.
"""

from models.rung import Rung

GROUPS = {
    "the matrices' rule with its rate": ("optim.matrices", "optim.matrix_lr"),
    "a head of its own, its start and rate": ("arch.head", "arch.zero_head", "optim.head_lr"),
    "normed embedding with its rate": ("arch.embed_norm", "optim.embed_lr"),
    "long rows of many documents": ("arch.row", "arch.documents"),
    "a window and its size": ("arch.window", "arch.window_blocks"),
    "a growing window": ("arch.window_ramp", "arch.window_steps", "arch.window_blocks"),
}

CLEAN_LADDER = (
    Rung(
        "baseline",
        "tied GPT, learned positions, ReLU squared, Adam",
        {
            "arch.rope_table": "float32",
            "optim.embed_lr": 6e-4,
            "optim.head_lr": 6e-4,
            "optim.matrix_lr": 6e-4,
            "optim.scalar_lr": 0.04,
            "optim.weight_decay": 0.0,
            "optim.clip": 1.0,
            "optim.schedule": "trapezoid",
            "optim.num_steps": 20_000,
            "published_target": 3.3,
        },
    ),
    Rung("rope", "rotary positions", {"arch.position": "rope"}),
    Rung("qknorm", "RMS norm of queries and keys", {"arch.qk_norm": True}),
    Rung(
        "muon",
        "Muon on the matrices of the blocks",
        {"optim.matrices": "muon", "optim.matrix_lr": 0.04},
    ),
    Rung(
        "untied",
        "an output head of its own",
        {"arch.head": "untied", "arch.zero_head": True, "optim.head_lr": 0.008},
    ),
    Rung(
        "embednorm",
        "RMS norm after the embedding",
        {"arch.embed_norm": True, "optim.embed_lr": 0.6},
    ),
    Rung("valuemix", "values of the first layer in all layers", {"arch.value": "residual"}),
    Rung("x0skip", "the embedding in every block's input", {"arch.x0_skip": True}),
    Rung("unet", "skips from encoder to decoder", {"arch.unet": True}),
    Rung("longrow", "long rows, masked by document", {"arch.row": "long", "arch.documents": True}),
    Rung(
        "fixedwin",
        "a sliding window of 8 blocks",
        {"arch.window": "block", "arch.window_blocks": 8},
    ),
    Rung(
        "flexwin",
        "a window growing to 14 blocks",
        {"arch.window_ramp": "ceil", "arch.window_steps": 3000, "arch.window_blocks": 14},
    ),
    Rung("vte", "value embeddings in every layer", {"arch.value": "embed"}),
    Rung("mirrorvte", "value embeddings shared in mirror image", {"arch.value": "embed_mirrored"}),
    Rung("sparsev", "three value embeddings, outer layers", {"arch.value": "embed_outer"}),
    Rung("pairmix", "two weights for values and their embeddings", {"arch.value_mix": "pair"}),
    Rung("dropattn", "one layer without attention", {"arch.drop_attention": True}),
    Rung("truncrope", "half-truncated rotary positions", {"arch.position": "half_rope"}),
    Rung("softcap", "logits capped at 15", {"arch.softcap": 15.0}),
    Rung("fp8head", "output head in float8", {"arch.head_dtype": "float8"}),
    Rung("lswa", "long and short windows", {"arch.long_short": True}),
    Rung("attnscale", "attention scores times 0.12", {"arch.attn_scale": 0.12}),
)
CLEAN_CONTROLS = (
    Rung(
        "lswa_adam",
        "control: Adam on the matrices",
        {"optim.matrices": "adam", "optim.matrix_lr": 0.004},
        over="lswa",
    ),
)
