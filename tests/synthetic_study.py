"""A folder of the toy study made up from planted exponents and planted modes, without training."""

import json
from unittest.mock import patch

import numpy as np

from lens_jax.records import write_step
from toy_modular.banded import step_law
from toy_modular.config import BandedConfig

CORE = ("baseline", "rope", "muon", "untied")
CELLS = tuple(
    f"cell-{head}-{std}-{norm}-{start}"
    for head, start in (("tied", "random"), ("untied", "random"), ("untied", "zero"))
    for std in ("std1", "std.09")
    for norm in ("nonorm", "norm")
)
TARGET = 2.0
# Tokens to the target against the batch size are not monotone, so that -log B does not order them.
COST = {32: 1.30, 64: 1.00, 128: 1.15, 256: 1.60, 512: 2.40}
STAGE_COST = {"baseline": 9.0, "rope": 6.0, "muon": 3.0, "untied": 1.0}
STRENGTH = {"baseline": 0.02, "rope": 0.04, "muon": 0.10, "untied": 0.60}


def make_study(
    folder,
    *,
    stages=CORE,
    batches=tuple(COST),
    seeds=(0, 1, 2),
    width=64,
    bands=("23_4", "24_4"),
    groups=8,
    planted="efficiency",
    unfinished=(),
    censored=(),
    per_doubling=2,
):
    """Writes a study and returns its folder.

    planted: what orders alpha on the middle ranks from 20 % of a run on, the token "efficiency" or
    "batch" (small is steep) or "nothing"; deep ranks are always ordered by batch.
    unfinished, censored: names of runs without a result, and of runs that miss the target.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"task": "banded", "seeds": list(seeds)}))
    selected = {
        f"{stage}-b{batch}": {"lr": 6e-4, "trials": [], "edge": batch == min(batches)}
        for stage in stages
        for batch in batches
    }
    (folder / "selected.json").write_text(json.dumps(selected))
    for stage in stages:
        for batch in batches:
            for seed in seeds:
                name = f"{stage}-b{batch}-s{seed}"
                run = _Planted(stage, batch, seed, batches, planted, width, bands, groups)
                with patch("os.fsync"):  # nobody needs these files after a power cut
                    run.write(
                        folder / "runs" / name, name in unfinished, name in censored, per_doubling
                    )
    return folder


class _Planted:
    """One run; everything random comes from its own generator."""

    def __init__(self, stage, batch, seed, batches, planted, width, bands, groups):
        self.stage, self.batch, self.seed = stage, batch, seed
        self.batches, self.planted, self.width = batches, planted, width
        self.bands, self.groups = bands, groups
        self.rng = np.random.default_rng([*stage.encode(), batch, seed])
        wobble = 1 + 0.02 * self.rng.normal()
        self.tokens = 1e6 * STAGE_COST.get(stage, 2.0) * COST[batch] * wobble
        self.last = max(int(self.tokens / (batch * 64)), 8)

    def steepness(self):
        """Where this batch stands among the others, 0 to 1, in what orders alpha."""
        if self.planted == "nothing":
            return float(self.rng.random())
        key = {"efficiency": lambda b: -COST[b], "batch": lambda b: -b}[self.planted]
        order = sorted(self.batches, key=key)
        return order.index(self.batch) / max(len(order) - 1, 1)

    def write(self, folder, unfinished, censored, per_doubling):
        folder.mkdir(parents=True)
        config = {"stage": self.stage, "batch": self.batch, "seed": self.seed, "lr": 6e-4}
        config |= {"target_loss": TARGET, "max_steps": 40_000, "task": "banded"}
        (folder / "config.json").write_text(json.dumps(config))
        steep = self.steepness()
        steps = {0, self.last}
        steps |= {round(self.last / 2 ** (k / per_doubling)) for k in range(6 * per_doubling)}
        lines = []
        for step in sorted(steps):
            progress = step / self.last
            loss = self.loss(progress) + 0.3 * censored
            tokens = step * self.batch * 64
            for kind in ("train", "val"):
                row = {"kind": kind, "step": step, "tokens": tokens, "loss": loss}
                lines.append(json.dumps(row | ({"rows": 512} if kind == "val" else {})) + "\n")
            meta = {"tokens": tokens, "val_loss": loss, "act_tokens": 1024}
            write_step(folder / "spectra", step, self.spectra(progress, steep), meta)
            write_step(folder / "features", step, self.features(progress), meta)
        (folder / "metrics.jsonl").write_text("".join(lines))
        if not unfinished:
            tokens = self.last * self.batch * 64
            reached = None if censored else tokens
            crossing = None if censored else float(tokens)
            result = {"reason": "max_steps" if censored else "target", "step": self.last}
            result |= {"tokens": tokens, "val_loss": loss, "test_loss": loss, "seconds": 1.0}
            result |= {"tokens_to_target": reached, "crossing_tokens": crossing}
            (folder / "result.json").write_text(json.dumps(result))

    def loss(self, progress):
        """From the untrained loss to just below the target, on a grid that all runs share."""
        start = 6.93 if self.stage == "untied" else 12.0
        loss = TARGET + (start - TARGET) * (1 - progress) ** 2
        return round(loss - 0.005, 4)

    def spectra(self, progress, steep):
        """Power laws joined at rank 40 of 128: planted exponents on both sides, 2 % noise."""
        rank = np.arange(1, self.width + 1)
        knee = 40 * self.width / 128
        early = min(progress / 0.2, 1.0)
        stage = CORE.index(self.stage) if self.stage in CORE else 0
        middle = 1.0 + 0.8 * steep * early + 0.25 * stage * progress
        order = sorted(self.batches, reverse=True)
        deep = 2.0 + 2.0 * progress + 0.4 * order.index(self.batch)
        slope = np.where(rank <= knee, middle, deep)
        steps = np.diff(np.log(rank), prepend=0.0)
        clean = np.exp(-np.cumsum(slope * steps))
        noise = 0.02 + 0.4 * (1 - early) * (self.planted != "nothing")
        values = self._noisy(clean, noise)
        left_out = np.stack([self._noisy(values, 0.3 / self.groups) for _ in range(self.groups)])
        found = {}
        for site in ("final_norm/last", "final_norm/mean", "residual_proxy/last"):
            found[f"act_cov_eigenvalues/{site}"] = values
            found[f"act_cov_eigenvalues_left_out/{site}"] = left_out.astype(np.float32)
        return found

    def _noisy(self, values, scale):
        """A smooth disturbance of the exponent and a rough one of the values."""
        tilt = 0.15 * scale * self.rng.normal() * np.log(np.arange(1, values.size + 1))
        rough = 0.2 * scale * self.rng.normal(size=values.size)
        return np.sort(values * np.exp(tilt + rough))[::-1]

    def features(self, progress):
        found = {}
        for band in self.bands:
            c = int(band.partition("_")[0])
            law = step_law(c, BandedConfig())
            strength = planted_strength(self.stage) * min(1.0, 1.3 * progress)
            following = self.rng.normal(size=(c, self.width)) / np.sqrt(self.width)
            current = sum(p * np.roll(following, -d, axis=0) for d, p in enumerate(law))
            current -= current.mean(axis=0)
            wave = np.exp(2j * np.pi * planted_mode(c) * np.arange(c) / c)[:, None]
            wave = np.concatenate([wave.real, wave.imag], axis=1)  # (c, 2)
            trace = np.sum(current**2) / c
            current *= np.sqrt(1 - strength)
            current[:, :2] += wave * np.sqrt(strength * trace)
            following[:, 2:4] += wave * np.sqrt(0.3 * strength)
            found[f"current/{band}"], found[f"next/{band}"] = current, following
            found[f"embedding/{band}"] = self.rng.normal(size=(c, self.width))
            found[f"covariance/{band}"] = np.cov(following.T, bias=True)
            found[f"law/{band}"], found[f"loss/{band}"] = law, np.array(0.5)
        return {name: np.asarray(values, np.float32) for name, values in found.items()}


def planted_mode(c):
    """The mode that the stages learn, the one next to the Nyquist frequency for an odd c."""
    return c // 2


def planted_strength(stage):
    """Share of variance of a table that its planted mode holds at the end of a run."""
    if stage in STRENGTH:
        return STRENGTH[stage]
    _, head, std, _, start = stage.split("-")
    return 0.05 + 0.35 * (head == "untied") + 0.1 * (std != "std1") + 0.02 * (start == "zero")
