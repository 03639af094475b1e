"""The toy's benchmark: what it times and refuses; the times themselves are nobody's test."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from toy_engines import DISPATCH, ToyBenchConfig, main, make_members, scanned, step_by_step

from models.command_line import UsageError


def test_members_differ_in_their_rate_alone_and_have_no_target():
    members = make_members(ToyBenchConfig(members=3))
    assert len({config.lr for config in members}) == 3
    assert {config.eval_every for config in members} == {DISPATCH}
    assert {config.target_loss for config in members} == {None}


def test_both_ways_to_train_lower_the_loss():
    from tiny_models import quick_compiler
    from tiny_toy import tiny_member

    with quick_compiler():
        for way in (scanned, step_by_step):
            dispatch = way(tiny_member(lr=1e-2))
            losses = [dispatch() for _ in range(12)]
            assert losses[-1] < losses[0], way.__name__


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["short=15"], "short=15: give a multiple of 10"),
        (["short=80"], "long=80: give more than short=80"),
        (["members=0"], "members=0: give at least 1"),
        (["profile=huge"], "profile=huge"),
    ],
)
def test_bad_input_ends_in_one_line(words, message):
    with pytest.raises(UsageError, match=message):
        main(words)
