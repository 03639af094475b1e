"""Grokking: the model at '=' against the whole one, probes against slow sums, records to a page."""

import json
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import quick_compiler, shake

from lens_jax.claims import HELD, UNDECIDED
from lens_jax.records import read_step, write_step
from models.command_line import Layer, build
from toy_modular import tasks
from toy_modular.config import GrokConfig
from toy_modular.figure_grokking import draw, mode_plane
from toy_modular.grok import all_pairs, make_splits
from toy_modular.grok_probes import make_features
from toy_modular.grok_summary import (
    grok_summary,
    group_order,
    half_rise,
    key_modes,
    read_run,
    restricted_loss,
)
from toy_modular.grokking import answer_logits, load_data, make_model, make_problem
from toy_modular.presets import GROK, GROK_PUBLISHED
from toy_modular.run_config import RunConfig
from toy_modular.training import train_members

P, WIDTH = 11, 16


@pytest.fixture(scope="module", autouse=True)
def _quick_compiler():
    with quick_compiler():
        yield


def tiny(**values) -> RunConfig:
    small = {
        "grok.p": P,
        "grok.train_fraction": 0.5,
        "size.n_embd": WIDTH,
        "size.n_head": 2,
        "max_steps": 20,
        "measure.rows": 40,
        "measure.samples": 8,
        "measure.chunk": 8,
        "measure.per_doubling": 1,
    }
    values = {key.replace("__", "."): value for key, value in values.items()}
    return build(RunConfig, [Layer("tiny", GROK | small | values)])[0]


@cache
def start(config: RunConfig):
    return shake(jax.jit(make_problem(config).init)(jax.random.key(config.seed)))


def seen_at_last(config: RunConfig, params, tokens) -> tuple[np.ndarray, np.ndarray]:
    """Logits and h at '=', float64."""
    model = make_model(config)
    logits, taps = jax.jit(lambda params: answer_logits(model, params, tokens))(params)
    return np.asarray(logits, np.float64), np.asarray(taps["final_norm/last"], np.float64)


def cross_entropy(logits, answers) -> np.ndarray:
    """One pair at a time, in float64."""
    rows = np.asarray(logits, np.float64)
    return np.array(
        [
            math.log(sum(math.exp(x) for x in row)) - row[a]
            for row, a in zip(rows, answers, strict=True)
        ]
    )


# The problem


@pytest.mark.parametrize("layers", [1, 2])
def test_working_at_the_last_position_alone_changes_nothing(layers):
    config = tiny(size__n_layer=layers)
    model, params = make_model(config), start(config)
    tokens, answers = (array[:20] for array in all_pairs(config.grok))

    def whole(params):
        logits, taps = model.apply({"params": params}, tokens)
        loss = jnp.mean(
            jax.nn.logsumexp(logits[:, -1], axis=-1) - logits[np.arange(20), -1, answers]
        )
        return loss, (logits[:, -1], taps)

    problem = make_problem(config)
    rows = {"tokens": tokens, "answers": answers}
    (loss, (logits, taps)), grads = jax.jit(jax.value_and_grad(whole, has_aux=True))(params)
    (ours, our_taps), our_grads = jax.jit(jax.value_and_grad(problem.loss, has_aux=True))(
        params, rows
    )

    close = {"rtol": 2e-4, "atol": 2e-5}
    np.testing.assert_allclose(ours, loss, **close)
    np.testing.assert_allclose(seen_at_last(config, params, tokens)[0], logits, **close)
    assert set(problem.activations) == set(our_taps)
    np.testing.assert_allclose(our_taps["final_norm/last"], taps["final_norm"][:, -1], **close)
    for i in range(layers):
        name = f"h_{i}/resid_post"
        np.testing.assert_allclose(our_taps[name], taps[name][:, -1], **close)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), our_grads, grads
    )


def test_scores_are_those_of_the_logits():
    config = tiny()
    problem, params = make_problem(config), start(config)
    rows = load_data(config).val
    logits, _ = seen_at_last(config, params, rows["tokens"])
    losses = cross_entropy(logits, rows["answers"])
    score = jax.jit(problem.score)(params, rows)
    assert logits.shape == (len(losses), P + 1)
    assert float(score["loss"]) == pytest.approx(losses.mean(), rel=1e-5)
    right = np.mean(np.argmax(logits, axis=1) == rows["answers"])
    assert float(score["accuracy"]) == pytest.approx(right)
    assert problem.score_train


def test_data_are_the_pairs_of_the_seed():
    config = tiny(seed=3)
    data, splits = load_data(config), make_splits(config.grok, 3)
    for rows, pairs in ((data.train, splits.train), (data.val, splits.val)):
        np.testing.assert_array_equal(rows["tokens"], pairs.tokens)
        np.testing.assert_array_equal(rows["answers"], pairs.answers)
    assert data.test is None


def test_a_vocabulary_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"size\.vocab_size=64 with grok\.p=11: the task has 12"):
        make_model(tiny(size__vocab_size=64))


def test_a_step_decays_every_parameter_by_rate_times_decay():
    config = tiny(optim__weight_decay=0.5)
    problem, params = make_problem(config), start(config)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(problem.tx.update)(zero, problem.tx.init(params), params)
    jax.tree.map(lambda u, p: np.testing.assert_allclose(u, -0.5 * p, rtol=1e-5), updates, params)


@pytest.mark.parametrize("values", [GROK, GROK_PUBLISHED])
def test_presets_are_configurations(values):
    config = build(RunConfig, [Layer("preset", values)])[0]
    assert config.batch is None
    assert config.optim.warmdown == 0
    assert config.optim.decay == "all"
    assert config.tokens_per_step == config.grok.train


# Probes


@pytest.mark.parametrize("operation", ["add", "multiply"])
def test_probes_are_means_over_pairs(operation):
    config = tiny(grok__operation=operation)
    params = start(config)
    found = make_features(config)(params, False)
    tokens, answers = all_pairs(config.grok)
    logits, h = seen_at_last(config, params, tokens)
    for answer in range(P):
        same = [i for i in range(P * P) if answers[i] == answer]
        np.testing.assert_allclose(found["answer/last"][answer], h[same].mean(0), atol=1e-5)
        np.testing.assert_allclose(found["answer/logits"][answer], logits[same].mean(0), atol=1e-5)
    excluded = [
        row - logits[answers == a].mean(0) + logits.mean(0)
        for row, a in zip(logits, answers, strict=True)
    ]
    np.testing.assert_allclose(found["loss/pairs"], cross_entropy(logits, answers), atol=1e-4)
    np.testing.assert_allclose(found["excluded/pairs"], cross_entropy(excluded, answers), atol=1e-4)
    np.testing.assert_array_equal(found["embedding/tokens"], params["wte"]["embedding"][:P])
    np.testing.assert_array_equal(found["unembedding/tokens"], params["lm_head"]["kernel"].T[:P])


def test_a_tied_model_has_no_table_of_its_own_for_the_head():
    config = tiny(arch__head="tied")
    found = make_features(config)(start(config), True)
    assert "unembedding/tokens" not in found
    assert found["answer/logits"].shape == (P, P + 1)


# Modes


@pytest.mark.parametrize("p", [2, 3, 5, 7, 11, 23])
def test_products_add_places_along_the_order(p):
    order = group_order(GrokConfig(p=p, operation="multiply", train_fraction=0.5))
    place = {int(number): i for i, number in enumerate(order)}
    assert sorted(place) == list(range(1, p))
    for a in place:
        for b in place:
            assert place[a * b % p] == (place[a] + place[b]) % (p - 1)


def test_sums_are_in_order_as_they_are_and_products_need_a_prime():
    np.testing.assert_array_equal(group_order(GrokConfig(p=9, operation="subtract")), np.arange(9))
    with pytest.raises(ValueError, match=r"p=9 with operation=multiply: give a prime p"):
        GrokConfig(p=9, operation="multiply")


def waves(c: int, weights: dict[int, float]) -> np.ndarray:
    angle = 2 * np.pi * np.arange(c) / c
    parts = [(w**0.5 * np.cos(r * angle), w**0.5 * np.sin(r * angle)) for r, w in weights.items()]
    return np.stack([column for pair in parts for column in pair], axis=1)


def test_key_modes_are_the_fewest():
    table = waves(13, {2: 0.5, 5: 0.3, 1: 0.15, 6: 0.05})
    assert key_modes(table, 0.45) == (2,)
    assert key_modes(table, 0.7) == (2, 5)
    assert key_modes(table, 0.9) == (2, 5, 1)
    assert key_modes(table, 1.0) == (2, 5, 1, 6)


def test_restricted_loss_keeps_modes_and_mean():
    rng = np.random.default_rng(0)
    answers = np.arange(7)
    logits = rng.normal(size=(7, 8))
    whole = cross_entropy(logits, answers).mean()
    assert restricted_loss(logits, answers, (1, 2, 3)) == pytest.approx(whole)
    # one mode by its own projection
    angle = 2 * np.pi * 2 * np.arange(7) / 7
    rows = logits.mean(0)[None, :] + sum(
        np.outer(f(angle), f(angle) @ logits) * 2 / 7 for f in (np.cos, np.sin)
    )
    assert restricted_loss(logits, answers, (2,)) == pytest.approx(
        cross_entropy(rows, answers).mean()
    )


def test_a_circle_is_a_circle_in_the_plane_of_its_mode():
    points, share = mode_plane(np.pad(waves(13, {3: 2.0}), ((0, 0), (0, 4))) + 5.0, 3)
    assert share == pytest.approx(1.0)
    np.testing.assert_allclose(np.sum(points**2, axis=1), 2.0, rtol=1e-9)
    noise = np.random.default_rng(0).normal(size=(13, 200))
    assert mode_plane(noise, 3)[1] == pytest.approx(2 / 12, abs=0.08)


def test_half_rise_is_for_good():
    steps = np.array([0, 10, 20, 30, 40, 50])
    values = np.array([9.0, 0.0, 6.0, 4.0, 6.0, 10.0])
    assert half_rise(steps, values, 10, 50) == 40
    assert half_rise(steps, values, 10, 20) == 20
    assert half_rise(steps, -values, 10, 50) is None


# A run and its page


def test_a_run_becomes_a_page(tmp_path, monkeypatch):
    task = tasks.Task(make_problem, load_data, make_features)
    monkeypatch.setitem(tasks.TASKS, "grok", task)
    folder = tmp_path / "run"
    (result,) = train_members([tiny(target_accuracy=None)], [folder])
    assert result["step"] == 20
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows if "accuracy" in row} == {"train", "val"}
    found = draw(folder, tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 50_000
    assert found == grok_summary(folder)
    assert found["verdict"] == UNDECIDED
    assert "no grokking within 20 steps" in found["sentence"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    run = read_run(folder)
    assert len(run.alphas()) == len(run.ranks()) == len(run.spectra) == 3
    _, arrays = read_step(folder / "features" / "step_00000020.npz")
    trained_on = make_splits(run.task, 0).train
    losses = arrays["loss/pairs"].reshape(P, P)[*trained_on.tokens[:, :2].T]
    last = [row for row in rows if row["kind"] == "train"][-1]
    assert losses.mean() == pytest.approx(last["loss"], rel=1e-4)


def write_planted(folder, feature_leads: bool) -> None:
    """A run whose embedding becomes a wave of mode 3 by step 40 or after 80; accuracy at 60."""
    folder.mkdir()
    task = {"p": 13, "operation": "add", "train_fraction": 0.5}
    (folder / "config.json").write_text(json.dumps({"task": "grok", "seed": 0, "grok": task}))
    rng = np.random.default_rng(0)
    wave, noise = np.pad(waves(13, {3: 1.0}), ((0, 0), (0, 6))), rng.normal(size=(13, 8))
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(0, 101, 10):
            train, val = float(step >= 20), (1.0 if step >= 80 else 0.7 if step == 70 else 0.2)
            loss = 2.0 if step < 50 else 1.5 if step == 50 else 0.5
            for kind, accuracy in (("train", train), ("val", val)):
                row = {"kind": kind, "step": step, "loss": loss, "accuracy": accuracy}
                file.write(json.dumps(row) + "\n")
    for step in range(0, 101, 10):
        learned = step >= 40 if feature_leads else step >= 80
        table = wave if learned else noise
        tables = {name: table for name in ("embedding/tokens", "answer/last")}
        logits = np.pad(table, ((0, 0), (0, 6)))
        pairs = {"loss/pairs": np.ones(169), "excluded/pairs": np.ones(169)}
        write_step(
            folder / "features", step, tables | {"answer/logits": logits} | pairs, {"tokens": step}
        )
        spectra = {"act_cov_eigenvalues/final_norm/last": np.arange(8, 0, -1.0)}
        weights = {"weight_singular_values/wte/embedding": np.arange(8, 0, -1.0)}
        write_step(folder / "spectra", step, spectra | weights, {"tokens": step})


def test_features_that_lead_are_told_from_those_that_follow(tmp_path):
    for name, leads in (("leads", True), ("follows", False)):
        write_planted(tmp_path / name, leads)
    found = grok_summary(tmp_path / "leads")
    assert (found["trained_step"], found["onset_step"], found["generalised_step"]) == (20, 70, 80)
    assert found["key_modes"] == [3]
    assert found["null_share"] == pytest.approx(2 / 12)
    assert found["ratio"] == 4.0
    assert found["half_rise_steps"] == {
        "embedding": 40, "answers": 40, "val_accuracy": 70, "val_loss": 60,
    }  # fmt: skip
    assert found["val_loss_falls_from_step"] == 20
    assert found["shares"]["embedding"]["before_onset"] == pytest.approx(1.0)
    assert found["verdict"] == HELD
    assert "step 80 (4.0 times later)" in found["sentence"]
    assert draw(tmp_path / "leads", tmp_path / "leads.png")["verdict"] == HELD

    late = grok_summary(tmp_path / "follows")
    assert late["shares"]["embedding"]["before_onset"] < 0.5
    assert late["verdict"] == "did not hold"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no readable JSON"),
        ('{"task": "banded"}', "a run of task=banded, not of task=grok"),
        ('{"task": "grok", "seed": 0, "grok": {}}', "nothing in features/"),
    ],
)
def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
        (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=message) as caught:
        read_run(tmp_path)
    assert "\n" not in str(caught.value)
