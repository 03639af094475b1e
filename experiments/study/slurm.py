"""Leave the runs of a study to Slurm: an array whose tasks are plain training commands.

A task list has a command a line, as JSON; the batch script passes each array task its number, and
`experiments.study.slurm_task` becomes the training process of that line. Slurm sends TERM before it
kills: the run saves, ends with code 143 and, if it was preempted, comes back by --requeue and goes
on bit by bit; a task that is out of time is taken up by the next submission of the study.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import chz

from experiments.study.pool import Failed, Task, last_line
from models.atomic_files import read_json_object, write_bytes_atomic, write_json
from models.command_line import UsageError

TERM_SECONDS = 120
"""How long before its end a run is told; a checkpoint takes seconds."""

_TIME = re.compile(r"(\d+-)?\d{1,3}(:\d{2}){0,2}")
_WORD = re.compile(r"[A-Za-z0-9_.,:@%+=/-]+")


@chz.chz
class SlurmConfig:
    """What the cluster is asked for, a run."""

    time: str = chz.field(default="24:00:00", doc="longest time of a run, as sbatch takes it")
    partition: str | None = chz.field(default=None, doc="as sbatch takes it; none: Slurm's own")
    account: str | None = chz.field(default=None, doc="as sbatch takes it; none: the user's own")
    gpus: int = chz.field(default=1, doc="GPUs of a run; 0 for none")
    cpus: int = chz.field(default=8, doc="CPU cores of a run")
    memory: str | None = chz.field(default=None, doc="memory of a run, as 64G")
    most: int = chz.field(default=16, doc="runs at the same time")
    extra: tuple[str, ...] = chz.field(
        default=(), doc="further options of sbatch, as --constraint=h100,--exclusive"
    )

    @chz.validate
    def _ranges(self):
        if not _TIME.fullmatch(self.time):
            raise ValueError(f"slurm.time={self.time}: write minutes, H:MM:SS or D-H:MM:SS")
        for name, least in (("gpus", 0), ("cpus", 1), ("most", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"slurm.{name}={getattr(self, name)}: give at least {least}")
        for name in ("partition", "account", "memory"):
            value = getattr(self, name)
            if value is not None and not _WORD.fullmatch(value):
                raise ValueError(f"slurm.{name}={value}: give letters, digits and _.,:@%+=/-")
        for option in self.extra:
            if not option.startswith("--") or not _WORD.fullmatch(option):
                raise ValueError(f"slurm.extra={option}: write options as --name=value")


def submit(tasks: Sequence[Task], folder: Path, config: SlurmConfig) -> str:
    """Submits the training commands of tasks as one array and returns the job's number.

    Script and list are kept in folder/slurm. While an array of the study is queued or running
    nothing is submitted. Raises UsageError then, and in one line when sbatch is not there or
    refuses.
    """
    if shutil.which("sbatch") is None:
        raise UsageError("launcher=slurm: no sbatch on this machine; give launcher=local")
    place = (folder / "slurm").absolute()
    place.mkdir(parents=True, exist_ok=True)
    _refuse_twice(place)
    number = len(list(place.glob("tasks_*.jsonl")))
    task_list, script = place / f"tasks_{number}.jsonl", place / f"array_{number}.sh"
    lines = "".join(json.dumps(task.command()) + "\n" for task in tasks)
    write_bytes_atomic(task_list, lines.encode())
    write_bytes_atomic(script, batch_script(task_list, len(tasks), config).encode())
    done = subprocess.run(
        ["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        raise UsageError(f"sbatch refused {script}: {reason}")
    job = done.stdout.strip().partition(";")[0]  # JOB or JOB;CLUSTER
    stood = {task.folder.name: task.outcome().tokens for task in tasks}
    write_json(place / "submitted.json", {"job": job, "tasks": task_list.name, "stood": stood})
    return job


def broken_off(tasks: Sequence[Task], folder: Path) -> dict[str, Failed]:
    """Of tasks that are not done, those that the last array has had and not moved, by folder.

    Told once: what is left of them is submitted the next time. Raises UsageError while that array
    is queued or running.
    """
    place = (folder / "slurm").absolute()
    if not tasks or not (place / "submitted.json").exists():
        return {}
    _refuse_twice(place)
    last = read_json_object(place / "submitted.json")
    stood, told = last.get("stood", {}), last.get("told", [])
    numbers = {name: number for number, name in enumerate(stood)}  # in the order of the array
    found = {}
    for task in tasks:
        name = task.folder.name
        if name in stood and name not in told and task.outcome().tokens <= stood[name]:
            said = last_line(place / f"{last['job']}_{numbers[name]}.log")
            found[name] = Failed(said or f"Slurm job {last['job']} did not move it")
    write_json(place / "submitted.json", last | {"told": [*told, *found]})
    return found


def batch_script(task_list: Path, count: int, config: SlurmConfig) -> str:
    """The script of an array of `count` tasks; what Slurm prints goes beside the list."""
    options = {
        "job-name": "lens_jax_study",
        "array": f"0-{count - 1}%{config.most}",
        "time": config.time,
        "partition": config.partition,
        "account": config.account,
        "gpus-per-node": config.gpus or None,
        "cpus-per-task": config.cpus,
        "mem": config.memory,
        "output": f"{task_list.parent}/%A_%a.log",
        "signal": f"TERM@{TERM_SECONDS}",
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    lines += ["#SBATCH --requeue", *(f"#SBATCH {option}" for option in config.extra)]
    # exec, so that TERM reaches the run and no shell stands between
    command = [sys.executable, "-m", "experiments.study.slurm_task", str(task_list)]
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "set -euo pipefail",
            f"cd {shlex.quote(str(Path.cwd()))}",
            f'exec srun {shlex.join(command)} "$SLURM_ARRAY_TASK_ID"',
            "",
        ]
    )


def _refuse_twice(place: Path) -> None:
    record = place / "submitted.json"
    if not record.exists() or shutil.which("squeue") is None:
        return
    job = str(json.loads(record.read_bytes())["job"])
    done = subprocess.run(
        ["squeue", "--noheader", f"--jobs={job}"], capture_output=True, text=True, check=False
    )
    # squeue fails for a number that it has forgotten
    if done.returncode == 0 and done.stdout.strip():
        count = len(done.stdout.strip().splitlines())
        raise UsageError(
            f"Slurm job {job} of this study is still queued or running ({count} lines of squeue); "
            f"the same command goes on when it has ended"
        )
