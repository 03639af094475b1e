"""The compiled training step with the lens inside it, and the same lens on its own.

A loss function is `loss_fn(params, batch, linear) -> (loss, taps)`: the loss a mean over the rows
of the batch, taps a dict of arrays, and `linear(x, kernel, path)` the product to use for the
kernels that the gradient probe watches (a lens without sinks calls loss_fn(params, batch)).

`measure` is static, so two programs are compiled: the plain step carries no trace of the lens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lens_jax.gradients import Sink, make_sinks, observed_linear
from lens_jax.probes import Evidence, Probe, spectra


class Lens(NamedTuple):
    """Probes to run together, and the kernels whose products feed sinks (none: no sinks).

    passes: into how many equal consecutive parts a held-out set of samples is cut, each with a
    forward and a backward pass of its own, where memory does not hold the activations of all.
    """

    probes: tuple[Probe, ...]
    paths: tuple[str, ...] = ()
    sink: Sink | None = None
    passes: int = 1

    def wants(self, evidence: str) -> bool:
        return any(probe.needs == evidence for probe in self.probes)


class TrainState(NamedTuple):
    """Everything an optimizer step reads and writes; step counts completed updates."""

    step: jax.Array
    params: Any
    opt_state: Any


class ProbeBatch(NamedTuple):
    """A held-out probe set: `samples` go forward and backward, `more` forward only.

    samples: a batch; more: batches stacked along a new leading axis, or None.
    """

    samples: Any
    more: Any = None


def init_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def make_train_step(
    loss_fn: Callable,
    tx: optax.GradientTransformation,
    lens: Lens,
    *,
    probe_data: Literal["fixed", "batch"] = "fixed",
    eigen: Literal["host", "graph"] = "host",
    out_sharding=None,
) -> Callable:
    """A jitted `step(state, batches, probe_batch, *, measure) -> (state, metrics, measured)`.

    batches: leaves with a leading axis of micro-batches, whose gradients are averaged. state is
    donated. With measure, measured holds what the lens saw at the parameters *before* the update:
    on probe_batch (probe_data="fixed") or on the training batch's own passes ("batch"), as
    summaries (eigen="host", see `probes.spectra`) or spectra ("graph"); otherwise it is empty.
    metrics: loss, the global norms grad_norm, update_norm and param_norm (before the update), and
    finite; a step of which any of these is not finite leaves parameters and optimizer state as
    they were.
    """
    blind = Lens(())

    @partial(
        jax.jit, static_argnames="measure", donate_argnames="state", out_shardings=out_sharding
    )
    def step(state: TrainState, batches, probe_batch, *, measure: bool):
        inside = lens if measure and probe_data == "batch" else blind
        loss, grads, measured = _accumulate(loss_fn, state.params, batches, inside)
        if measure and probe_data == "fixed":
            measured, _ = measure_lens(loss_fn, lens, state.params, probe_batch)
        if eigen == "graph":
            measured = spectra(measured, jnp)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(state.params),
        }
        finite = jnp.all(jnp.isfinite(jnp.stack(list(metrics.values()))))
        new = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
        new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
        return new, metrics | {"finite": finite}, measured

    return step


def make_measure_step(loss_fn: Callable, lens: Lens) -> Callable:
    """A jitted `measure(params, probe_batch) -> (summaries, mean loss of the samples)`."""
    return jax.jit(partial(measure_lens, loss_fn, lens))


def measure_lens(
    loss_fn: Callable, lens: Lens, params: Any, probe_batch: ProbeBatch
) -> tuple[dict[str, Any], jax.Array]:
    """Summaries of every probe of the lens on a probe set, and the mean loss of its samples.

    One forward and backward pass over the samples serves all matrices, and its forward the
    activations too; no gradient of a parameter is formed.
    """

    def visit(carry, batch):
        total, states = carry
        loss, evidence = _observe(loss_fn, lens, params, batch)
        return (total + loss, _update(lens.probes, states, evidence)), None

    parts = jax.tree.map(
        lambda leaf: leaf.reshape(lens.passes, -1, *leaf.shape[1:]), probe_batch.samples
    )
    total, states = _visit_all(
        visit, parts, lambda part: _observe(loss_fn, lens, params, part)[1], params, lens.probes
    )
    forward_only = tuple(probe for probe in lens.probes if probe.needs == "taps")
    if probe_batch.more is not None and forward_only:

        def look(states, batch):
            _, taps = loss_fn(params, batch)
            return _update(forward_only, states, Evidence(params, taps)), None

        seen = {probe.name: states[probe.name] for probe in forward_only}
        states |= jax.lax.scan(look, seen, probe_batch.more)[0]
    return _summarize(lens.probes, states), total / lens.passes


def _observe(loss_fn, lens: Lens, params, batch):
    """Loss and evidence of one held-out batch; backward only as far as sinks ask."""
    if not lens.wants("sinks"):
        loss, taps = loss_fn(params, batch)
        return loss, Evidence(params, taps)
    sinks = make_sinks(params, lens.paths, lens.sink)
    objective = partial(_objective, loss_fn, lens, params, batch)
    (loss, taps), cotangents = jax.value_and_grad(objective, has_aux=True)(sinks)
    return loss, Evidence(params, taps, cotangents)


def _accumulate(loss_fn, params, batches, lens: Lens):
    """Mean loss and gradients over micro-batches, and what the lens saw in those very passes."""

    def one_pass(batch):
        sinks = make_sinks(params, lens.paths, lens.sink) if lens.wants("sinks") else {}

        def objective(params, sinks):
            return _objective(loss_fn, lens, params, batch, sinks)

        both = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
        (loss, taps), (grads, cotangents) = both(params, sinks)
        return loss, grads, Evidence(params, taps, cotangents)

    def visit(carry, batch):
        (total_loss, total_grads), states = carry
        loss, grads, evidence = one_pass(batch)
        totals = total_loss + loss, jax.tree.map(jnp.add, total_grads, grads)
        return (totals, _update(lens.probes, states, evidence)), None

    num_batches = jax.tree.leaves(batches)[0].shape[0]
    zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    totals, states = _visit_all(
        visit, batches, lambda batch: one_pass(batch)[2], params, lens.probes, zero
    )
    loss, grads = jax.tree.map(lambda total: total / num_batches, totals)
    return loss, grads, _summarize(lens.probes, states)


def _visit_all(visit, batches, look, params, probes, zero=0.0):
    """Fold visit over stacked batches from (zero, empty probe states); one batch needs no loop."""
    first = jax.tree.map(lambda leaf: leaf[0], batches)
    shapes = jax.eval_shape(look, first)._replace(params=params)
    carry = jax.tree.map(jnp.asarray, zero), _init(probes, shapes)
    if jax.tree.leaves(batches)[0].shape[0] == 1:
        return visit(carry, first)[0]
    return jax.lax.scan(visit, carry, batches)[0]


def _objective(loss_fn, lens: Lens, params, batch, sinks):
    if not sinks:
        return loss_fn(params, batch)
    return loss_fn(params, batch, observed_linear(sinks, lens.sink))


def _init(probes, shapes: Evidence):
    return {probe.name: probe.init(shapes) for probe in probes}


def _update(probes, states, evidence: Evidence):
    return {probe.name: probe.update(states[probe.name], evidence) for probe in probes}


def _summarize(probes, states) -> dict[str, Any]:
    summaries = {}
    for probe in probes:
        summaries |= probe.summarize(states[probe.name])
    return summaries
