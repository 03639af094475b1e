"""How a run goes on elsewhere: what is refused, what is told, and what earlier checkpoints lack."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_models import tiny_config

from experiments.devices import make_mesh, replicated
from experiments.start import circumstances, greet, initial_state
from models.command_line import UsageError


@pytest.fixture
def run():
    mesh = make_mesh(1)
    return SimpleNamespace(
        mesh=mesh,
        facts={"dtype": "float32"},
        shapes={"w": jax.ShapeDtypeStruct((3,), np.float32, sharding=replicated(mesh))},
    )


@pytest.mark.parametrize(("val_tokens", "told"), [(8 * 32, []), (12 * 32, [True])])
def test_a_validation_that_devices_cannot_share_is_told(val_tokens, told):
    device = SimpleNamespace(device_kind="cpu")
    mesh = SimpleNamespace(devices=np.array([device] * 8), size=8)
    run = SimpleNamespace(
        mesh=mesh, num_params=1, facts={"dtype": "float32", "unigram_entropy": None}
    )
    schedule = SimpleNamespace(num_steps=1, measure=())
    lines = []
    words = {"data__val_tokens": val_tokens, "data__probe_offset": val_tokens, "accumulate": 1}
    config = tiny_config("untied", **words)
    greet(SimpleNamespace(note=lines.append), config, run, schedule, 0)
    found = [line for line in lines if line.startswith("validation runs whole on every device")]
    assert ["its 12 rows cannot be shared by 8 of them" in line for line in found] == told


def resume(run, here, **saved):
    """The step a run goes on from, when its newest checkpoint says what `saved` says."""
    checkpoints = SimpleNamespace(
        latest=lambda: 7, read_meta=lambda step: saved, restore=lambda step, abstract: abstract
    )
    return initial_state(run, checkpoints, here)[1]


def test_what_a_checkpoint_says(run):
    here = circumstances(tiny_config("untied"), run, "tiny")
    assert (here["data"], here["num_devices"], here["platform"]) == ("tiny", 1, "cpu")
    assert (here["dtype"], here["attention"], here["remat"]) == ("float32", "blocked", False)
    assert here["versions"]["jax"] == jax.__version__
    assert "grain" in here["versions"]


def test_the_same_circumstances_are_no_news(run, capsys):
    here = circumstances(tiny_config("untied"), run, "tiny")
    assert resume(run, here, **here) == 7
    assert capsys.readouterr().out == ""


def test_another_precision_is_refused_and_another_machine_told(run, capsys):
    here = circumstances(tiny_config("untied"), run, "tiny")
    there = here | {"platform": "gpu", "dtype": "bfloat16"}
    with pytest.raises(UsageError) as caught:
        resume(run, here, **there)
    assert "was trained in bfloat16 on gpu, compute_dtype=auto means float32" in str(caught.value)
    there = here | {
        "platform": "gpu",
        "attention": "pallas",
        "remat": True,
        "fsdp": True,
        "num_devices": 8,
    }
    there["versions"] = here["versions"] | {"jax": "0.1"}
    assert resume(run, here, **there) == 7
    told = capsys.readouterr().out
    for change in (
        "saved on 8 devices, resumed on 1",
        "saved with platform=gpu, resumed with platform=cpu",
        "saved with attention=pallas, resumed with attention=blocked",
        "saved with remat=True, resumed with remat=False",
        "saved with fsdp=True, resumed with fsdp=False",
        f"saved with jax 0.1, resumed with jax {jax.__version__}",
    ):
        assert f"note: {change}: losses agree to rounding, not bit by bit\n" in told


def test_a_checkpoint_that_says_less_goes_on_as_before(run, capsys):
    here = circumstances(tiny_config("untied"), run, "tiny")
    versions = {name: there for name, there in here["versions"].items() if name != "grain"}
    assert resume(run, here, data="tiny", num_devices=1, versions=versions) == 7
    assert capsys.readouterr().out == ""
    with pytest.raises(UsageError, match="was trained on other, not on tiny; bring that data back"):
        resume(run, here, data="other", num_devices=1, versions=versions)
