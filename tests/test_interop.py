"""Published names and layouts, to our tree and back."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_models import LAYERS, VOCAB, WIDTH, flat, shake, tiny_model

from models.config import ArchConfig, SizeConfig
from models.gpt import init_params
from models.interop import (
    COMPILED_PREFIX,
    by_path,
    from_published,
    published_name,
    to_published,
)
from models.ladder import RUNGS

GOLDEN = Path(__file__).parents[2] / "shared/golden"
FIXTURES = [path for path in sorted(GOLDEN.glob("*.npz")) if "spectra" not in path.name]
# A made-up array for every kind of name of the sixteen rungs, and the path that it has here.
KERNELS = {
    "transformer.h.0.attn.c_q.weight": ("h_0/attn/c_q/kernel", (6, 6)),
    "transformer.h.0.attn.c_k.weight": ("h_0/attn/c_k/kernel", (6, 6)),
    "transformer.h.0.attn.c_v.weight": ("h_0/attn/c_v/kernel", (6, 6)),
    "transformer.h.0.attn.c_proj.weight": ("h_0/attn/c_proj/kernel", (6, 6)),
    "transformer.h.11.mlp.c_fc.weight": ("h_11/mlp/c_fc/kernel", (24, 6)),
    "transformer.h.11.mlp.c_proj.weight": ("h_11/mlp/c_proj/kernel", (6, 24)),
    "lm_head.weight": ("lm_head/kernel", (10, 6)),
}
OTHERS = {
    "transformer.wte.weight": ("wte/embedding", (10, 6)),
    "transformer.wpe.weight": ("wpe/embedding", (8, 6)),
    "transformer.vte.weight": ("value_embed/embedding", (10, 36)),
    "value_embeds.emb.0.weight": ("value_embed_0/embedding", (10, 6)),
    "value_embeds.emb.1.weight": ("value_embed_1/embedding", (10, 6)),
    "value_embeds.emb.2.weight": ("value_embed_2/embedding", (10, 6)),
    "skip_weights": ("skip_weights", (6,)),
    "transformer.h.0.attn.c_proj.bias": ("h_0/attn/c_proj/bias", (6,)),
    "transformer.h.0.attn.lamb": ("h_0/attn/lamb", ()),
    "transformer.h.0.lambdas": ("h_0/lambdas", (2,)),
    "transformer.h.11.attn.mix": ("h_11/attn/mix", (2,)),
}
UNTIED = ArchConfig(position="rope", head="untied")


def made_up(shapes) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def drawn(rung: str) -> tuple[ArchConfig, SizeConfig, dict]:
    """What a rung is made of and parameters of its shapes, without compiling its start."""
    model = tiny_model(rung).model
    shapes = jax.eval_shape(lambda: init_params(model, 0))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return model.arch, model.size, shake(zeros)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


def test_every_kind_of_name_there_and_back():
    table = KERNELS | OTHERS
    published = made_up({name: shape for name, (_, shape) in table.items()})
    params = from_published(published, UNTIED)
    expected = {
        path: published[name].T if name in KERNELS else published[name]
        for name, (path, _) in table.items()
    }
    assert_same(dict(by_path(params)), expected)
    assert_same(to_published(params, UNTIED), published)
    assert {path: published_name(path, UNTIED) for path in expected} == {
        path: name for name, (path, _) in table.items()
    }


def test_fused_matrix_there_and_back():
    arch = ArchConfig(position="learned")
    published = made_up({"transformer.h.10.attn.c_attn.weight": (18, 6)})
    (fused,) = published.values()
    params = from_published(published, arch)
    attn = params["h_10"]["attn"]
    assert attn.keys() == {"c_q", "c_k", "c_v"}
    for part, name in enumerate(("c_q", "c_k", "c_v")):
        np.testing.assert_array_equal(attn[name]["kernel"], fused[6 * part : 6 * part + 6].T)
        named = published_name(f"h_10/attn/{name}/kernel", arch)
        assert named == "transformer.h.10.attn.c_attn.weight"
    # jax sorts the keys of a dict: q, k, v must not follow that order
    params["h_10"]["attn"] = dict(sorted(attn.items()))
    assert_same(to_published(params, arch), published)


def test_a_part_of_the_fused_matrix_is_refused():
    params = {"h_2": {"attn": {"c_k": {"kernel": np.zeros((6, 6))}}}}
    said = r"^transformer.h.2.attn.c_q.weight: missing, and transformer.h.2.attn.c_attn.weight is"
    with pytest.raises(ValueError, match=said):
        to_published(params, ArchConfig(position="learned"))


@pytest.mark.parametrize("shape", [(), (6,), (19, 6), (18, 6, 1)])
def test_a_fused_matrix_that_is_no_three_is_refused(shape):
    name = "transformer.h.0.attn.c_attn.weight"
    with pytest.raises(ValueError, match=rf"^{name}: shape \({', '.join(map(str, shape))}"):
        from_published({name: np.zeros(shape)}, ArchConfig())


@pytest.mark.parametrize("rung", RUNGS)
def test_round_trip_in_both_directions(rung):
    arch, _, params = drawn(rung)
    ours, published = flat(params), to_published(params, arch)
    again = flat(from_published(published, arch))
    assert again.keys() == ours.keys()
    for path, leaf in ours.items():
        np.testing.assert_array_equal(again[path], leaf)
    there = to_published(from_published(published, arch), arch)
    assert there.keys() == published.keys()
    for name, array in published.items():
        np.testing.assert_array_equal(there[name], array)


def test_layouts_are_torchs():
    arch, _, params = drawn("baseline")
    published, ours = to_published(params, arch), flat(params)
    assert published["transformer.h.1.mlp.c_fc.weight"].shape == (4 * WIDTH, WIDTH)
    np.testing.assert_array_equal(
        published["transformer.h.1.mlp.c_fc.weight"], ours["h_1/mlp/c_fc/kernel"].T
    )
    fused = published["transformer.h.0.attn.c_attn.weight"]
    assert fused.shape == (3 * WIDTH, WIDTH)
    for part, name in enumerate(("c_q", "c_k", "c_v")):
        x = np.random.default_rng(part).normal(size=WIDTH)
        rows = fused[part * WIDTH : (part + 1) * WIDTH]
        np.testing.assert_allclose(rows @ x, x @ ours[f"h_0/attn/{name}/kernel"], atol=1e-6)
    assert published["transformer.wte.weight"].shape == (VOCAB, WIDTH)
    assert "lm_head.weight" not in published


@pytest.mark.skipif(not FIXTURES, reason="no reference fixtures beside the repository")
@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_every_fixture_comes_back_exactly(path):
    with np.load(path, allow_pickle=False) as file:
        stored = {k.removeprefix("param/"): file[k] for k in file.files if k.startswith("param/")}
    arch = ArchConfig(
        position="learned" if "transformer.wpe.weight" in stored else "rope",
        head="untied" if "lm_head.weight" in stored else "tied",
    )
    params = from_published(stored, arch)
    assert sum(leaf.size for _, leaf in by_path(params)) == sum(a.size for a in stored.values())
    assert_same(to_published(params, arch), stored)


def test_names_of_every_rung():
    arch, _, params = drawn("rope")
    bias = to_published(params, arch)
    assert sum(name.endswith("bias") for name in bias) == LAYERS
    arch, _, params = drawn("untied")
    head = to_published(params, arch)
    assert head["lm_head.weight"].shape == (VOCAB, WIDTH)


@pytest.mark.parametrize("rung", ["baseline", "untied"])
def test_compiled_prefix_and_both_names_of_a_tied_matrix(rung):
    arch, _, params = drawn(rung)
    published = to_published(params, arch)
    saved = {COMPILED_PREFIX + name: array for name, array in published.items()}
    saved.setdefault(f"{COMPILED_PREFIX}lm_head.weight", published["transformer.wte.weight"])
    again, ours = flat(from_published(saved, arch)), flat(params)
    assert again.keys() == ours.keys()
    assert all(np.array_equal(again[path], leaf) for path, leaf in ours.items())


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_the_head_alone_is_the_embedding_of_a_tied_model(head):
    published = made_up({"lm_head.weight": (10, 6)})
    (path, leaf), *rest = by_path(from_published(published, ArchConfig(head=head)))
    assert not rest
    assert path == ("wte/embedding" if head == "tied" else "lm_head/kernel")
    assert leaf.shape == ((10, 6) if head == "tied" else (6, 10))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("transformer.wte.weight", "lm_head.weight"),
        ("lm_head.weight", "_orig_mod.transformer.wte.weight"),
        ("transformer.h.3.lambdas", "_orig_mod.transformer.h.3.lambdas"),
    ],
)
def test_two_names_of_one_parameter_must_agree(first, second):
    array = np.arange(12.0).reshape(4, 3)
    array[1, 1] = np.nan  # equal to itself here
    arch = ArchConfig(head="tied")
    ((_, leaf),) = by_path(from_published({first: array, second: array.copy()}, arch))
    np.testing.assert_array_equal(leaf, array)
    for other in (array + (array == 11.0), array[:3]):
        with pytest.raises(ValueError, match=f"^{second}: differs from {first}, .*head=tied"):
            from_published({first: array, second: other}, arch)


@pytest.mark.parametrize(
    "name",
    [
        *("transformer.h.0.attn.bias", "transformer.ln_f.weight", "h.0.mlp.c_fc.weight"),
        *("wte.weight", "transformer.h.01.lambdas", "transformer.h.x.lambdas", "lambdas"),
        *("transformer.h.0.mlp.c_fc.bias", "value_embeds.emb.3.weight", "transformer.lambdas"),
        *("transformer.h.0.lambdas.weight", "model.lm_head.weight", "transformer.h.{}.mix"),
    ],
)
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=f"^{re.escape(name)}: no parameter"):
        from_published({name: np.zeros((2, 2))}, ArchConfig())


@pytest.mark.parametrize(
    "path",
    ["h_0/attn/c_q/bias", "h_00/lambdas", "wte/kernel", "value_embed_3/embedding", "h_0/x/y"],
)
def test_unknown_paths_are_refused(path):
    *parents, leaf = path.split("/")
    params = {leaf: np.zeros((2, 2))}
    for part in reversed(parents):
        params = {part: params}
    for refuse in (lambda: to_published(params, UNTIED), lambda: published_name(path, UNTIED)):
        with pytest.raises(ValueError, match=f"^{path}: no parameter of the ladder has this path"):
            refuse()
