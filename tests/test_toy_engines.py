"""The toy's benchmark: what it times and refuses; the times themselves are nobody's test."""

import json
import sys
from pathlib import Path

import chz
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import toy_engines
from tiny_models import quick_compiler
from tiny_toy import tiny_member
from toy_engines import DISPATCH, ENGINES, PlainLoop, ToyBenchConfig, main, make_members, scanned

from models.command_line import UsageError


def test_members_differ_in_their_rate_alone_and_have_no_target():
    members = make_members(ToyBenchConfig(members=3))
    assert len({config.lr for config in members}) == 3
    assert {config.eval_every for config in members} == {DISPATCH}
    assert {config.target_loss for config in members} == {None}


def test_both_ways_to_train_lower_the_loss():
    with quick_compiler():
        for way in (scanned, PlainLoop):
            dispatch = way(tiny_member(lr=1e-2))
            losses = [dispatch() for _ in range(12)]
            assert losses[-1] < losses[0], way.__name__


def test_the_loop_looks_at_the_loss_of_validation():
    with quick_compiler():
        script = PlainLoop(tiny_member(lr=1e-2))
        before = script.look()
        for _ in range(12):
            loss = script()
        assert script.look() < before - 0.1
        assert abs(script.look() - loss) < 1


def test_the_whole_report(monkeypatch, tmp_path, capsys):
    config = tiny_member(max_steps=100)
    members = [config, chz.replace(config, lr=2e-3)]
    monkeypatch.setattr(toy_engines, "make_members", lambda plan: members)
    out = tmp_path / "report.json"
    with quick_compiler():
        assert main([f"out={out}", "short=10", "long=20", "run_steps=20", "repeats=1"]) == 0
    report = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == report
    assert tuple(report["engines"]) == ENGINES
    assert report["step"]["loop"]["tokens_per_second"] > 0
    looking = report["looking"]
    # of 20 steps in dispatches of two; measured at 0, 2, 4, 6, 8, 12, 16, two a doubling
    assert looking["times_in_run"] == {"dispatch": 10, "glance": 11, "spectra": 7}
    assert sum(looking["share_of_run"].values()) == pytest.approx(1, abs=2e-3)


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
