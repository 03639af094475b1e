"""The lens in a training step of your own, on flax.nnx: python examples/nnx_transformer.py [FOLDER]

Rows repeat themselves after 16 tokens; every 16 steps the passes that train on a batch measure it
too. 12 s on one core; fills FOLDER and prints alpha of the stream.
"""

import json
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx

from lens_jax.fits import fit_power_law
from lens_jax.jackknife import estimate
from lens_jax.lens import Lens, make_lens
from lens_jax.probes import spectra
from lens_jax.records import write_step
from lens_jax.show import draw_run
from lens_jax.step import measured_value_and_grad


# The model, which returns what is to be looked at beside its logits.
class Transformer(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.place = (nnx.Embed(64, 64, rngs=rngs) for _ in range(2))
        self.norms = nnx.List([nnx.RMSNorm(64, rngs=rngs) for _ in range(3)])
        self.attention = nnx.MultiHeadAttention(4, 64, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(64, 256, rngs=rngs), nnx.Linear(256, 64, rngs=rngs)

    def __call__(self, tokens):  # (B, T)
        x = self.embed(tokens) + self.place(np.arange(tokens.shape[1]))[None]  # (B, T, 64)
        mid = x + self.attention(self.norms[0](x), mask=nnx.make_causal_mask(tokens))
        out = mid + self.down(nnx.gelu(self.up(self.norms[1](mid))))
        return self.embed.attend(self.norms[2](out)), {"h_0/mid": mid, "h_0/out": out}


graph, params = nnx.split(Transformer(nnx.Rngs(0)))  # paths of a State end in /value


def loss_fn(params, tokens):
    logits, taps = nnx.merge(graph, params)(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(), taps


# The lens: made for all 128 rows of a batch.
lens = make_lens(windows=128, activations=["h_0/mid"], gradients=["up/kernel/value"])
tx = optax.adam(5e-3)


@partial(jax.jit, static_argnames="measure")  # two programs; the plain one has no trace of the lens
def train_step(params, opt_state, tokens, *, measure):
    look = measured_value_and_grad(loss_fn, lens if measure else Lens())
    loss, grads, summaries = look(params, tokens)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss, summaries


# Training.
folder, log = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/example_nnx"), []
opt_state, rng = tx.init(params), np.random.default_rng(0)
for i in range(65):
    tokens = np.tile(rng.zipf(1.2, (128, 16)) % 64, 2)  # (128, 32)
    measure = i % 16 == 0
    params, opt_state, loss, summaries = train_step(params, opt_state, tokens, measure=measure)
    log.append({"kind": "train", "tokens": i * tokens.size, "loss": float(loss)})
    if measure:
        arrays = spectra(summaries)
        write_step(folder / "spectra", i, arrays, {"tokens": i * tokens.size})
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
draw_run(folder)  # summary.png

# Alpha of the last measurement, with its error.
alpha, error = estimate(
    lambda spectrum: fit_power_law(spectrum, 1, 32).alpha,
    *(arrays, "h_0/mid", "act_cov_eigenvalues"),
)
print(f"h_0/mid: alpha {alpha:.3f} +- {error:.3f} (ranks 1-32)")
