"""Random tokens that are cut into documents as long as real ones."""

import math

import numpy as np

# Documents of the training text, in tokens, and the mask block that they are told against: their
# lengths are log-normal.
MEDIAN, MEAN, PUBLISHED_BLOCK = 403, 690, 128


def random_documents(
    random: np.random.Generator, shape: tuple[int, int], vocab: int, eot_token: int, block: int
) -> np.ndarray:
    """Tokens (B, T) int32 of a stream in which every document opens with eot_token.

    Lengths are log-normal and shrink with the mask block (tokens), so that a row has about as many
    documents a block in every profile; the stream begins inside a document.
    """
    total = shape[0] * shape[1]
    median, sigma = MEDIAN * block / PUBLISHED_BLOCK, math.sqrt(2 * math.log(MEAN / MEDIAN))
    lengths = np.ceil(random.lognormal(math.log(median), sigma, size=total)).astype(np.int64)
    starts = np.cumsum(lengths)
    tokens = random.integers(vocab - 1, size=total, dtype=np.int32)
    tokens += tokens >= eot_token  # every word but that one
    tokens[starts[starts < total]] = eot_token
    return tokens.reshape(shape)
