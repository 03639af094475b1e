"""Published names and layouts, to our tree and back."""

import numpy as np
import pytest
from tiny_models import LAYERS, VOCAB, WIDTH, flat, tiny_model

from models.config import ArchConfig
from models.interop import COMPILED_PREFIX, from_published, to_published
from models.ladder import RUNGS


@pytest.mark.parametrize("rung", RUNGS)
def test_round_trip_in_both_directions(rung):
    model = tiny_model(rung)
    arch, ours = model.config.arch, flat(model.shaken)
    published = to_published(model.shaken, arch)
    again = flat(from_published(published, arch))
    assert again.keys() == ours.keys()
    for path, leaf in ours.items():
        np.testing.assert_array_equal(again[path], leaf)
    there = to_published(from_published(published, arch), arch)
    assert there.keys() == published.keys()
    for name, array in published.items():
        np.testing.assert_array_equal(there[name], array)


def test_layouts_are_torchs():
    model = tiny_model("baseline")
    published, ours = to_published(model.shaken, model.config.arch), flat(model.shaken)
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


def test_names_of_every_rung():
    bias = to_published(tiny_model("rope").shaken, tiny_model("rope").config.arch)
    assert sum(name.endswith("bias") for name in bias) == LAYERS
    head = to_published(tiny_model("untied").shaken, tiny_model("untied").config.arch)
    assert head["lm_head.weight"].shape == (VOCAB, WIDTH)


@pytest.mark.parametrize("rung", ["baseline", "untied"])
def test_compiled_prefix_and_both_names_of_a_tied_matrix(rung):
    model = tiny_model(rung)
    arch = model.config.arch
    published = to_published(model.shaken, arch)
    saved = {COMPILED_PREFIX + name: array for name, array in published.items()}
    saved.setdefault(f"{COMPILED_PREFIX}lm_head.weight", published["transformer.wte.weight"])
    again, ours = flat(from_published(saved, arch)), flat(model.shaken)
    assert again.keys() == ours.keys()
    assert all(np.array_equal(again[path], leaf) for path, leaf in ours.items())


@pytest.mark.parametrize(
    "name",
    ["transformer.h.0.attn.bias", "transformer.ln_f.weight", "h.0.mlp.c_fc.weight", "wte.weight"],
)
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=f"^{name}: no parameter"):
        from_published({name: np.zeros((2, 2))}, ArchConfig())
