"""The objects of a run: the start, the yardstick, and a lens that leaves training alone."""

import chz
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import tiny_config
from tiny_runs import assert_same_arrays, make_data, make_words

from experiments.checksums import leaves_by_path
from experiments.data import TrainWindows, resolve_source
from experiments.devices import make_mesh, place_rows
from experiments.loss import make_loss
from experiments.probe_set import place_probe_set
from experiments.resolve import parse_command, resolve
from experiments.schedule import make_schedule
from experiments.setup import (
    _make_evaluate,
    compute_dtype,
    hold_out,
    make_run,
    read_yardstick,
    validation_chunk,
)
from lens_jax.probes import spectra
from models.gpt import GPT

STEPS = 4
SPREAD = {"probes__windows": 24, "probes__gradient_windows": 8, "probes__chunk": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def build(data, **changed):
    """Configuration, run and the batches of its first steps."""
    small = {"size__short_row": 16, "probes__window": 16, "size__n_embd": 16, "size__n_head": 1}
    small |= {"optim__matrices": "adam"}  # compiles faster
    config, _ = resolve(parse_command(make_words(data, 40, **(small | changed))), "laptop")
    files = resolve_source(config.data)
    config = chz.replace(config, size=chz.replace(config.size, vocab_size=files.vocab_size))
    held = hold_out(config, files)
    run = make_run(config, make_schedule(config), held, read_yardstick(files))
    windows = TrainWindows(files, row=config.row, exclude=held.exclude)
    rows = np.stack([windows[i] for i in range(STEPS * config.rows_per_step)])
    shape = (STEPS, config.accumulate, -1, config.row + 1)
    return config, run, rows.reshape(shape)


def advance(data, measure, **changed):
    """State after a few steps, their losses, and what was measured in each."""
    _, run, batches = build(data, **changed)
    state, losses, measured = run.fresh_state(), [], []
    for rows in batches:
        tokens = {"tokens": place_rows(run.mesh, rows, axis=1)}
        probe_batch = run.probe_batch if measure else None
        state, metrics, seen = run.step(state, tokens, probe_batch, measure=measure)
        losses.append(float(metrics["loss"]))
        measured.append(jax.device_get(seen))
    return leaves_by_path(jax.device_get(state)), losses, measured


@pytest.fixture(scope="module")
def plain(data):
    return advance(data, False)


@pytest.fixture(scope="module")
def on_batch(data):
    return advance(data, True, probe_data="batch")


def test_a_fixed_probe_set_leaves_training_bitwise_alone(data, plain):
    state, losses, measured = advance(data, True)
    assert all(measured)
    assert losses == plain[1]
    assert_same_arrays(state, plain[0])


def test_probes_on_the_batch_leave_training_bitwise_alone(plain, on_batch):
    state, losses, measured = on_batch
    assert all(measured)
    assert losses == plain[1]
    assert_same_arrays(state, plain[0])


def test_a_batch_measured_in_pieces_is_the_batch_measured_at_once(data, on_batch):
    _, losses, measured = advance(data, True, probe_data="batch", accumulate=2)
    np.testing.assert_allclose(losses, on_batch[1], rtol=0, atol=1e-5)
    wanted, got = (spectra(seen[1], np) for seen in (on_batch[2], measured))
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(
            got[name], array, rtol=0, atol=1e-3 * np.abs(array).max(), err_msg=name
        )


def test_every_kernel_of_a_probed_layer_is_measured(on_batch):
    kinds = {"act/h_0/resid_post", "act_last/h_0/resid_post"}
    matrices = ("attn/c_q", "attn/c_v", "attn/c_proj", "mlp/c_proj")
    kinds |= {
        f"{kind}/h_0/{each}/kernel"
        for kind in ("grad", "grad_facts", "weight")
        for each in matrices
    }
    assert set(on_batch[2][0]) == kinds


def test_validation_is_the_mean_loss_of_every_row(data):
    config, run, _ = build(data)
    files = resolve_source(config.data)
    rows = hold_out(config, files).val
    params = run.fresh_state().params
    loss_fn = jax.jit(make_loss(GPT(config.arch, config.size)))
    one_by_one = [float(loss_fn(params, {"tokens": row[None]})[0]) for row in rows]
    assert len(rows) == config.data.val_tokens // config.row
    assert float(run.evaluate(params, None)) == pytest.approx(np.mean(one_by_one), abs=1e-6)


@pytest.mark.parametrize(
    ("rows", "most", "num_devices", "chunk"),
    [
        (16, 8, 1, 8),
        (24, 16, 8, 8),  # 12 divides too, and would be computed whole on each of the eight
        (12, 8, 8, 6),  # none that eight devices can share
        (640, 64, 4, 64),
    ],
)
def test_devices_share_the_rows_of_a_validation_where_they_can(rows, most, num_devices, chunk):
    assert validation_chunk(rows, most, num_devices) == chunk


def test_every_product_of_a_float32_run_is_computed_in_full(data):
    for dtype, precisions in (("float32", {"highest"}), ("bfloat16", {None})):
        found = []

        def loss_fn(params, batch, found=found):
            found.append(jax.config.jax_default_matmul_precision)
            return jnp.float32(0), {}

        rows = np.zeros((4, 3), np.int32)
        _make_evaluate(loss_fn, rows, 2, make_mesh(1), jnp.dtype(dtype))({}, None)
        assert set(found) == precisions
        config, run, batches = build(data, compute_dtype=dtype)
        arguments = run.fresh_state(), {"tokens": batches[0]}, run.probe_batch
        lines = run.step.lower(*arguments, measure=True).as_text().splitlines()
        products = [line for line in lines if "stablehlo.dot_general" in line]
        plain = [line for line in products if "HIGHEST" not in line]
        assert products
        assert bool(plain) == (dtype == "bfloat16")
        assert compute_dtype(config) == dtype


def test_no_probes_no_probe_set(data):
    config, run, _ = build(data, probes="")
    assert run.probe_batch is None
    assert run.facts["gradient_samples"] == 0
    assert make_schedule(config).measure == frozenset()


def test_a_spread_probe_set_is_spread_in_every_pass():
    config = tiny_config("untied", data__probe_spread=True, **SPREAD)
    windows = np.repeat(np.arange(24, dtype=np.int32)[:, None], 3, axis=1)
    found = place_probe_set(config, windows, make_mesh(4))
    samples, rest = found.samples["tokens"][:, 0], found.more["tokens"][:, :, 0]
    # every third window is a gradient sample, every other one of those in a pass
    np.testing.assert_array_equal(samples, [0, 6, 12, 18, 3, 9, 15, 21])
    assert sorted([*samples.tolist(), *rest.ravel().tolist()]) == list(range(24))
    assert rest.shape == (4, 4)
    np.testing.assert_array_equal(rest[0], [1, 7, 13, 19])
    plain = place_probe_set(tiny_config("untied", **SPREAD), windows, make_mesh(4))
    np.testing.assert_array_equal(plain.samples["tokens"][:, 0], np.arange(8))
    np.testing.assert_array_equal(plain.more["tokens"][1, :, 0], np.arange(12, 16))
