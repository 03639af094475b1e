"""Benchmark of our training step beside the same step in PyTorch, eager and under torch.compile.

The peer is our own PyTorch code of two rungs, benchmarks/torch_twin.py and torch_step.py. It starts
from the weights of the benchmark's state, and times are refused unless it computes the same loss.
torch is not a dependency; whoever asks for this section installs it.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from experiments.bench_steps import Bench
from experiments.bench_timing import paired_ratio, spread, time_in_turns
from experiments.config import RunConfig
from experiments.schedule import make_schedule
from models.command_line import UsageError
from models.interop import to_published
from optim.groups import learning_rates

PEER_RUNGS = ("untied", "attnscale")
PEER_FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
TOLERANCE = 1e-4  # largest relative difference of two losses that still are the same
ROUTES = {"torch_eager": False, "torch_compile": True}


def peer_section(
    benches: dict[str, Bench], repeats: int, note: Callable[[str], None]
) -> dict[str, Any]:
    """Our step, PyTorch's and torch.compile's in turns, one entry a rung of `benches`.

    All three are whole updates on one batch from one set of weights; ours also takes three norms
    for its metrics, which the twin does not. Ratios are above 1 where ours is faster: those of
    speed_ratio_to over the turns, and those of fastest_ratio_to of the fastest steps, to be read
    where other processes were at work: PyTorch's threads wait for one another and lose more.
    Sets the number of torch's threads for the process. Raises UsageError where torch or the twin
    is missing, for a rung that the twin does not have, and where the losses differ.
    """
    torch = load_torch()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    return {
        "torch": torch.__version__,
        "device": _device(torch).type,
        "threads": threads,
        "rungs": {rung: _time_rung(torch, bench, repeats, note) for rung, bench in benches.items()},
    }


def load_torch() -> ModuleType:
    """The module torch; raises UsageError where it is not installed."""
    try:
        import torch
    except ImportError:
        raise UsageError(
            "peer=torch needs PyTorch, which is not installed here; pip install torch"
        ) from None
    return torch


def load_peer(name: str) -> ModuleType:
    """The module of a file in benchmarks/, which is a folder of the repository and no package."""
    path = PEER_FOLDER / f"{name}.py"
    if not path.is_file():
        raise UsageError(f"peer=torch needs {path}; run it in a clone of the repository")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # torch.compile looks modules up by their name
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def make_trainer(bench: Bench, device, weights: Mapping, compile: bool):
    """The twin of a benchmark's rung with these published weights, and its optimizers.

    Raises UsageError for what the twin does not have.
    """
    config, twin = bench.config, load_peer("torch_twin")
    rates = partial(learning_rates, config.optim, make_schedule(config).horizon)
    try:
        twin.check_covered(config.arch, config.optim)
    except ValueError as error:
        raise UsageError(str(error)) from None
    model = twin.Twin(config.arch, config.size, config.row, flex=device.type == "cuda")
    model.load_state_dict(weights)
    return load_peer("torch_step").Trainer(model.to(device), config.optim, rates, compile)


def to_torch(torch: ModuleType, arrays: Mapping[str, Any], device) -> dict[str, Any]:
    """Named arrays as tensors of their own on a device, integers as int64."""
    tensors = {}
    for name, array in arrays.items():
        # a copy: the buffers behind the state of a benchmark are used again by its next step
        array = np.array(array)
        tensors[name] = torch.from_numpy(array).to(device)
        if array.dtype.kind == "i":
            tensors[name] = tensors[name].long()
    return tensors


def check_losses(rung: str, losses: Mapping[str, float]) -> None:
    """Raises UsageError unless all losses agree with the first to TOLERANCE, relative."""
    (ours, expected), *others = losses.items()
    for name, loss in others:
        if not abs(loss - expected) <= TOLERANCE * abs(expected):  # NaN differs from everything
            raise UsageError(
                f"rung={rung}: from the same weights on the same batch the loss of {name} is "
                f"{loss:.6f} and of {ours} {expected:.6f}; times of different computations mean "
                f"nothing together"
            )


def _device(torch: ModuleType):
    """Where torch runs: beside JAX on a GPU, else on the CPU."""
    if jax.default_backend() == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError(
            f"peer=torch: JAX runs on {jax.default_backend()} and this PyTorch finds no GPU; "
            f"install one that does, or set JAX_PLATFORMS=cpu"
        )
    return torch.device("cuda")


def _time_rung(
    torch: ModuleType, bench: Bench, repeats: int, note: Callable[[str], None]
) -> dict[str, Any]:
    config, device = bench.config, _device(torch)
    weights = to_torch(torch, to_published(bench.state.params, config.arch), device)
    batches = to_torch(torch, bench.batches, device)
    steps, attention = {"ours": _our_step(bench)}, ""
    for name, compile in ROUTES.items():
        trainer = make_trainer(bench, device, weights, compile)
        steps[name] = _torch_step(torch, trainer, batches)
        attention = trainer.model.attention
    with _torch_failures(torch, config.rung):
        first = {name: timed.result for name, timed in time_in_turns(steps, 0).items()}
        check_losses(config.rung, first)
        timed = time_in_turns(steps, repeats)
    bench.check_finite()
    seconds = {name: timed[name].seconds for name in steps}
    ratios = {name: paired_ratio(seconds[name], seconds["ours"]) for name in ROUTES}
    fastest = {name: min(seconds[name]) / min(seconds["ours"]) for name in ROUTES}
    said = (f"{ratio:.3f} x {name.replace('_', '.')}" for name, ratio in ratios.items())
    note(f"{config.rung}: our speed is " + ", ".join(said))
    return {
        "attention": attention,
        "speed_ratio_to": ratios,
        "fastest_ratio_to": fastest,
        **{name: _entry(config, seconds[name], first[name]) for name in steps},
    }


@contextmanager
def _torch_failures(torch: ModuleType, rung: str) -> Iterator[None]:
    """What can be missing on a machine, in one line each."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UsageError(
            f"rung={rung}: PyTorch found too little memory beside JAX; set "
            f"XLA_PYTHON_CLIENT_MEM_FRACTION=0.4, or take a smaller batch"
        ) from None
    except torch._dynamo.exc.BackendCompilerFailed as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"rung={rung}: torch.compile failed ({reason}); on a CPU it needs a C++ compiler"
        ) from None


def _entry(config: RunConfig, seconds: list[float], first_loss: float) -> dict[str, Any]:
    times = spread(seconds)
    tokens_per_s = config.tokens_per_step / times["median_s"]
    return {"step": times, "tokens_per_s": tokens_per_s, "first_loss": first_loss}


def _our_step(bench: Bench) -> Callable[[], float]:
    """The benchmark's plain step, returning its loss."""
    program = bench.program()

    def step():
        program.call()
        return float(bench.metrics["loss"])

    return step


def _torch_step(torch: ModuleType, trainer, batches: Mapping) -> Callable[[], float]:
    """The step of a twin, returning its loss when all its work is done."""

    def step():
        loss = trainer.step(batches)
        if batches["tokens"].is_cuda:
            torch.cuda.synchronize()
        return loss

    return step
