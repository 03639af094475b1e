"""One operation on all pairs of residues modulo p: the task on which grokking was found.

An input is the three tokens a, b, '=', and the answer is predicted at '=' alone, as in Nanda et al.
(arXiv 2301.05217). Power et al. (arXiv 2201.02177) write the operation as a fourth token, a op b =;
within one data set that token never varies, so it is left out. Numbers are tokens 0..p-1 and '=' is
token p. All p^2 pairs are used, those with a zero too.
"""

from typing import NamedTuple

import numpy as np

from toy_modular.config import GrokConfig

SEED_OFFSET = 202

OPERATIONS = {"add": np.add, "subtract": np.subtract, "multiply": np.multiply}


class Pairs(NamedTuple):
    """tokens: int32 (N, 3), a, b and '='; answers: int32 (N,), in 0..p-1."""

    tokens: np.ndarray
    answers: np.ndarray


class Splits(NamedTuple):
    """A partition of all pairs."""

    train: Pairs
    val: Pairs


def all_pairs(config: GrokConfig) -> Pairs:
    """Every pair once, ordered by a, then b."""
    a, b = np.divmod(np.arange(config.p**2), config.p)
    answers = OPERATIONS[config.operation](a, b) % config.p
    tokens = np.stack([a, b, np.full_like(a, config.p)], axis=1)
    return Pairs(tokens.astype(np.int32), answers.astype(np.int32))


def make_splits(config: GrokConfig, seed: int) -> Splits:
    """Splits the pairs in an order shuffled by the seed: the first config.train, and the rest.

    The order depends on p and the seed alone: with a larger train_fraction the training pairs are
    the same and more, and every operation has the same pairs held out.
    """
    order = np.random.default_rng(seed + SEED_OFFSET).permutation(config.p**2)
    tokens, answers = all_pairs(config)
    parts = np.split(order, [config.train])
    return Splits(*(Pairs(tokens[part], answers[part]) for part in parts))
