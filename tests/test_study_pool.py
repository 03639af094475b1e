"""How runs of a study share a machine."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from tiny_runs import ROOT

from experiments import devices
from experiments.study import pool
from experiments.study.pool import Machine, this_machine
from models.command_line import UsageError


def look(monkeypatch, platform, count, named=None):
    monkeypatch.setattr(pool, "look_from_outside", lambda: (platform, count))
    monkeypatch.setattr(pool, "_cores", lambda: [0, 1, 4])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)


def test_a_run_a_core_without_an_accelerator(monkeypatch):
    look(monkeypatch, "cpu", 1, "0,1")
    assert this_machine() == Machine([0, 1, 4], [], 3)
    assert this_machine(2).workers == 2


def test_a_run_a_gpu_and_one_run_on_all_other_accelerators(monkeypatch):
    look(monkeypatch, "gpu", 2)
    assert this_machine() == Machine([0, 1, 4], ["0", "1"], 2)
    look(monkeypatch, "tpu", 4)
    assert this_machine() == Machine([0, 1, 4], [], 1)


def test_gpus_are_those_that_the_user_lets_be_seen(monkeypatch):
    look(monkeypatch, "gpu", 2, "3,GPU-8f")
    assert [this_machine().share(i, 2).gpus for i in range(2)] == [["3"], ["GPU-8f"]]


@pytest.mark.parametrize(
    ("count", "cores", "gpus"),
    [
        (2, [[0, 4], [1]], [["0"], ["1"]]),
        (3, [[0], [1], [4]], [["0"], ["1"], ["0"]]),
        (4, [[0], [1], [4], [0]], [["0"], ["1"], ["0"], ["1"]]),
    ],
)
def test_shares_are_parts_until_there_are_too_few(count, cores, gpus):
    shares = [Machine([0, 1, 4], ["0", "1"], count).share(i, count) for i in range(count)]
    assert [share.cores for share in shares] == cores
    assert [share.gpus for share in shares] == gpus


def asked(monkeypatch, **answer):
    monkeypatch.setattr(devices, "ACCELERATOR_PLUGINS", ("jax",))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(**answer))
    return devices.look_from_outside()


def test_devices_are_asked_of_another_process(monkeypatch):
    assert asked(monkeypatch, returncode=0, stdout='a note\n["gpu", 8]\n') == ("gpu", 8)
    with pytest.raises(UsageError, match="cannot open this machine's devices: no driver"):
        asked(monkeypatch, returncode=1, stderr="Traceback\nno driver\n")


def test_what_a_run_said_last_is_of_this_time_and_its_error_first(tmp_path):
    log = tmp_path / "log"
    log.write_text("error: disk full\n")
    start = log.stat().st_size
    assert pool.last_line(log, start) == ""
    with open(log, "a") as file:
        file.write("step 1\nerror: out of memory\nleaving\n\n")
    assert pool.last_line(log, start) == "error: out of memory"
    assert pool.last_line(tmp_path / "none") == ""


LAST_OUTCOME = """
import os, signal, sys
from pathlib import Path
from experiments.study import pool
place = Path(sys.argv[1])
task = pool.Task("bad", {"rung": "none"}, place / "run")
machine = pool.Machine(pool._cores(), [], 1)
ends = pool.run_tasks([task], machine, place / "logs", place / "compiled", print)
print(next(ends)[1].error)
os.kill(os.getpid(), signal.SIGTERM)
try:
    next(ends)
except pool.Stopped as stop:
    print(stop)
"""


def test_a_signal_that_comes_with_the_last_outcome_stops_the_study(tmp_path):
    argv = [sys.executable, "-c", LAST_OUTCOME, str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
    error, stop = done.stdout.splitlines()
    assert error.startswith("exit code 2: error: rung=none")
    assert stop == "stopped by SIGTERM", done.stderr


def test_without_a_plugin_no_process_is_asked(monkeypatch):
    monkeypatch.setattr(devices, "ACCELERATOR_PLUGINS", ("no_such_plugin",))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("asked"))
    assert devices.look_from_outside() == ("cpu", 1)


def test_what_another_process_says_is_what_jax_sees(monkeypatch):
    monkeypatch.setattr(devices, "ACCELERATOR_PLUGINS", ("jax",))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "3")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert devices.look_from_outside() == ("cpu", 3)
