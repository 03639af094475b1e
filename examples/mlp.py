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

from lens_jax.fits import gradient_noise_scale, rankme
from lens_jax.jackknife import estimate
from lens_jax.lens import make_lens, split_windows
from lens_jax.probes import spectra
from lens_jax.records import write_step
from lens_jax.show import draw_run
from lens_jax.step import init_state, make_train_step

# The data: points around ten centres.
rng = np.random.default_rng(0)
centres = rng.normal(0, 0.7, (10, 32))


def draw(*rows):
    y = rng.integers(10, size=rows)
    return {"x": rng.normal(centres[y]), "y": y}  # (*rows, 32), rows


# The model, which returns what is to be looked at beside its loss.
SHAPES = {"h_0": (32, 64), "h_1": (64, 64), "head": (64, 10)}


def loss_fn(params, batch):
    first = jnp.tanh(batch["x"] @ params["h_0"]["kernel"])  # (B, 64)
    second = jnp.tanh(first @ params["h_1"]["kernel"])
    logits = second @ params["head"]["kernel"]  # (B, 10)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses.mean(), {"h_0/out": first, "h_1/out": second}


# The lens: 1,024 rows, of which the first 256 are gradient samples.
kernels = ["h_0/kernel", "h_1/kernel"]
rows = {"samples": 256, "chunk": 256}
sites = {"activations": ["h_0/out", "h_1/out"], "gradients": kernels, "weights": kernels}
lens = make_lens(windows=1024, **rows, **sites)
probe_set = split_windows(draw(1024), **rows)

# Training: the step measures where `measure` is true.
starts = {name: rng.normal(0, shape[0] ** -0.5, shape) for name, shape in SHAPES.items()}
params = {name: {"kernel": jnp.asarray(start)} for name, start in starts.items()}
tx = optax.adam(1e-3)
state, step = init_state(params, tx), make_train_step(loss_fn, tx, lens)
folder, log = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/example_mlp"), []
for i in range(65):
    measure = i & (i - 1) == 0  # at 0 and the powers of two
    state, metrics, summaries = step(state, draw(1, 128), probe_set, measure=measure)
    log.append({"kind": "train", "tokens": 128 * i, "loss": float(metrics["loss"])})
    if measure:
        arrays = spectra(summaries)
        write_step(folder / "spectra", i, arrays, {"tokens": 128 * i})
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
draw_run(folder)  # summary.png

# Two statistics of the last measurement, each with its error.
rank, error = estimate(rankme, arrays, "h_1/out", "act_cov_eigenvalues")
noise, spread = estimate(
    lambda centred, mean_sq: gradient_noise_scale(centred, mean_sq).b_simple,
    *(arrays, "h_1/kernel", "grad_singular_values_centred", "grad_mean_sq"),
)
print(f"h_1: RankMe {rank:.2f} +- {error:.2f}, noise scale {noise:.0f} +- {spread:.0f} rows")
