"""The compiled training step with the lens inside it, and the same lens on its own.

A loss function is what `lens_jax.lens` describes: loss_fn(params, batch) -> (loss, taps), with a
third argument `linear(x, kernel, path)` where gradients come from one backward pass.

`measure` is static, so two programs are compiled: the plain step carries no trace of the lens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lens_jax.gradients import Observed, Watch, per_sample_gradients
from lens_jax.lens import Lens, ProbeBatch, Sweep
from lens_jax.probes import FACTS, Evidence, Probe, spectra
from lens_jax.taps import call_loss, check_taps, check_trainable, get_parameters, num_rows


class TrainState(NamedTuple):
    """Everything an optimizer step reads and writes; step counts completed updates."""

    step: jax.Array
    params: Any
    opt_state: Any


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
    out_shardings=None,
) -> Callable:
    """A jitted `step(state, batches, probe_batch, *, measure) -> (state, metrics, measured)`.

    batches: leaves with a leading axis of micro-batches, whose gradients are averaged. state is
    donated. With measure, measured holds what the lens saw at the parameters *before* the update:
    on probe_batch (probe_data="fixed") or on the training batch's own passes ("batch"), as
    summaries (eigen="host", see `probes.spectra`) or spectra ("graph"); otherwise it is empty.
    metrics: loss, the global norms grad_norm, update_norm and param_norm (before the update), and
    finite, whether all of these are. A step whose loss, grad_norm or param_norm is not finite
    leaves parameters and optimizer state as they were. A step that measures a fixed probe set has
    probe_loss too, the mean over its samples. out_shardings: as jax.jit takes them, for that
    triple.
    """
    if probe_data == "batch":
        _check_one_sweep(lens)
    blind = Lens()

    @partial(
        jax.jit, static_argnames="measure", donate_argnames="state", out_shardings=out_shardings
    )
    def step(state: TrainState, batches, probe_batch, *, measure: bool):
        if probe_batch is not None:
            _check_micro_batches(batches, probe_batch)
        inside = lens if measure and probe_data == "batch" else blind
        loss, grads, measured = _accumulate(loss_fn, state.params, batches, inside)
        seen = {}
        if measure and probe_data == "fixed":
            measured, loss_there = measure_lens(loss_fn, lens, state.params, probe_batch)
            seen = {} if loss_there is None else {"probe_loss": loss_there}
        if eigen == "graph":
            measured = spectra(measured, jnp)
        narrow = _like(grads, state.params)
        updates, opt_state = tx.update(narrow, state.opt_state, state.params)
        norms = {"grad_norm": grads, "update_norm": updates, "param_norm": state.params}
        metrics = {"loss": loss} | {n: optax.tree.norm(_wide(tree)) for n, tree in norms.items()}
        finite = {name: jnp.isfinite(value) for name, value in metrics.items()}
        # The norm of the updates plays no part: all updates would have to be there before the first
        # could be written over what it updates, which holds the parameters once more.
        usable = finite["loss"] & finite["grad_norm"] & finite["param_norm"]
        new = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
        new = jax.tree.map(lambda after, before: jnp.where(usable, after, before), new, state)
        whole = jnp.all(jnp.stack(list(finite.values())))
        return new, metrics | seen | {"finite": whole}, measured

    return step


def make_measure_step(loss_fn: Callable, lens: Lens) -> Callable:
    """A jitted `measure(params, probe_batch) -> (summaries, mean loss of the samples)`."""
    return jax.jit(partial(measure_lens, loss_fn, lens))


def measured_value_and_grad(loss_fn: Callable, lens: Lens) -> Callable:
    """`f(params, batch) -> (loss, gradients, summaries)` in place of jax.value_and_grad.

    For a training step of one's own: summaries are what the lens sees of the batch in the very
    passes that yield the gradients. Raises ValueError for a lens of several sweeps or passes.
    """
    _check_one_sweep(lens)
    if lens.passes > 1:
        raise ValueError(f"a lens of {lens.passes} passes cannot watch one batch; give no chunk")

    def value_and_grad(params, batch):
        stacked = jax.tree.map(lambda leaf: leaf[None], batch)
        loss, grads, summaries = _accumulate(loss_fn, params, stacked, lens)
        return loss, _like(grads, params), summaries

    return value_and_grad


def measure_lens(
    loss_fn: Callable, lens: Lens, params: Any, probe_batch: ProbeBatch
) -> tuple[dict[str, Any], jax.Array | None]:
    """Summaries of every probe of the lens on a probe set, and the mean loss of its samples.

    A lens on weights alone looks at no data, and its loss is None. One forward and backward pass
    over the samples serves all matrices of a sweep, and the first one's forward the activations
    too; no other gradient of a parameter is formed.
    """
    if not lens.sweeps and all(probe.needs == "params" for probe in lens.probes):
        states = _init(lens.probes, Evidence(params))
        return _summarize(lens.probes, states), None
    if not isinstance(probe_batch, ProbeBatch):
        raise ValueError("a probe set is a ProbeBatch(batch), or what split_windows makes of one")
    samples, more = probe_batch
    more_rows = 0 if more is None else num_rows(more) * num_rows(more, 1)
    lens.check_windows(num_rows(samples) + more_rows)
    first, *others = lens.sweeps or (None,)
    zero = jnp.zeros(())
    summaries, loss = _sweep(loss_fn, lens, first, lens.probes, params, probe_batch, zero)
    for sweep in others:
        # One sweep after another, or their gradients would be held together after all; a zero that
        # is known only then keeps the compiler from filling their arrays before.
        params, summaries, zero = jax.lax.optimization_barrier((params, summaries, zero))
        summaries |= _sweep(loss_fn, lens, sweep, (), params, probe_batch, zero)[0]
    return summaries, loss


def _sweep(loss_fn, lens: Lens, sweep: Sweep | None, probes, params, probe_batch, zero):
    forward_only = tuple(probe for probe in probes if probe.needs == "taps")
    probes = _with_gradients(probes, sweep)

    def visit(carry, batch):
        total, states = carry
        loss, evidence = _observe(loss_fn, probes, sweep, params, batch)
        return (total + loss, _update(probes, states, evidence)), None

    parts = jax.tree.map(
        lambda leaf: leaf.reshape(lens.passes, -1, *leaf.shape[1:]), probe_batch.samples
    )
    total, states = _visit_all(
        visit,
        parts,
        lambda part: _observe(loss_fn, probes, sweep, params, part)[1],
        params,
        probes,
        zero,
    )
    if probe_batch.more is not None and forward_only:

        def look(states, batch):
            _, taps = call_loss(loss_fn, params, batch)
            _check_taps(forward_only, taps, batch)
            return _update(forward_only, states, Evidence(params, taps)), None

        seen = {probe.name: states[probe.name] for probe in forward_only}
        states |= jax.lax.scan(look, seen, probe_batch.more)[0]
    return _summarize(probes, states), total / lens.passes


def _with_gradients(probes: tuple[Probe, ...], sweep: Sweep | None) -> tuple[Probe, ...]:
    return probes if sweep is None else (*probes, sweep.probe)


def _check_taps(probes, taps, batch) -> None:
    for probe in probes:
        if probe.needs == "taps":
            check_taps(taps, probe.reads, num_rows(batch))


def _observe(loss_fn, probes, sweep: Sweep | None, params, batch):
    """Loss and evidence of one held-out batch; backward only as far as the sweep asks."""
    if sweep is not None:
        sweep.check_rows(num_rows(batch))
    if sweep is None or sweep.route == "vmap_grad":
        loss, taps = call_loss(loss_fn, params, batch)
        _check_taps(probes, taps, batch)
        return loss, Evidence(params, taps, _mapped(loss_fn, sweep, params, batch))
    watch = Watch(params, sweep.paths, sweep.sink)
    objective = partial(_objective, loss_fn, watch, params, batch)
    (loss, taps), cotangents = jax.value_and_grad(objective, has_aux=True)(watch.sinks)
    _check_taps(probes, taps, batch)
    return loss, Evidence(params, taps, watch.observed(cotangents))


def _mapped(loss_fn, sweep: Sweep | None, params, batch):
    """What the sinks of a sweep would hold, by vmap(grad)."""
    if sweep is None or sweep.route == "one_backward":
        return {}
    grads = per_sample_gradients(loss_fn, params, batch, sweep.paths)
    none = jnp.zeros((), jnp.float32)
    return {path: Observed(sweep.sink.of_rows(rows), none) for path, rows in grads.items()}


def _check_one_sweep(lens: Lens) -> None:
    if len(lens.sweeps) > 1:
        raise ValueError(
            f"a lens of {len(lens.sweeps)} sweeps cannot measure the training batch, which is "
            f"visited once; give sweeps=1, or a fixed probe set"
        )


def _check_micro_batches(batches, probe_batch: ProbeBatch) -> None:
    """Without their leading axis every row would train as a micro-batch, and none would notice."""
    ours, theirs = (jax.tree.leaves(each)[0].ndim for each in (batches, probe_batch.samples))
    if ours != theirs + 1:
        raise ValueError(
            f"batches have leaves of {ours} axes and the probe set of {theirs}: give batches a "
            f"leading axis of micro-batches"
        )


def _accumulate(loss_fn, params, batches, lens: Lens):
    """Mean loss and gradients over micro-batches, and what the lens saw in those very passes.

    The gradients are float32 at least, whatever the parameters are: in bfloat16 a sum over
    micro-batches would lose the small ones.
    """
    check_trainable(params)
    lens.check_windows(num_rows(batches) * num_rows(batches, 1))
    sweep = lens.sweeps[0] if lens.sweeps else None
    probes = _with_gradients(lens.probes, sweep)
    backward = sweep is not None and sweep.route == "one_backward"

    def one_pass(batch):
        if sweep is not None:
            sweep.check_rows(num_rows(batch))
        watched = sweep.paths if backward else ()
        watch = Watch(params, watched, sweep.sink if backward else None)

        def objective(params, sinks):
            return _objective(loss_fn, watch, params, batch, sinks)

        both = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
        (loss, taps), (grads, cotangents) = both(params, watch.sinks)
        _check_taps(probes, taps, batch)
        found = watch.observed(cotangents) | _mapped(loss_fn, sweep, params, batch)
        return loss, _wide(grads), Evidence(params, taps, found)

    def visit(carry, batch):
        (total_loss, total_grads), states = carry
        loss, grads, evidence = one_pass(batch)
        totals = total_loss + loss, jax.tree.map(jnp.add, total_grads, grads)
        return (totals, _update(probes, states, evidence)), None

    num_batches = num_rows(batches)
    start = jnp.zeros(()), jax.tree.map(jnp.zeros_like, _wide(params))
    totals, states = _visit_all(
        visit, batches, lambda batch: one_pass(batch)[2], params, probes, start
    )
    loss, grads = jax.tree.map(lambda total: total / num_batches, totals)
    summaries = _summarize(probes, states)
    if backward:
        for path, grad in get_parameters(grads, sweep.paths).items():
            facts = summaries[f"{FACTS}/{path}"]
            summaries[f"{FACTS}/{path}"] = facts._replace(whole_sq=jnp.sum(grad * grad))
    return loss, grads, summaries


def _wide(tree):
    """The leaves in float32, or in what they are where that is wider."""

    def widened(leaf):
        leaf = jnp.asarray(leaf)
        return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))

    return jax.tree.map(widened, tree)


def _like(tree, other):
    """The leaves in the dtypes of another tree."""
    return jax.tree.map(lambda leaf, like: leaf.astype(jnp.result_type(like)), tree, other)


def _visit_all(visit, batches, look, params, probes, start):
    """Fold visit over stacked batches from (start, empty probe states); one batch needs no loop."""
    first = jax.tree.map(lambda leaf: leaf[0], batches)
    shapes = jax.eval_shape(look, first)._replace(params=params)
    zero = jax.tree.leaves(start)[0]  # of the loss; see measure_lens
    empty = jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), _init(probes, shapes))
    carry = start, empty
    if num_rows(batches) == 1:
        return visit(carry, first)[0]
    return jax.lax.scan(visit, carry, batches)[0]


def _objective(loss_fn, watch: Watch, params, batch, sinks):
    if not sinks:
        return call_loss(loss_fn, params, batch)
    result = call_loss(loss_fn, params, batch, watch.linear(sinks))
    watch.check()
    return result


def _init(probes, shapes: Evidence):
    return {probe.name: probe.init(shapes) for probe in probes}


def _update(probes, states, evidence: Evidence):
    return {probe.name: probe.update(states[probe.name], evidence) for probe in probes}


def _summarize(probes, states) -> dict[str, Any]:
    summaries = {}
    for probe in probes:
        summaries |= probe.summarize(states[probe.name])
    return summaries
