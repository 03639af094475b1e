"""Training of members: the scan against a loop, company, resumption, target stop, measurements."""

import json
import shutil

import chz
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import quick_compiler
from tiny_toy import record_dispatches, tiny_member

from lens_jax.records import read_step
from models.command_line import UsageError
from toy_modular import measuring
from toy_modular.language import load_data, make_problem
from toy_modular.members import STREAM_OFFSET, make_program
from toy_modular.training import crossing_tokens, train_members


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick_compiler():
        yield


def curve(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state(folder) -> list[np.ndarray]:
    with np.load(folder / "state.npz") as file:
        return [file[name] for name in sorted(file.files)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an unbroken run of 8 steps."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    (result,) = train_members([tiny_member()], [folder])
    assert (result["reason"], result["step"], result["tokens"]) == ("max_steps", 8, 8 * 4 * 16)
    return folder


def test_a_dispatch_is_the_loop_written_out(whole):
    config = tiny_member()
    problem, train = make_problem(config), load_data(config).train
    params = problem.init(jax.random.key(config.seed))
    opt_state = problem.tx.init(params)
    losses, value_and_grad = [], jax.jit(jax.value_and_grad(lambda p, r: problem.loss(p, r)[0]))
    for step in range(8):
        key = jax.random.fold_in(jax.random.key(config.seed + STREAM_OFFSET), step)
        index = np.asarray(jax.random.randint(key, (4,), 0, 256))
        rows = {"tokens": jnp.asarray(train["tokens"][index])}
        loss, grads = value_and_grad(params, rows)
        losses.append(float(loss))
        updates, opt_state = problem.tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda u: config.lr * u, updates))
    seen = [row["loss"] for row in curve(whole) if row["kind"] == "train"]
    np.testing.assert_allclose(seen, np.mean(np.reshape(losses, (4, 2)), axis=1), rtol=1e-4)


def test_a_run_that_is_stopped_goes_on_bit_by_bit(whole, tmp_path, monkeypatch):
    dispatched = record_dispatches(monkeypatch)
    folder = tmp_path / "run"
    (result,) = train_members([tiny_member()], [folder], until=4)
    assert result["reason"] == "paused"
    # a kill between the curve and the state leaves rows of a dispatch that did not count
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "val", "step": 6, "tokens": 1, "loss": 0.0}) + "\n")
    assert dispatched == [2, 4]
    train_members([tiny_member()], [folder])
    assert dispatched == [2, 4, 6, 8]
    assert curve(folder) == curve(whole)
    for one, other in zip(state(folder), state(whole), strict=True):
        np.testing.assert_array_equal(one, other)
    names = [path.name for path in sorted((folder / "spectra").iterdir())]
    assert names == [path.name for path in sorted((whole / "spectra").iterdir())]
    for name in names:
        for part in ("spectra", "features"):
            if (whole / part / name).exists():
                mine, theirs = read_step(folder / part / name), read_step(whole / part / name)
                assert mine[0] == theirs[0]
                for key, value in theirs[1].items():
                    np.testing.assert_array_equal(mine[1][key], value)


def test_members_in_company_are_as_alone(whole, tmp_path):
    configs = [tiny_member(), tiny_member(lr=3e-3), tiny_member(seed=1)]
    configs = [chz.replace(c, measure=chz.replace(c.measure, per_doubling=0)) for c in configs]
    folders = [tmp_path / f"run{i}" for i in range(3)]
    train_members(configs, folders)
    alone = tmp_path / "alone"
    train_members(configs[2:], [alone])
    for one, other in ((folders[0], whole), (folders[2], alone)):
        mine, theirs = ([row["loss"] for row in curve(folder)] for folder in (one, other))
        np.testing.assert_allclose(mine, theirs, rtol=1e-3)
    assert curve(folders[1])[-1]["loss"] != curve(folders[0])[-1]["loss"]


def test_a_member_that_is_not_alive_stays_as_it_is():
    config = tiny_member()
    program, data = make_program(config), load_data(config)
    member = jax.tree.map(lambda leaf: leaf[None], program.start(0))
    before = jax.tree.map(np.asarray, member)
    train = jax.tree.map(lambda leaf: leaf[None], data.train)
    one = (np.full(1, 1e-3, np.float32), np.zeros(1, np.int32), np.zeros(1, np.int32))
    after, _ = program.advance(member, *one, np.zeros(1, bool), train)
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_target_ends_a_run_and_is_confirmed_on_all(tmp_path):
    config = tiny_member(target_loss=4.1, max_steps=100, lr=1e-2)
    (result,) = train_members([config], [tmp_path / "run"])
    rows = [row for row in curve(tmp_path / "run") if row["kind"] == "val"]
    assert result["reason"] == "target"
    assert rows[-1]["full_loss"] <= 4.1
    # a glance at half of the rows sent for all of them before they were there
    assert all(row.get("full_loss", 5) > 4.1 for row in rows[:-1])
    assert any("full_loss" in row for row in rows[:-1])
    assert {row["rows"] for row in rows} == {32}
    assert result["tokens_to_target"] == rows[-1]["tokens"] == result["tokens"]
    assert rows[-2]["tokens"] <= result["crossing_tokens"] <= rows[-1]["tokens"]
    # nothing is left to do, and asking again does nothing
    written = (tmp_path / "run" / "state.npz").stat().st_mtime_ns
    assert train_members([config], [tmp_path / "run"]) == [result]
    assert (tmp_path / "run" / "state.npz").stat().st_mtime_ns == written


def test_a_diverged_run_ends_and_says_so(tmp_path):
    (result,) = train_members([tiny_member(lr=1e30)], [tmp_path / "run"])
    assert result["reason"] == "diverged"


def test_crossing_is_linear_between_the_last_two():
    rows = [{"kind": "val", "tokens": t, "loss": loss} for t, loss in ((0, 5), (100, 3), (200, 1))]
    assert crossing_tokens(rows, 2.0) == 150
    assert crossing_tokens(rows, 0.5) is None
    assert crossing_tokens(rows[:1], 2.0) is None
    # all rows have 0.5 more than those that were looked at
    assert crossing_tokens([*rows[:2], rows[2] | {"full_loss": 1.5}], 2.5) == 150


def test_measurements_lie_on_a_doubling_grid_of_dispatches():
    steps = [s for s in range(0, 321, 10) if measuring.is_on_grid(s, 10, 1)]
    assert steps == [0, 10, 20, 40, 80, 160, 320]
    # four times the batch at a quarter of the steps: the same tokens
    assert [s // 10 for s in steps] == [s for s in range(33) if measuring.is_on_grid(s, 1, 1)]
    assert not measuring.is_on_grid(0, 10, 0)


def test_records_hold_every_pool_and_the_proxy_under_its_own_name(whole):
    meta, arrays = read_step(whole / "spectra" / "step_00000008.npz")
    sites = {name.partition("/")[2] for name in arrays if name.startswith("act_cov_eigenvalues/")}
    assert sites == {
        *(f"final_norm/{pool}" for pool in ("last", "mean", "tokens")),
        *(f"residual_proxy/{pool}" for pool in ("last", "mean")),
    }
    assert {"lm_head/kernel", "wte/embedding", "h_1/mlp/c_proj/kernel"} <= {
        name.partition("/")[2] for name in arrays if name.startswith("grad_singular_values/")
    }
    assert (meta["step"], meta["tokens"], meta["sequences"]) == (8, 512, 32)


def test_pools_and_proxy_against_a_float64_twin(whole):
    """From the saved weights, by way of the model's own logits."""
    config = tiny_member()
    problem, program, data = make_problem(config), make_program(config), load_data(config)
    member = program.start(0)
    params = jax.tree.unflatten(jax.tree.structure(member), state(whole)).params
    rows = measuring.measured_rows(data.train, 32, config.seed)
    from toy_modular.language import make_model

    logits, taps = make_model(config).apply({"params": params}, rows["tokens"][:, :-1])
    h, z = np.asarray(taps["final_norm"], np.float64), np.asarray(logits, np.float64)
    shares = np.exp(z - z.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    true = np.take_along_axis(shares, rows["tokens"][:, 1:, None], -1)
    _, arrays = read_step(whole / "spectra" / "step_00000008.npz")
    for site, vectors in {
        "final_norm/last": h[:, -1],
        "final_norm/mean": h.mean(axis=1),
        "residual_proxy/last": ((true - 1) * h)[:, -1],
        "residual_proxy/mean": (true - 1).mean(axis=1) * h.mean(axis=1),
    }.items():
        wanted = np.sort(np.linalg.eigvalsh(np.cov(vectors.T)))[::-1]
        found = arrays[f"act_cov_eigenvalues/{site}"]
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4 * wanted[0])
    assert problem.activations[0] == "final_norm/last"


def test_a_folder_of_another_configuration_or_damaged_is_refused(whole, tmp_path):
    with pytest.raises(UsageError, match="another configuration"):
        train_members([tiny_member(lr=2e-3)], [whole])
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "result.json").unlink()
    (folder / "state.npz").write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"state.npz is damaged .*; remove its folder"):
        train_members([tiny_member()], [folder])
