"""Meshes, where arrays lie on them, and the same training on 1 and on 8 devices."""

import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_runs import ROOT, make_data, make_words, numbers, train

from experiments import devices
from lens_jax.comparisons import subspace_overlap
from lens_jax.records import read_step

EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
ONE = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Twenty steps on one device, on eight, and on eight among which the state is cut at times."""
    folder = tmp_path_factory.mktemp("devices")
    words = make_words(make_data(folder), 20, optim__ns_dtype="float32")
    for name, count, env in (("one", 1, ONE), ("eight", 8, EIGHT)):
        code, out, err = train([*words, f"out={folder / name}"], folder / "cache", **env)
        assert (code, err) == (0, "")
        assert f"parameters on {count} x cpu" in out
    for word in ("fsdp=true pause_tokens=1e3", "fsdp=false pause_tokens=3e3", "fsdp=true"):
        ours = [*words, *word.split(), f"out={folder / 'cut'}"]
        code, out, err = train(ours, folder / "cache", **EIGHT)
        assert (code, err) == (0, "")
    assert "saved with fsdp=False, resumed with fsdp=True: losses agree to rounding" in out
    return folder / "one", folder / "eight", folder / "cut"


@pytest.fixture(params=[1, 2], ids=["copied", "cut"])
def pair(runs, request):
    """The run on one device, and one on eight."""
    return runs[0], runs[request.param]


def test_losses_of_one_and_eight_devices_agree(pair):
    one, eight = (numbers(run) for run in pair)
    assert [(row["kind"], row["step"]) for row in one] == [
        (row["kind"], row["step"]) for row in eight
    ]
    assert sum(row["kind"] == "train" for row in one) == 20
    for key in ("loss", "grad_norm"):
        wanted, got = ([row[key] for row in rows if key in row] for rows in (one, eight))
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5, err_msg=key)


def test_spectra_of_one_and_eight_devices_agree(pair):
    names = [sorted(path.name for path in (run / "spectra").iterdir()) for run in pair]
    assert names[0] == names[1]
    for name in names[0]:
        (meta, one), (other_meta, eight) = (read_step(run / "spectra" / name) for run in pair)
        assert meta["probe_hash"] == other_meta["probe_hash"]
        for key, wanted in one.items():
            if key.startswith("grad_singular_values_centred/"):
                wanted, eight[key] = wanted[:-1], eight[key][:-1]  # the last is 0 but for rounding
            if key.startswith("act_cov_eigenvectors/"):
                assert subspace_overlap(eight[key], wanted) > 1 - 1e-4, key  # signs are arbitrary
                continue
            np.testing.assert_allclose(
                eight[key], wanted, rtol=0, atol=1e-4 * np.abs(wanted).max(), err_msg=key
            )


ROUTES = """
import sys
sys.path.insert(0, "tests")
import jax, numpy as np
from tiny_models import flat, quick_compiler, random_tokens, shake, tiny_config
from experiments.devices import make_mesh, place_rows, replicated
from experiments.loss import make_loss
from experiments.setup import make_model
from lens_jax.lens import ProbeBatch, make_lens
from lens_jax.step import make_measure_step
from models.gpt import init_params
mesh = make_mesh(8)
model = make_model(tiny_config("attnscale"), mesh)
params = shake(jax.jit(lambda: init_params(model, 0))())
paths = tuple(p for p in flat(params) if p.endswith("/kernel") and p.startswith("h_"))
batch = ProbeBatch({"tokens": place_rows(mesh, random_tokens(8), axis=0)})
found = []
with quick_compiler():
    for route in ("one_backward", "vmap_grad"):
        lens = make_lens(windows=8, gradients=paths, route=route)
        measure = make_measure_step(make_loss(model), lens)
        found.append(measure(jax.device_put(params, replicated(mesh)), batch)[0])
ours, expected = (
    {k: np.asarray(v) for k, v in each.items() if k.startswith("grad/")} for each in found
)
worst = max(np.abs(ours[k] - expected[k]).max() / np.abs(expected[k]).max() for k in expected)
print(jax.device_count(), len(paths), worst)
"""


VALIDATION = """
import numpy as np
from experiments import setup
from experiments.devices import make_mesh
def place(mesh, tokens, *, axis):
    placed = own(mesh, tokens, axis=axis)
    print(*placed.sharding.shard_shape(placed.shape))
    return placed
own, setup.place_rows = setup.place_rows, place
for rows in (24, 12):
    setup._make_evaluate(None, np.zeros((rows, 3), np.int32), 16, make_mesh(16), np.float32)
"""


def test_eight_devices_share_the_rows_of_a_validation():
    # passes, rows of each on a device, tokens: of 24 rows one a device, of 12 all on every one
    assert python(VALIDATION, **EIGHT) == ["3 1 3", "1 12 3"]


def test_one_backward_on_eight_devices_is_vmap_of_grad():
    devices, kernels, worst = python(ROUTES, **EIGHT)[-1].split()
    assert (int(devices), int(kernels)) == (8, 20)  # one of the four layers has no attention
    assert float(worst) < 1e-5


# Meshes and placement


def python(code, **env):
    """Standard output of a Python process in which jax has not been used yet."""
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    return process.stdout.split("\n")[:-1]


def test_a_mesh_takes_as_many_devices_as_divide_the_rows():
    lines = python(
        "import numpy as np\n"
        "from experiments.devices import make_mesh, place_rows, replicated, split_cpu\n"
        "split_cpu()\n"  # the user has chosen: nothing changes
        "print(*(make_mesh(rows).size for rows in (1, 6, 7, 8, 12, 16, 22)))\n"
        "mesh = make_mesh(8)\n"
        "for rows in (16, 8, 6):\n"
        "    tokens = np.arange(2 * rows * 3).reshape(2, rows, 3)\n"
        "    placed = place_rows(mesh, tokens, axis=1)\n"
        "    assert np.array_equal(placed, tokens)\n"
        "    print(*placed.sharding.shard_shape(tokens.shape), placed.is_fully_replicated)\n"
        "print(*replicated(mesh).shard_shape((5, 3)))\n",
        **EIGHT,
    )
    assert lines == ["1 6 7 8 6 8 2", "2 2 3 False", "2 1 3 False", "2 6 3 True", "5 3"]


@pytest.mark.parametrize(
    ("batch", "count", "processes", "expected"),
    [
        *[(8, 1, 1, 8), (8, 8, 1, 1), (8, 4, 1, 2), (8, 3, 1, 4), (8, 16, 2, 1), (32, 8, 1, 4)],
        *[(4, 8, 1, 1), (6, 4, 1, 2), (1, 2, 1, 1), (1, 2, 2, 1), (6, 4, 2, 3), (7, 4, 1, 7)],
    ],
)
def test_every_device_has_one_long_row_at_a_time(batch, count, processes, expected):
    assert devices.micro_batches(batch, count, processes) == expected


def test_micro_batches_are_settled_by_the_devices():
    code = (
        "import chz\n"
        "from experiments.devices import settled\n"
        "from experiments.resolve import resolve\n"
        "for batch in (4, 8, 32):\n"
        "    config = resolve({'batch': str(batch), 'profile': 'paper'}, 'paper')[0]\n"
        "    print(config.accumulate, settled(config).accumulate)\n"
        "print(settled(chz.replace(config, accumulate=2)).accumulate)"
    )
    assert python(code, **EIGHT) == ["None 1", "None 1", "None 4", "2"]


STATE = """
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec
from experiments.devices import make_mesh, state_sharding
mesh = make_mesh(8)
for shape in ((64, 128), (128, 64), (96, 96), (804, 128), (8, 24, 100), (71, 73), (8, 16), ()):
    whole, cut = (state_sharding(mesh, jnp.zeros(shape), cut=cut) for cut in (False, True))
    assert whole.spec == PartitionSpec()
    print(*cut.shard_shape(shape))
"""


def test_a_state_is_cut_along_the_last_axis_that_devices_divide():
    lines = python(STATE, **EIGHT)
    assert lines == ["64 16", "128 8", "96 12", "804 16", "8 3 100", "71 73", "8 16", ""]


def test_a_cpu_is_split_in_two_unless_the_user_has_chosen():
    code = "from experiments.devices import *\nsplit_cpu()\nimport jax\nprint(jax.device_count())"
    cores = "import os\nprint(min(2, os.cpu_count()))"
    assert python(code) == python(cores)
    assert python(code, JAX_NUM_CPU_DEVICES="3") == ["3"]


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The environment of a machine that has an accelerator's plugin, here an empty module."""
    (tmp_path / "plugin").mkdir()
    (tmp_path / "plugin/jax_cuda12_plugin.py").write_text("")
    for name in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    return {"PYTHONPATH": f"{tmp_path / 'plugin'}:{ROOT}"}


def test_the_cpu_is_split_before_a_plugin_is_asked_for_devices(plugin):
    code = (
        "from experiments.devices import split_cpu\n"
        "from experiments.resolve import resolve_here\n"
        "print(resolve_here({})[2])\n"
        "split_cpu()\n"  # as every command does later
        "import os, jax\n"
        "print(jax.device_count() == min(2, os.cpu_count()))"
    )
    assert python(code, **plugin) == ["no accelerator is visible", "True"]


def test_a_run_with_profile_auto_trains_where_a_plugin_is_installed(plugin, tmp_path):
    words = make_words(make_data(tmp_path), 1, profile="auto", probes="", out=tmp_path / "run")
    code, out, err = train(words, tmp_path / "cache", **plugin)
    assert (code, err) == (0, "")
    assert "profile laptop: no accelerator is visible" in out


def test_peak_flops_of_a_mesh():
    def mesh(kind):
        device = SimpleNamespace(device_kind=kind)
        return SimpleNamespace(devices=np.array([device, device]), size=2)

    assert devices.peak_flops(mesh("NVIDIA H100 80GB HBM3")) == 2 * 989.5e12
    assert devices.peak_flops(mesh("NVIDIA H200")) == 2 * 989.5e12
    assert devices.peak_flops(mesh("NVIDIA H100 PCIe")) == 2 * 756.5e12
    for kind in ("NVIDIA H100 NVL", "NVIDIA H200 NVL"):
        assert devices.peak_flops(mesh(kind)) == 2 * 835.5e12
    assert devices.peak_flops(mesh("NVIDIA H100 80GB HBM3 MIG 1g.10gb")) is None
    assert devices.peak_flops(mesh("cpu")) is None


@pytest.mark.parametrize(
    ("platform", "memory", "profile"),
    [
        ("gpu", 105e9, "paper"),
        ("gpu", 18e9, "laptop"),
        ("gpu", None, "laptop"),
        ("cpu", 0, "laptop"),
    ],
)
def test_the_profile_depends_on_the_memory_of_the_accelerator(
    monkeypatch, platform, memory, profile
):
    stats = None if memory is None else {"bytes_limit": memory}
    device = SimpleNamespace(
        platform=platform, device_kind="NVIDIA A100", memory_stats=lambda: stats
    )
    monkeypatch.setattr(devices, "ACCELERATOR_PLUGINS", ("jax",))
    monkeypatch.setattr(devices, "split_cpu", lambda: None)  # jax of this process runs already
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert devices.auto_profile()[0] == profile


def test_without_a_plugin_jax_is_not_asked(monkeypatch):
    monkeypatch.setattr(devices, "ACCELERATOR_PLUGINS", ("no_such_plugin",))
    monkeypatch.setattr(jax, "devices", lambda: pytest.fail("asked"))
    assert devices.auto_profile()[0] == "laptop"
