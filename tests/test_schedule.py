"""When things happen: the same tokens at every batch size, and the last step in every set."""

from itertools import pairwise

import chz
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.config import DataConfig, ProbeConfig, RunConfig
from experiments.resolve import resolve
from experiments.schedule import doubling_grid, make_schedule
from experiments.study.presets import LAPTOP, LAPTOP_RUN, LAPTOP_RUNGS
from models.command_line import UsageError

EVENTS = ("validate", "measure", "checkpoint")
LONG_ROW = 64


def make_config(batch=4, steps=100, **changed):
    base = RunConfig(batch=batch, accumulate=1)
    size = chz.replace(base.size, vocab_size=64, short_row=32, long_row=LONG_ROW, block=16)
    values = {
        "size": size,
        "max_tokens": steps * batch * LONG_ROW,
        "data": DataConfig(val_tokens=512, probe_offset=512),
        "probes": ProbeConfig(window=32, first=1000, linear_from=16_000),
        "val_every": 3000,
        "checkpoint_every": 7000,
    }
    return chz.replace(base, **(values | changed))


def test_a_schedule_written_out():
    schedule = make_schedule(make_config())
    assert schedule.num_steps == 100  # of 256 tokens, 25,600 in all
    assert sorted(schedule.validate) == [0, 12, 24, 36, 47, 59, 71, 83, 94, 100]
    assert sorted(schedule.checkpoint) == [0, 28, 55, 83, 100]
    # 1000, 2000, 4000, 8000, 16000 tokens
    assert sorted(schedule.measure) == [0, 4, 8, 16, 32, 63, 100]


def test_measure_every_adds_steps_to_the_grid():
    probes = ProbeConfig(window=32, first=1000, linear_from=16_000, every=30)
    extra = make_schedule(make_config(probes=probes))
    assert extra.measure == make_schedule(make_config()).measure | {0, 30, 60, 90}


def test_without_probes_nothing_is_measured():
    config = make_config()
    schedule = make_schedule(chz.replace(config, probes=chz.replace(config.probes, names=())))
    assert schedule.measure == frozenset()
    assert schedule.validate == make_schedule(config).validate


def test_the_published_length_is_constant_in_tokens():
    for batch, steps in ((8, 60_000), (16, 30_000), (32, 15_000)):
        schedule = make_schedule(RunConfig(batch=batch))
        assert schedule.num_steps == schedule.horizon.num_steps == steps


@pytest.mark.parametrize(("anneal", "length"), [("published", 120_000), ("budget", 100)])
def test_the_rate_comes_down_with_the_published_run_or_with_the_budget(anneal, length):
    assert make_schedule(make_config(anneal=anneal)).horizon.num_steps == length


def test_a_budget_past_the_published_end_is_refused_and_one_up_to_it_is_not():
    words = {"rung": "sparsev", "anneal": "published", "max_tokens": str(300 * 4096)}
    config, _ = resolve(words, "laptop")
    assert make_schedule(config).num_steps == make_schedule(config).horizon.num_steps == 300
    longer = words | {"max_tokens": str(301 * 4096)}
    with pytest.raises(UsageError, match="set anneal=budget, or give at most that"):
        resolve(longer, "laptop")
    config, _ = resolve(longer | {"anneal": "budget"}, "laptop")
    assert make_schedule(config).horizon.num_steps == 301


def test_the_rungs_of_the_laptop_study_end_within_their_schedules():
    for rung in LAPTOP_RUNGS:
        for batch in LAPTOP["batches"]:
            resolve(LAPTOP_RUN | {"rung": rung, "batch": str(batch)}, "laptop")


@given(
    batch=st.integers(1, 40),
    steps=st.integers(1, 300),
    every=st.integers(500, 100_000),
    first=st.integers(1, 10_000),
    linear_from=st.integers(500, 100_000),
)
@settings(max_examples=50)
def test_every_event_is_in_the_run_and_on_time(batch, steps, every, first, linear_from):
    probes = ProbeConfig(window=32, first=first, linear_from=linear_from)
    config = make_config(
        batch, steps, probes=probes, val_every=every, checkpoint_every=every, accumulate=1
    )
    schedule = make_schedule(config)
    assert schedule.num_steps == steps
    per_step = config.tokens_per_step
    wanted = {
        "validate": range(0, config.max_tokens, every),
        "checkpoint": range(0, config.max_tokens, every),
        "measure": doubling_grid(first, linear_from, config.max_tokens),
    }
    for name in EVENTS:
        events = getattr(schedule, name)
        assert {0, steps} <= events <= set(range(steps + 1))
        # the first step that has seen the tokens, and nothing else
        seen = np.arange(steps + 1) * per_step
        assert events == {*np.searchsorted(seen, list(wanted[name])).tolist(), steps}


@given(
    batch=st.sampled_from((1, 2, 4, 8, 16, 32)),
    blocks=st.integers(1, 40),
    spacing=st.sampled_from((1, 2, 3, 8)),
)
@settings(max_examples=30)
def test_events_come_at_the_same_tokens_whatever_the_batch(batch, blocks, spacing):
    unit = 32 * LONG_ROW  # a step of the largest batch here
    changed = {
        "probes": ProbeConfig(window=32, first=unit, linear_from=8 * unit),
        "val_every": spacing * unit,
        "checkpoint_every": 2 * spacing * unit,
        "max_tokens": blocks * unit,
    }

    def tokens(batch):
        config = make_config(batch, **changed)
        schedule = make_schedule(config)
        return [
            {step * config.tokens_per_step for step in getattr(schedule, name)} for name in EVENTS
        ]

    assert tokens(batch) == tokens(32)


@given(
    first=st.integers(1, 10_000), linear_from=st.integers(500, 100_000), end=st.integers(1, 10**6)
)
def test_the_grid_doubles_and_then_keeps_to_multiples(first, linear_from, end):
    grid = doubling_grid(first, linear_from, end)
    assert grid[0] == 0
    assert max(grid) < max(end, 1)
    assert grid == sorted(set(grid))
    assert (first in grid) == (first < end)
    for before, after in pairwise(grid[1:]):
        if after < linear_from:
            assert after == 2 * before
        else:
            assert after % linear_from == 0
            assert after - before <= linear_from
