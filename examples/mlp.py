"""The lens inside the training step of a plain JAX network: python examples/mlp.py [FOLDER]

Ten Gaussian clusters are told apart; at steps 0, 1, 2, 4, ..., 64 a fixed set of 1,024 rows too is
measured. 8 s on one core; prints RankMe of the last layer (23 at first) and noise scale (27 rows).
"""

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax

from lens_jax import fits, jackknife, lens, probes, records, show, step

FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/example_mlp")
SHAPES = {"h_0": (32, 64), "h_1": (64, 64), "head": (64, 10)}
rng = np.random.default_rng(0)
centres = rng.normal(0, 0.7, (10, 32))


def draw(*rows):
    y = rng.integers(10, size=rows)
    return {"x": rng.normal(centres[y]), "y": y}  # (*rows, 32), rows


def loss_fn(params, batch):
    first = jnp.tanh(batch["x"] @ params["h_0"]["kernel"])  # (B, 64)
    second = jnp.tanh(first @ params["h_1"]["kernel"])
    logits = second @ params["head"]["kernel"]  # (B, 10)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses.mean(), {"h_0/out": first, "h_1/out": second}


kernels = ("h_0/kernel", "h_1/kernel")
sites = {"activations": ("h_0/out", "h_1/out"), "gradients": kernels, "weights": kernels}
watch = lens.make_lens(windows=1024, samples=256, chunk=256, route="vmap_grad", **sites)
probe_set = lens.split_windows(draw(1024), samples=256, chunk=256)
starts = {name: rng.normal(0, shape[0] ** -0.5, shape) for name, shape in SHAPES.items()}
tx, log = optax.adam(1e-3), []
state = step.init_state({name: {"kernel": jnp.asarray(k)} for name, k in starts.items()}, tx)
train_step = step.make_train_step(loss_fn, tx, watch)
for i in range(65):
    measure, meta = i & (i - 1) == 0, {"tokens": 128 * i}  # at 0 and the powers of two
    state, metrics, seen = train_step(state, draw(1, 128), probe_set, measure=measure)
    log.append(json.dumps({"kind": "train", "loss": float(metrics["loss"]), **meta}) + "\n")
    if measure:
        arrays = probes.spectra(seen)
        records.write_step(FOLDER / "spectra", i, arrays, meta)
(FOLDER / "metrics.jsonl").write_text("".join(log))
show.draw_run(FOLDER)
rank, error = jackknife.estimate(fits.rankme, arrays, "h_1/out", "act_cov_eigenvalues")
kinds = ("grad_singular_values_centred", "grad_mean_sq")
noise, spread = jackknife.estimate(
    lambda *spectra: fits.gradient_noise_scale(*spectra).b_simple, arrays, "h_1/kernel", *kinds
)
print(f"h_1: RankMe {rank:.2f} +- {error:.2f}, noise scale {noise:.0f} +- {spread:.0f} rows")
