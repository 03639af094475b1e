"""Grids with a name: which runs each finding needs (protocol spec 2 and 2.1), as plain data.

`laptop` is a grid for one evening on two cores; the others have the published sizes and want GPUs.
A run belongs to its resolved configuration, so presets that share an out= share their runs.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from models.ladder import RUNGS


class Preset(NamedTuple):
    """study: keys of the study; run: words of every run; elsewhere: for a preset without runs, the
    command that makes what it stands for."""

    study: Mapping[str, Any]
    run: Mapping[str, str]
    elsewhere: str | None = None


LAPTOP_RUNGS = ("baseline", "muon", "untied", "flexwin", "betterwin", "attnscale")
TIERS_12, TIERS_36, TIERS_48 = (4, 8, 16, 32), (2, 4, 8, 16), (1, 2, 4, 8)
DEEP = {"rung_tokens": (40_000_000, 70_000_000, 100_000_000), "window": (200, 400)}
# One target for all rungs, 3.3: of the published ones (3.3, and 3.2 of baseline, rope and flexwin)
# the one that comes first, so that tokens to it compare (protocol spec 1.8 B7).
PAPER = {
    "profile": "paper",
    "target_loss": "3.3",
    "probes.first": str(2**23),
    "probes.linear_from": str(2**28),
}
SEEDS_16 = tuple(f"flexwin-d12-b16-s{seed}" for seed in (1, 2))
LSWA_ADAM = tuple(f"lswa_adam-d12-b{batch}-s0" for batch in (1, 2, 4, 8, 16, 32))
DEEP_FAMILIES = ("flexwin", "betterwin", "sparsev")

# One early token budget, one layer (the last) and one rank window are named here, before any run,
# and carry the primary test; everything else that figures show is exploration.
LAPTOP = {
    "rungs": LAPTOP_RUNGS,
    "batches": (2, 4, 8, 16),
    "more": ("flexwin-d12-b8-s1", "flexwin-d12-b8-s2"),
    "transfer": ("sqrt",),
    "factors": (0.5, 1.0, 2.0),
    "lr_base": ("baseline:4", "muon:0.7", "untied:0.7"),
    "rung_tokens": (2**16,),
    "beyond": 2,
    "early_tokens": 2**16,
    "match_tolerance": 0.04,
}
LAPTOP_RUN = {
    "profile": "laptop",
    "max_tokens": str(3 * 2**18),
    "target_loss": "4.3",
    # lengths in tokens a fiftieth of those of profile=laptop's own, so that windows open and
    # momentum warms up early in a run, as they do in the published ones
    "time_scale": "0.02",
    # no rate comes down before the target: when it does would depend on the budget (spec 1.8 B8)
    "anneal": "published",
    "val_every": str(2**13),
    "checkpoint_every": str(2**17),
    "keep_checkpoints": "1",
    "data.val_tokens": str(2**13),
    "probes.windows": "64",
    "probes.gradient_windows": "64",
    "probes.groups": "8",
    "probes.first": str(2**14),
    "probes.linear_from": str(2**16),
}


def _figure(rungs, batches, tier="d12", **more) -> Preset:
    return Preset({"rungs": tuple(rungs), "batches": batches, "tiers": (tier,), **more}, PAPER)


def _elsewhere(what: str, command: str) -> Preset:
    return Preset({}, {}, f"preset of {what}: no training runs belong to it; run {command}")


_TOY = "python -m toy_modular.study profile=paper"
_WINDOWS = "python -m experiments.window_counts"

PRESETS = {
    "laptop": Preset(LAPTOP, LAPTOP_RUN),
    "M0": _elsewhere("toy, weights, data and logs", f"{_TOY}, and {_WINDOWS}"),
    "M1": _figure(("flexwin", "betterwin", "lswa"), TIERS_12, more=SEEDS_16 + LSWA_ADAM),
    "M2": _figure(RUNGS, TIERS_12),
    "M3": _figure(DEEP_FAMILIES, TIERS_36, "d36", **DEEP),
    "fig1": _figure(("flexwin",), TIERS_36, "d36", **DEEP),
    "fig2": _figure(RUNGS, TIERS_12),
    "fig3": _figure(RUNGS, (8,), seeds=(0, 1, 2)),
    "fig4": _elsewhere("figure 4", _TOY),
    "fig5": _elsewhere("figure 5", _WINDOWS),
    "fig6": _figure(("betterwin",), (8,)),
    "fig7": _figure(("lswa",), TIERS_12, more=LSWA_ADAM),
    "fig8": _figure(RUNGS, TIERS_12),
    "fig9": _figure(("flexwin",), (16,), more=SEEDS_16),
    "fig10": _figure(DEEP_FAMILIES, TIERS_36, "d36", **DEEP),
    "fig11": _elsewhere("figure 11", f"{_TOY} batches=32,64,128,256,512 seeds=0,1,2"),
    "fig12": _figure(RUNGS, TIERS_12),
    "fig13": _figure(("baseline", "rope", "muon", "untied"), (8,)),
    "fig14": _figure(RUNGS[4:10], (8,)),
    "fig15": _figure(RUNGS[10:], (8,)),
    "fig16": _figure(
        DEEP_FAMILIES, (8,), "d36", more=("betterwin-d48-b8-s0", "flexwin-d12-b8-s0"), **DEEP
    ),
    "fig17": _figure(RUNGS, (8,)),
    "fig18": _figure(("muon", "flexwin", "betterwin", "lswa"), TIERS_12),
}
