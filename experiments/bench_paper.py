"""Benchmark of the released procedure beside the lens: the same spectra, one thing at a time.

For every probed layer a forward pass of its own up to that layer, activations copied to the host
and X'X formed there; for every probed matrix a pass of its own over the samples, one at a time,
each gradient copied to the host, and an SVD of the N x P matrix of them; an SVD of every weight
matrix (protocol spec 1.2 to 1.4 and 1.7). Every function of the model is compiled and prunes what
it does not need, which the released code does not.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.bench_steps import PROBE_DATA, Bench, Program, compile_program
from experiments.bench_timing import paired_ratio, spread, time_in_turns
from experiments.config import PROBES, probed_layers
from experiments.loss import make_loss
from experiments.probe_set import run_lens, split_samples
from experiments.setup import compute_dtype
from lens_jax.probes import rms_normalise
from lens_jax.taps import get_parameters, replace_parameters
from models.gpt import GPT


class Outcome(NamedTuple):
    """Spectra by path, and the seconds of the route that went by on the host."""

    values: dict[str, np.ndarray]
    host_s: float


class PaperWay:
    """The released procedure for the weights of a bench and some rows of tokens.

    samples: (N, T+1) under the gradients; windows: (W, T+1) under the activations; chunk: windows
    in a forward pass. layers: how many of the probed layers are visited, evenly spread; None: all.
    """

    def __init__(self, bench: Bench, samples, windows, chunk: int, layers: int | None):
        config = bench.config
        self.note = bench.note
        self.paths = run_lens(config).paths
        self.loop_paths = spread_layers(self.paths, layers)
        self.loss_fn = make_loss(GPT(config.arch, config.size, compute_dtype(config)))
        # one sample cannot be split over devices, so all is on one of them
        device = bench.plain_run.mesh.devices.flat[0]
        # by way of the host, for the bench donates its own
        self.params = jax.device_put(jax.device_get(bench.state.params), device)
        self.samples = jax.device_put(samples, device)
        self.windows = jax.device_put(windows.reshape(-1, chunk, windows.shape[1]), device)
        visited = {_layer(path) for path in self.loop_paths}
        self.sites = [f"h_{i}/resid_post" for i in probed_layers(config) if i in visited]
        self._programs: dict[str, Program] = {}

    @property
    def timed_fraction(self) -> float:
        """The share of the procedure's work that is done."""
        return len(self.loop_paths) / len(self.paths)

    def program(self, name: str) -> Program:
        """The compiled gradient of one sample at a path, or the activations at a tap."""
        if name not in self._programs:
            if name in self.sites:
                function, example = partial(self._activations, name), self.windows[0]
            else:
                function, example = partial(self._gradient, name), self.samples[:1]
            found = compile_program(jax.jit(function), self.params, example)
            self.note(f"compiled {name} in {found.compile_s:.1f} s")
            self._programs[name] = found
        return self._programs[name]

    def _gradient(self, path, params, tokens):
        def loss(values):
            return self.loss_fn(replace_parameters(params, values), {"tokens": tokens})[0]

        return jax.grad(loss)(get_parameters(params, [path]))[path]

    def _activations(self, site, params, tokens):
        return rms_normalise(self.loss_fn(params, {"tokens": tokens})[1][site])

    def gradients(self) -> Outcome:
        """A gradient at a time, copied to the host, and an SVD of each matrix of them."""
        values, host_s = {}, 0.0
        samples = [self.samples[index : index + 1] for index in range(len(self.samples))]
        for path in self.loop_paths:
            one_gradient = self.program(path).call
            rows = [jax.device_get(one_gradient(self.params, one)).ravel() for one in samples]
            began = time.perf_counter()
            values[path] = np.linalg.svd(np.stack(rows), compute_uv=False)
            host_s += time.perf_counter() - began
        return Outcome(values, host_s)

    def activations(self) -> dict[str, np.ndarray]:
        """Eigenvalues of the covariance at each visited layer, a pass of the model a layer."""
        found = {}
        for site in self.sites:
            forward = self.program(site).call
            count, mean, scatter = 0, 0.0, 0.0
            for chunk in self.windows:
                x = np.asarray(forward(self.params, chunk)).reshape(-1, self._width(site))
                new, shift = x.mean(0), x.mean(0) - mean
                total = count + len(x)
                scatter = scatter + (x.T @ x - len(x) * np.outer(new, new)).astype(np.float64)
                scatter = scatter + np.outer(shift, shift) * (count * len(x) / total)
                mean, count = mean + shift * (len(x) / total), total
            found[site] = np.linalg.eigvalsh(scatter / (count - 1))[::-1]
        return found

    def _width(self, site: str) -> int:
        return jax.tree.leaves(self.program(site).call.out_info)[0].shape[-1]

    def weights(self) -> dict[str, np.ndarray]:
        """Singular values of the visited matrices in float32."""
        kernels = get_parameters(self.params, self.loop_paths)
        return {
            path: np.linalg.svd(np.asarray(kernel), compute_uv=False)
            for path, kernel in kernels.items()
        }

    def all(self) -> dict[str, Any]:
        """Everything, as a checkpoint is measured."""
        return {
            "activation": self.activations(),
            "gradient": self.gradients().values,
            "weight": self.weights(),
        }


def spread_layers(paths: tuple[str, ...], count: int | None) -> tuple[str, ...]:
    """The paths that lie in `count` of their layers, chosen evenly; None: all of them."""
    layers = sorted({_layer(path) for path in paths})
    if count is None or count >= len(layers):
        return paths
    # bin centres: their mean depth, and so the loop's mean cost, is close to that of all
    picks = {layers[int((k + 0.5) * len(layers) / count)] for k in range(count)}
    return tuple(path for path in paths if _layer(path) in picks)


def _layer(path: str) -> int:
    return int(path.partition("/")[0].removeprefix("h_"))


def paper_way(bench: Bench, data: str, layers: int | None) -> PaperWay:
    """The released procedure on the fixed probe set or on the training batch's rows."""
    config = bench.config
    if data == "fixed":
        windows, chunk = bench.held.probe, config.probes.chunk
        samples, _ = split_samples(config, windows)
    else:
        windows = np.asarray(bench.batches["tokens"]).reshape(-1, config.row + 1)
        samples, chunk = windows, 1
    return PaperWay(bench, samples, windows, chunk, layers)


def paper_section(bench: Bench, repeats: int, layers: int | None) -> dict[str, Any]:
    """Seconds of the plain step, of the step with all probes, and of the released procedure."""
    report: dict[str, Any] = {}
    for data in PROBE_DATA:
        way = paper_way(bench, data, layers)
        variants: dict[str, Callable] = {
            "plain": bench.program().call,
            "all": bench.program(PROBES, data).call,
            "paper": way.all,
        }
        timed = time_in_turns(variants, repeats)
        bench.check_finite()
        plain, measured = timed["plain"].seconds, timed["all"].seconds
        paper = [second / way.timed_fraction for second in timed["paper"].seconds]
        extra = [b - a for a, b in zip(plain, measured, strict=True)]
        report[data] = {
            "samples": len(way.samples),
            "sample_tokens": way.samples.shape[1] - 1,
            "activation_windows": way.windows.shape[0] * way.windows.shape[1],
            "plain": spread(plain),
            "all": spread(measured),
            "paper": spread(paper),
            "timed_fraction": way.timed_fraction,
            "all_over_plain": paired_ratio(measured, plain),
            "paper_over_extra": paired_ratio(paper, extra),
            "gradients_on_host_bytes": len(way.samples) * largest_kernel(way) * 4,
        }
        bench.note(
            f"{data}: step with all probes x {report[data]['all_over_plain']:.3f}; the released "
            f"procedure takes {report[data]['paper_over_extra']:.1f} x what they add"
        )
    return report


def largest_kernel(way: PaperWay) -> int:
    """Numbers in a row of the largest matrix of gradients."""
    return max(kernel.size for kernel in get_parameters(way.params, way.loop_paths).values())
