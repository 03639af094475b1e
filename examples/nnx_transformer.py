"""The lens in a training step of your own, on flax.nnx: python examples/nnx_transformer.py [FOLDER]

Rows repeat themselves after 16 tokens; every 16 steps the passes that train on a batch measure it
too. 12 s on one core; fills FOLDER and prints alpha of the stream.
"""

import sys

import jax
import numpy as np
import optax
from flax import nnx

from lens_jax import fits, jackknife, lens, probes, records, show, step


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


def loss_fn(params, tokens):
    logits, taps = nnx.merge(graphdef, params)(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(), taps


@jax.jit(static_argnames="measure")  # two programs; the plain one has no trace of the lens
def train_step(params, opt_state, tokens, *, measure):
    look = step.measured_value_and_grad(loss_fn, watch if measure else lens.Lens())
    loss, grads, seen = look(params, tokens)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss, seen


graphdef, params = nnx.split(Transformer(nnx.Rngs(0)))  # paths of a State end in /value
watch = lens.make_lens(windows=128, activations=["h_0/mid"], gradients=["up/kernel/value"])
tx, folder = optax.adam(5e-3), (*sys.argv, "runs/example_nnx")[1]
opt_state, rng = tx.init(params), np.random.default_rng(0)
for i in range(65):
    tokens = np.tile(rng.zipf(1.2, (128, 16)) % 64, 2)
    params, opt_state, loss, seen = train_step(params, opt_state, tokens, measure=i % 16 == 0)
    if seen:
        arrays = probes.spectra(seen)
        records.write_step(f"{folder}/spectra", i, arrays, {"tokens": i * tokens.size})
show.draw_run(folder)
alpha, error = jackknife.estimate(
    lambda spectrum: fits.fit_power_law(spectrum, 1, 32).alpha,
    arrays, "h_0/mid", "act_cov_eigenvalues",
)  # fmt: skip
print(f"h_0/mid: alpha {alpha:.3f} +- {error:.3f} (ranks 1-32)")
