"""Runs side by side on this machine: a process of `experiments.train` each, on cores of its own.

A run that fails does not stop the others. A signal to the study goes to the runs, which save and
leave; where the kernel can tell (Linux), a study that is killed takes its runs with it.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, NamedTuple

from experiments.devices import look_from_outside
from experiments.stops import Interrupt
from experiments.study.outcome import Outcome, is_in_use, outcome_of

POLL_SECONDS = 0.2
NOTE_SECONDS = 30.0
_PR_SET_PDEATHSIG = 1


class Task(NamedTuple):
    """A run to train: its words, without out=, its folder, and where it pauses, if it does."""

    name: str
    words: dict[str, str]
    folder: Path
    until: int | None = None

    def command(self) -> list[str]:
        """The words of `python -m experiments.train`."""
        words = [f"{key}={value}" for key, value in self.words.items()]
        words.append(f"out={self.folder}")
        return words if self.until is None else [*words, f"pause_tokens={self.until}"]

    def outcome(self) -> Outcome:
        """Where it stands, at its pause if it has one and went beyond it."""
        return outcome_of(self.folder, self.until)

    def is_done(self) -> bool:
        """Whether nothing is left of it to train."""
        there = self.outcome()
        return there.ended or (self.until is not None and there.tokens >= self.until)


class Failed(NamedTuple):
    """A run that broke off, and what it said last."""

    error: str


class Stopped(Exception):
    """A signal has come; the runs have saved and left."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Machine(NamedTuple):
    """What runs share here: cores by number, and GPUs by what CUDA_VISIBLE_DEVICES calls them."""

    cores: list[int]
    gpus: list[str]
    workers: int

    def share(self, index: int, count: int) -> "Machine":
        """The part of one of `count` runs side by side; the last ones share where there are few."""
        cores, gpus = (
            own[index::count] or own[index % len(own) :][:1] if own else []
            for own in (self.cores, self.gpus)
        )
        return Machine(cores, gpus, 1)


def this_machine(workers: int | Literal["auto"] = "auto") -> Machine:
    """Looks where the study runs. auto: one run a core on a CPU, one a GPU; else one run."""
    platform, count = look_from_outside()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",")[:count] if named else [str(i) for i in range(count)]
    if platform != "gpu":
        gpus = []
    if workers == "auto":
        workers = {"cpu": len(_cores()), "gpu": count}.get(platform, 1)
    return Machine(_cores(), gpus, workers)


def run_tasks(
    tasks: Sequence[Task],
    machine: Machine,
    logs: Path,
    compiled: Path,
    note: Callable[[str], None],
) -> Iterator[tuple[Task, Outcome | Failed]]:
    """Trains what is left of all tasks and yields each as it is done; raises Stopped on a signal.

    logs: a folder for what every run prints; compiled: one for compiled programs, which runs that
    differ in seed or rate share.
    """
    waiting = []
    for task in tasks:
        if task.is_done():
            yield task, task.outcome()
        else:
            waiting.append(task)
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        signals = stack.enter_context(Interrupt())
        # as many however few tasks are left: how many devices a run has decides its last bits
        slots = [
            stack.enter_context(_Slot(machine, i, logs, compiled)) for i in range(machine.workers)
        ]
        told = time.monotonic()
        while waiting or any(slot.task for slot in slots):
            if signals.received:
                break
            for slot in slots:
                done = slot.collect()
                if done is not None:
                    yield done
                if slot.task is None and (task := _take(waiting)) is not None:
                    slot.start(task)
            if time.monotonic() - told >= NOTE_SECONDS:
                told = time.monotonic()
                for slot in slots:
                    if slot.task is not None:
                        note(f"... {slot.describe()}")
            time.sleep(POLL_SECONDS)
        if signals.received:  # also one that came while the last outcome was dealt with
            for slot in slots:
                slot.tell()
            for slot in slots:
                slot.stop()
            raise Stopped(signals.received)


def _take(waiting: list[Task]) -> Task | None:
    """The first task whose folder no other process is using."""
    for task in waiting:
        if not is_in_use(task.folder):
            waiting.remove(task)
            return task
    return None


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


class _Slot:
    """A share of the machine, and the run that has it now."""

    def __init__(self, machine: Machine, index: int, logs: Path, compiled: Path):
        self._share = machine.share(index, machine.workers)
        self._alone = machine.workers == 1
        self._logs, self._compiled = logs, compiled
        self._log_start = 0  # of what the run that has it now has printed
        self._process: subprocess.Popen | None = None
        self.task: Task | None = None

    def __enter__(self) -> "_Slot":
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self, task: Task) -> None:
        self.task = task
        with open(self._log(task), "ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "experiments.train", *task.command()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,  # Ctrl-C reaches the study, which tells the runs
                preexec_fn=self._begin,
            )

    def collect(self) -> tuple[Task, Outcome | Failed] | None:
        """The task with its outcome once it is over, else None."""
        if self.task is None or self._process.poll() is None:
            return None
        task, code = self.task, self._process.returncode
        self.task = self._process = None
        if task.is_done():  # a run that diverged says so in its folder, and by its exit code
            return task, task.outcome()
        return task, Failed(f"exit code {code}: {last_line(self._log(task), self._log_start)}")

    def tell(self) -> None:
        """Tells the run to save and leave."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def stop(self) -> None:
        """Lets the run save and leave, and waits for it."""
        self.tell()
        if self._process is not None:
            self._process.wait()

    def describe(self) -> str:
        said = last_line(self._log(self.task), self._log_start)
        return f"{self.task.name}: {said or self.task.outcome().reason}"

    def _log(self, task: Task) -> Path:
        return self._logs / f"{task.folder.name}.log"

    def _environment(self) -> dict[str, str]:
        given = {"JAX_COMPILATION_CACHE_DIR": str(self._compiled.absolute())}
        if self._alone:
            return given | os.environ
        # a device a core serves one run a machine; side by side, a run has its own core
        given["JAX_NUM_CPU_DEVICES"] = "1"
        gpus = self._share.gpus
        return given | os.environ | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})

    def _begin(self) -> None:
        """In the child, before the program: its cores, and the signal at its parent's end."""
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, self._share.cores)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def last_line(log: Path, start: int = 0) -> str:
    """What a run said last in its log, from a place on: its error, if there is one."""
    try:
        with open(log, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(start, file.tell() - 4096))
            lines = file.read().decode("utf-8", "replace").split("\n")
    except FileNotFoundError:
        return ""
    found = [line.strip() for line in lines if line.strip()]
    errors = [line for line in found if line.startswith("error: ")]
    return (errors or found or [""])[-1]
