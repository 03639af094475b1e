"""Real runs of the training command at toy size, in processes of their own, and how to compare two.

Subprocesses share a compile cache and skip LLVM's optimizations (unless the environment says
otherwise), so that a start takes seconds; results stay the same bit by bit from start to start.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from experiments.checkpoints import Checkpoints
from experiments.checksums import leaves_by_path
from experiments.metrics import read_metrics
from experiments.shards import write_shard
from lens_jax.records import read_step

ROOT = Path(__file__).parent.parent
VOCAB = 64
ROWS_PER_STEP, TOKENS_PER_STEP = 8, 256
TIMING = ("step_time_s", "tokens_per_s", "seconds")
WORDS = {
    "rung": "untied",
    "profile": "laptop",
    "batch": 4,
    "size.n_layer": 1,
    "size.n_embd": 32,
    "size.n_head": 2,
    "size.short_row": 32,
    "size.long_row": 64,
    "size.block": 16,
    "data.val_tokens": 512,
    "data.probe_offset": 512,
    "probes.window": 32,
    "probes.windows": 8,
    "probes.gradient_windows": 4,
    "probes.chunk": 4,
    "probes.first": 4 * TOKENS_PER_STEP,
    "val_every": 4 * TOKENS_PER_STEP,
    "checkpoint_every": 4 * TOKENS_PER_STEP,
}


def make_data(folder: Path) -> str:
    """Shards of a language that can be learned in a few steps; returns their glob."""
    rng = np.random.default_rng(0)
    for name, length in (("train", 30_000), ("val", 4_000)):
        tokens, surprises = np.zeros(length, np.int64), rng.random(length) < 0.3
        noise = rng.integers(VOCAB, size=length)
        for i in range(1, length):
            tokens[i] = noise[i] if surprises[i] else (5 * tokens[i - 1] + 1) % VOCAB
        write_shard(folder / f"tiny_{name}_0.bin", tokens)
    (folder / "meta.json").write_text(json.dumps({"vocab_size": VOCAB, "eot_token": 0}))
    return f"{folder}/*.bin"


def make_words(data: str, steps: int, **changed) -> list[str]:
    """The words of a tiny run; in the names of `changed` keys two underscores stand for a dot."""
    words = WORDS | {"data": data, "max_tokens": steps * TOKENS_PER_STEP}
    words |= {key.replace("__", "."): value for key, value in changed.items()}
    return [f"{key}={value}" for key, value in words.items()]


def start(words: list[str], cache: Path, **env) -> subprocess.Popen:
    """Begin a run; `cache` keeps compiled programs between starts."""
    settings = {
        "JAX_COMPILATION_CACHE_DIR": f"{cache}/xla",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "LENS_JAX_CACHE": str(cache),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.train", *words],
        cwd=ROOT,
        env=settings | os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, timeout: float = 300) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a run, once it has ended."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def train(words: list[str], cache: Path, **env) -> tuple[int, str, str]:
    """Run to the end; exit code, standard output and standard error."""
    return finish(start(words, cache, **env))


def numbers(run: Path) -> list[dict]:
    """The rows of a run's metrics without the fields that tell of time."""
    rows = read_metrics(run / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


def final_state(run: Path) -> tuple[int, dict[str, np.ndarray]]:
    """The newest saved step of a run and its arrays by path."""
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        latest = checkpoints.latest()
        return latest, leaves_by_path(checkpoints.restore_numpy(latest))


def assert_same_run(got: Path, expected: Path) -> None:
    """Metrics, spectra with their meta, newest checkpoint and result agree bit by bit."""
    assert numbers(got) == numbers(expected)
    names = sorted(path.name for path in (expected / "spectra").iterdir())
    assert sorted(path.name for path in (got / "spectra").iterdir()) == names
    for name in names:
        (meta, arrays), (other_meta, other) = (
            read_step(r / "spectra" / name) for r in (got, expected)
        )
        assert meta == other_meta, name
        assert_same_arrays(arrays, other)
    (step, state), (other_step, other) = final_state(got), final_state(expected)
    assert step == other_step
    assert_same_arrays(state, other)
    results = [json.loads((run / "result.json").read_text()) for run in (got, expected)]
    for result in results:
        del result["tokens_per_s"]
    assert results[0] == results[1]


def assert_same_arrays(got: dict, expected: dict) -> None:
    """The same names, and behind each the same bytes."""
    assert got.keys() == expected.keys()
    different = [
        name
        for name, array in expected.items()
        if np.asarray(got[name]).tobytes() != np.asarray(array).tobytes()
    ]
    assert not different
