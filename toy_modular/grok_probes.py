"""Features of the model of one operation modulo p: what features/ holds of a grokking run.

A probe looks at all p^2 pairs, trained on or not, in the order of `grok.all_pairs`:

    embedding/tokens    (p, D)      input embedding of the numbers
    unembedding/tokens  (p, D)      output head of the numbers, where it is a matrix of its own
    answer/last         (p, D)      mean h at '=' over the pairs of each answer
    answer/logits       (p, p + 1)  mean logits over the pairs of each answer
    loss/pairs          (p^2,)      loss of each pair
    excluded/pairs      (p^2,)      loss without what the logits know of the answer, see below

A circuit for the operation makes logits that depend on a and b through the answer alone, on whose
modes Nanda et al. (arXiv 2301.05217, section 5) base two measures of progress: the loss with
nothing but the key modes, which is in `answer/logits`, and the loss without them. The latter is
taken here without any mode of the answer, not only the key ones, so that nothing needs to be
chosen: from the logits of a pair goes their mean over all pairs of its answer, and the mean over
all pairs comes back. What is left has been learned pair by pair.
"""

from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from models.gpt import head_kernel, token_loss
from toy_modular.grok import all_pairs
from toy_modular.grokking import answer_logits, make_model
from toy_modular.run_config import RunConfig


@lru_cache(maxsize=4)
def make_features(config: RunConfig) -> Callable:
    """probe(params, last) -> arrays by kind and site, NumPy float32; `last` changes nothing."""
    model, (tokens, answers) = make_model(config), all_pairs(config.grok)
    p = config.grok.p

    @jax.jit
    def measure(params):
        logits, taps = answer_logits(model, params, tokens)
        by_answer = _mean_by(answers, p, logits)  # (p, p + 1)
        excluded = logits - by_answer[answers] + jnp.mean(logits, axis=0)[None, :]
        found = {
            "embedding/tokens": params["wte"]["embedding"][:p],
            "answer/last": _mean_by(answers, p, taps["final_norm/last"]),
            "answer/logits": by_answer,
            "loss/pairs": token_loss(logits, answers),
            "excluded/pairs": token_loss(excluded, answers),
        }
        if config.arch.head == "untied":
            found["unembedding/tokens"] = head_kernel(params, config.arch).T[:p]
        return found

    def probe(params, last: bool) -> dict[str, np.ndarray]:
        del last
        return jax.device_get(measure(params))

    return probe


def _mean_by(answers: np.ndarray, p: int, rows: jax.Array) -> jax.Array:
    """Mean of rows (p^2, K) by answer, (p, K); zero for an answer without a pair.

    Every answer of a group has p pairs, but of a product zero has 2 p - 1.
    """
    counts = np.maximum(np.bincount(answers, minlength=p), 1).astype(np.float32)
    return jax.ops.segment_sum(rows, answers, p) / counts[:, None]
