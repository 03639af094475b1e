"""Every rung at tiny size: causality, taps, starts, dtypes, and the parts against slow twins."""

import math
import re

import chz
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import (
    EOT,
    LAYERS,
    ROW,
    VOCAB,
    WIDTH,
    TinyModel,
    flat,
    quick_compiler,
    random_tokens,
    tiny_config,
    tiny_model,
)

from experiments.loss import make_loss
from lens_jax.taps import parameter_paths
from models.config import SizeConfig
from models.flops import flops_per_token, mean_keys
from models.gpt import GPT, init_params, token_loss
from models.ladder import RUNGS
from models.layers import layer_plan
from models.rotary import (
    BASE,
    HALF_BASE,
    frequencies,
    half_frequencies,
    rotary_tables,
    rotate,
)

BLOCK_TAPS = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
# Parameters with a gradient at the start (ladder spec 15.12); a rung not named here: its head.
MOVING = {"baseline": r"wte/|wpe/|.*c_proj/", "rope": "", "muon": r"wte/|.*c_proj/"}


@pytest.fixture(scope="module", autouse=True)
def _quick_compiler():
    with quick_compiler():
        yield


@pytest.fixture(params=RUNGS)
def tiny(request):
    return tiny_model(request.param)


# The steps of the ladder that change what a forward pass is made of.
@pytest.fixture(params=["baseline", "rope", "untied", "unet", "betterwin", "sparsev", "attnscale"])
def unlike(request):
    return tiny_model(request.param)


# Every rung


def test_loss_is_finite_and_near_that_of_a_guess(tiny):
    (loss, _), grads = tiny.loss_and_grads(tiny.start, random_tokens())
    assert abs(float(loss) - math.log(VOCAB)) < 1.0
    if tiny.config.arch.zero_head:
        assert float(loss) == pytest.approx(math.log(VOCAB), abs=1e-5)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_taps_are_all_there_and_add_up(tiny):
    taps = tiny.taps(tiny.shaken, random_tokens())
    plan = layer_plan(tiny.config.arch, LAYERS)
    attending = [i for i, layer in enumerate(plan) if layer.attention]
    names = {
        f"h_{i}/{tap}"
        for i in range(LAYERS)
        for tap in BLOCK_TAPS
        if i in attending or tap != "attn_out"
    }
    inside = {f"h_{i}/{tap}" for i in attending for tap in "qkvz"}
    assert names | inside == {name for name in taps if name.startswith("h_")}
    assert names | {"final_norm", "logits"} <= taps.keys()
    for name, tap in taps.items():
        assert tap.shape == (4, ROW, VOCAB if name == "logits" else WIDTH), name
        assert tap.dtype == np.float32, name
    for i in range(LAYERS):
        stream, attn, middle, mlp, end = (taps.get(f"h_{i}/{name}", 0) for name in BLOCK_TAPS)
        np.testing.assert_allclose(stream + attn, middle, rtol=1e-6, atol=1e-5)
        np.testing.assert_allclose(middle + mlp, end, rtol=1e-6, atol=1e-5)
    for i in attending:
        kernel, bias = (
            tiny.shaken[f"h_{i}"]["attn"]["c_proj"].get(k, 0) for k in ("kernel", "bias")
        )
        out = taps[f"h_{i}/z"].astype(np.float64) @ kernel + bias
        np.testing.assert_allclose(out, taps[f"h_{i}/attn_out"], rtol=1e-4, atol=1e-4)
        if tiny.config.arch.qk_norm:  # rotation keeps the length of a head
            heads = taps[f"h_{i}/q"].reshape(4, ROW, tiny.config.size.n_head, -1)
            np.testing.assert_allclose((heads**2).mean(-1), 1, rtol=1e-2)
    last = taps[f"h_{LAYERS - 1}/resid_post"].astype(np.float64)
    expected = last / np.sqrt((last**2).mean(-1, keepdims=True) + tiny.config.arch.norm_eps)
    np.testing.assert_allclose(taps["final_norm"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position", [0, 1, 15, 16, ROW - 1])
def test_a_token_changes_no_logits_before_it(tiny, position):
    tokens = random_tokens()
    changed = tokens.copy()
    changed[:, position] = (tokens[:, position] + 1) % EOT
    before, after = (tiny.taps(tiny.shaken, each)["logits"] for each in (tokens, changed))
    moved = np.abs(after - before).max(axis=(0, 2))
    assert (moved[:position] == 0).all()
    assert (moved[position:] > 0).all()


def test_gradients_of_logits_reach_all_tokens_up_to_them_and_none_after(unlike):
    """The row of a token's own embedding is the way; logits of absent words spare a tied head."""
    tokens = jnp.arange(ROW)[None]  # all different, so each position has a row of its own
    weights = jnp.asarray(np.random.default_rng(0).normal(size=VOCAB - ROW), jnp.float32)

    def words_at(params, position):
        logits, _ = unlike.model.apply({"params": params}, tokens)
        return logits[0, position, ROW:] @ weights

    slope = jax.jit(jax.grad(words_at))
    for position in (0, 15, 20, ROW - 1):
        for table, grad in slope(unlike.shaken, position).items():
            if table in ("wte", "wpe"):
                reached = np.abs(np.asarray(grad["embedding"]))[:ROW].max(-1)
                assert (reached[: position + 1] > 0).all(), table
                assert (reached[position + 1 :] == 0).all(), table


def test_one_step_lowers_the_loss(tiny):
    _, first, second = tiny.two_steps
    assert bool(first["finite"])
    assert float(second["loss"]) < float(first["loss"])


def test_bfloat16_is_close_and_float32_where_it_matters(unlike):
    tiny = unlike
    half = GPT(tiny.config.arch, tiny.config.size, jnp.bfloat16)
    tokens = random_tokens()
    logits, taps = jax.jit(lambda p: half.apply({"params": p}, tokens[:, :-1]))(tiny.shaken)
    expected = tiny.taps(tiny.shaken, tokens)["logits"]
    assert logits.dtype == jnp.float32
    assert taps["h_1/resid_post"].dtype == jnp.float32
    assert taps["h_1/attn_out"].dtype == jnp.bfloat16
    assert 0 < np.abs(np.asarray(logits) - expected).mean() < 0.04 * expected.std()
    start = jax.eval_shape(lambda: init_params(half, 0))
    assert {leaf.dtype for leaf in jax.tree.leaves(start)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("outside", [VOCAB, -1])
def test_a_token_outside_the_vocabulary_gives_nan(tiny, outside):
    tokens = random_tokens()
    tokens[0, 20] = outside
    missing = np.isnan(tiny.taps(tiny.shaken, tokens)["logits"]).all(-1)
    assert missing[0, 20:].all()
    assert not missing[1:].any()


def test_a_target_outside_the_vocabulary_gives_nan():
    for outside in (-1, 5):
        found = token_loss(jnp.zeros((1, 3, 5)), jnp.array([[0, outside, 4]]))
        np.testing.assert_array_equal(np.isnan(found), [[False, True, False]])


def test_what_a_model_cannot_take_is_told():
    tokens = jnp.zeros((2, 48), jnp.int32)
    config = tiny_config("baseline")
    short = chz.replace(config.size, short_row=32, long_row=64)
    for size, complaint in (
        (chz.replace(short, vocab_size=None, eot_token=None), "size.vocab_size=None: give the num"),
        (short, "rows of 48 tokens: the position table has size.short_row=32; give shorter ones"),
    ):
        with pytest.raises(ValueError, match=complaint):
            jax.eval_shape(GPT(config.arch, size).init, jax.random.key(0), tokens)


def test_one_window_for_all_rows_and_none_beyond_the_widest():
    tiny = tiny_model("betterwin")
    size, tokens = tiny.config.size, random_tokens()[:, :-1]
    inputs = np.where(tokens == EOT, EOT - 1, tokens)  # one document a row

    def logits(window):
        return tiny.model.apply({"params": tiny.shaken}, inputs, window=window)[0]

    rows = jnp.full(len(inputs), size.block, jnp.int32)
    np.testing.assert_array_equal(logits(size.block), logits(rows))
    widest = tiny.config.arch.window_blocks * size.block
    np.testing.assert_array_equal(logits(10 * widest), logits(None))
    assert np.abs(logits(rows) - logits(None)).max() > 1e-3


@pytest.mark.parametrize("rung", ["fixedwin", "betterwin", "lswa"])
def test_documents_do_not_see_one_another(rung):
    tiny, cut = tiny_model(rung), 20
    tokens = random_tokens()
    tokens[:, cut] = EOT
    changed = tokens.copy()
    changed[:, : cut - 1] = (tokens[:, : cut - 1] + 1) % EOT
    before, after = (tiny.taps(tiny.shaken, each)["logits"] for each in (tokens, changed))
    np.testing.assert_array_equal(before[:, cut:], after[:, cut:])
    assert (np.abs(after - before)[:, : cut - 1].max(axis=(0, 2)) > 0).all()


@pytest.mark.parametrize("rung", ["flexwin", "betterwin", "sparsev", "lswa"])
def test_a_window_is_data_and_cuts_what_is_farther_back(rung):
    tiny = TinyModel(rung, size__n_layer=2, size__block=4, arch__window_blocks=4)
    params = tiny.shaken
    run = jax.jit(lambda w, t: tiny.model.apply({"params": params}, t, window=w)[0])
    tokens = random_tokens()[:, :-1]
    changed = tokens.copy()
    changed[:, 0] = (tokens[:, 0] + 1) % EOT
    for window in (4, 8, 16):
        widths = jnp.full((4,), window)
        moved = np.abs(np.asarray(run(widths, changed) - run(widths, tokens))).max(axis=(0, 2))
        first_unmoved = np.flatnonzero(moved)[-1] + 1
        # two layers reach back at most twice the window
        assert 4 <= first_unmoved <= 2 * window
    assert run._cache_size() == 1
    default, widest = run(None, tokens), run(jnp.full((4,), 16), tokens)
    np.testing.assert_array_equal(default, widest)


def test_rows_may_have_windows_of_their_own():
    tiny = tiny_model("flexwin")
    params = tiny.shaken
    apply = jax.jit(lambda w, t: tiny.model.apply({"params": params}, t, window=w)[0])
    tokens = random_tokens()[:, :-1]
    mixed = apply(jnp.asarray([3, 9, 3, 9]), tokens)
    for window, rows in ((3, [0, 2]), (9, [1, 3])):
        alone = apply(jnp.full((4,), window), tokens)
        np.testing.assert_allclose(mixed[np.asarray(rows)], alone[np.asarray(rows)], atol=1e-5)


@pytest.mark.parametrize("rung", ["muon", "lswa"])
def test_remat_changes_no_gradient(rung):
    tiny, tokens = tiny_model(rung), random_tokens()
    again = GPT(tiny.config.arch, tiny.config.size, remat=True)
    loss_fn = make_loss(again)
    step = jax.value_and_grad(lambda p: loss_fn(p, {"tokens": tokens}), has_aux=True)
    assert "remat" in str(jax.make_jaxpr(step)(tiny.shaken))
    (loss, _), grads = jax.jit(step)(tiny.shaken)
    (expected, _), wanted = tiny.loss_and_grads(tiny.shaken, tokens)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    for (path, grad), want in zip(flat(grads).items(), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-6, err_msg=path)


# The start

SCALARS = {"lambdas": (1, 0), "lamb": 0.5, "mix": 0.5, "skip_weights": 1}


@pytest.mark.parametrize("rung", RUNGS)
def test_gradients_and_first_update_of_the_start(rung):
    tiny = tiny_model(rung)
    _, grads = tiny.loss_and_grads(tiny.start, random_tokens())
    start, after = flat(tiny.start), flat(tiny.two_steps[0])
    for path, grad in flat(grads).items():
        moves = re.match(MOVING.get(rung, "lm_head/"), path) is not None
        assert (np.abs(grad).max() > 0) == moves, path
        assert after[path].dtype == np.float32, path
        assert np.isfinite(after[path]).all(), path
        if moves or tiny.config.optim.weight_decay == 0:
            assert (after[path] != start[path]).any() == moves, path


@pytest.mark.parametrize("rung", RUNGS)
def test_starts_are_those_of_the_table(rung):
    tiny = tiny_model(rung)
    arch = tiny.config.arch
    start, torch = flat(tiny.start), arch.init == "torch"
    for path, leaf in start.items():
        zero = path.endswith("bias") or (path == "lm_head/kernel" and arch.zero_head)
        zero = zero or ("c_proj" in path and arch.zero_proj)
        scalar = SCALARS.get(path.rpartition("/")[2])
        if scalar is not None:
            assert np.array_equal(leaf, np.broadcast_to(scalar, leaf.shape)), path
            continue
        bound, deviation = leaf.shape[0] ** -0.5, None
        if zero:
            bound = 0.0
        elif path == "wte/embedding" and torch and arch.head == "tied":
            bound = WIDTH**-0.5
        elif path.endswith("embedding"):
            deviation = 1.0 if torch else 0.02
        elif not torch:
            deviation = 0.02 / (2 * LAYERS) ** 0.5 if "c_proj" in path else 0.02
        if deviation is None:
            assert np.abs(leaf).max() <= bound, path
            deviation = bound / 3**0.5
        assert leaf.std() == pytest.approx(deviation, rel=0.08, abs=1e-12), path
        assert abs(leaf.mean()) <= 5 * deviation / leaf.size**0.5, path
    random = [leaf for path, leaf in start.items() if "c_q" in path or "c_k" in path]
    attentions = sum(layer.attention for layer in layer_plan(arch, LAYERS))
    assert len({leaf.tobytes() for leaf in random}) == 2 * attentions  # no two start alike
    assert not np.array_equal(tiny.start_of(1)["wte"]["embedding"], start["wte/embedding"])


def test_gradient_of_a_tied_head_is_the_sum_of_both_uses():
    tied, apart = tiny_model("muon"), TinyModel("muon", arch__head="untied")
    _, grads = tied.loss_and_grads(tied.shaken, random_tokens())
    head = {"lm_head": {"kernel": tied.shaken["wte"]["embedding"].T}}
    _, parts = apart.loss_and_grads(tied.shaken | head, random_tokens())
    total = parts["wte"]["embedding"] + parts.pop("lm_head")["kernel"].T
    np.testing.assert_allclose(grads["wte"]["embedding"], total, rtol=1e-4, atol=1e-6)
    assert np.abs(np.asarray(parts["wte"]["embedding"])).max() > 1e-3
    for path, grad in flat(parts).items():
        if path != "wte/embedding":
            np.testing.assert_allclose(flat(grads)[path], grad, rtol=1e-4, atol=1e-6)


# The parts


@pytest.mark.parametrize("sign", [-1, 1])
def test_rotary_turns_complex_numbers(sign):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 9, 3, 8)).astype(np.float32)
    got = rotate(jnp.asarray(x), *rotary_tables(9, frequencies(8), jnp.float32), sign)
    angle = np.arange(9)[:, None] * BASE ** (-np.arange(0, 8, 2) / 8)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * sign * angle)[None, :, None]
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=2e-6)
    spoken = rotate(jnp.asarray(x), *rotary_tables(9, frequencies(8), jnp.bfloat16), sign)
    assert spoken.dtype == jnp.float32
    assert 1e-4 < np.abs(np.asarray(spoken - got)).max() < 0.03


def test_half_of_a_truncated_head_never_turns():
    turning = np.asarray(half_frequencies(16), np.float64)
    np.testing.assert_allclose(turning[:4], HALF_BASE ** (-np.arange(4) / 3), rtol=1e-6)
    assert (turning[4:] == 0).all()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 2, 16)), jnp.bfloat16)
    got = rotate(x, *rotary_tables(5, half_frequencies(16), jnp.float32), -1)
    assert got.dtype == jnp.bfloat16
    still = np.r_[4:8, 12:16]
    np.testing.assert_array_equal(np.asarray(got)[..., still], np.asarray(x)[..., still])


def test_token_loss_is_numpys():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(2, 5, 11)) * 10, rng.integers(0, 11, (2, 5))
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    got = token_loss(jnp.asarray(logits, jnp.float32), jnp.asarray(targets))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    targets[1, 2] = 11
    outside = token_loss(jnp.asarray(logits, jnp.float32), jnp.asarray(targets))
    assert np.argwhere(np.isnan(np.asarray(outside))).tolist() == [[1, 2]]


def test_flops_are_those_of_every_product():
    size = SizeConfig(
        n_layer=6, n_head=2, n_embd=16, vocab_size=50, eot_token=49, block=8, short_row=24,
        long_row=24,
    )  # fmt: skip
    tokens = np.zeros((1, 24), np.int32)
    model = GPT(tiny_config("untied").arch, size)
    kernels = [s.size for s in jax.tree.leaves(jax.eval_shape(lambda: init_params(model, 0)))]
    multiplications = 24 * (sum(kernels) - 50 * 16)  # the embedding is a lookup
    for query in range(24):
        multiplications += 6 * 2 * 16 * (query + 1)  # scores and mixing, in six layers
    # two operations each, and twice as many backward as forward
    found = flops_per_token(model.arch, size, tokens)
    assert found == pytest.approx(6 * multiplications / 24)

    arch = tiny_config("lswa").arch
    model = GPT(arch, size)
    params = jax.eval_shape(lambda: init_params(model, 0))
    kernels = [leaf.size for path, leaf in shapes_of(params) if path.endswith("kernel")]
    multiplications = 24 * sum(kernels)
    for layer in layer_plan(arch, 6):
        blocks = 2 if layer.long_window else 1
        for query in range(24 * layer.attention):
            multiplications += 2 * 16 * (query - max(0, query // 8 - blocks + 1) * 8 + 1)
    assert flops_per_token(arch, size, tokens, 16) == pytest.approx(6 * multiplications / 24)


def shapes_of(tree):
    return zip(parameter_paths(tree), jax.tree.leaves(tree), strict=True)


def test_documents_have_fewer_keys():
    config = tiny_config("fixedwin")
    tokens = random_tokens(1, 32)
    whole = mean_keys(config.arch, config.size, tokens, 128)
    tokens[0, 16] = EOT
    assert whole == 16.5
    assert mean_keys(config.arch, config.size, tokens, 128) == 8.5
    assert mean_keys(config.arch, config.size, tokens, 1) == 1
