"""Settings of the two tasks that are not walks, readable without importing jax.

Each is a set of dotted keys of `run_config.RunConfig`, over `stages.BASE`.
"""

from toy_modular.stages import BASE


def _all_betas(b2: float) -> dict:
    return {f"optim.{group}_betas": (0.9, b2) for group in ("embed", "head", "matrix", "scalar")}


_GROK = BASE | {
    "task": "grok",
    "stage": "grok",
    "size.n_layer": 1,
    "size.n_head": 4,
    "size.mlp_ratio": 4,
    "arch.head": "untied",
    "arch.zero_proj": False,
    "embed_std": 0.1,
    "optim.weight_decay": 1.0,
    "batch": None,
    "target_loss": None,
    "measure.per_doubling": 8,
    "measure.rows": 1024,
    "measure.levels": (4.0, 3.0, 2.0, 1.0, 0.5, 0.2),
}

GROK = _GROK | _all_betas(0.95) | {
    "grok.p": 97,
    "grok.train_fraction": 0.3,
    "size.n_embd": 64,
    "lr": 2e-3,
    "max_steps": 6000,
    "eval_every": 10,
    "eval_rows": 2048,
    "target_accuracy": 0.999,
}  # fmt: skip
"""Grokking in under four minutes on one core.

Train accuracy is 1 at step 100, validation accuracy 0.99 at step 1740 (seed 0) and 1600 (seed 1).
"""

GROK_PUBLISHED = _GROK | _all_betas(0.98) | {
    "grok.p": 113,
    "grok.train_fraction": 0.3,
    "size.n_embd": 128,
    "lr": 1e-3,
    "max_steps": 40_000,
    "eval_every": 100,
    "eval_rows": 8939,
    "target_accuracy": None,
}  # fmt: skip
"""The setting of arXiv 2301.05217: full batch, rate 1e-3, decay 1, 30% of the pairs.

Ours has RMS norms and squared ReLU where theirs has neither norms nor squares, and no warm-up.
"""

RFF_PUBLISHED = BASE | {
    "task": "rff",
    "stage": "rff",
    "arch.zero_proj": False,
    "batch": 128,
    "lr": 3e-4,
    "max_steps": 1000,
    "eval_every": 10,
    "target_loss": None,
}
"""The published setting of the random features, 1,000 steps of 128 sequences."""

RFF = RFF_PUBLISHED | {
    "rff.train": 8192,
    "rff.val": 1024,
    "rff.test": 1024,
    "max_steps": 500,
}
"""The same law with fewer sequences and half the steps: a minute or two on two cores."""
