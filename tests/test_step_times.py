"""The time of a step in metrics.jsonl: of the step alone, also where validations lie between."""

from types import SimpleNamespace

import numpy as np
import pytest

from experiments import loop as module
from experiments.devices import make_mesh
from experiments.loop import Loop
from experiments.resolve import resolve
from experiments.schedule import make_schedule

STEP, MEASURED, VALIDATION, COMPILING = 2.0, 30.0, 100.0, 1000.0


class Stubs:
    """What a loop writes to and waits for; waiting moves a clock on instead."""

    def __init__(self, monkeypatch):
        self.now, self.rows = 0.0, []
        words = {"profile": "laptop", "rung": "muon", "batch": "4", "target_loss": "1.0"}
        config = resolve(words, "laptop")[0]
        run = SimpleNamespace(
            mesh=make_mesh(1),
            facts={},
            evaluate=self.evaluate,
            step=self.compiling,
            probe_batch=None,
        )
        writer = SimpleNamespace(submit=lambda *args: None)
        display = SimpleNamespace(train=lambda *args: None, validation=lambda row: None)
        self.loop = Loop(
            config, make_schedule(config), run, None, None, self.rows, writer, display, {}, {}
        )
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(module.jax, "device_get", self.wait)

    def evaluate(self, params, window):
        self.now += VALIDATION
        return 3.0

    def wait(self, metrics):
        self.now += metrics.pop("takes")
        return dict(metrics)

    def compiling(self, *args, **kwargs):
        self.now += self.compiles

    def step(self, step, *, measured=False, validated=False, compiles=False):
        """As `Loop.run` goes: validation, dispatch, then the wait for the step before."""
        if validated:
            self.loop._validate(step, SimpleNamespace(params=None))
        self.compiles = COMPILING if compiles else 0.0
        self.loop._dispatch(step, None, np.zeros((8, 2), np.int32), measured)
        self.loop._fetch()
        takes = MEASURED if measured else STEP
        spectra = {"x": 1.0} if measured else {}
        self.loop.pending = step, {"finite": True, "loss": 3.0, "takes": takes}, spectra

    def times(self):
        self.loop._fetch()
        return [row["step_time_s"] for row in self.rows if row["kind"] == "train"]


@pytest.fixture
def stubs(monkeypatch):
    return Stubs(monkeypatch)


def test_steps_with_a_validation_before_each_are_timed_without_it(stubs):
    stubs.step(0, measured=True, validated=True, compiles=True)
    stubs.step(1, validated=True, compiles=True)
    for step in range(2, 6):
        stubs.step(step, measured=step == 4, validated=True)
    assert stubs.times() == [None, None, STEP, STEP, None, STEP]


def test_steps_in_a_row_are_timed_from_one_to_the_next(stubs):
    stubs.step(0, measured=True, validated=True, compiles=True)
    stubs.step(1, compiles=True)
    for step in range(2, 7):
        stubs.step(step, measured=step == 4, validated=step == 6)
    assert stubs.times() == [None, None, STEP, STEP, None, STEP, STEP]


def test_the_step_before_the_first_measured_one_is_not_timed_with_its_compilation(stubs):
    stubs.step(4, validated=True, compiles=True)  # after a resume between two measurements
    for step in range(5, 10):
        stubs.step(step, measured=step in (7, 9), compiles=step == 7)
    assert stubs.times() == [None, STEP, None, None, STEP, None]
