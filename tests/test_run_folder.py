"""The run folder: locks, refusals, configuration on resume, atomic files."""

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.run_folder import RunFolder, check_run_name, write_bytes_atomic, write_json
from models import atomic_files
from models.command_line import UsageError

ROOT = Path(__file__).parent.parent
CONFIG = {"rung": "muon", "seed": 1, "optim": {"embed_lr": 3e-4, "betas": (0.9, 0.95)}, "eval": {}}


def refused(path, resume="auto", config=CONFIG, free_keys=()) -> str:
    with pytest.raises(UsageError) as excinfo:
        RunFolder.open(path, resume, config, free_keys)
    message = str(excinfo.value)
    assert "\n" not in message
    return message


@pytest.fixture
def finished(tmp_path):
    """A run folder with a checkpoint of step 5, closed."""
    path = tmp_path / "run"
    with RunFolder.open(path, "auto", CONFIG) as run:
        (run.checkpoints / "5").mkdir(parents=True)
    return path


# Opening


def test_a_new_folder_has_its_configuration(tmp_path):
    path = tmp_path / "a" / "b"
    with RunFolder.open(path, "never", CONFIG) as run:
        assert not run.resumed
        assert run.path == path
        assert json.loads((path / "config.json").read_text()) == json.loads(json.dumps(CONFIG))
        assert run.spectra.is_dir()
        assert run.metrics_path == path / "metrics.jsonl"
        assert run.checkpoints == path / "checkpoints"
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "lock", "spectra"]
    run.close()  # twice is fine


def test_a_relative_folder_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with RunFolder.open("run", "auto", CONFIG) as run:
        assert run.path == tmp_path / "run"


def test_a_folder_in_the_home_is_found_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with RunFolder.open("~/run", "never", CONFIG) as run:
        assert run.path == tmp_path / "run" == RunFolder.beside("~/run").path
    assert not (tmp_path / "~").exists()


def test_auto_and_must_go_on_from_a_checkpoint(finished):
    for resume in ("auto", "must"):
        with RunFolder.open(finished, resume, CONFIG) as run:
            assert run.resumed


def test_half_written_checkpoints_are_none(tmp_path):
    with RunFolder.open(tmp_path / "run", "auto", CONFIG) as run:
        (run.checkpoints / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    with RunFolder.open(tmp_path / "run", "auto", CONFIG) as run:
        assert not run.resumed


def test_must_without_a_checkpoint_is_refused_and_makes_nothing(tmp_path):
    assert "has no checkpoint; use resume=auto" in refused(tmp_path / "typo", "must")
    assert not (tmp_path / "typo").exists()


def test_never_wants_an_empty_folder(finished, tmp_path):
    assert "is not empty (checkpoints); use another out=" in refused(finished, "never")
    (tmp_path / "empty").mkdir()
    RunFolder.open(tmp_path / "empty", "never", CONFIG).close()


def test_resume_is_one_of_three_words(tmp_path):
    assert refused(tmp_path, "yes") == "resume='yes': one of auto, never, must"


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    (tmp_path / ".editor.tmp").write_text("")
    assert "not the folder of a run: it has thesis.tex" in refused(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".editor.tmp", "thesis.tex"]


def test_what_killed_writers_left_is_removed(finished):
    for name in (".config.json.77.tmp", "spectra/.step_00000001.npz.77.tmp"):
        (finished / name).write_text("half")
    RunFolder.open(finished, "auto", CONFIG).close()
    assert not list(finished.rglob("*.tmp"))


def test_a_folder_killed_at_birth_can_be_used(tmp_path):
    (tmp_path / "lock").write_text("")
    (tmp_path / ".config.json.77.tmp").write_text("{")
    RunFolder.open(tmp_path, "never", CONFIG).close()


# Configuration


def test_changed_keys_are_named_with_both_values(finished):
    config = CONFIG | {"seed": 2, "optim": {"embed_lr": 1e-3, "betas": (0.9, 0.95)}}
    message = refused(finished, config=config)
    assert "optim.embed_lr was 0.0003, now 0.001, seed was 1, now 2; set it back" in message
    assert json.loads((finished / "config.json").read_text())["seed"] == 1


def test_keys_that_came_or_went_are_named(finished):
    config = {key: value for key, value in CONFIG.items() if key != "seed"} | {"tier": "d12"}
    message = refused(finished, config=config)
    assert 'seed was 1, now absent, tier was absent, now "d12"' in message


def test_long_lists_of_changes_are_cut(finished):
    message = refused(finished, config=CONFIG | {f"key_{i}": i for i in range(9)})
    assert "key_3 was absent, now 3 (and 5 more);" in message


def test_free_keys_may_change_and_the_change_is_stored(finished):
    config = CONFIG | {"seed": 2, "eval": {"every": 5}}
    assert "eval.every" in refused(finished, config=config, free_keys={"seed"})
    with RunFolder.open(finished, "auto", config, free_keys={"seed", "eval"}) as run:
        assert run.resumed
    RunFolder.open(finished, "auto", config).close()


def test_a_free_key_frees_no_namesake(finished):
    config = CONFIG | {"seed_of_data": 1}
    assert "seed_of_data" in refused(finished, config=config, free_keys={"seed"})


@pytest.mark.parametrize("text", ["", '{"seed": 1', "[1]", "\xff"])
def test_a_damaged_configuration_is_refused(finished, text):
    (finished / "config.json").write_text(text, encoding="latin-1")
    assert f"{finished / 'config.json'} is not " in refused(finished)


# Locks


HOLD = """
import sys, time
from experiments.run_folder import RunFolder
run = RunFolder.open(sys.argv[1], "auto", {"seed": 1})
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "run"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_run_is_refused_with_the_pid_and_a_killed_one_blocks_nobody(tmp_path, holder):
    message = refused(tmp_path / "run", config={"seed": 1})
    assert f"in use by another run (pid {holder.pid} on " in message
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / "run/lock").read_text())["pid"] == holder.pid  # stale
    with RunFolder.open(tmp_path / "run", "auto", {"seed": 1}):
        assert json.loads((tmp_path / "run/lock").read_text())["pid"] == os.getpid()


def test_the_lock_holds_within_one_process_and_ends_with_close(tmp_path):
    with RunFolder.open(tmp_path, "auto", CONFIG):
        assert f"pid {os.getpid()}" in refused(tmp_path)
    RunFolder.open(tmp_path, "auto", CONFIG).close()


def test_a_refused_opening_releases_the_lock(finished):
    refused(finished, config={"seed": 2})
    RunFolder.open(finished, "auto", CONFIG).close()


def test_an_unreadable_lock_file_still_refuses(tmp_path):
    with RunFolder.open(tmp_path, "auto", CONFIG):
        (tmp_path / "lock").write_text("?")
        assert "in use by another run (pid unknown)" in refused(tmp_path)


def test_the_lock_does_not_pass_to_children(tmp_path):
    with RunFolder.open(tmp_path, "auto", CONFIG):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    try:
        RunFolder.open(tmp_path, "auto", CONFIG).close()
    finally:
        child.kill()
        child.wait()


# Disks that cannot be written


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    message = refused(tmp_path / "file" / "run")
    assert message.startswith("cannot make the run folder")
    assert message.endswith("Not a directory; choose another out=")


def test_a_full_disk_is_said_at_the_start(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic_files.os, "fsync", full)
    message = refused(tmp_path / "run")
    assert "No space left on device; free some space or choose another out=" in message
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["lock"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_read_only_disk_is_said_at_the_start(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "none", str(tmp_path)])
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        RunFolder.open(tmp_path / "run", "auto", CONFIG).close()
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        assert "Read-only file system; choose another out=" in refused(tmp_path / "run")
        assert "Read-only file system; choose another out=" in refused(tmp_path / "new")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# Atomic files


def test_json_is_strict_and_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, None, "é"]})
    assert json.loads(path.read_text()) == {"b": [1, None, "é"]}
    assert path.read_bytes().endswith(b"}\n")
    for wrong, error in (({"x": float("nan")}, ValueError), ({"x": {1}}, TypeError)):
        with pytest.raises(error):
            write_json(path, wrong)
    assert json.loads(path.read_text()) == {"b": [1, None, "é"]}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    write_bytes_atomic(path, b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(atomic_files.os, function, full)
            with pytest.raises(UsageError, match=f"cannot write {re.escape(str(path))}: No space"):
                write_bytes_atomic(path, b"new")
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["a.bin"]


KILLED_WRITER = """
import sys
from experiments.run_folder import write_bytes_atomic
print("ready", flush=True)
for i in range(10**9):
    write_bytes_atomic(sys.argv[1], bytes([i % 256]) * 300_000)
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    path = tmp_path / "a.bin"
    write_bytes_atomic(path, bytes(300_000))
    for delay in (0.0, 0.004, 0.03):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED_WRITER, path], cwd=ROOT, stdout=subprocess.PIPE
        )
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.wait()
        process.stdout.close()
        data = path.read_bytes()
        assert len(data) == 300_000
        assert len(set(data)) == 1


# Names and imports


@pytest.mark.parametrize("name", ["a", "d12_muon-b8.s1", "0", "A" * 80])
def test_safe_run_names(name):
    assert check_run_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "-a", "a/b", "a\\b", "a b", "a\n", "A" * 81])
def test_unsafe_run_names_are_refused(name):
    with pytest.raises(UsageError, match="run name"):
        check_run_name(name)


@given(st.text(max_size=90))
def test_a_name_that_passes_is_one_plain_folder_name(name):
    with contextlib.suppress(UsageError):
        check_run_name(name)
        assert Path("root", name).parts == ("root", name)
        assert name.isascii()
        assert name.isprintable()


def test_opening_a_run_folder_does_not_import_jax():
    code = "import sys, experiments.run_folder; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
