"""Random-feature regression: both tracks against models written out in float64 NumPy."""

import math

import jax
import numpy as np
import pytest
from tiny_models import flat, quick_compiler, shake

from lens_jax.records import read_step
from models.command_line import Layer, build
from models.rotary import frequencies
from optim.groups import group_labels
from toy_modular import tasks
from toy_modular.presets import RFF, RFF_PUBLISHED
from toy_modular.rff import features, make_splits, make_teacher
from toy_modular.rff_model import SEEDS, load_data, make_problem
from toy_modular.run_config import RunConfig
from toy_modular.training import train_members

ROWS, LENGTH, WIDTH, HEADS, FEATURES = 5, 10, 16, 2, 12
ROPE = {"arch.position": "rope", "arch.qk_norm": True}
VARIANTS = {
    "plain": {},
    "rope": ROPE,
    "unet": {"arch.unet": True},
    "fixed_window": {"arch.window": "token", "arch.window_blocks": 1},
    "attn_scale": {"arch.attn_scale": 0.12},
}


@pytest.fixture(scope="module", autouse=True)
def _quick_compiler():
    with quick_compiler():
        yield


def tiny(values: dict | None = None, **rff) -> RunConfig:
    small = {
        "size.n_embd": WIDTH,
        "size.n_head": HEADS,
        "size.block": 4,
        "rff.seq_len": LENGTH,
        "rff.input_dim": 3,
        "rff.num_features": FEATURES,
        "rff.train": 48,
        "rff.val": 16,
        "rff.test": 16,
        "batch": 8,
        "max_steps": 4,
        "eval_every": 2,
        "measure.rows": 24,
        "measure.samples": 8,
        "measure.chunk": 8,
    }
    rff = {f"rff.{key}": value for key, value in rff.items()}
    return build(RunConfig, [Layer("tiny", RFF | small | rff | (values or {}))])[0]


def start(config: RunConfig, seed: int = 0):
    return shake(jax.jit(make_problem(config).init)(jax.random.key(seed)))


def loss_of(config: RunConfig):
    return jax.jit(make_problem(config).loss)


# Slow twins


def linear(p, x):
    return x @ np.asarray(p["kernel"], np.float64) + np.asarray(p["bias"], np.float64)


def layer_norm(p, x):
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return normed * np.asarray(p["scale"], np.float64) + np.asarray(p["bias"], np.float64)


def turn(x, position: int):
    """One head (K,) by rotate-half with sign 1."""
    half = len(x) // 2
    angle = position * np.asarray(frequencies(len(x)), np.float64)
    first, second = x[:half], x[half:]
    return np.concatenate(
        [
            first * np.cos(angle) - second * np.sin(angle),
            first * np.sin(angle) + second * np.cos(angle),
        ]
    )


def slow_attention(p, x, config):
    """One row (T, D), query by query and head by head."""
    arch, width = config.arch, WIDTH // HEADS
    q, k, v = (linear(p[name], x).reshape(LENGTH, HEADS, width) for name in ("c_q", "c_k", "c_v"))
    if arch.qk_norm:
        q, k = (each / np.sqrt((each**2).mean(-1, keepdims=True) + 2.0**-23) for each in (q, k))
    if arch.position == "rope":
        q, k = (
            np.array([[turn(each[t, h], t) for h in range(HEADS)] for t in range(LENGTH)])
            for each in (q, k)
        )
    reach = 4 if arch.window == "token" else LENGTH
    scale = arch.attn_scale or width**-0.5
    out = np.zeros_like(q)
    for t in range(LENGTH):
        seen = range(max(0, t - reach + 1), t + 1)
        for h in range(HEADS):
            weights = np.exp([scale * q[t, h] @ k[s, h] for s in seen])
            out[t, h] = sum(w * v[s, h] for w, s in zip(weights / weights.sum(), seen, strict=True))
    return linear(p["c_proj"], out.reshape(LENGTH, WIDTH))


def slow_transformer(params, phi, config):
    """Prediction and h of one row of features (T, P)."""
    x = linear(params["wte"], phi)
    if config.arch.position == "learned":
        x = x + np.asarray(params["wpe"]["embedding"], np.float64)
    first = None
    for i in range(2):
        if i == 1 and config.arch.unet:
            x = x + float(params["skip_weights"][0]) * first
        p = params[f"h_{i}"]
        x = x + slow_attention(p["attn"], layer_norm(p["ln_1"], x), config)
        hidden = linear(p["mlp"]["c_fc"], layer_norm(p["ln_2"], x))
        gelu = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        x = x + linear(p["mlp"]["c_proj"], gelu)
        first = x if i == 0 else first
    return linear(params["lm_head"], x[-1])[0], x[-1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_transformer_is_the_one_written_out(variant):
    seed = 0 if variant == "plain" else 5
    config = tiny({"seed": seed} | VARIANTS[variant])
    params = start(config)
    assert ("wpe" in params) == (variant != "rope")
    rows = {name: leaf[:ROWS] for name, leaf in load_data(config).train.items()}
    loss, taps = loss_of(config)(params, rows)
    phi = features(rows["latents"], make_teacher(config.rff, seed))
    slow = [slow_transformer(params, row, config) for row in phi]
    prediction, h = (np.array(part) for part in zip(*slow, strict=True))
    residual = prediction - rows["targets"]
    assert float(loss) == pytest.approx(np.mean(residual**2), rel=1e-4)
    np.testing.assert_allclose(taps["final/last"], h, rtol=1e-3, atol=1e-4)
    proxy = 2 * residual[:, None] * h
    np.testing.assert_allclose(taps["residual_proxy/last"], proxy, rtol=1e-3, atol=1e-3)


def test_the_linear_model_is_the_teacher_at_its_coefficients():
    config = tiny(track="B", noise_std=0.0)
    rows = load_data(config).val
    coefficients = make_teacher(config.rff, 0).coefficients.astype(np.float32)
    params = {"lm_head": {"kernel": coefficients[:, None], "bias": np.zeros(1, np.float32)}}
    loss, taps = loss_of(config)(params, rows)
    assert float(loss) < 1e-12
    phi = features(rows["latents"], make_teacher(config.rff, 0))
    np.testing.assert_allclose(taps["final/last"], phi.mean(1), atol=1e-6)
    assert set(flat(start(config))) == {"lm_head/kernel", "lm_head/bias"}
    # where the error is that of nothing predicted
    zero = jax.tree.map(np.zeros_like, params)
    assert float(loss_of(config)(zero, rows)[0]) == pytest.approx(np.mean(rows["targets"] ** 2))


@pytest.mark.parametrize("track", ["A", "B"])
def test_the_proxy_is_the_gradient_of_the_readout(track):
    config = tiny(track=track)
    problem, params = make_problem(config), start(config)
    rows = {name: leaf[:ROWS] for name, leaf in load_data(config).train.items()}
    _, taps = loss_of(config)(params, rows)
    grads = jax.jit(jax.grad(lambda p, r: problem.loss(p, r)[0]))(params, rows)
    gradient = np.asarray(grads["lm_head"]["kernel"])[:, 0]
    np.testing.assert_allclose(np.mean(taps["residual_proxy/last"], axis=0), gradient, rtol=1e-4)


def test_every_parameter_has_its_group():
    labels = flat_labels(tiny({"arch.unet": True, "optim.matrices": "muon"}))
    assert labels["wte/kernel"] == labels["wpe/embedding"] == "embed"
    assert labels["lm_head/kernel"] == labels["lm_head/bias"] == "head"
    assert labels["skip_weights"] == labels["h_0/ln_1/scale"] == labels["h_1/mlp/c_fc/bias"]
    matrices = {path for path, label in labels.items() if label == "matrix"}
    names = ("attn/c_q", "attn/c_k", "attn/c_v", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")
    assert matrices == {f"h_{i}/{name}/kernel" for i in range(2) for name in names}


def flat_labels(config: RunConfig) -> dict[str, str]:
    params = jax.eval_shape(make_problem(config).init, jax.random.key(0))
    paths, _ = jax.tree_util.tree_flatten_with_path(group_labels(params))
    return {jax.tree_util.keystr(p, simple=True, separator="/"): str(x) for p, x in paths}


def test_parameters_start_as_torch_has_them():
    config = tiny({"size.n_embd": 128})
    params = flat(jax.jit(make_problem(config).init)(jax.random.key(0)))
    bounds = {"wte/bias": FEATURES, "h_0/attn/c_q/kernel": 128, "h_1/mlp/c_proj/bias": 256}
    for path, fan_in in bounds.items():
        reach = np.abs(params[path]).max() * fan_in**0.5
        assert 0.9 < reach <= 1.0, path
    assert params["wpe/embedding"].std() == pytest.approx(0.02, rel=0.1)
    np.testing.assert_array_equal(params["h_0/ln_1/scale"], 1.0)


def test_data_are_the_splits_of_the_seed_with_its_teacher():
    config = tiny({"seed": 2})
    for rows, split in zip(load_data(config), make_splits(config.rff, 2), strict=True):
        np.testing.assert_array_equal(rows["latents"], split.latents)
        np.testing.assert_array_equal(rows["targets"], split.targets)
        assert set(rows["teacher"]) == {2}
    with pytest.raises(ValueError, match=f"seed={SEEDS} with task=rff: give at most {SEEDS - 1}"):
        load_data(tiny({"seed": SEEDS}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arch.value": "residual"}, r"arch\.value=residual with task=rff.*set arch\.value=plain"),
        ({"arch.softcap": 30.0}, r"arch\.softcap=30\.0 with task=rff.*set arch\.softcap=None"),
        ({"arch.position": "half_rope"}, r"arch\.position=half_rope with task=rff"),
        ({"arch.window": "block"}, r"arch\.window=block with task=rff"),
        ({"arch.unet": True, "size.n_layer": 1}, r"size\.n_layer=1 with arch\.unet"),
    ],
)
def test_what_the_model_has_not_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        make_problem(tiny(values))


def test_members_of_two_seeds_learn_from_their_own_teachers(tmp_path, monkeypatch):
    task = tasks.Task(make_problem, load_data, lambda config: None)
    monkeypatch.setitem(tasks.TASKS, "rff", task)
    configs = [tiny({"seed": seed, "lr": 0.02, "max_steps": 600, "eval_every": 300}
                    | {"measure.per_doubling": 0}, track="B", noise_std=0.0)
               for seed in (0, 1)]  # fmt: skip
    results = train_members(configs, [tmp_path / "0", tmp_path / "1"])
    for config, result in zip(configs, results, strict=True):
        spread = np.var(load_data(config).test["targets"])
        assert result["test_loss"] < 0.1 * spread


def test_a_run_of_the_transformer_is_measured(tmp_path, monkeypatch):
    task = tasks.Task(make_problem, load_data, lambda config: None)
    monkeypatch.setitem(tasks.TASKS, "rff", task)
    config = tiny(ROPE | {"optim.matrices": "muon", "size.n_layer": 1})
    (result,) = train_members([config], [tmp_path / "run"])
    assert result["tokens"] == 4 * 8
    _, arrays = read_step(tmp_path / "run" / "spectra" / "step_00000004.npz")
    assert arrays["act_cov_eigenvalues/final/last"].shape == (WIDTH,)
    assert arrays["act_cov_eigenvalues/residual_proxy/last"].shape == (WIDTH,)
    for path in ("wte/kernel", "lm_head/kernel", "h_0/attn/c_proj/kernel", "h_0/mlp/c_proj/kernel"):
        assert arrays[f"grad_singular_values/{path}"].shape == (8,)
        assert f"weight_singular_values/{path}" in arrays


@pytest.mark.parametrize("values", [RFF, RFF_PUBLISHED])
def test_presets_are_configurations(values):
    config = build(RunConfig, [Layer("preset", values)])[0]
    assert (config.batch, config.lr, config.tokens_per_step) == (128, 3e-4, 128)
