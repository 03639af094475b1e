"""Who trains the members of a study: one process, all together in it, or a process a core.

A toy member hardly uses a second core, so on a CPU single-thread processes beside each other are
faster than one process with all cores, on two machines of two cores by 1.5 and by 1.0 to 1.3; on an
accelerator one program with a batch axis of members should win, which nobody has timed (`python
benchmarks/toy_engines.py`). All three write the same folders.
"""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

from toy_modular.run_config import RunConfig, from_nested, nested

Engine = Literal["auto", "processes", "together", "sequential"]


class Job(NamedTuple):
    """Members of one kind to train together, from where they stand to step `until`."""

    configs: tuple[RunConfig, ...]
    folders: tuple[Path, ...]
    until: int | None = None

    def to_json(self) -> str:
        document = {
            "configs": [nested(config) for config in self.configs],
            "folders": [str(folder) for folder in self.folders],
            "until": self.until,
        }
        return json.dumps(document)

    @classmethod
    def from_json(cls, text: str) -> "Job":
        document = json.loads(text)
        return cls(
            tuple(from_nested(config) for config in document["configs"]),
            tuple(Path(folder) for folder in document["folders"]),
            document["until"],
        )


class Failed(NamedTuple):
    """What a job that broke off said last."""

    error: str


def choose_engine(engine: Engine) -> str:
    """What engine=auto stands for on this machine."""
    if engine != "auto":
        return engine
    import jax

    if jax.default_backend() != "cpu":
        return "together"
    return "processes" if len(os.sched_getaffinity(0)) > 1 else "sequential"


def run_jobs(
    jobs: Sequence[Job],
    engine: str,
    note: Callable[[str], None],
    compiled: Path | None = None,
) -> Iterator[tuple[Job, list[dict] | Failed]]:
    """Trains all jobs and yields each with the results of its members as it is done.

    A job that fails is yielded as Failed; the others go on. compiled: a folder for what one worker
    compiles and another, or a later rung of a search, need not compile again.
    """
    if engine == "processes":
        yield from _in_processes(jobs, note, compiled)
        return
    from toy_modular.training import train_members

    for job in jobs:
        try:
            results = train_members(job.configs, job.folders, until=job.until, note=note)
        except Exception as error:  # told to the study, which goes on with other jobs
            results = Failed(describe_error(error))
        yield job, results


def describe_error(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _in_processes(jobs, note, compiled):
    """Workers on a core each take jobs from one queue; a job that kills its worker is given up."""
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    cores = sorted(os.sched_getaffinity(0))[: len(jobs)]
    with ExitStack() as stack:
        for core in cores:
            worker = stack.enter_context(_Worker(core, compiled))
            threading.Thread(target=worker.serve, args=(waiting, done), daemon=True).start()
        finished = 0
        while finished < len(jobs):
            kind, *told = done.get()
            if kind == "note":
                note(told[0])
            else:
                finished += 1
                yield tuple(told)


class _Worker:
    """A process `python -m toy_modular.worker` on one core: a line of JSON in, lines out."""

    def __init__(self, core: int, compiled: Path | None):
        self._core = core
        self._environment = dict(os.environ)
        if compiled is not None:
            self._environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiled.absolute()))
        self._process: subprocess.Popen | None = None
        self._lock, self._closed = threading.Lock(), False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self._lock:
            self._closed = True
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def serve(self, waiting, done) -> None:
        """Works off the queue; runs on a thread of its own."""
        while not self._closed:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            # whatever happens to a job, somebody waits for an answer
            try:
                done.put(("job", job, self._train(job, done)))
            except Exception as error:
                done.put(("job", job, Failed(describe_error(error))))

    def _train(self, job: Job, done) -> list[dict] | Failed:
        process = self._running()
        process.stdin.write(job.to_json() + "\n")
        process.stdin.flush()
        for line in process.stdout:
            told = json.loads(line)
            if "note" in told:
                done.put(("note", told["note"]))
            elif "error" in told:
                return Failed(told["error"])
            else:
                return told["results"]
        return Failed(f"the worker ended with exit code {process.wait()}")

    def _running(self) -> subprocess.Popen:
        with self._lock:
            if self._closed:
                raise RuntimeError("the study has ended")
            if self._process is None or self._process.poll() is not None:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "toy_modular.worker", str(self._core)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=self._environment,
                )
            return self._process
