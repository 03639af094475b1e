"""The lens on a convolutional network of flax.linen: python examples/convnet.py [FOLDER]

Stripes of five directions are told apart under noise; 256 images and their gradients are measured
before and after. 9 s on one core; prints RankMe of the last map, and a noise scale in images.
"""

import json
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax

from lens_jax.fits import gradient_noise_scale, rankme
from lens_jax.jackknife import estimate
from lens_jax.lens import Lens, ProbeBatch, make_lens
from lens_jax.probes import spectra
from lens_jax.records import write_step
from lens_jax.show import draw_run
from lens_jax.step import init_state, make_measure_step, make_train_step

# The data: noisy stripes in five directions.
rng = np.random.default_rng(0)


def draw(*rows):
    label, phase = rng.integers(5, size=(*rows, 1, 1)), rng.uniform(0, 2 * np.pi, (*rows, 1, 1))
    turned = np.exp(1j * np.pi / 5 * label) * (np.arange(16)[:, None] + 1j * np.arange(16))
    image = rng.normal(np.sin(turned.real + phase))
    return {"image": image[..., None], "label": label[..., 0, 0]}  # (*rows, 16, 16, 1), rows


# The model, which returns what is to be looked at beside its logits.
class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):  # (B, 16, 16, 1)
        fine = nn.relu(nn.Conv(16, (3, 3), strides=2, name="conv_0")(x))  # (B, 8, 8, 16)
        coarse = nn.relu(nn.Conv(32, (3, 3), strides=2, name="conv_1")(fine))  # (B, 4, 4, 32)
        x = nn.relu(nn.Dense(64, name="dense")(coarse.reshape(len(x), -1)))
        return nn.Dense(5, name="head")(x), {"conv_0/out": fine, "conv_1/out": coarse}


def loss_fn(params, batch):
    logits, taps = ConvNet().apply({"params": params}, batch["image"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), taps


# The lens: kernels of convolutions have gradients, and only matrices have weight spectra.
sites = {
    "activations": ["conv_0/out", "conv_1/out"],
    "gradients": ["conv_0/kernel", "conv_1/kernel"],
    "weights": ["dense/kernel"],
}
lens = make_lens(windows=256, **sites, normalise=False)
measure, probe_set = make_measure_step(loss_fn, lens), ProbeBatch(draw(256))

# Training, without a lens inside; any other training loop would do.
params, tx = ConvNet().init(jax.random.key(0), draw(1)["image"])["params"], optax.adam(1e-3)
state, step = init_state(params, tx), make_train_step(loss_fn, tx, Lens())
folder, log = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/example_convnet"), []
for i in range(65):
    if i in (0, 64):
        arrays = spectra(measure(state.params, probe_set)[0])
        write_step(folder / "spectra", i, arrays, {"tokens": 64 * i})
    state, metrics, _ = step(state, draw(1, 64), None, measure=False)
    log.append({"kind": "train", "tokens": 64 * i, "loss": float(metrics["loss"])})
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
draw_run(folder)  # summary.png

# Two statistics of the last measurement, each with its error.
rank, error = estimate(rankme, arrays, "conv_1/out", "act_cov_eigenvalues")
noise, spread = estimate(
    lambda centred, mean_sq: gradient_noise_scale(centred, mean_sq).b_simple,
    *(arrays, "conv_0/kernel", "grad_singular_values_centred", "grad_mean_sq"),
)
print(f"conv_1: RankMe {rank:.2f} +- {error:.2f}; conv_0: noise scale {noise:.0f} +- {spread:.0f}")
