"""One run in two processes of this machine: the numbers of one process, stopped and gone on with.

They talk through the CPU collectives of jax (gloo). Several machines and NCCL are not tested here.
"""

import json
import re
import signal
import socket
import time

import jax
import numpy as np
import pytest
from tiny_runs import final_state, finish, make_data, make_words, numbers, start, train

from experiments.devices import make_mesh
from experiments.processes import joined, meeting, share
from experiments.run_folder import RunFolder
from lens_jax.comparisons import subspace_overlap
from lens_jax.records import read_step
from models.command_line import UsageError

STEPS = 60
EARLY = 10  # steps in which rounding has not grown
VAL_STEPS, TOKENS_PER_STEP = 10, 256


def free_port(ports=(0,)) -> int:
    for port in ports:
        with socket.socket() as one:
            try:
                one.bind(("", port))
            except OSError:
                continue
            return one.getsockname()[1]
    raise OSError("no port is free")


def by_coordinator():
    """Environments of two processes that are told where they meet."""
    shared = {"LENS_JAX_COORDINATOR": f"127.0.0.1:{free_port()}", "LENS_JAX_NUM_PROCESSES": "2"}
    return [shared | {"LENS_JAX_PROCESS_ID": str(number)} for number in range(2)]


def by_slurm():
    """Environments of two tasks of a Slurm step on one node, as far as jax reads them."""
    first = 2**16 - 2**12  # jax takes the port from the number of the job
    shared = {
        "SLURM_JOB_ID": str(free_port(range(first, 2**16)) - first),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
    }
    return [shared | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]


def start_two(words, cache, environments):
    return [start(words, cache, JAX_NUM_CPU_DEVICES="1", **each) for each in environments]


def wait_for_rows(processes, metrics, count, seconds=120.0):
    """Returns as soon as a run in progress has written so many rows."""
    deadline = time.monotonic() + seconds
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < count:
        assert all(process.poll() is None for process in processes), "the run ended too soon"
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run in one process, the same in two, and what the two processes said at their two starts.

    TERM is sent to the second process alone; the second start finds its partner by Slurm's names.
    """
    folder = tmp_path_factory.mktemp("processes")
    cache = folder / "cache"
    words = make_words(
        make_data(folder),
        STEPS,
        optim__ns_dtype="float32",
        val_every=VAL_STEPS * TOKENS_PER_STEP,
        checkpoint_every=4 * VAL_STEPS * TOKENS_PER_STEP,
        probes__matrices="attn.c_proj",  # most of the time goes into compiling
        probes__windows=4,
    )
    one, two = folder / "one", folder / "two"
    code, out, err = train([*words, f"out={one}"], cache, JAX_NUM_CPU_DEVICES="2")
    assert (code, err) == (0, "")
    assert "parameters on 2 x cpu" in out
    processes = start_two([*words, f"out={two}"], cache, by_coordinator())
    wait_for_rows(processes, two / "metrics.jsonl", 4)
    processes[1].send_signal(signal.SIGTERM)
    stopped = [finish(process) for process in processes]
    saved, _ = final_state(two)
    ended = [finish(each) for each in start_two([*words, f"out={two}"], cache, by_slurm())]
    return one, two, stopped, saved, ended


def test_term_to_one_process_stops_both_at_one_step(runs):
    _, _, stopped, saved, _ = runs
    assert [(code, err) for code, _, err in stopped] == [(143, "")] * 2
    said = stopped[0][1].splitlines()[-1]
    assert said.startswith(f"stopped by SIGTERM after step {saved}, checkpoint saved")
    assert 0 < saved < STEPS


def test_only_the_first_process_speaks(runs):
    _, _, stopped, _, ended = runs
    for (_, first, _), (_, second, _) in (stopped, ended):
        assert "parameters on 2 x cpu" in first
        assert not [line for line in second.splitlines() if not line.startswith("[Gloo]")]


def test_two_processes_went_on_to_the_end(runs):
    _, two, _, saved, ended = runs
    assert [(code, err) for code, _, err in ended] == [(0, "")] * 2
    assert f"resumed at step {saved}\n" in ended[0][1]
    assert json.loads((two / "result.json").read_text())["step"] == STEPS
    assert (two / "summary.png").exists()


def test_losses_and_gradient_norms_are_those_of_one_process(runs):
    one, two = (numbers(run) for run in runs[:2])
    assert [(row["kind"], row["step"]) for row in two] == [
        (row["kind"], row["step"]) for row in one
    ]
    for key in ("loss", "grad_norm", "update_norm", "param_norm"):
        pairs = [(a[key], b[key], a["step"]) for a, b in zip(one, two, strict=True) if key in a]
        wanted, got, steps = (np.array(column) for column in zip(*pairs, strict=True))
        early = steps <= EARLY
        np.testing.assert_allclose(got[early], wanted[early], rtol=1e-6, err_msg=key)
        np.testing.assert_allclose(got, wanted, rtol=1e-4, err_msg=key)


def test_spectra_are_those_of_one_process(runs):
    names = [sorted(path.name for path in (run / "spectra").iterdir()) for run in runs[:2]]
    assert names[0] == names[1]
    early = [name for name in names[0] if int(re.findall(r"\d+", name)[0]) <= EARLY]
    assert len(early) >= 2
    for name in early:
        (meta, one), (other_meta, two) = (read_step(run / "spectra" / name) for run in runs[:2])
        assert meta == other_meta
        for key, wanted in one.items():
            if key.startswith("act_cov_eigenvectors/"):
                assert subspace_overlap(two[key], wanted) > 1 - 1e-6, key  # signs are arbitrary
                continue
            scale = np.abs(wanted).max()
            np.testing.assert_allclose(two[key], wanted, rtol=0, atol=1e-6 * scale, err_msg=key)


def test_the_state_of_two_processes_is_that_of_one(runs):
    (step, wanted), (other, got) = (final_state(run) for run in runs[:2])
    assert (step, other) == (STEPS, STEPS)
    for path, array in wanted.items():
        np.testing.assert_allclose(got[path], array, rtol=1e-3, atol=1e-5, err_msg=path)


def test_processes_with_different_words_are_refused(runs, tmp_path):
    words = make_words(f"{runs[0].parent}/*.bin", STEPS, out=tmp_path / "run")
    processes = [
        start([*words, f"seed={seed}"], tmp_path / "cache", JAX_NUM_CPU_DEVICES="1", **each)
        for seed, each in enumerate(by_coordinator())
    ]
    for code, _, err in map(finish, processes):
        assert code == 2
        assert err.startswith("error: the 2 processes of this run have different configurations")
        assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


# Who meets whom

THREE = {
    "LENS_JAX_COORDINATOR": "host:1234",
    "LENS_JAX_NUM_PROCESSES": "3",
    "LENS_JAX_PROCESS_ID": "2",
}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-4]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
}


def test_a_coordinator_that_is_given_wins_over_slurm():
    found = meeting(SLURM | THREE)
    assert (found["coordinator_address"], found["num_processes"], found["process_id"]) == (
        "host:1234",
        3,
        2,
    )
    assert found["cluster_detection_method"] == "deactivate"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (SLURM, {}),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        # a job of four tasks, and a shell or a script of it that is a single one
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({key: SLURM[key] for key in SLURM if key != "SLURM_STEP_NODELIST"}, None),
        # a task a node takes all its cards, two tasks a node one each, as jax deals them out
        (
            SLURM | {"SLURM_STEP_NUM_NODES": "4", "SLURM_GPUS_ON_NODE": "2"},
            {"local_device_ids": [0, 1]},
        ),
        (SLURM | {"SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "2"}, {}),
        (SLURM | {"SLURM_STEP_NUM_NODES": "4"}, {}),
    ],
)
def test_who_is_alone_and_who_meets_by_slurm(environ, expected):
    assert meeting(environ) == expected


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"LENS_JAX_COORDINATOR": "host"}, "LENS_JAX_COORDINATOR=host: write HOST:PORT"),
        ({"LENS_JAX_NUM_PROCESSES": "0"}, "LENS_JAX_NUM_PROCESSES=0"),
        ({"LENS_JAX_PROCESS_ID": "3"}, "LENS_JAX_PROCESS_ID=3: give 0 to 2"),
        ({"LENS_JAX_PROCESS_ID": None}, "LENS_JAX_PROCESS_ID is missing"),
    ],
)
def test_bad_variables_end_in_one_line(changed, said):
    environ = {key: value for key, value in (THREE | changed).items() if value is not None}
    with pytest.raises(UsageError, match=said):
        meeting(environ)


def test_a_port_in_use_is_named(monkeypatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        for key, value in THREE.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setenv("LENS_JAX_COORDINATOR", f"localhost:{port}")
        monkeypatch.setenv("LENS_JAX_PROCESS_ID", "0")
        with pytest.raises(UsageError, match=f"localhost:{port}: Address already in use"), joined():
            pass


def test_a_process_alone_shares_with_itself():
    value = {"anything": [1, None]}
    assert share(value) is value


def test_rows_that_processes_cannot_share_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UsageError, match="2 processes cannot share a micro-batch of 3 rows"):
        make_mesh(3)


def test_a_folder_beside_is_not_locked(tmp_path):
    with RunFolder.open(tmp_path / "run", "auto", {"a": 1}) as first:
        beside = RunFolder.beside(first.path)
        assert (beside.path, beside.checkpoints) == (first.path, first.checkpoints)
        beside.close()  # does not open the folder to others
        with pytest.raises(UsageError, match="in use by another run"):
            RunFolder.open(tmp_path / "run", "auto", {"a": 1})
