"""Flash kernels, interpreted on the CPU with small tiles, against a dense float64 twin."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import quick_compiler

from models import flash
from models.flash import Launch, Plan, flash_attention, supports, visited_tiles

SCALE = 0.3
EVEN = Plan(*[Launch(16, 16, 4, 1)] * 3)
UNEVEN = Plan(Launch(32, 16, 4, 1), Launch(16, 32, 4, 1), Launch(16, 32, 4, 1))
ARRAYS = ("out", "dq", "dk", "dv")


@pytest.fixture(scope="module", autouse=True)
def _quick_compiler():
    with quick_compiler():
        yield


# Masks: the first key that each query sees


def intervals(rows: list[list[int]], length: int, window=None, block: int = 1) -> np.ndarray:
    """(B, T): documents start at the given positions, windows reach back whole blocks."""
    first = np.zeros((len(rows), length), np.int32)
    for b, starts in enumerate(rows):
        for t in range(length):
            document = max([s for s in starts if s <= t], default=0)
            reach = 0 if window is None else (t // block + 1) * block - window
            first[b, t] = min(max(document, reach, 0), t)
    return first


def random_intervals(rng, length: int) -> np.ndarray:
    """Two rows of few to many documents and, at times, a window of tokens or of blocks."""
    rows = [rng.integers(1, length, rng.integers(0, length // 3)).tolist() for _ in range(2)]
    window = rng.choice([None, rng.integers(1, length)])
    return intervals(rows, length, window, int(rng.choice([1, 8])))


def masks(length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(length)
    inside = [[5, 7, 8, 9, 13], [1, 2, 3, 4, 30, 31, 33, 60]]
    return {
        "causal": intervals([[], []], length),
        "documents on edges": intervals([[16, 48], [32]], length),
        "documents inside": intervals(inside, length),
        "every token its own": intervals([list(range(length))] * 2, length),
        "token window": intervals([[], []], length, 20),
        "block window": intervals([[], [40]], length, 32, 16),
        "both": intervals([[3, 50], [16, 17]], length, 23),
        **{f"random {i}": random_intervals(rng, length) for i in range(6)},
    }


def pairs(first: np.ndarray) -> np.ndarray:
    """(B, T, T): whether query t sees key k."""
    position = np.arange(first.shape[1])
    return (first[:, :, None] <= position) & (position <= position[:, None])


# The twin and the kernels


def dense(q, k, v, do, first) -> dict[str, np.ndarray]:
    """Output and gradients of sum(do * out) in float64."""
    q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))
    scores = np.einsum("bqhk,bshk->bhqs", q, k) * SCALE
    scores = np.where(pairs(first)[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    slope = np.einsum("bqhk,bshk->bhqs", do, v)
    slope = weights * (slope - (weights * slope).sum(-1, keepdims=True)) * SCALE
    return {
        "out": np.einsum("bhqs,bshk->bqhk", weights, v),
        "dq": np.einsum("bhqs,bshk->bqhk", slope, k),
        "dk": np.einsum("bhqs,bqhk->bshk", slope, q),
        "dv": np.einsum("bhqs,bqhk->bshk", weights, do),
    }


def output_and_gradients(plan, q, k, v, do, first):
    attend = partial(flash_attention, scale=SCALE, interpret=True, _plan=plan)
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, first), q, k, v)
    return out, *pull(do)


@cache
def kernels(plan: Plan):
    """The three kernels, and a list that grows by one whenever they are traced."""
    traces = []

    def run(*arrays):
        traces.append(1)
        return output_and_gradients(plan, *arrays)

    return jax.jit(run), traces


def run(plan, *arrays) -> dict[str, np.ndarray]:
    return dict(zip(ARRAYS, kernels(plan)[0](*arrays), strict=True))


def draw(length: int, dtype=jnp.float32, seed: int = 0, rows: int = 2) -> tuple[jax.Array, ...]:
    """q, k, v and a cotangent of two heads."""
    numbers = np.random.default_rng(seed).normal(size=(4, rows, length, 2, 16))
    return tuple(jnp.asarray(x, dtype) for x in numbers)


def assert_close(got, expected):
    np.testing.assert_allclose(got["out"], expected["out"], rtol=0, atol=1e-6)
    for name in ARRAYS[1:]:
        np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("length", "plan"), [(64, EVEN), (77, UNEVEN)])
@pytest.mark.parametrize("name", masks(64))
def test_output_and_gradients_are_the_dense_ones(length, plan, name):
    arrays, first = draw(length), masks(length)[name]
    assert_close(run(plan, *arrays, first), dense(*arrays, first))


@pytest.mark.parametrize("length", [1, 17])
def test_a_row_shorter_than_two_tiles(length):
    arrays, first = draw(length), intervals([[], [9]], length)
    got = run(EVEN, *arrays, first)
    assert_close(got, dense(*arrays, first))
    if length == 1:
        np.testing.assert_array_equal(got["out"], arrays[2])


def test_windows_and_documents_do_not_recompile():
    compiled, traces = kernels(EVEN)
    arrays = draw(64)
    compiled(*arrays, masks(64)["causal"])
    before = len(traces), compiled._cache_size()
    outputs = [compiled(*arrays, first)[0] for first in masks(64).values()]
    assert (len(traces), compiled._cache_size()) == before
    assert len({np.asarray(out).tobytes() for out in outputs}) == len(outputs)


def test_hidden_keys_leave_no_trace_however_large():
    q, k, v, do = draw(64)
    first = intervals([[24], [24]], 64)
    q = q.at[:, 24:].set(jnp.abs(q[:, 24:]))
    loud = k.at[:, :24].set(1e6), v.at[:, :24].set(1e6)  # scores of 1e6 and beyond, hidden
    do = do.at[:, :24].set(0)
    got, quiet = run(EVEN, q, *loud, do, first), run(EVEN, q, k, v, do, first)
    for name in ARRAYS:
        assert np.isfinite(got[name]).all(), name
        np.testing.assert_array_equal(got[name][:, 24:], quiet[name][:, 24:], err_msg=name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close(dtype):
    arrays, first = draw(64, dtype), masks(64)["both"]
    got, expected = run(EVEN, *arrays, first), dense(*arrays, first)
    for name in ARRAYS:
        assert got[name].dtype == jnp.dtype(dtype), name
        error = np.abs(np.asarray(got[name], np.float64) - expected[name]).max()
        assert 0 < error < (0.03 if dtype == "bfloat16" else 0.004), name


def test_a_batch_axis_more():
    """Per-sample gradients are vmap(grad): every leading index has a mask of its own."""
    samples = [draw(40, seed=seed, rows=1) for seed in range(3)]
    first = np.stack([intervals([[]], 40), intervals([[9, 32]], 40), intervals([[]], 40, 5)])
    stacked = (jnp.stack(each) for each in zip(*samples, strict=True))
    mapped = jax.jit(jax.vmap(partial(output_and_gradients, EVEN)))(*stacked, first)
    for i, arrays in enumerate(samples):
        got = dict(zip(ARRAYS, (x[i] for x in mapped), strict=True))
        assert_close(got, dense(*arrays, first[i]))


# Which tiles meet


@pytest.mark.parametrize(("tile_q", "tile_k"), [(16, 16), (32, 8), (8, 32)])
def test_visited_and_whole_tiles_are_exactly_those_of_the_mask(tile_q, tile_k):
    for first in masks(96).values():
        shape = 2, 96 // tile_q, tile_q, 96 // tile_k, tile_k
        seen = pairs(first).reshape(shape).any((2, 4))  # (B, queries, keys)
        whole = pairs(first).reshape(shape).all((2, 4))
        assert visited_tiles(first, tile_q, tile_k) == seen.sum()
        by_queries, by_keys = (
            np.asarray(bounds_of(jnp.asarray(first), tile_q, tile_k))
            for bounds_of in (flash._bounds_of_query_tiles, flash._bounds_of_key_tiles)
        )
        for bounds, some, all_ in ((by_queries, seen, whole), (by_keys, seen.mT, whole.mT)):
            for b, n in np.ndindex(some.shape[:2]):
                start, whole_start, whole_end, end = bounds[b, :, n]
                assert start <= whole_start <= whole_end <= end
                assert np.flatnonzero(some[b, n]).tolist() == [*range(start, end)]
                assert np.flatnonzero(all_[b, n]).tolist() == [*range(whole_start, whole_end)]


def test_visited_tiles_of_a_narrow_window_do_not_grow_with_the_square():
    causal, narrow = intervals([[]], 256), intervals([[]], 256, 32)
    assert visited_tiles(causal, 16, 16) == 16 * 17 // 2
    assert visited_tiles(narrow, 16, 16) == 3 * 16 - 3
    assert visited_tiles(narrow[:, :250], 16, 16) == 3 * 16 - 3


# What is refused


@pytest.mark.parametrize(("width", "fine"), [(8, 0), (16, 1), (24, 0), (64, 1), (256, 1), (512, 0)])
def test_head_widths(width, fine):
    assert supports(width) == bool(fine)
    if not fine:
        x = jnp.zeros((1, 4, 1, width))
        with pytest.raises(ValueError, match=f"head width {width}: give a power of two"):
            flash_attention(x, x, x, jnp.zeros((1, 4), jnp.int32), scale=1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"k": jnp.zeros((1, 5, 1, 16))}, "float32 (1, 5, 1, 16), float32 (1, 4, 1, 16): give one"),
        ({"v": jnp.zeros((1, 4, 1, 16), jnp.bfloat16)}, "bfloat16 (1, 4, 1, 16): give one shape"),
        (
            {"first_key": jnp.zeros((1, 5), jnp.int32)},
            "first_key is int32 (1, 5): give int32 (1, 4",
        ),
        ({"first_key": jnp.zeros((1, 4))}, "first_key is float32 (1, 4): give int32 (1, 4)"),
        ({"scale": 0.0}, "scale=0.0: give a positive number"),
    ],
)
def test_bad_arguments(values, message):
    x = jnp.zeros((1, 4, 1, 16))
    fine = {"q": x, "k": x, "v": x, "first_key": jnp.zeros((1, 4), jnp.int32), "scale": 1.0}
    with pytest.raises(ValueError, match=re.escape(message)):
        flash_attention(**fine | values)


# The GPU's own lowering, with the tiles that it would run


def lowered_for_cuda(function, *arrays) -> str:
    """Lowered text; later versions of jax ask which GPU even where there is none."""
    hopper = jax.sharding.AbstractDevice("NVIDIA H100", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh(
        (1,), ("i",), (jax.sharding.AxisType.Auto,), abstract_device=hopper
    )
    try:
        with jax.sharding.use_abstract_mesh(mesh):
            traced = jax.jit(function).trace(*arrays)
            return traced.lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as error:
        if "No supported GPU devices" not in str(error):
            raise
        pytest.skip("this jax lowers Triton kernels only where there is a GPU")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("width", [64, 128])
def test_kernels_lower_for_cuda(width, dtype):
    array = jax.ShapeDtypeStruct((2, 1024, 3, width), dtype)
    arrays = (array, array, array, jax.ShapeDtypeStruct((2, 1024), jnp.int32))

    def attend(q, k, v, first):
        return flash_attention(q, k, v, first, scale=SCALE)

    def loss(*arrays):
        return attend(*arrays).astype(jnp.float32).sum()

    names = set(re.findall(r'name = "(flash_\w+)"', lowered_for_cuda(attend, *arrays)))
    assert names == {"flash_forward"}
    gradient = lowered_for_cuda(jax.grad(loss, (0, 1, 2)), *arrays)
    names = re.findall(r'name = "(flash_\w+)"', gradient)
    assert sorted(names) == ["flash_dkv", "flash_dq", "flash_forward"]


def test_per_sample_gradients_lower_for_cuda():
    array = jax.ShapeDtypeStruct((4, 1, 1000, 3, 64), jnp.bfloat16)
    arrays = (array, array, array, jax.ShapeDtypeStruct((4, 1, 1000), jnp.int32))

    def loss(*arrays):
        return flash_attention(*arrays, scale=SCALE).astype(jnp.float32).sum()

    text = lowered_for_cuda(jax.vmap(jax.grad(loss, (0, 1, 2))), *arrays)
    assert "flash_dkv" in text
