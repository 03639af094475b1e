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
import numpy as np

from lens_jax.gradients import Observed, Sink
from lens_jax.resampling import Resampled, even_groups, gram_left_out
from lens_jax.spectra import (
    covariance_eigenvalues,
    covariance_eigenvectors,
    empty_groups,
    gram_singular_values,
    gram_with_mean,
    matrix_singular_values,
    mean_square,
    merge_into_groups,
    pool,
    split_gram,
    widen_groups,
)
from lens_jax.taps import get_parameters, select

NORM_EPS = 2.0**-23
LEADING = 10  # eigenvectors kept of a covariance
FACTS = "grad_facts"  # kind of the summary that goes with a Gram matrix `grad/<path>`


class Facts(NamedTuple):
    """What is known of a Gram matrix of per-sample gradients, numbers.

    rank: what its rows can have at most, min(N, P); pieces: samples of one row of data; surplus: of
    `gradients.Observed`; whole_sq: |.|^2 of the parameter's own gradient, NaN where not known.
    """

    rank: Any
    pieces: Any
    surplus: Any
    whole_sq: Any = np.nan


class Evidence(NamedTuple):
    """What one pass shows: parameters, taps (B, T, D) by name, per-sample gradients by path."""

    params: Any
    taps: Mapping[str, jax.Array] | None = None
    sinks: Mapping[str, Observed] | None = None


class Probe(NamedTuple):
    """One measurement.

    needs: the evidence it reads, "params", "taps" or "sinks"; reads: the names of what it reads.
    init sees the parameters, and of taps and sinks only shapes and dtypes; where all probes of a
    lens need "params" there is no pass and no update. summarize names what it gives
    `<kind>/<site>`: arrays that go into a record as they are, unless `spectra` knows the kind.
    """

    name: str
    needs: Literal["params", "taps", "sinks"]
    reads: tuple[str, ...]
    init: Callable[[Evidence], Any]
    update: Callable[[Any, Evidence], Any]
    summarize: Callable[[Any], dict[str, Any]]


def activation_probe(
    sites: Sequence[str],
    windows: int,
    groups: int = 1,
    *,
    spread: bool = False,
    normalise: bool = True,
) -> Probe:
    """Covariance of the vectors at each site, over all positions and over last ones.

    A tap is (B, ..., D), B windows at a time and `windows` over all passes, of which consecutive
    ones form `groups` of equal size that are kept apart for error bars; with spread, every pass has
    windows from all over the data, in order, and an equal share of them goes to every group.
    normalise: every vector is divided by its root mean square first (protocol spec 1.2). Last
    positions are taken of taps (B, T, D) only.
    """
    if windows % groups:
        raise ValueError(f"{groups} groups do not divide {windows} windows")
    size = windows // groups

    def init(evidence):
        state = {}
        for site, tap in select(evidence.taps, sites).items():
            width = tap.shape[-1]
            state[site] = {"act": empty_groups(width, groups)}
            if tap.ndim == 3:
                state[site]["act_last"] = empty_groups(width, 1)
        return jnp.zeros((), jnp.int32), state

    def merge(state, vectors, seen):
        if spread or groups == 1:
            return merge_into_groups(state, vectors, 0, groups)
        return merge_into_groups(state, vectors, seen // size, max(1, vectors.shape[0] // size))

    def update(state, evidence):
        seen, state = state
        new = {}
        for site, tap in select(evidence.taps, sites).items():
            vectors = rms_normalise(tap) if normalise else tap
            new[site] = {"act": merge(state[site]["act"], vectors, seen)}
            if "act_last" in state[site]:
                last = state[site]["act_last"]
                new[site]["act_last"] = merge_into_groups(last, vectors[:, -1:], 0, 1)
        return seen + tap.shape[0], new

    def summarize(state):
        _, state = state
        return {
            f"{kind}/{site}": cov for site, kinds in state.items() for kind, cov in kinds.items()
        }

    return Probe("activation", "taps", tuple(sites), init, update, summarize)


def rms_normalise(x: jax.Array) -> jax.Array:
    """Every vector (..., D) over its root mean square, in float32 (protocol spec 1.2)."""
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
        empty = {
            path: Observed(jnp.zeros((passes, *sink.shape(kernel))), jnp.zeros(()))
            for path, kernel in kernels.items()
        }
        ranks = {path: min(passes * sink.samples, k.size) for path, k in kernels.items()}
        return jnp.zeros((), jnp.int32), empty, jax.tree.map(jnp.int32, ranks)

    def update(state, evidence):
        count, kept, ranks = state
        new = {}
        for path in paths:
            values, surplus = evidence.sinks[path]
            values = kept[path].values.at[count].set(values)
            new[path] = Observed(values, kept[path].surplus + jnp.abs(surplus))
        return count + 1, new, ranks

    def summarize(state):
        _, kept, ranks = state
        found = {}
        for path, (values, surplus) in kept.items():
            gram = values[0] if sink.form == "gram" else gram_with_mean(_flat(values))
            found[f"grad/{path}"] = gram
            facts = Facts(ranks[path], sink.pieces, surplus)
            found[f"{FACTS}/{path}"] = jax.tree.map(jnp.float32, facts)
        return found

    return Probe("gradient", "sinks", tuple(paths), init, update, summarize)


def _flat(values: jax.Array) -> jax.Array:
    return values.reshape(-1, values.shape[-1])


def weight_probe(paths: Sequence[str]) -> Probe:
    """The weight matrices themselves, whose singular values are the spectrum."""

    def init(evidence):
        matrices = get_parameters(evidence.params, paths)
        for path, matrix in matrices.items():
            if matrix.ndim != 2:
                raise ValueError(
                    f"the weight at {path!r} has shape {matrix.shape}, and singular values need a "
                    f"matrix (in, out): leave it out of weights="
                )
        return matrices

    def summarize(state):
        return {f"weight/{path}": matrix for path, matrix in state.items()}

    def update(state, evidence):
        del state
        return init(evidence)

    return Probe("weight", "params", tuple(paths), init, update, summarize)


def spectra(summaries: Mapping[str, Any], xp=np, *, resample: bool = True) -> dict[str, Any]:
    """Arrays of a record from the summaries of all probes.

    xp: numpy for float64 on the host, jax.numpy for float32 inside a compiled step. resample: on
    the host, also the spectra with parts of the measurement left out, from which error bars come
    (`lens_jax.jackknife`). What a probe of one's own gives goes through as it is. Names and shapes
    are those of `lens_jax.records`. What was measured of numbers that are not finite is NaN. Raises
    ValueError where one backward pass saw other gradients than those of the parameter; inside a
    step these are NaN too.
    """
    resample = resample and xp is np
    arrays = {}
    for name, value in summaries.items():
        kind, _, where = name.partition("/")
        if kind == FACTS:
            continue
        if kind not in _SPECTRA:
            arrays[name] = _as_given(name, value, xp)
            continue
        if kind == "grad":
            value = _checked(where, value, summaries.get(f"{FACTS}/{where}"), xp)
        with np.errstate(all="ignore"):  # what is not finite comes out as NaN
            found = _SPECTRA[kind](value, xp, resample)
        arrays |= {f"{quantity}/{where}": values for quantity, values in found.items()}
    return arrays


def _as_given(name: str, value, xp):
    """What a probe of one's own gives; raises ValueError unless it is an array with a site."""
    if "/" not in name or not hasattr(value, "shape"):
        raise ValueError(
            f"the summary {name!r} of a probe is no array named <kind>/<site>, which goes into a "
            f"record as it is"
        )
    return xp.asarray(value)


def _checked(path: str, gram, facts, xp):
    """The Gram matrix of a kernel with what is known of it: (gram, rank, pieces).

    Where it is that of other gradients than the kernel's it is NaN inside a step, and on the host
    ValueError says why.
    """
    gram = xp.asarray(gram)
    facts = Facts(len(gram) - 1, 1, 0) if facts is None else facts
    rank, pieces, surplus, whole_sq = (xp.asarray(fact) for fact in facts)
    repeated = surplus != 0
    # Far beyond the rounding of low precision, of which a mean of many rows has most; not so NaN.
    with np.errstate(all="ignore"):
        mean, whole = xp.sqrt(gram[-1, -1]), xp.sqrt(whole_sq)
        row = xp.sqrt(xp.max(xp.diagonal(gram)[:-1]) + gram[-1, -1])
        differs = xp.abs(mean - whole) > 0.1 * xp.maximum(mean, whole) + 0.01 * row
    if xp is jnp:
        return jnp.where(repeated | differs, jnp.nan, gram), rank, pieces
    if repeated:
        raise ValueError(
            f"linear(x, kernel, {path!r}) did not run once: a kernel that the steps of a scan "
            f"share, or one in a branch or under vmap, has no Gram matrix of its own there; take "
            f"route='vmap_grad'"
        )
    if differs:
        raise ValueError(
            f"the samples' gradients of {path!r} have a mean of norm {mean:.3g}, its own gradient "
            f"has {whole:.3g}: pass the parameter itself to linear(x, kernel, path), unscaled and "
            f"nowhere else, or take route='vmap_grad'"
        )
    return gram, rank, pieces


def _activation_spectra(state, xp, resample):
    groups = widen_groups(state, xp)
    moments = pool(groups, xp)
    found = {
        "act_cov_eigenvalues": covariance_eigenvalues(moments, xp),
        "act_cov_eigenvectors": covariance_eigenvectors(moments, LEADING, xp).astype(xp.float32),
        "act_mean_sq": mean_square(moments),
    }
    if resample and len(groups.count) > 1:
        parts = Resampled(groups)
        for name, values in (("left_out", parts.left_out()), ("halves", parts.halves())):
            if values is not None:
                found[f"act_cov_eigenvalues_{name}"] = values.astype(np.float32)
    return found


def _last_spectra(state, xp, resample):
    del resample  # too few vectors to leave any out
    return {
        "act_last_cov_eigenvalues": covariance_eigenvalues(pool(widen_groups(state, xp), xp), xp)
    }


def _gradient_spectra(known, xp, resample):
    gram, rank, pieces = known
    plain, centred = split_gram(gram, xp)
    found = {
        "grad_singular_values": gram_singular_values(plain, xp, rank),
        "grad_singular_values_centred": gram_singular_values(centred, xp, rank, centred=True),
        "grad_mean_sq": plain.mean(),
    }
    # of whole rows, whose pieces are alike
    groups = even_groups(len(plain) // int(pieces)) if resample else 1
    if groups > 1 and len(plain) - len(plain) // groups > 1:
        names = ("singular_values", "singular_values_centred", "mean_sq")
        for name, values in zip(names, gram_left_out(plain, centred, groups, rank), strict=True):
            found[f"grad_{name}_left_out"] = values.astype(np.float32)
    return found


def _weight_spectra(matrix, xp, resample):
    del resample  # nothing is sampled
    return {"weight_singular_values": matrix_singular_values(matrix, xp)}


_SPECTRA = {
    "act": _activation_spectra,
    "act_last": _last_spectra,
    "grad": _gradient_spectra,
    "weight": _weight_spectra,
}
