"""Do two samples of text have one spectrum? Token counts of windows, without any model.

    python -m experiments.window_counts a='fineweb10B/*.bin' b='fineweb100B/*.bin' out=FOLDER
    python -m experiments.window_counts a=corpus b='openmix/*.bin' out=FOLDER vocab=50304

The feature of a window is how often each token occurs in it; the spectrum is that of the covariance
of these vectors over N windows, by the N x N Gram matrix of centred counts. The two samples are
compared by the Jensen-Shannon divergence of their spectra, and against chance: 2 N windows of `a`
are split at random into halves, which differ by sampling alone.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import chz
import numpy as np

from lens_jax.fits import jsd
from lens_jax.records import write_step
from models.command_line import UsageError, check_path, read_command, run_command

KIND = "window_count_eigenvalues"
DIVERGENCE, NULL = "window_count_jsd/a_b", "window_count_jsd_null/a"
BLOCK = 4096  # tokens of the vocabulary whose counts are held at a time


@chz.chz
class WindowConfig:
    """The keys of the command."""

    a: str | None = chz.field(default=None, doc="first sample: corpus, or a glob of .bin shards")
    b: str | None = chz.field(default=None, doc="second sample")
    out: str | None = chz.field(default=None, doc="folder of the record; STUDY/window_counts")
    windows: int = chz.field(default=4096, doc="N, windows of each sample, drawn without overlap")
    window: int = chz.field(default=1024, doc="tokens in a window")
    resamples: int = chz.field(default=100, doc="random halves of 2 N windows of a")
    vocab: int = chz.field(default=50_304, doc="byte-pair vocabulary where a sample is the corpus")
    seed: int = chz.field(default=0, doc="of which windows are drawn, and of the halves")

    @chz.validate
    def _ranges(self):
        for key in ("a", "b", "out"):
            if getattr(self, key) is not None:
                check_path(key, getattr(self, key))
        for key, least in (("windows", 3), ("window", 1), ("resamples", 1), ("seed", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"{key}={getattr(self, key)}: give at least {least}")


class Comparison(NamedTuple):
    """Eigenvalues (N,) of both samples, descending, their JSD, and that of random halves of a."""

    a: np.ndarray
    b: np.ndarray
    divergence: float
    null: np.ndarray  # (resamples,)

    @property
    def p(self) -> float:
        return share_beyond(self.null, self.divergence)


def share_beyond(null: np.ndarray, observed: float) -> float:
    """Returns the share of random halves that differ at least as much, the observed counted in."""
    return float((1 + np.sum(null >= observed)) / (1 + null.size))


def gram_of_counts(windows: np.ndarray, vocab_size: int) -> np.ndarray:
    """Returns the inner products (N, N) of the count vectors of windows (N, T), float64, exact.

    Counts are small whole numbers, so every product and sum is exact.
    """
    rows = np.repeat(np.arange(len(windows)), windows.shape[1])
    tokens = windows.ravel().astype(np.int64)
    gram = np.zeros((len(windows),) * 2)
    for first in range(0, vocab_size, BLOCK):
        inside = (tokens >= first) & (tokens < first + BLOCK)
        counts = np.zeros((len(windows), BLOCK))
        np.add.at(counts, (rows[inside], tokens[inside] - first), 1.0)
        gram += counts @ counts.T
    return gram


def spectrum(gram: np.ndarray) -> np.ndarray:
    """Returns the eigenvalues (N,) of the covariance, from inner products that are not centred."""
    n = len(gram)
    mean = gram.mean(axis=0)
    centred = gram - mean[None, :] - mean[:, None] + mean.mean()
    return np.maximum(np.linalg.eigvalsh(centred)[::-1], 0.0) / (n - 1)


def compare(
    a: np.ndarray,
    b: np.ndarray,
    vocab_size: int,
    resamples: int,
    seed: int,
    tell: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Compares windows (2 N, T) of one sample, of which the first N are taken, with (N, T) of b."""
    n = len(b)
    if len(a) != 2 * n:
        raise ValueError(f"{len(a)} windows of a and {n} of b: give twice as many of a")
    gram = gram_of_counts(a, vocab_size)
    first, other = spectrum(gram[:n, :n]), spectrum(gram_of_counts(b, vocab_size))
    rng, null = np.random.default_rng([seed, 1]), []
    for done in range(resamples):
        order = rng.permutation(2 * n)
        halves = (order[:n], order[n:])
        null.append(jsd(*(spectrum(gram[np.ix_(half, half)]) for half in halves)))
        if (done + 1) % 10 == 0:
            tell(f"{done + 1} of {resamples} random halves")
    return Comparison(first, other, jsd(first, other), np.array(null))


def draw_windows(source: str, count: int, config: WindowConfig, stream: int):
    """Returns (windows (count, T), vocabulary size, name) of the training text of a source.

    Raises UsageError where the text is too short for so many windows.
    """
    from experiments.config import DataConfig
    from experiments.data import TrainWindows, resolve_source

    files = resolve_source(DataConfig(source=source, corpus_vocab=config.vocab))
    windows = TrainWindows(files, row=config.window)
    if len(windows) < count:
        raise UsageError(
            f"data {files.name} has {len(windows)} windows of {config.window} tokens, {count} are "
            f"needed; give fewer windows=, or a shorter window="
        )
    chosen = np.random.default_rng([config.seed, 0, stream]).permutation(len(windows))[:count]
    tokens = np.stack([windows[int(i)][: config.window] for i in np.sort(chosen)])
    return tokens[np.random.default_rng([config.seed, 2, stream]).permutation(count)], files


def sample_names(config: WindowConfig, data: tuple[str, str]) -> tuple[str, str]:
    """What the samples are called: their data, or their files where both are of the same data."""
    if data[0] != data[1]:
        return data
    return Path(config.a).stem, Path(config.b).stem


def main(argv: list[str]) -> int:
    """The command; returns its exit code. Raises UsageError on bad words."""
    config = read_command(WindowConfig, __doc__, argv, ("a", "b", "out"), "give a=, b= and out=")
    if config is None:
        return 0
    first, files = draw_windows(config.a, 2 * config.windows, config, 0)
    other, other_files = draw_windows(config.b, config.windows, config, 1)
    if files.vocab_size != other_files.vocab_size:
        raise UsageError(
            f"a has a vocabulary of {files.vocab_size} and b one of {other_files.vocab_size}; "
            f"encode both with one tokenizer"
        )
    found = compare(first, other, files.vocab_size, config.resamples, config.seed, print)
    arrays = {f"{KIND}/a": found.a, f"{KIND}/b": found.b, NULL: found.null}
    arrays[DIVERGENCE] = np.float64(found.divergence)
    names = sample_names(config, (files.name, other_files.name))
    meta = {
        "tokens": 0,
        "a": names[0],
        "b": names[1],
        "windows": config.windows,
        "window": config.window,
        "vocab_size": files.vocab_size,
        "seed": config.seed,
    }
    path = write_step(Path(config.out), 0, arrays, meta)
    print(
        f"JSD {found.divergence:.3g} between {names[0]} and {names[1]}, "
        f"{np.median(found.null):.3g} between random halves of the first, p = {found.p:.2g}: {path}"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
