"""Probes: what is measured, each as three pure functions in the manner of optax.

init() gives an empty state, update(state, evidence) takes in what one pass over data showed, and
summarize(state) gives small arrays that leave the compiled step; `spectra` turns those into the
arrays of a record, on the host in float64 or inside the step. A probe says which evidence it needs,
so the step runs one pass for all of them.

Conventions (protocol spec 1.2 to 1.4): activations are RMS-normalised, all tokens, centred,
divided by n - 1; rows of a gradient matrix are gradients of a sample's token-mean loss.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lens_jax.gradients import Sink
from lens_jax.spectra import (
    covariance_eigenvalues,
    empty_covariance,
    gram_singular_values,
    gram_with_mean,
    matrix_singular_values,
    mean_square,
    merge_covariance,
)
from lens_jax.taps import get_parameters, select

NORM_EPS = 2.0**-23


class Evidence(NamedTuple):
    """What one pass shows: parameters, taps (B, T, D) by name, sink cotangents by path."""

    params: Any
    taps: Mapping[str, jax.Array] | None = None
    sinks: Mapping[str, jax.Array] | None = None


class Probe(NamedTuple):
    """One measurement; `needs` is the evidence it reads, "params", "taps" or "sinks"."""

    name: str
    needs: Literal["params", "taps", "sinks"]
    init: Callable[[Evidence], Any]
    update: Callable[[Any, Evidence], Any]
    summarize: Callable[[Any], dict[str, Any]]


def activation_probe(sites: Sequence[str]) -> Probe:
    """Covariance of the RMS-normalised vectors at each site, over all tokens and over last ones."""

    def init(evidence):
        taps = select(evidence.taps, sites)
        return {
            site: {kind: empty_covariance(tap.shape[-1]) for kind in ("act", "act_last")}
            for site, tap in taps.items()
        }

    def update(state, evidence):
        new = {}
        for site, tap in select(evidence.taps, sites).items():
            normal = _rms_normalise(tap)
            new[site] = {
                "act": merge_covariance(state[site]["act"], normal),
                "act_last": merge_covariance(state[site]["act_last"], normal[:, -1]),
            }
        return new

    def summarize(state):
        return {
            f"{kind}/{site}": cov for site, kinds in state.items() for kind, cov in kinds.items()
        }

    return Probe("activation", "taps", init, update, summarize)


def _rms_normalise(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + NORM_EPS)


def gradient_probe(paths: Sequence[str], sink: Sink, passes: int = 1) -> Probe:
    """Gram matrix of the per-sample gradients of each kernel, over the samples of all passes.

    With one pass the sinks hold Gram matrices; with more, sink.form must be "rows" and the rows of
    every pass are kept until the end.
    """
    if passes > 1 and sink.form != "rows":
        raise ValueError(f"{passes} passes need sinks of the form 'rows', not {sink.form!r}")

    def init(evidence):
        kernels = get_parameters(evidence.params, paths)
        shapes = {path: (passes, *sink.shape(kernel)) for path, kernel in kernels.items()}
        return jnp.zeros((), jnp.int32), {path: jnp.zeros(s) for path, s in shapes.items()}

    def update(state, evidence):
        count, kept = state
        return count + 1, {path: kept[path].at[count].set(evidence.sinks[path]) for path in paths}

    def summarize(state):
        _, kept = state
        if sink.form == "gram":
            return {f"grad/{path}": value[0] for path, value in kept.items()}
        return {
            f"grad/{path}": gram_with_mean(value.reshape(-1, value.shape[-1]))
            for path, value in kept.items()
        }

    return Probe("gradient", "sinks", init, update, summarize)


def weight_probe(paths: Sequence[str]) -> Probe:
    """The weight matrices themselves, whose singular values are the spectrum."""

    def init(evidence):
        return get_parameters(evidence.params, paths)

    def summarize(state):
        return {f"weight/{path}": matrix for path, matrix in state.items()}

    return Probe("weight", "params", init, lambda state, evidence: init(evidence), summarize)


PROBES = {"activation": activation_probe, "gradient": gradient_probe, "weight": weight_probe}


def spectra(summaries: Mapping[str, Any], xp) -> dict[str, Any]:
    """Arrays of a record from the summaries of all probes.

    xp: numpy for float64 on the host, jax.numpy for float32 inside a compiled step. Names and
    shapes are those of `lens_jax.records`.
    """
    arrays = {}
    for name, value in summaries.items():
        kind, _, where = name.partition("/")
        if kind == "act":
            arrays[f"act_cov_eigenvalues/{where}"] = covariance_eigenvalues(value, xp)
            arrays[f"act_mean_sq/{where}"] = mean_square(value, xp)
        elif kind == "act_last":
            arrays[f"act_last_cov_eigenvalues/{where}"] = covariance_eigenvalues(value, xp)
        elif kind == "grad":
            arrays[f"grad_singular_values/{where}"] = gram_singular_values(value, xp, centred=False)
            arrays[f"grad_singular_values_centred/{where}"] = gram_singular_values(
                value, xp, centred=True
            )
        elif kind == "weight":
            arrays[f"weight_singular_values/{where}"] = matrix_singular_values(value, xp)
        else:
            raise ValueError(f"no spectrum is defined for the summary {name!r}")
    return arrays
