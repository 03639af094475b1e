"""What ends a run: the first and the second Ctrl-C, and a disk that fills under a spectrum."""

import errno
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from tiny_models import quick_compiler
from tiny_runs import ROOT, make_data, make_words

from experiments.stops import Interrupt, failed_record_in_one_line
from experiments.train import main
from lens_jax import records
from lens_jax.records import RecordWriter
from models.command_line import UsageError

DEAF = """
import time
from experiments.stops import Interrupt
with Interrupt() as interrupt:
    print("ready", flush=True)
    while not interrupt.received:
        time.sleep(0.01)
    print(interrupt.received, flush=True)
    time.sleep(60)  # a step, or a compilation, that takes its time
"""


def test_the_first_ctrl_c_shows_the_cursor_that_the_second_would_leave_hidden(monkeypatch):
    ours, theirs = os.openpty()
    with open(theirs, "w") as terminal, Interrupt():
        monkeypatch.setattr(sys, "stdout", terminal)
        signal.raise_signal(signal.SIGINT)
        assert os.read(ours, 10) == b"\x1b[?25h"
    os.close(ours)


def test_a_second_ctrl_c_ends_the_process_at_once():
    process = subprocess.Popen(
        [sys.executable, "-c", DEAF], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "2\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == -signal.SIGINT
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_handlers_are_given_back():
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.received == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def full_disk(monkeypatch):
    def write_step(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(records, "write_step", write_step)


@pytest.mark.parametrize("end", [lambda writer: writer.drain(), lambda writer: None])
def test_a_record_that_cannot_be_written_is_told_in_one_line(full_disk, tmp_path, end):
    def write():
        with failed_record_in_one_line(tmp_path), RecordWriter(tmp_path) as writer:
            writer.submit(7, {"tokens": 0}, lambda: {"a/b": np.ones(1)})
            end(writer)

    with pytest.raises(UsageError) as caught:
        write()
    assert str(caught.value) == (
        f"cannot write in {tmp_path}: No space left on device, while writing the spectra of step "
        f"7; free some space and resume"
    )


def test_other_errors_pass_through(tmp_path):
    for error in (OSError("elsewhere"), ValueError("no array")):
        with pytest.raises(type(error)) as caught, failed_record_in_one_line(tmp_path):
            raise error
        assert caught.value is error


def test_a_run_on_a_full_disk_says_so(full_disk, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")  # jax of this process runs already
    monkeypatch.setenv("LENS_JAX_CACHE", str(tmp_path / "cache"))
    words = make_words(make_data(tmp_path), 2, probes="weight")
    with quick_compiler(), pytest.raises(UsageError, match="No space left on device, while writ"):
        main([*words, f"out={tmp_path / 'run'}"])
