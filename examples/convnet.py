"""The lens on a convolutional network of flax.linen: python examples/convnet.py [FOLDER]

Stripes of five directions are told apart under noise; 256 images and their gradients are measured
before and after. 9 s on one core; prints RankMe of the last map, and a noise scale in images.
"""

import sys

import flax.linen as nn
import jax
import numpy as np
import optax

from lens_jax import fits, jackknife, lens, probes, records, show, step

rng, folder = np.random.default_rng(0), (*sys.argv, "runs/example_convnet")[1]


def draw(*rows):
    label, phase = rng.integers(5, size=(*rows, 1, 1)), rng.uniform(0, 2 * np.pi, (*rows, 1, 1))
    turned = np.exp(1j * np.pi / 5 * label) * (np.arange(16)[:, None] + 1j * np.arange(16))
    image = rng.normal(np.sin(turned.real + phase))
    return {"image": image[..., None], "label": label[..., 0, 0]}  # (*rows, 16, 16, 1), rows


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


what = dict(activations=("conv_0/out", "conv_1/out"), gradients=("conv_0/kernel", "conv_1/kernel"))
watch = lens.make_lens(windows=256, **what, weights=["dense/kernel"], normalise=False)
measure, probe_set = step.make_measure_step(loss_fn, watch), lens.ProbeBatch(draw(256))
tx, params = optax.adam(1e-3), ConvNet().init(jax.random.key(0), draw(1)["image"])["params"]
state = step.init_state(params, tx)
train_step = step.make_train_step(loss_fn, tx, lens.Lens())  # without a lens; any other would do
for i in range(65):
    if i in (0, 64):
        arrays = probes.spectra(measure(state.params, probe_set)[0])
        records.write_step(f"{folder}/spectra", i, arrays, {"tokens": 64 * i})
    state, _, _ = train_step(state, draw(1, 64), None, measure=False)
show.draw_run(folder)
rank, error = jackknife.estimate(fits.rankme, arrays, "conv_1/out", "act_cov_eigenvalues")
kinds = ("grad_singular_values_centred", "grad_mean_sq")
noise, spread = jackknife.estimate(
    lambda *spectra: fits.gradient_noise_scale(*spectra).b_simple, arrays, "conv_0/kernel", *kinds
)
print(f"conv_1: RankMe {rank:.2f} +- {error:.2f}; conv_0: noise scale {noise:.0f} +- {spread:.0f}")
