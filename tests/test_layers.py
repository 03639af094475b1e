"""Patterns over the depth and windows over the steps, against the tables of the ladder spec."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.resolve import resolve
from models.config import TIERS, ArchConfig, SizeConfig
from models.layers import layer_plan, num_value_pieces
from models.windows import layer_window, widest_window, window_at

DEPTHS = {tier: values["size.n_layer"] for tier, values in TIERS.items()}


def plan_of(depth: int, **arch):
    return layer_plan(ArchConfig(**arch), depth)


def test_a_plain_model_has_plain_layers():
    for layer in plan_of(12):
        assert layer == (True, True, None, None)


@pytest.mark.parametrize(("tier", "layer"), [("d12", 7), ("d24", 13), ("d36", 19), ("d48", 25)])
def test_the_layer_without_attention(tier, layer):
    plan = plan_of(DEPTHS[tier], drop_attention=True)
    assert [i for i, each in enumerate(plan) if not each.attention] == [layer]


def test_skips_pop_what_the_encoder_pushed():
    """Simulated with a stack, as published."""
    for depth in (2, 12, 36):
        stack, expected = [], []
        for i in range(depth):
            expected.append(None if i < depth // 2 else stack.pop())
            if i < depth // 2:
                stack.append(i)
        assert [layer.skip_from for layer in plan_of(depth, unet=True)] == expected


def test_long_and_short_layers():
    short = "".join(
        "SL"[layer.long_window] for layer in plan_of(12, window="block", long_short=True)
    )
    assert short == "LSSSLSSLSSSL"
    for depth in (24, 36, 48):
        plan = [layer.long_window for layer in plan_of(depth, window="block", long_short=True)]
        half = (([True, False, False, False]) * depth)[: depth // 2]
        assert plan == half + half[::-1]


@pytest.mark.parametrize(
    ("tier", "front"), [("d12", "012"), ("d24", "012012"), ("d36", "012012012"), ("d48", "012" * 4)]
)
def test_outer_value_embeddings(tier, front):
    depth = DEPTHS[tier]
    plan = plan_of(depth, value="embed_outer")
    pieces = "".join("-" if each.value_from is None else str(each.value_from) for each in plan)
    assert pieces == front + "-" * (depth - 2 * len(front)) + front


def test_value_embeddings_of_all_layers():
    assert [layer.value_from for layer in plan_of(12, value="embed")] == list(range(12))
    mirrored = [layer.value_from for layer in plan_of(12, value="embed_mirrored")]
    assert mirrored == [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0]
    counts = {value: num_value_pieces(ArchConfig(value=value), 24) for value in ("embed", "plain")}
    assert counts == {"embed": 24, "plain": 0}
    assert num_value_pieces(ArchConfig(value="embed_mirrored"), 24) == 12
    assert num_value_pieces(ArchConfig(value="embed_outer"), 24) == 3


# Windows


def published_window(rung: str, step: int, steps: int) -> int:
    """The published formulas in tokens of block 128, in floats (ladder spec 5.3)."""
    f = min(step / steps, 1.0)
    if rung in ("flexwin", "vte", "betterwin"):
        return 64 * int((64 + 1728 * f) // 64)
    if rung in ("sparsev", "truncrope", "softcap", "fp8head"):
        return 128 * max(1, int(64 + 1728 * f) // 128)
    return 128 * min(max(int(np.ceil(1728 * f / 128)), 1), 14)


@pytest.mark.parametrize(
    "rung", ["flexwin", "betterwin", "sparsev", "fp8head", "lswa", "attnscale"]
)
def test_ramps_are_the_published_ones(rung):
    config, _ = resolve({"rung": rung, "profile": "paper"}, "paper")
    steps = config.arch.window_steps
    differ = [
        step
        for step in range(0, steps + 500, 7)
        if window_at(config.arch, config.size, step, steps) != published_window(rung, step, steps)
    ]
    assert differ == []
    assert window_at(config.arch, config.size, 10 * steps, steps) == 1792


def test_the_first_window_is_the_published_one():
    for rung, first in (("flexwin", 64), ("sparsev", 128), ("lswa", 128), ("fixedwin", 1024)):
        config, _ = resolve({"rung": rung, "profile": "paper"}, "paper")
        assert window_at(config.arch, config.size, 0, config.arch.window_steps) == first
    assert window_at(ArchConfig(), SizeConfig(), 5, 100) is None
    assert widest_window(ArchConfig(), SizeConfig()) is None


@given(
    step=st.integers(0, 2000),
    steps=st.integers(0, 1500),
    block=st.sampled_from((2, 16, 128)),
    ramp=st.sampled_from(("half_blocks", "floor", "ceil")),
    blocks=st.integers(1, 20),
)
def test_a_ramp_grows_to_its_end_and_scales_with_the_block(step, steps, block, ramp, blocks):
    rule = "token" if ramp == "half_blocks" else "block"
    arch = ArchConfig(window=rule, window_ramp=ramp, window_blocks=blocks, window_steps=1)
    size = SizeConfig(block=block, short_row=block, long_row=block)
    now, later = (window_at(arch, size, s, steps) for s in (step, step + 1))
    assert 0 < now <= later <= widest_window(arch, size) == blocks * block
    assert window_at(arch, size, max(step, steps), steps) == blocks * block
    unit = SizeConfig(block=2, short_row=2, long_row=2)
    assert now * 2 == window_at(arch, unit, step, steps) * block


@pytest.mark.parametrize(("blocks", "short"), [(1, 1), (2, 1), (3, 1), (4, 2), (14, 7)])
def test_a_short_layer_has_half_the_blocks(blocks, short):
    arch = ArchConfig(window="block", long_short=True)
    size = SizeConfig()
    assert layer_window(arch, size, blocks * 128, False) == short * 128
    assert layer_window(arch, size, blocks * 128, True) == blocks * 128
    assert layer_window(ArchConfig(window="block"), size, blocks * 128, False) == blocks * 128
    row = layer_window(arch, size, np.asarray([blocks * 128, 256]), False)
    assert row.tolist() == [short * 128, 128]
