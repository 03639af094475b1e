"""The ladder against numbers of the released PyTorch code, and the command that compares them."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_models import ROW, VOCAB, flat, quick_compiler, random_tokens, tiny_model

from experiments.verify import check_file, main
from models.command_line import UsageError
from models.interop import to_published
from models.ladder import RUNGS

GOLDEN = Path(__file__).parents[2] / "shared/golden"
NAMES = [f"{kind}{rung}.npz" for rung in RUNGS for kind in ("", "spectra_")]
OPTIMIZER = {
    **{"adamw": 1e-3, "embed": 1e-2, "head": 1e-3, "muon": 1e-2, "scalar": 1e-2},
    **{"weight_decay": 0.1, "momentum": 0.9, "ns_steps": 5, "ns_dtype": "float32", "clip": 1.0},
}


@pytest.fixture(scope="module", autouse=True)
def _quick_compiler():
    with quick_compiler():
        yield


@pytest.mark.parametrize("name", NAMES)
def test_built_rungs_are_the_published_models(name):
    path = GOLDEN / name
    if not path.exists():
        pytest.skip("no such reference fixture beside the repository")
    checks, reason = check_file(path)
    assert reason is None
    forward_only = name == "fp8head.npz"
    assert len(checks) == (2 if forward_only else 3 if name.startswith("spectra_") else 4)
    for check in checks:
        assert check.passed, check


# The command, on fixtures made here by our own model


def save(path: Path, meta: dict, arrays: dict) -> Path:
    np.savez(path, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays)
    return path


@pytest.fixture(scope="module")
def parts() -> tuple[dict, dict]:
    """Meta and arrays of a rung at tiny size: weights, logits and loss, no gradients."""
    model = tiny_model("muon")
    tokens = random_tokens()
    (loss, taps), _ = model.loss_and_grads(model.shaken, tokens)
    weights = to_published(model.shaken, model.config.arch)
    size = model.config.size
    meta = {
        **{"rung": "muon", "n_layer": size.n_layer, "n_head": size.n_head},
        **{"n_embd": size.n_embd, "vocab_size": VOCAB, "T": ROW, "B": len(tokens)},
        **{"logits_stride": 1, "opt": OPTIMIZER},
    }
    arrays = {f"param/{name}": array for name, array in weights.items()} | {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "logits": np.asarray(taps["logits"]),
        "loss": np.asarray(loss),
    }
    return meta, arrays


def test_an_array_that_differs_fails(parts, tmp_path, capsys):
    meta, arrays = parts
    good = save(tmp_path / "good.npz", meta, arrays)
    logits = arrays["logits"].copy()
    logits[1, 5, 7] += 1e-3 * np.abs(logits).max()
    bad = save(tmp_path / "bad.npz", meta, arrays | {"logits": logits})
    assert main([str(good)]) == 0
    assert "FAILED" not in capsys.readouterr().out
    assert main([str(good), str(bad)]) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    verdicts = {(line[0], line[1]): line[-1] for line in lines if len(line) == 5}
    assert verdicts[("good.npz", "logits")] == "ok"
    assert verdicts[("bad.npz", "logits")] == "FAILED"
    assert verdicts[("bad.npz", "loss")] == "ok"


def test_what_is_not_a_number_fails(parts, tmp_path, capsys):
    meta, arrays = parts
    tokens = arrays["tokens"].copy()
    tokens[0, 0] = VOCAB
    assert main([str(save(tmp_path / "nan.npz", meta, arrays | {"tokens": tokens}))]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rung", "said"), [("qknorm", "not of this ladder"), ("odd", "not of this ladder")]
)
def test_other_rungs_are_listed(rung, said, parts, tmp_path, capsys):
    meta, arrays = parts
    path = save(tmp_path / "other.npz", meta | {"rung": rung}, arrays)
    assert check_file(path)[0] == []
    assert said in check_file(path)[1]
    assert main([str(path)]) == 0
    assert "skipped" in capsys.readouterr().out


def without(entries: dict, key: str) -> dict:
    return {name: value for name, value in entries.items() if name != key}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m, a: (m, without(a, "tokens")), "it has no tokens"),
        (lambda m, a: (m, without(a, "loss")), "it has no loss"),
        (lambda m, a: (without(m, "n_head"), a), "it has no n_head"),
        (lambda m, a: (m | {"opt": {}}, a), "it has no embed"),
        (lambda m, a: (m | {"n_head": 5}, a), "size.n_head=5 does not divide"),
        (lambda m, a: (m | {"n_layer": 3}, a), "its weights are not those of rung muon"),
        (lambda m, a: (m | {"rung": "rope"}, a), "its weights are not those of rung rope"),
        (lambda m, a: (m, without(a, "param/transformer.wte.weight")), "its weights are not those"),
        (lambda m, a: (m, a | {"param/odd.weight": a["loss"]}), "odd.weight: no parameter"),
        (lambda m, a: (m, a | {"logits": a["logits"][:, :3]}), "an array has shape (4, 3, 97)"),
        (lambda m, a: (m, a | {"grad/odd": a["loss"]}), "only one side has"),
        (lambda m, a: (m | {"weights_from": "gone.npz"}, a), "it has no N"),
        (lambda m, a: (["no", "object"], a), "meta is no object"),
        (lambda m, a: (m, a | {"tokens": np.array([None])}), "not a fixture"),
    ],
)
def test_a_file_that_is_no_fixture_of_ours_is_refused(change, said, parts, tmp_path):
    path = save(tmp_path / "odd.npz", *change(*parts))
    with pytest.raises(UsageError) as caught:
        main([str(path)])
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)


def test_missing_weights_of_spectra_are_named(tmp_path):
    meta = {"rung": "muon", "weights_from": "muon.npz", "N": 1, "layers": [0], "matrices": {}}
    path = save(tmp_path / "spectra_muon.npz", meta, {"tokens": random_tokens()})
    with pytest.raises(UsageError, match=r"spectra_muon.npz: .*muon.npz: no such file"):
        main([str(path)])


def test_fixture_weights_are_all_read(parts):
    """Each published array ends in a parameter, so a perturbed one cannot go unnoticed."""
    _, arrays = parts
    count = sum(a.size for name, a in arrays.items() if name.startswith("param/"))
    assert count == sum(leaf.size for leaf in flat(tiny_model("muon").shaken).values())
    assert count == sum(leaf.size for leaf in jax.tree.leaves(tiny_model("muon").start))
