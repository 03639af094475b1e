"""The PyTorch twin of the benchmark against our model, and the section that times it.

What needs torch is skipped where it is not installed: the twin is a benchmark's peer, and nothing
else here depends on torch.
"""

import sys
from functools import cache, cached_property, partial

import chz
import jax
import numpy as np
import pytest
from tiny_models import TinyModel, quick_compiler, random_tokens, shake, tiny_config

from experiments import bench_peer
from experiments.bench_peer import check_losses, load_peer, load_torch, to_torch
from lens_jax.lens import Lens
from lens_jax.step import init_state, make_train_step
from models.command_line import UsageError
from models.interop import to_published
from models.masks import document_ids, visible_pairs
from optim.groups import learning_rates, make_optimizer
from optim.schedules import Horizon

ROWS, BLOCK, EOT = 4, 16, 5
HORIZON = Horizon(1000, momentum_steps=3)
WINDOWS = np.asarray([32, 64, 96, 128], np.int32)
# 8 layers: some have a value embedding and some none, one has no attention, windows of both kinds
SIZES = {
    "untied": {},
    "attnscale": {"size__n_layer": 8, "size__long_row": 128, "size__eot_token": EOT},
}
# bfloat16 iterations round differently in the two frameworks: 2 to 4 % of an update
FLOAT32_MUON = {"optim__ns_dtype": "float32"}


@pytest.fixture(scope="module", autouse=True)
def _quick_compiler():
    with quick_compiler():
        yield


@pytest.fixture(scope="module")
def torch():
    module = pytest.importorskip("torch", reason="the twin is PyTorch, and torch is not installed")
    module.set_num_threads(1)
    return module


class Pair:
    """One rung in both frameworks, from the same weights on the same tokens and windows."""

    def __init__(self, rung: str, torch):
        self.torch = torch
        self.ours = TinyModel(rung, **SIZES[rung] | FLOAT32_MUON)
        self.config = self.ours.config
        self.batch = {"tokens": random_tokens(ROWS, self.config.row + 1)}
        if self.config.arch.window != "none":
            self.batch["window"] = WINDOWS
        self.params = shake(self.ours.start)
        self.batches = {name: array[None] for name, array in self.batch.items()}

    def trainer(self, compile: bool = False):
        config = self.config
        model = load_peer("torch_twin").Twin(config.arch, config.size, config.row, flex=False)
        model.load_state_dict(self.to_torch(to_published(self.params, config.arch)))
        rates = partial(learning_rates, config.optim, HORIZON)
        return load_peer("torch_step").Trainer(model, config.optim, rates, compile)

    def to_torch(self, arrays):
        return to_torch(self.torch, arrays, "cpu")

    @cached_property
    def loss_and_grads(self):
        both = jax.jit(jax.value_and_grad(lambda p: self.ours.loss_fn(p, self.batch)[0]))
        return both(self.params)

    def our_steps(self, count: int, batches) -> tuple[list[float], dict]:
        """The losses of some steps, and the published parameters after them."""
        tx = make_optimizer(self.config.optim, HORIZON, self.params)
        step = make_train_step(self.ours.loss_fn, tx, Lens())
        state, losses = init_state(jax.tree.map(jax.numpy.asarray, self.params), tx), []
        for _ in range(count):
            state, metrics, _ = step(state, batches, None, measure=False)
            losses.append(float(metrics["loss"]))
        return losses, to_published(jax.tree.map(np.array, state.params), self.config.arch)


@cache
def make_pair(rung: str) -> Pair:
    return Pair(rung, sys.modules["torch"])


@pytest.fixture(params=SIZES)
def pair(torch, request):
    return make_pair(request.param)


def assert_close(got: dict, expected: dict, tolerance: float) -> None:
    """The same names, and arrays that differ by at most a share of their norms."""
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        scale = np.linalg.norm(array)
        assert scale > 0, name
        assert np.linalg.norm(got[name] - array) <= tolerance * scale, name


def test_twin_has_the_published_parameters_and_no_others(pair):
    published = to_published(pair.params, pair.config.arch)
    state = pair.trainer().model.state_dict()
    assert {name: tuple(p.shape) for name, p in state.items()} == {
        name: array.shape for name, array in published.items()
    }


def test_losses_and_gradients_agree(pair):
    loss, grads = pair.loss_and_grads
    trainer = pair.trainer()
    assert trainer.gradients(pair.to_torch(pair.batches)) == pytest.approx(float(loss), rel=1e-5)
    got = {name: p.grad.numpy() for name, p in trainer.model.named_parameters()}
    assert_close(got, to_published(grads, pair.config.arch), 1e-3)


def test_three_updates_of_two_microbatches_agree(pair):
    batches = {name: np.stack([rows, rows[::-1]]) for name, rows in pair.batch.items()}
    start = to_published(pair.params, pair.config.arch)
    losses, expected = pair.our_steps(3, batches)
    trainer = pair.trainer()
    assert [trainer.step(pair.to_torch(batches)) for _ in range(3)] == pytest.approx(
        losses, rel=1e-3
    )
    got = {name: p.numpy() for name, p in trainer.model.state_dict().items()}
    assert_close(got, expected, 1e-3)
    moved, expected = ({n: end[n] - start[n] for n in start} for end in (got, expected))
    assert_close(moved, expected, 1e-2)


def test_iteration_in_bfloat16_agrees_but_for_rounding(torch):
    from optim.muon import newton_schulz

    for shape in ((48, 24), (24, 48)):
        kernel = np.random.default_rng(3).normal(size=shape).astype(np.float32)
        expected = np.asarray(newton_schulz(kernel, 5, "bfloat16")).T
        got = load_peer("torch_step").newton_schulz(
            torch.from_numpy(kernel.T.copy()), 5, torch.bfloat16
        )
        assert np.linalg.norm(got.numpy() - expected) < 0.05 * np.linalg.norm(expected)


# Masks


@pytest.fixture
def masked(torch):
    """Documents (B, T) and windows (B,) in blocks as tensors, and the pairs that should be seen."""
    tokens = random_tokens(ROWS, 128)
    tokens[:2] = np.where(tokens[:2] == EOT, EOT + 1, tokens[:2])  # one document a row
    tokens[1, 70] = EOT
    documents = document_ids(tokens, EOT)
    pairs = visible_pairs((ROWS, 128), documents, WINDOWS, rule="block", block=BLOCK)
    tensors = to_torch(torch, {"documents": documents, "blocks": WINDOWS // BLOCK}, "cpu")
    return tensors["documents"], tensors["blocks"], np.array(pairs)


def test_boolean_mask_is_that_of_the_definition(masked):
    documents, blocks, expected = masked
    got = load_peer("torch_twin").boolean_mask(documents, blocks, BLOCK)
    np.testing.assert_array_equal(got.numpy()[:, 0], expected)


@pytest.mark.parametrize("tile", [8, BLOCK, 32])
def test_flex_mask_is_that_of_the_definition_and_skips_tiles(masked, torch, monkeypatch, tile):
    monkeypatch.setattr(load_peer("torch_twin"), "TILE", tile)
    documents, blocks, expected = masked
    mask = load_peer("torch_twin").flex_mask(documents, blocks, BLOCK)
    index = np.indices(expected.shape)
    row, query, key = (torch.from_numpy(each) for each in index)
    np.testing.assert_array_equal(mask.mask_mod(row, 0, query, key).numpy(), expected)

    tiles = expected.reshape(ROWS, 128 // tile, tile, 128 // tile, tile)
    whole = _listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    partial_ = _listed(mask.kv_num_blocks, mask.kv_indices)
    assert not (whole & partial_).any()
    assert (tiles.all((2, 4)) >= whole).all()
    assert ((whole | partial_) >= tiles.any((2, 4))).all()
    assert whole.any()
    assert (whole | partial_).sum() < 1.2 * tiles.any((2, 4)).sum()


def _listed(counts, indices) -> np.ndarray:
    """(B, 1, N) and (B, 1, N, N) as the bool (B, N, N) that they list."""
    counts, indices = counts.numpy()[:, 0], indices.numpy()[:, 0]
    listed = np.zeros(indices.shape, bool)
    used = np.arange(indices.shape[-1])[None, None] < counts[..., None]
    np.put_along_axis(listed, indices, used, axis=-1)
    return listed


# The section of the benchmark


@pytest.fixture(scope="module")
def bench(torch):
    from experiments.bench_steps import Bench

    values = SIZES["attnscale"] | {"size__n_layer": 2, "batch": 4, "accumulate": 2}
    values |= {"probes__windows": 4, "probes__gradient_windows": 2, "probes__chunk": 2}
    config = chz.replace(tiny_config("attnscale", **values), rung="attnscale")
    return Bench(config, lambda line: None)


def test_section_times_three_routes_from_one_loss(torch, bench, monkeypatch):
    # traced, then run by PyTorch's own operations: inductor takes a minute
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    notes = []
    report = bench_peer.peer_section({"attnscale": bench}, 2, notes.append)
    assert report["torch"] == torch.__version__
    assert (report["device"], report["threads"]) == ("cpu", torch.get_num_threads())
    assert [note.partition(":")[0] for note in notes] == ["attnscale"]
    entry = report["rungs"]["attnscale"]
    assert entry["attention"] == "sdpa, boolean mask"
    for route in ("ours", "torch_eager", "torch_compile"):
        expected = entry["ours"]["first_loss"]
        assert entry[route]["first_loss"] == pytest.approx(expected, rel=1e-5)
        times = entry[route]["step"]
        assert 0 < times["min_s"] <= times["median_s"] <= times["max_s"]
        tokens = bench.config.tokens_per_step
        assert entry[route]["tokens_per_s"] == pytest.approx(tokens / times["median_s"])
    assert entry["speed_ratio_to"].keys() == {"torch_eager", "torch_compile"}
    for route, ratio in entry["speed_ratio_to"].items():
        slowest = entry[route]["step"]["max_s"] / entry["ours"]["step"]["min_s"]
        fastest = entry[route]["step"]["min_s"] / entry["ours"]["step"]["max_s"]
        assert 0.99 * fastest <= ratio <= 1.01 * slowest  # seconds are rounded
        quickest = entry[route]["step"]["min_s"] / entry["ours"]["step"]["min_s"]
        assert entry["fastest_ratio_to"][route] == pytest.approx(quickest, rel=1e-2)


def test_section_refuses_a_twin_with_another_loss(torch, bench, monkeypatch):
    monkeypatch.setattr(bench_peer, "ROUTES", {"torch_eager": False})
    published = bench_peer.to_published

    def altered(params, arch):
        arrays = published(params, arch)
        return arrays | {"lm_head.weight": 2 * arrays["lm_head.weight"]}

    monkeypatch.setattr(bench_peer, "to_published", altered)
    with pytest.raises(UsageError, match=r"rung=attnscale: .* times of different computations"):
        bench_peer.peer_section({"attnscale": bench}, 1, print)


@pytest.mark.parametrize(
    ("rung", "complaint"),
    [("muon", "arch.embed_norm=False: the PyTorch twin has only True"), ("unet", "arch.value=res")],
)
def test_rungs_without_a_twin_are_refused(torch, rung, complaint):
    config = tiny_config(rung)
    with pytest.raises(ValueError, match=complaint):
        load_peer("torch_twin").check_covered(config.arch, config.optim)


@pytest.mark.parametrize("loss", [1.001, float("nan")])
def test_losses_must_agree(loss):
    check_losses("untied", {"ours": 1.0, "torch_eager": 1.00001})
    with pytest.raises(UsageError, match="rung=untied: from the same weights") as caught:
        check_losses("untied", {"ours": 1.0, "torch_eager": 1.0, "torch_compile": loss})
    assert "torch_compile" in str(caught.value)


def test_a_missing_torch_is_answered_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UsageError, match="which is not installed here; pip install torch"):
        load_torch()
    with pytest.raises(UsageError, match="pip install torch"):
        bench_peer.peer_section({}, 1, print)


def test_a_missing_twin_is_answered_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_peer, "PEER_FOLDER", tmp_path)
    with pytest.raises(UsageError, match="run it in a clone of the repository"):
        load_peer("torch_twin")
