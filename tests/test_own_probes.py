"""Probes of a user's own beside those of the lens: the same passes, and arrays as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lens_jax.lens import ProbeBatch, make_lens, split_windows
from lens_jax.probes import Probe, spectra
from lens_jax.step import init_state, make_measure_step, make_train_step

WIDTH, WINDOWS = 5, 16


def loss_fn(params, batch):
    hidden = jnp.tanh(batch @ params["kernel"])  # (B, T, WIDTH)
    return jnp.mean(hidden**2), {"out": hidden}


def largest_probe(name="largest", needs="taps"):
    """The largest value of every direction, (WIDTH,)."""

    def init(evidence):
        return jnp.full(evidence.taps["out"].shape[-1], -jnp.inf)

    def update(state, evidence):
        return jnp.maximum(state, evidence.taps["out"].max((0, 1)))

    return Probe(name, needs, ("out",), init, update, lambda state: {"largest/out": state})


def norm_probe():
    """The norm of the kernel, of parameters alone."""
    return Probe(
        *("norm", "params", ("kernel",)),
        lambda evidence: jnp.linalg.norm(evidence.params["kernel"]),
        lambda state, evidence: state,
        lambda state: {"norm/kernel": state},
    )


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(3, WIDTH)), jnp.float32)}
    return params, jnp.asarray(rng.normal(size=(WINDOWS, 4, 3)), jnp.float32)


def check(found, params, rows):
    hidden = np.tanh(np.asarray(rows) @ np.asarray(params["kernel"]))
    np.testing.assert_allclose(found["largest/out"], hidden.max((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(found["norm/kernel"], np.linalg.norm(params["kernel"]), rtol=1e-6)


@pytest.mark.parametrize("lens_own", [{}, {"gradients": ["kernel"], "activations": ["out"]}])
def test_own_probes_see_all_windows_of_every_pass(problem, lens_own):
    params, rows = problem
    cut = {"samples": 8, "chunk": 4}
    own = [largest_probe(), norm_probe()]
    lens = make_lens(windows=WINDOWS, probes=own, **lens_own, **cut)
    summaries, _ = make_measure_step(loss_fn, lens)(params, split_windows(rows, **cut))
    for found in (spectra(summaries), spectra(summaries, jnp)):
        check(found, params, rows)
        assert ("grad_mean_sq/kernel" in found) == bool(lens_own)
    with pytest.raises(ValueError, match="windows=16, the data has 8"):
        make_measure_step(loss_fn, lens)(params, ProbeBatch(rows[:8]))


@pytest.mark.parametrize("probe_data", ["fixed", "batch"])
def test_own_probes_in_a_training_step(problem, probe_data):
    params, rows = problem
    tx = optax.sgd(0.1)
    lens = make_lens(windows=WINDOWS, probes=[largest_probe(), norm_probe()])
    step = make_train_step(loss_fn, tx, lens, probe_data=probe_data)
    state = init_state(jax.tree.map(jnp.copy, params), tx)
    _, _, summaries = step(state, rows[None], ProbeBatch(rows), measure=True)
    check(spectra(summaries), params, rows)


def test_a_probe_of_parameters_alone_looks_at_no_data(problem):
    lens = make_lens(windows=WINDOWS, probes=[norm_probe()])
    summaries, loss = make_measure_step(loss_fn, lens)(problem[0], None)
    assert loss is None
    assert spectra(summaries).keys() == {"norm/kernel"}


@pytest.mark.parametrize(
    ("probes", "said"),
    [
        ([largest_probe(), largest_probe()], "two probes called 'largest'"),
        ([largest_probe("activation")], "two probes called 'activation'"),
        ([largest_probe(needs="sinks")], "needs 'sinks': a probe of one's own reads"),
    ],
)
def test_what_would_not_work_is_refused(probes, said):
    with pytest.raises(ValueError, match=said):
        make_lens(windows=2, probes=probes)


@pytest.mark.parametrize("summaries", [{"norm": np.ones(1)}, {"norm/a": (1.0, 2.0)}])
def test_a_summary_that_is_no_array_with_a_site_is_refused(summaries):
    with pytest.raises(ValueError, match="no array named <kind>/<site>"):
        spectra(summaries)
