"""A folder of the language study made up from planted exponents and costs, without training."""

import json
from functools import cache
from unittest.mock import patch

import numpy as np

from experiments.resolve import resolve, sized_by
from lens_jax.records import write_step
from models.command_line import flatten

RUNGS = ("baseline", "muon", "untied", "flexwin", "betterwin", "attnscale")
BATCHES = (4, 8, 16, 32)
ROW, WIDTH = 512, 48
TARGET = 4.5
SITES = tuple(f"h_{i}/resid_post" for i in (0, 3, 6, 9, 11))
MATRICES = ("attn/c_q", "attn/c_v", "attn/c_proj", "mlp/c_proj")
KERNELS = tuple(f"h_{i}/{matrix}/kernel" for i in (0, 3, 6, 9, 11) for matrix in MATRICES)
# Tokens to the target against the batch are not monotone, so that -log B does not order them.
COST = {1: 1.9, 2: 1.5, 4: 1.15, 8: 1.00, 16: 1.30, 32: 1.80}
RUNG_COST = {"baseline": 6.0, "muon": 3.0, "untied": 2.2, "flexwin": 1.8, "betterwin": 1.6}


def make_study(
    folder,
    *,
    rungs=RUNGS,
    tiers=("d12",),
    batches=BATCHES,
    seeds=(0,),
    seed_cells=(("flexwin", "d12", 16, (0, 1, 2)),),
    planted="efficiency",
    strength=1.0,
    noise=0.02,
    rng_seed=0,
    trials=(0.5, 2.0),
    censored=(),
    unfinished=(),
    diverged=(),
    kinds=("activation", "gradient", "weight"),
    sites=SITES,
    kernels=KERNELS,
    groups=4,
):
    """Writes a study of 4 batches a rung and returns its folder.

    planted: what orders alpha over batches, the token "efficiency", the "batch" (small is steep) or
    "nothing"; strength: difference of alpha from one end to the other, noise: sd of alpha on top.
    seed_cells: (rung, tier, batch, seeds) with more seeds. trials: other multipliers of every cell,
    which stopped early. censored, unfinished, diverged: names of runs as `name` gives them.
    """
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    cells = [(r, t, b) for r in rungs for t in tiers for b in batches]
    more = {(r, t, b): own for r, t, b, own in seed_cells}
    selected, config = {}, {}
    config = {
        "preset": "laptop",
        "target_loss": TARGET,
        "early_tokens": 2**16,
        "window": [90, 200],
        "rungs": list(rungs),
        "batches": list(batches),
        "seeds": list(seeds),
    }
    rng = np.random.default_rng(rng_seed)
    for rung, tier, batch in cells:
        selected[f"{rung}-{tier}-b{batch}"] = {"lr_scale": 1.0, "edge": False, "trials": []}
        for seed in more.get((rung, tier, batch), seeds):
            run = _Planted(rung, tier, batch, seed, 1.0, batches, planted, strength, noise, rng)
            run.shape(kinds, sites, kernels, groups)
            key = run.name
            run.write(folder, key in unfinished, key in censored, key in diverged)
        for scale in trials:
            run = _Planted(rung, tier, batch, 0, scale, batches, planted, strength, noise, rng)
            run.shape((), sites, kernels, groups)
            run.write(folder, paused=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "selected.json").write_text(json.dumps(selected))
    return folder


def name(rung, tier="d12", batch=8, seed=0, scale=1.0):
    """The folder name of a made-up run."""
    return f"{rung}-{tier}-b{batch}-s{seed}-x{scale:g}"


@cache
def _config(rung, tier, batch, seed, scale):
    words = {"profile": "laptop", "rung": rung, "tier": tier, "batch": str(batch)}
    words |= {"seed": str(seed), "optim.lr_scale": str(scale), "target_loss": str(TARGET)}
    words |= {"size.n_embd": str(WIDTH)} if tier == "d12" else {}
    return flatten(sized_by(resolve(words, "laptop")[0], 1024, 0))


class _Planted:
    def __init__(self, rung, tier, batch, seed, scale, batches, planted, strength, noise, rng):
        self.rung, self.tier, self.batch, self.seed, self.scale = rung, tier, batch, seed, scale
        self.name = name(rung, tier, batch, seed, scale)
        self.rng = rng
        wobble = 1 + 0.02 * rng.normal()
        self.step_tokens = batch * ROW
        self.tokens = 2e5 * RUNG_COST.get(rung, 1.4) * COST[batch] * wobble
        ordered = {
            "efficiency": sorted(batches, key=lambda b: -COST[b]),
            "batch": sorted(batches, reverse=True),
            "nothing": None,
        }[planted]
        place = 0.5 if ordered is None else ordered.index(batch) / max(1, len(batches) - 1)
        self.alpha = 1.2 + strength * (place - 0.5) + noise * rng.normal()

    def shape(self, kinds, sites, kernels, groups):
        self.kinds, self.sites, self.kernels, self.groups = kinds, sites, kernels, groups

    def loss(self, tokens):
        """Falls through the target at self.tokens."""
        return TARGET + 0.6 * np.log(self.tokens / np.maximum(tokens, 2.0**12))

    def write(self, folder, unfinished=False, censored=False, diverged=False, paused=False):
        place = folder / "runs" / self.name
        place.mkdir(parents=True, exist_ok=True)
        config = _config(self.rung, self.tier, self.batch, self.seed, self.scale)
        (place / "config.json").write_text(json.dumps(config))
        end = 2**16 if paused or diverged else self.tokens * (0.8 if censored else 1.0)
        last = int(np.ceil(end / self.step_tokens)) + (0 if paused or censored else 1)
        every = max(1, 2**13 // self.step_tokens)
        rows, measured = [], set()
        grid = {-(-n // self.step_tokens) for n in [0, *(2**k for k in range(14, 24))]}
        for step in range(0, last + 1):
            tokens = step * self.step_tokens
            if step % every == 0 or step == last:
                loss = float(self.loss(tokens))
                rows.append({"kind": "val", "step": step, "tokens": tokens, "loss": loss})
            if step in grid or step == last:
                measured.add(step)
            rows.append(
                {
                    "kind": "train",
                    "step": step,
                    "tokens": tokens + self.step_tokens,
                    "loss": float(self.loss(tokens) + 0.05 * self.rng.normal()),
                    "lr_matrix": 0.04,
                    "step_time_s": 0.5 + 0.1 * list(RUNG_COST).index("muon"),
                    "tokens_per_s": 4000.0 / RUNG_COST.get(self.rung, 1.4),
                    "window_blocks": 2.0,
                }
            )
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (place / "metrics.jsonl").write_text(text)
        with patch("os.fsync"):  # nobody needs these files after a power cut
            for step in sorted(measured):
                self._measure(place / "spectra", step)
        if diverged:
            report = {"kind": "training", "step": last, "tokens": last * self.step_tokens}
            (place / "nonfinite.json").write_text(json.dumps(report))
        elif not (unfinished or paused):
            result = {
                "reason": "budget" if censored else "target",
                "step": last,
                "tokens": last * self.step_tokens,
                "val_loss": float(self.loss(last * self.step_tokens)),
                "target_loss": TARGET,
                "unigram_entropy": 6.04,
                "tokens_per_s": 4000.0 / RUNG_COST.get(self.rung, 1.4),
            }
            (place / "result.json").write_text(json.dumps(result))

    def _measure(self, folder, step):
        tokens = step * self.step_tokens
        shift = 0.3 * np.log1p(tokens / 2**14)
        arrays = {}
        if "activation" in self.kinds:
            for site in self.sites:
                arrays |= self._spectra("act_cov_eigenvalues", site, WIDTH, self.alpha + shift)
                arrays[f"act_last_cov_eigenvalues/{site}"] = self._spectrum(WIDTH, self.alpha)
                arrays[f"act_mean_sq/{site}"] = np.float64(WIDTH * 0.2)
        for site in self.kernels:
            alpha = 0.5 + 0.1 * MATRICES.index(site.split("/", 1)[1].removesuffix("/kernel"))
            if "gradient" in self.kinds:
                # a zero head gives no gradient to what lies below it
                scale = 0.0 if step == 0 and self.rung not in ("baseline", "muon") else 1.0
                for kind in ("grad_singular_values", "grad_singular_values_centred"):
                    own = self._spectra(kind, site, 32, alpha)
                    arrays |= {key: scale * value for key, value in own.items()}
                arrays[f"grad_mean_sq/{site}"] = np.float64(scale)
            if "weight" in self.kinds:
                arrays[f"weight_singular_values/{site}"] = self._spectrum(WIDTH, 0.3 * alpha)
        meta = {
            "tokens": tokens,
            "val_loss": float(self.loss(tokens)),
            "window_tokens": 32,
            "gradient_samples": 32,
            "sample_tokens": 128,
            "act_tokens": 8192,
            "width": WIDTH,
            "probe_hash": "made up",
        }
        write_step(folder, step, arrays, meta)

    def _spectra(self, kind, site, size, alpha):
        spectrum = self._spectrum(size, alpha)
        cut = spectrum * (1 + 0.003 * self.rng.normal(size=(self.groups, size)))
        return {
            f"{kind}/{site}": spectrum,
            f"{kind}_left_out/{site}": -np.sort(-cut).astype(np.float32),
        }

    def _spectrum(self, size, alpha):
        ranks = np.arange(1, size + 1)
        return -np.sort(-(ranks**-alpha) * np.exp(0.002 * self.rng.normal(size=size)))
