"""Optimizer settings as data, readable without importing jax.

Rates, betas and schedule lengths are the published ones (ladder spec 5.2 and 5.3); lengths are in
*reference steps*, steps of batch tier 8, and `reference_to_run_steps` turns them into steps of a
run.
"""

from typing import Literal

import chz

REFERENCE_BATCH = 8  # long rows per step of the batch tier in which published lengths are stated


def reference_to_run_steps(reference_steps: int, *, batch: int, time_scale: float = 1.0) -> int:
    """Convert a length in steps of batch tier 8 to steps of batch tier `batch`.

    Lengths are constant in tokens: `batch` long rows a step need 8 / batch times the steps, and
    `time_scale` shortens or stretches the whole run. 0 stays 0 (no warm-up), anything else is at
    least 1. Raises ValueError for a negative length or a factor that is not positive. Source:
    ladder spec 6 (500 momentum steps at batch 8 are 125 at batch 32).
    """
    if reference_steps < 0:
        raise ValueError(f"reference_steps={reference_steps}: give 0 or more steps")
    if not batch > 0:
        raise ValueError(f"batch={batch}: give at least 1 row a step")
    if not 0 < time_scale < float("inf"):
        raise ValueError(f"time_scale={time_scale}: give a positive finite factor")
    if reference_steps == 0:
        return 0
    return max(1, round(reference_steps * time_scale * REFERENCE_BATCH / batch))


@chz.chz
class OptimConfig:
    """What updates which parameters, how fast, and on which schedule."""

    matrices: Literal["adam", "muon"] = chz.field(
        default="adam", doc="rule for the 2-D weights inside the blocks"
    )
    embed_lr: float = chz.field(default=3e-4, doc="token, position and value embeddings, tied head")
    head_lr: float = chz.field(default=3e-4, doc="untied output head")
    matrix_lr: float = chz.field(default=3e-4, doc="2-D weights inside the blocks")
    scalar_lr: float = chz.field(default=3e-4, doc="biases, lambdas, skip weights")
    embed_betas: tuple[float, float] = chz.field(
        default=(0.9, 0.95), doc="Adam's two decay rates, of the embeddings"
    )
    head_betas: tuple[float, float] = chz.field(
        default=(0.9, 0.95), doc="the same of an untied head"
    )
    matrix_betas: tuple[float, float] = chz.field(
        default=(0.9, 0.95), doc="the same of the matrices, with optim.matrices=adam"
    )
    scalar_betas: tuple[float, float] = chz.field(
        default=(0.9, 0.95), doc="the same of biases, lambdas and skip weights"
    )
    lr_scale: float = chz.field(default=1.0, doc="one multiplier on every group's rate")
    eps: float = chz.field(default=1e-8, doc="Adam's epsilon, outside the root")
    weight_decay: float = chz.field(default=0.1, doc="decoupled, on the Adam groups only")
    decay: Literal["all", "matrices"] = chz.field(
        default="all", doc="which parameters decay: all, or those with two axes or more"
    )
    clip: float | None = chz.field(default=None, doc="global gradient norm bound over everything")
    schedule: Literal["cosine", "trapezoid"] = chz.field(
        default="cosine", doc="cosine to 0, or a plateau and a linear way down to 0"
    )
    warmdown: float = chz.field(default=0.1, doc="share of the schedule that goes down (trapezoid)")
    num_steps: int = chz.field(default=60_000, doc="schedule length in reference steps")
    momentum: float = chz.field(default=0.95, doc="Muon's momentum, after its warm-up")
    momentum_start: float | None = chz.field(default=None, doc="momentum at step 0; none: constant")
    momentum_steps: int = chz.field(default=0, doc="momentum warm-up in reference steps")
    ns_steps: int = chz.field(default=5, doc="Newton-Schulz iterations")
    ns_dtype: Literal["bfloat16", "float32"] = chz.field(
        default="bfloat16", doc="arithmetic of the Newton-Schulz iteration"
    )

    @chz.validate
    def _ranges(self):
        for name in ("embed_lr", "head_lr", "matrix_lr", "scalar_lr", "lr_scale", "eps"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"optim.{name}={value}: give a positive finite number")
        if not 0 <= self.warmdown <= 1:
            raise ValueError(f"optim.warmdown={self.warmdown}: give a share between 0 and 1")
        if self.num_steps < 1:
            raise ValueError(f"optim.num_steps={self.num_steps}: give at least 1 step")
        if self.momentum_steps < 0:
            raise ValueError(f"optim.momentum_steps={self.momentum_steps}: give 0 or more steps")
        if self.clip is not None and not 0 < self.clip < float("inf"):
            raise ValueError(f"optim.clip={self.clip}: give a positive finite norm, or none")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"optim.weight_decay={self.weight_decay}: give 0 or more")
        if self.ns_steps < 1:
            raise ValueError(f"optim.ns_steps={self.ns_steps}: give at least 1 iteration")
        for name in ("embed_betas", "head_betas", "matrix_betas", "scalar_betas"):
            if not all(0 <= beta < 1 for beta in getattr(self, name)):
                raise ValueError(f"optim.{name}={getattr(self, name)}: give two numbers in [0, 1)")
        start = self.momentum if self.momentum_start is None else self.momentum_start
        if not (0 <= self.momentum < 1 and 0 <= start < 1):
            raise ValueError(f"optim.momentum={self.momentum} from {start}: give numbers in [0, 1)")
