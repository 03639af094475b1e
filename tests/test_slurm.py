"""The Slurm launcher against a stand-in sbatch that records what it was given, or runs it."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.study.grid import resolve_study
from experiments.study.pool import Task
from experiments.study.slurm import SlurmConfig, batch_script, broken_off, submit
from experiments.study.slurm_task import main, task_words
from models.command_line import UsageError

TASKS = [
    Task("one", {"rung": "muon"}, Path("a b")),
    Task("other", {"rung": "untied", "data": "x'y"}, Path("$HOME"), until=64),
]
WORDS = [["rung=muon", "out=a b"], ["rung=untied", "data=x'y", "out=$HOME", "pause_tokens=64"]]


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A folder of commands that stands before all others."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def command(folder: Path, name: str, text: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def test_an_array_is_submitted_with_its_list(path, tmp_path):
    command(path, "sbatch", f'printf "%s\\n" "$@" > {tmp_path}/given\necho "417;cluster"')
    study = tmp_path / "study"
    job = submit(TASKS, study, SlurmConfig(partition="gpu", most=3, extra=("--exclusive",)))
    assert job == "417"
    flag, script = (tmp_path / "given").read_text().split()
    assert flag == "--parsable"
    lines = Path(script).read_text().splitlines()
    for wanted in (
        *("--array=0-1%3", "--partition=gpu", "--requeue", "--signal=TERM@120"),
        *("--open-mode=append", "--gpus-per-node=1", "--exclusive", "--time=24:00:00"),
    ):
        assert f"#SBATCH {wanted}" in lines
    assert not any("account" in line for line in lines)
    assert lines[-1].startswith("exec srun ")
    tasks = (study / "slurm" / "tasks_0.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in tasks] == WORDS
    assert json.loads((study / "slurm" / "submitted.json").read_text())["job"] == "417"


def test_the_script_runs_the_words_as_they_are(path, tmp_path):
    """The stand-in runs every task; `srun` too, and training is replaced by what prints words."""
    command(path, "srun", 'exec "$@"')
    command(
        path,
        "sbatch",
        f"for i in 0 1; do SLURM_ARRAY_TASK_ID=$i bash $2 > {tmp_path}/out_$i || exit 3; done\n"
        "echo 5",
    )
    fake = tmp_path / "fake" / "experiments" / "study"
    fake.mkdir(parents=True)
    source = Path(sys.modules["experiments.study.slurm_task"].__file__).read_text()
    (fake / "slurm_task.py").write_text(source)
    (fake.parent / "train.py").write_text("import sys, json\nprint(json.dumps(sys.argv[1:]))\n")
    for package in (fake, fake.parent):
        (package / "__init__.py").touch()
    here = os.getcwd()
    try:
        os.chdir(tmp_path / "fake")
        assert submit(TASKS, tmp_path / "study", SlurmConfig()) == "5"
    finally:
        os.chdir(here)
    for number, words in enumerate(WORDS):
        assert json.loads((tmp_path / f"out_{number}").read_text()) == words


def test_nothing_is_submitted_while_an_array_is_queued(path, tmp_path):
    command(path, "sbatch", "echo 8")
    command(path, "squeue", "echo '8_0 gpu lens R'")
    submit(TASKS, tmp_path, SlurmConfig())
    with pytest.raises(UsageError, match="job 8 of this study is still queued or running"):
        submit(TASKS, tmp_path, SlurmConfig())
    command(path, "squeue", "echo 'Invalid job id specified' >&2; exit 1")
    assert submit(TASKS, tmp_path, SlurmConfig()) == "8"
    assert len(list((tmp_path / "slurm").glob("array_*.sh"))) == 2


def test_a_task_that_an_array_did_not_move_is_told_of_once(path, tmp_path):
    command(path, "sbatch", "echo 9")
    command(path, "squeue", "exit 1")
    folders = [tmp_path / name for name in ("still", "moved")]
    tasks = [Task(folder.name, {}, folder) for folder in folders]
    assert broken_off(tasks, tmp_path) == {}
    submit(tasks, tmp_path, SlurmConfig())
    (tmp_path / "slurm" / "9_0.log").write_text("starting\nerror: out of memory\n")
    (folders[1] / "checkpoints" / "3").mkdir(parents=True)
    row = {"kind": "val", "step": 3, "tokens": 96, "loss": 4.0}
    (folders[1] / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    found = broken_off(tasks, tmp_path)
    assert {name: failed.error for name, failed in found.items()} == {
        "still": "error: out of memory"
    }
    assert broken_off(tasks, tmp_path) == {}


def test_a_machine_without_slurm_and_a_refusal_end_in_one_line(path, tmp_path, monkeypatch):
    command(path, "sbatch", "echo 'sbatch: error: invalid partition' >&2; exit 1")
    with pytest.raises(UsageError, match="invalid partition") as caught:
        submit(TASKS, tmp_path, SlurmConfig())
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="no sbatch"):
        submit(TASKS, tmp_path, SlurmConfig())


def test_no_word_reaches_the_shell(tmp_path):
    script = batch_script(tmp_path / "a list.jsonl", 2, SlurmConfig())
    assert f"'{tmp_path}/a list.jsonl'" in script
    checked = subprocess.run(["bash", "-n"], input=script, text=True, check=False)
    assert checked.returncode == 0


@pytest.mark.parametrize(
    "word",
    ["slurm.time=soon", "slurm.gpus=-1", "slurm.partition=a b", "slurm.extra=x", "slurm.most=0"],
)
def test_bad_requests_end_in_one_line(word):
    with pytest.raises(UsageError, match=word.partition("=")[0]):
        resolve_study([word])


def test_a_task_that_is_not_there_is_named(tmp_path):
    (tmp_path / "list").write_text('["a=1"]\n{}\n')
    assert task_words(str(tmp_path / "list"), "0") == ["a=1"]
    for number in ("1", "7"):
        with pytest.raises(UsageError, match=f"task {number}"):
            task_words(str(tmp_path / "list"), number)
    with pytest.raises(UsageError, match="give LIST and NUMBER"):
        main(["list"])
    assert main(["--help"]) == 0


def test_a_study_leaves_its_runs_to_slurm_and_goes_on_later(path, tmp_path, capsys):
    from experiments.study.__main__ import main as study_main

    command(path, "sbatch", "echo 21")
    words = ["rungs=untied", "batches=4,8", "more=", f"out={tmp_path / 'study'}", "launcher=slurm"]
    assert study_main(words) == 0
    assert "rung 1: 6 runs submitted as Slurm job 21" in capsys.readouterr().out
    tasks = (tmp_path / "study" / "slurm" / "tasks_0.jsonl").read_text().splitlines()
    assert len(tasks) == 6
    assert all("pause_tokens=65536" in json.loads(line) for line in tasks)
