"""One operation modulo p as a problem: the GPT of the ladder on three tokens, one answer each.

The answer is predicted at '=' alone, among the numbers and '=' itself: the loss is -log p(answer)
over all p + 1 tokens. The last block is worked out at '=' alone too, where all that anyone reads
of it is; with one layer that takes a third off the time of a step.
"""

import chz
import jax
import jax.numpy as jnp

from models.config import SizeConfig
from models.gpt import GPT, head_kernel, init_params, token_loss
from models.head import head_logits
from models.linear import dot
from optim.groups import make_optimizer
from optim.schedules import Horizon
from toy_modular.grok import make_splits
from toy_modular.language import start
from toy_modular.problem import Data, Problem
from toy_modular.run_config import RunConfig

LENGTH = 3  # a, b and '='


def make_model(config: RunConfig) -> GPT:
    """The model of a run, in float32, with p + 1 tokens and rows of three.

    Raises ValueError for a size.vocab_size that is set and not p + 1.
    """
    size, vocab = config.size, config.grok.vocab_size
    if size.vocab_size not in (None, vocab):
        raise ValueError(
            f"size.vocab_size={size.vocab_size} with grok.p={config.grok.p}: the task has {vocab} "
            f"tokens; leave size.vocab_size unset"
        )
    size = chz.replace(size, vocab_size=vocab, block=LENGTH, short_row=LENGTH, long_row=LENGTH)
    return GPT(config.arch, size)


def make_problem(config: RunConfig) -> Problem:
    """Model, loss and optimizer of a run; rows are {"tokens": (N, 3), "answers": (N,)}, int32.

    Taps are those at '=', (N, D): final_norm/last, and h_i/resid_post of every block.
    """
    model = make_model(config)
    shapes = jax.eval_shape(lambda: init_params(model, 0))
    blocks = range(config.size.n_layer)
    matrices = tuple(f"h_{i}/{part}/c_proj/kernel" for i in blocks for part in ("attn", "mlp"))
    heads = ("wte/embedding",) + (("lm_head/kernel",) if config.arch.head == "untied" else ())

    def loss(params, rows):
        logits, taps = answer_logits(model, params, rows["tokens"])
        return jnp.mean(token_loss(logits, rows["answers"])), taps

    def score(params, rows):
        logits, _ = answer_logits(model, params, rows["tokens"])
        right = jnp.argmax(logits, axis=-1) == rows["answers"]
        return {
            "loss": jnp.mean(token_loss(logits, rows["answers"])),
            "accuracy": jnp.mean(right.astype(jnp.float32)),
        }

    return Problem(
        init=lambda key: start(model, config.embed_std, key),
        loss=loss,
        score=score,
        tx=make_optimizer(config.optim, Horizon(config.max_steps), shapes),
        activations=("final_norm/last", *(f"h_{i}/resid_post" for i in blocks)),
        gradients=heads + matrices,
        weights=heads + matrices,
        score_train=True,
    )


def answer_logits(model: GPT, params, tokens) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits at '=' of tokens (B, 3), (B, p + 1), and the taps there, (B, D) each."""
    linear = _at_last_position(model.size)
    _, taps = model.apply({"params": params}, tokens, linear)
    taps = {
        "final_norm/last": taps["final_norm"][:, -1],
        **{name: tap[:, -1] for name, tap in taps.items() if name.endswith("/resid_post")},
    }
    h = taps["final_norm/last"][:, None]  # (B, 1, D)
    kernel = head_kernel(params, model.arch)
    logits = head_logits(h, kernel, softcap=model.arch.softcap, dtype=model.dtype)
    return logits[:, 0], taps


def _at_last_position(size: SizeConfig):
    """`models.gpt.dot`, with zeros before the last position where the last block writes to it."""
    parts = ("attn/c_q", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")
    last = {f"h_{size.n_layer - 1}/{part}/kernel" for part in parts}

    def linear(x, kernel, path):
        if path not in last:
            return dot(x, kernel, path)
        y = dot(x[:, -1:], kernel, path)  # (B, 1, out)
        return jnp.pad(y, ((0, 0), (x.shape[1] - 1, 0), (0, 0)))

    return linear


def load_data(config: RunConfig) -> Data:
    """The pairs of a seed: those trained on, and all others to validate."""
    splits = make_splits(config.grok, config.seed)
    return Data(*({"tokens": pairs.tokens, "answers": pairs.answers} for pairs in splits))
