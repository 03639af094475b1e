"""The stages of the toy as diffs, each over the one before it (toy spec section 2).

A stage is written in the words of the command line, like a rung of the large ladder. `CELLS` are
the factorial that takes `untied` apart: every way to set the four things it changes at once, on
top of `muon`.
"""

from collections.abc import Mapping
from itertools import product
from typing import Any

from models.command_line import UsageError
from models.rung import Rung
from toy_modular.run_config import TORCH_BETAS

BASE = {
    "size.n_layer": 2,
    "size.n_head": 4,
    "size.n_embd": 128,
    "size.mlp_ratio": 2,
    "size.block": 8,
    "size.short_row": 64,
    "size.long_row": 64,
    "arch.rope_sign": 1,
    "optim.embed_lr": 1.0,
    "optim.head_lr": 1.0,
    "optim.matrix_lr": 1.0,
    "optim.scalar_lr": 1.0,
    "optim.embed_betas": TORCH_BETAS,
    "optim.head_betas": TORCH_BETAS,
    "optim.matrix_betas": TORCH_BETAS,
    "optim.scalar_betas": TORCH_BETAS,
    "optim.weight_decay": 0.0,
    "optim.schedule": "trapezoid",
    "optim.warmdown": 0.0,
}
"""What all stages share: two layers, torch's initial weights and Adam, a constant rate."""

STAGES = (
    Rung("baseline", "tied head, learned positions, AdamW", {}),
    Rung(
        "rope", "rotary positions; rider: QK norm", {"arch.position": "rope", "arch.qk_norm": True}
    ),
    Rung(
        "muon",
        "Muon on the matrices of the blocks; rider: weight decay 0.01 on all others",
        {"optim.matrices": "muon", "optim.matrix_lr": 50.0, "optim.weight_decay": 0.01},
    ),
    Rung(
        "untied",
        "a head of its own; riders: it starts at 0, norm right after the embedding",
        {"arch.head": "untied", "arch.zero_head": True, "arch.embed_norm": True},
    ),
    Rung(
        "value_mix",
        "values of the first layer in all layers; riders: embedding skip, softcap 30",
        {"arch.value": "residual", "arch.x0_skip": True, "arch.softcap": 30.0},
    ),
    Rung("unet", "skips from encoder to decoder", {"arch.unet": True}),
    Rung(
        "fixed_window",
        "attention to the last 8 tokens",
        {"arch.window": "token", "arch.window_blocks": 1},
    ),
    Rung("attn_scale", "attention scores times 0.12", {"arch.attn_scale": 0.12}),
)

CORE = ("baseline", "rope", "muon", "untied")


def _cells() -> tuple[Rung, ...]:
    cells = []
    for head, std, norm, start in product(
        ("tied", "untied"), ("std1", "std.09"), ("nonorm", "norm"), ("zero", "random")
    ):
        if head == "tied" and start == "zero":
            continue  # a tied head cannot start at zero while the embedding does not
        diff = {
            "arch.head": head,
            "embed_std": 1.0 if std == "std1" else 0.09,
            "arch.embed_norm": norm == "norm",
            "arch.zero_head": start == "zero",
        }
        cells.append(Rung("-".join(("cell", head, std, norm, start)), "", diff, over="muon"))
    return tuple(cells)


CELLS = _cells()
"""3 heads (tied; untied from random; untied from 0) x 2 scales x norm or none: 12 cells."""

_BY_NAME = {rung.name: rung for rung in (*STAGES, *CELLS)}


def check_stages(names: tuple[str, ...]) -> None:
    """Raises UsageError for a name that is no stage."""
    for name in names:
        if name not in _BY_NAME:
            raise UsageError(
                f"stages={name}: no such stage; give some of {', '.join(r.name for r in STAGES)}, "
                f"or of the factorial, such as {CELLS[0].name}"
            )


def stage_values(name: str) -> Mapping[str, Any]:
    """All values of a stage: the base and every diff up to it."""
    check_stages((name,))
    chosen = _BY_NAME[name]
    top = chosen.over or name
    values = dict(BASE)
    for rung in STAGES:
        values |= rung.diff
        if rung.name == top:
            break
    return values | (chosen.diff if chosen.over else {}) | {"stage": name}
