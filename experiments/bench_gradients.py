"""Benchmark of per-sample gradient spectra: one backward pass, vmap(grad), and a loop.

All three end in the singular values of the matrix G of N per-sample gradients, one G a probed
kernel. The loop is the procedure of the released code (protocol spec 1.3): for every kernel a pass
of its own over the samples, one at a time, G gathered on the host, and an SVD there.
"""

import time
from collections.abc import Callable
from typing import Any

import chz
import jax
import numpy as np

from experiments.bench_paper import Outcome, paper_way
from experiments.bench_steps import Bench, Program, compile_program
from experiments.bench_timing import paired_ratio, spread, time_in_turns
from experiments.loss import make_loss
from experiments.probe_set import run_lens
from experiments.setup import compute_dtype
from lens_jax.gradients import per_sample_gradients
from lens_jax.spectra import gram_singular_values, gram_with_mean, split_gram
from lens_jax.step import make_measure_step
from models.gpt import GPT

ROUTES = ("one_backward", "vmap_grad", "loop")
COMPARED_ABOVE = 1e-3  # of the largest singular value


class GradientRoutes:
    """The three routes compiled for the weights and the probe set of a rung.

    loop_layers: how many of the probed layers the loop visits, evenly spread; None: all of them.
    """

    def __init__(self, bench: Bench, loop_layers: int | None):
        config = bench.config
        self.note = bench.note
        run = bench.make_run(("gradient",), "fixed")
        self.params, self.probe_batch = bench.state.params, run.probe_batch
        chosen = chz.replace(config.probes, names=("gradient",), data="fixed")
        lens = run_lens(chz.replace(config, probes=chosen))
        self.paths, self.passes = lens.paths, lens.passes
        self.loss_fn = make_loss(GPT(config.arch, config.size, compute_dtype(config)))
        self._measure = make_measure_step(self.loss_fn, lens)
        self.paper = paper_way(bench, "fixed", loop_layers)
        self._programs: dict[str, Program] = {}

    def program(self, name: str) -> Program:
        """The compiled program of "one_backward" or of "vmap_grad"."""
        if name not in self._programs:
            if name == "one_backward":
                found = compile_program(self._measure, self.params, self.probe_batch)
            else:
                function = jax.jit(self._vmap_grams)
                found = compile_program(function, self.params, self.probe_batch.samples)
            self.note(f"compiled {name} in {found.compile_s:.1f} s")
            self._programs[name] = found
        return self._programs[name]

    def _vmap_grams(self, params, samples):
        def one_pass(part):
            return per_sample_gradients(self.loss_fn, params, part, self.paths)

        # in as many passes as the one-backward route takes, for the same memory
        parts = jax.tree.map(lambda leaf: leaf.reshape(self.passes, -1, *leaf.shape[1:]), samples)
        grads = jax.lax.map(one_pass, parts)  # (passes, samples of a pass, in, out)
        return {
            f"grad/{path}": gram_with_mean(rows.reshape(rows.shape[0] * rows.shape[1], -1))
            for path, rows in grads.items()
        }

    def one_backward(self) -> Outcome:
        """Gram matrices from the sinks of one backward pass, eigenvalues on the host."""
        grams, _ = self.program("one_backward").call(self.params, self.probe_batch)
        return _finish_grams(grams, self.paths)

    def vmap_grad(self) -> Outcome:
        """Every sample's gradient by definition, then their Gram matrices, both in one program."""
        grams = self.program("vmap_grad").call(self.params, self.probe_batch.samples)
        return _finish_grams(grams, self.paths)

    def loop(self) -> Outcome:
        """The released procedure."""
        return self.paper.gradients()


def _finish_grams(grams: dict[str, jax.Array], paths: tuple[str, ...]) -> Outcome:
    grams = jax.device_get(grams)
    began = time.perf_counter()
    values = {
        path: gram_singular_values(split_gram(grams[f"grad/{path}"], np)[0], np) for path in paths
    }
    return Outcome(values, time.perf_counter() - began)


def largest_difference(ours: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> float:
    """Largest |ours / reference - 1| over the paths of `reference`.

    Only values above COMPARED_ABOVE of their matrix's largest count.
    """
    worst = []
    for path, expected in reference.items():
        large = expected > COMPARED_ABOVE * expected[0]
        worst.append(np.abs(ours[path][large] / expected[large] - 1).max())
    return float(max(worst))


def gradients_section(routes: GradientRoutes, repeats: int) -> dict[str, Any]:
    """Seconds of each route in turns, ratios to the one backward pass, and their agreement."""
    calls: dict[str, Callable] = {name: getattr(routes, name) for name in ROUTES}
    timed = time_in_turns(calls, repeats)
    outcomes = {name: timed[name].result for name in ROUTES}
    entries: dict[str, Any] = {}
    for name in ROUTES:
        whole = 1 / routes.paper.timed_fraction if name == "loop" else 1.0
        seconds = [second * whole for second in timed[name].seconds]
        entries[name] = spread(seconds)
        entries[name]["host_s"] = outcomes[name].host_s * whole
        entries[name]["ratio"] = paired_ratio(seconds, timed["one_backward"].seconds)
    entries["loop"]["timed_fraction"] = routes.paper.timed_fraction
    exact = outcomes["loop"].values
    differences = {
        "one_backward_to_loop": largest_difference(outcomes["one_backward"].values, exact),
        "vmap_grad_to_loop": largest_difference(outcomes["vmap_grad"].values, exact),
        "one_backward_to_vmap_grad": largest_difference(
            outcomes["one_backward"].values, outcomes["vmap_grad"].values
        ),
    }
    routes.note(
        "singular values above "
        f"{COMPARED_ABOVE:g} of the largest differ by at most {max(differences.values()):.1e}"
    )
    for name in ROUTES[1:]:
        routes.note(f"{name} takes {entries[name]['ratio']:.2f} x one_backward")
    return {
        "samples": len(routes.paper.samples),
        "matrices": list(routes.paths),
        "routes": entries,
        "largest_relative_difference": differences,
    }


def gradient_memory(routes: GradientRoutes) -> dict[str, dict[str, int]]:
    """Bytes of the two batched routes and of the loop's first and largest program."""
    return {
        "one_backward": routes.program("one_backward").memory,
        "vmap_grad": routes.program("vmap_grad").memory,
        "loop, one sample": routes.paper.program(routes.paths[0]).memory,
    }
