"""Per-sample gradients of every matrix from one backward pass, against vmap(grad) and a loop."""

import jax
import numpy as np
import optax
import pytest
from tiny_models import LAYERS, VOCAB, TinyModel, flat, quick_compiler, random_tokens, tiny_model

from experiments.config import MATRICES
from lens_jax.gradients import per_sample_gradients
from lens_jax.lens import ProbeBatch, make_lens
from lens_jax.probes import spectra
from lens_jax.spectra import gram_with_mean
from lens_jax.step import init_state, make_measure_step, make_train_step
from models.ladder import LADDER

RUNGS = [rung.name for rung in LADDER]
SAMPLES = 4
TOLERANCE = 1e-5  # of the largest entry


@pytest.fixture(scope="module", autouse=True)
def _quick_compiler():
    with quick_compiler():
        yield


def one_backward(model: TinyModel, paths, params, **settings) -> dict[str, np.ndarray]:
    """Gram matrices from the sinks of one pass over all samples, or of several."""
    lens = make_lens(windows=SAMPLES, gradients=paths, route="one_backward", **settings)
    batch = ProbeBatch({"tokens": random_tokens(SAMPLES)})
    summaries, loss = make_measure_step(model.loss_fn, lens)(params, batch)
    assert np.isfinite(float(loss))
    return {name: np.asarray(value) for name, value in summaries.items()}


def looped(model: TinyModel, params) -> dict[str, np.ndarray]:
    """Rows (N, P) of every parameter by plain autograd, one sample after another.

    A sample is repeated to fill a batch: the mean loss over copies is its own.
    """
    rows = []
    for tokens in random_tokens(SAMPLES):
        _, grads = model.loss_and_grads(params, np.broadcast_to(tokens, (4, len(tokens))))
        rows.append(flat(grads))
    return {path: np.stack([row[path].ravel() for row in rows]) for path in rows[0]}


def close(got, expected, name):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(
        got, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max(), err_msg=name
    )


def gram64(rows: np.ndarray) -> np.ndarray:
    """What `gram_with_mean` computes, in float64."""
    rows = rows.astype(np.float64)
    stacked = np.concatenate([rows - rows.mean(0), rows.mean(0, keepdims=True)])
    return stacked @ stacked.T


@pytest.mark.parametrize("rung", RUNGS)
def test_one_backward_is_every_samples_own(rung):
    model = tiny_model(rung)
    params = model.shaken
    paths = tuple(
        path
        for i in range(LAYERS)
        for name in MATRICES
        if (path := f"h_{i}/{name.replace('.', '/')}/kernel") in flat(params)
    )
    assert len(paths) == LAYERS * len(MATRICES) - 4 * model.config.arch.drop_attention
    if rung == "rope":
        assert "h_1/attn/c_proj/bias" in flat(params)  # the observed product stands beside a bias
    if "lm_head" in params and model.config.arch.head_dtype == "compute":
        paths += ("lm_head/kernel",)
    summaries = one_backward(model, paths, params)
    found = spectra(summaries, np)
    batch = {"tokens": random_tokens(SAMPLES)}
    mapped = jax.jit(lambda p: per_sample_gradients(model.loss_fn, p, batch, paths))(params)
    rows = looped(model, params)
    for path in paths:
        expected = gram64(rows[path])
        assert np.abs(expected).max() > 0
        close(mapped[path].reshape(SAMPLES, -1), rows[path], f"vmap(grad) of {path}")
        close(gram_with_mean(mapped[path].reshape(SAMPLES, -1)), expected, f"Gram, vmap {path}")
        close(summaries[f"grad/{path}"], expected, f"Gram of {path}")
        values = np.linalg.svd(rows[path].astype(np.float64), compute_uv=False)
        close(found[f"grad_singular_values/{path}"], values, path)
        centred = rows[path] - rows[path].astype(np.float64).mean(0)
        values = np.linalg.svd(centred, compute_uv=False)[: SAMPLES - 1]
        close(found[f"grad_singular_values_centred/{path}"][: SAMPLES - 1], values, path)


def test_passes_and_sweeps_add_up_to_every_samples_own():
    model = tiny_model("attnscale")
    paths = ("h_0/attn/c_q/kernel", "h_0/mlp/c_proj/kernel", "h_3/mlp/c_proj/kernel")
    rows = looped(model, model.shaken)
    for settings in ({"chunk": 1}, {"chunk": 2, "sweeps": 2}):
        summaries = one_backward(model, paths, model.shaken, **settings)
        for path in paths:
            close(summaries[f"grad/{path}"], gram64(rows[path]), f"{path}, {settings}")


def test_micro_batches_that_train_show_every_samples_own():
    """Accumulated gradients: four micro-batches of a row each."""
    model = tiny_model("attnscale")
    path = "h_3/mlp/c_proj/kernel"
    lens = make_lens(windows=SAMPLES, gradients=(path,), chunk=1, route="one_backward")
    tx = optax.sgd(0.1)
    step = make_train_step(model.loss_fn, tx, lens, probe_data="batch")
    state = init_state(jax.tree.map(jax.numpy.copy, model.shaken), tx)
    batches = {"tokens": random_tokens(SAMPLES)[:, None]}
    _, _, measured = step(state, batches, None, measure=True)
    close(measured[f"grad/{path}"], gram64(looped(model, model.shaken)[path]), path)


def test_the_sink_of_a_tied_head_holds_its_use_as_head():
    """The embedding's other use, the lookup, is no product and has no part in it."""
    tied, apart = tiny_model("muon"), TinyModel("muon", arch__head="untied")
    summaries = one_backward(tied, ("wte/embedding",), tied.shaken)
    head = tied.shaken["wte"]["embedding"].T
    rows = looped(apart, tied.shaken | {"lm_head": {"kernel": head}})
    assert rows["lm_head/kernel"].shape == (SAMPLES, head.size)
    assert head.shape[1] == VOCAB
    close(summaries["grad/wte/embedding"], gram64(rows["lm_head/kernel"]), "tied head")


def test_a_float8_head_cannot_be_watched():
    model = tiny_model("fp8head")
    with pytest.raises(ValueError, match="lm_head/kernel is multiplied in float8"):
        one_backward(model, ("lm_head/kernel",), model.shaken)
