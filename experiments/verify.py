"""Check the models, optimizers and lens against reference fixtures, and print a table.

    python -m experiments.verify FILES

A fixture is an .npz of numbers computed by the released PyTorch code: weights and tokens, and
either logits, loss, gradients and weights after three optimizer steps (`<rung>.npz`) or the spectra
on the weights of its sibling file (`spectra_<rung>.npz`). Everything runs in float32. Errors are
largest |ours - reference| over largest |reference|, per array, worst over arrays; an array whose
reference is below 1e-7 of the largest of its kind is compared absolutely, on the scale of that
largest. Exit code 1 when a tolerance is exceeded, 2 on a file that cannot be read.
"""

import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.command_line import Layer, UsageError, build, run_command
from models.ladder import RUNGS, rung_values

LOGITS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 2e-4
SPECTRUM_TOLERANCE = 1e-4
# Adam divides by its own size a gradient that is nothing but rounding, so its rungs get more room.
UPDATE_TOLERANCE = {"muon": 1e-4, "adam": 1e-3}
NEGLIGIBLE = 1e-7
NUM_UPDATES = 3

# What a fixture must hold to be compared at all.
RUNG_META = ("n_layer", "n_head", "n_embd", "vocab_size", "T", "B", "logits_stride")
RUNG_ARRAYS = ("tokens", "targets", "logits", "loss")
OPTIMIZER_META = ("embed", "head", "muon", "scalar", "adamw", "weight_decay", "momentum")
OPTIMIZER_META += ("ns_steps", "ns_dtype", "clip")
MASK_BLOCK = 128  # of the published windows; fixtures of the others have one block a row
SPECTRA_META = ("weights_from", "N", "layers", "matrices")


class Check(NamedTuple):
    """One line of the table."""

    file: str
    quantity: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


def worst_error(ours: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> float:
    """Largest relative error over arrays, by the rule of the module docstring."""
    if ours.keys() != reference.keys():
        odd = sorted(ours.keys() ^ reference.keys())
        raise UsageError(f"not a fixture of this model (only one side has {odd[0]})")
    for name, array in reference.items():
        if np.shape(ours[name]) != array.shape:
            raise UsageError(
                f"not a fixture of this model ({name or 'an array'} has shape {array.shape}, "
                f"ours {np.shape(ours[name])})"
            )
    sizes = {name: np.abs(array).max() for name, array in reference.items()}
    largest = max(sizes.values())
    errors = []
    for name, array in reference.items():
        scale = sizes[name] if sizes[name] >= NEGLIGIBLE * largest else largest
        difference = np.abs(np.asarray(ours[name], np.float64) - array.astype(np.float64))
        errors.append(difference.max() / scale)
    return float(np.max(errors))


def load_fixture(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Meta and arrays of a fixture; raises UsageError when it is not one."""
    try:
        # an .npy would come back as an array and a pickle be refused: only .npz is opened at all
        with zipfile.ZipFile(path), np.load(path) as archive:
            arrays = {name: archive[name] for name in archive.files}
        meta = json.loads(bytes(arrays.pop("meta")))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; give fixture files (*.npz)") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{path}: not a fixture ({error}); give <rung>.npz files") from None
    if not isinstance(meta, dict):
        raise UsageError(f"{path}: not a fixture (meta is no object); give <rung>.npz files")
    return meta, arrays


def require(there: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises UsageError for the first name that is not there."""
    for name in names:
        if name not in there:
            raise UsageError(f"not a fixture (it has no {name}); give <rung>.npz files")


def subset(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Arrays under `prefix/`, by the rest of their name."""
    return {
        n.removeprefix(prefix + "/"): a for n, a in arrays.items() if n.startswith(prefix + "/")
    }


def fixture_config(meta: dict[str, Any]):
    """The run configuration of a fixture: its rung, at its size, with its optimizer settings.

    The later rungs' fixtures have a float32 head where their meta says so.
    """
    from experiments.config import RunConfig

    rung = rung_values(meta["rung"])
    windowed = rung.get("arch.window", "none") != "none"
    size = {key: meta[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size")}
    size |= {"block": MASK_BLOCK if windowed else meta["T"], "eot_token": meta.get("eot_token")}
    size |= {"short_row": meta["T"], "long_row": meta["T"] * meta["B"]}
    values = {f"size.{key}": value for key, value in size.items()} | fixture_optimizer(meta, rung)
    if meta.get("head") == "float32":
        values["arch.head_dtype"] = "compute"
    values |= {"rung": meta["rung"], "batch": 1, "accumulate": 1, "probes.window": meta["T"]}
    values |= {"data.val_tokens": meta["T"], "data.probe_offset": meta["T"]}
    return build(RunConfig, [Layer("rung", rung), Layer("fixture", values)])[0]


def fixture_optimizer(meta: dict[str, Any], rung: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer's keys of a fixture; a fixture without updates has none."""
    if "opt" not in meta:
        return {}
    rates = meta["opt"]
    require(rates, OPTIMIZER_META)
    if rung.get("optim.matrices") == "muon":
        names = {"embed_lr": "embed", "matrix_lr": "muon", "scalar_lr": "scalar"}
        optim = {key: rates[name] for key, name in names.items()} | {"head_lr": rates["head"]}
        optim |= {"weight_decay": 0.0, "momentum": rates["momentum"], "momentum_start": None}
    else:
        groups = ("embed_lr", "head_lr", "matrix_lr", "scalar_lr")
        optim = dict.fromkeys(groups, rates["adamw"]) | {"weight_decay": rates["weight_decay"]}
    optim |= {"ns_dtype": rates["ns_dtype"], "ns_steps": rates["ns_steps"], "clip": rates["clip"]}
    optim |= {"schedule": "trapezoid", "warmdown": 0.0}
    return {f"optim.{key}": value for key, value in optim.items()}


def fixture_batch(meta: dict[str, Any], config, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """A batch of token rows (B, T+1) under the window in a fixture's meta.

    That is in tokens, or in mask blocks where the rung's rule knows only those; the first windowed
    rung has its one window built in.
    """
    window = meta.get("window")
    if config.arch.window == "none" or not isinstance(window, int):
        return {"tokens": tokens}
    if config.arch.window == "block":
        window *= MASK_BLOCK
    return {"tokens": tokens, "window": np.full((len(tokens),), window, np.int32)}


def model_of(config, arrays: dict[str, np.ndarray]):
    """The model and our parameter tree from a fixture's published weights."""
    import jax

    from models.gpt import GPT, init_params
    from models.interop import from_published

    model = GPT(config.arch, config.size)
    try:
        params = from_published(subset(arrays, "param"), config.arch)
    except ValueError as error:
        raise UsageError(str(error)) from None
    expected = jax.tree.map(jax.numpy.shape, jax.eval_shape(lambda: init_params(model, 0)))
    if jax.tree.map(np.shape, params) != expected:
        raise UsageError(f"its weights are not those of rung {config.rung} at the size in its meta")
    return model, jax.tree.map(jax.numpy.asarray, params)


def check_rung(file: str, meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> Iterator[Check]:
    """Logits, loss, gradients and three updates of one rung."""
    import jax
    import optax

    from experiments.loss import make_loss
    from models.interop import to_published
    from optim.groups import make_optimizer
    from optim.schedules import Horizon

    require(meta, RUNG_META)
    require(arrays, RUNG_ARRAYS)
    config = fixture_config(meta)
    model, params = model_of(config, arrays)
    tokens = np.concatenate([arrays["tokens"], arrays["targets"][:, -1:]], axis=1)
    batch = fixture_batch(meta, config, tokens)
    loss_and_grads = jax.jit(jax.value_and_grad(make_loss(model), has_aux=True))
    (loss, taps), grads = loss_and_grads(params, batch)
    logits = np.asarray(taps["logits"])[:, :: meta["logits_stride"]]
    yield Check(file, "logits", worst_error({"": logits}, {"": arrays["logits"]}), LOGITS_TOLERANCE)
    loss_error = worst_error({"": np.asarray(loss)}, {"": arrays["loss"]})
    yield Check(file, "loss", loss_error, LOGITS_TOLERANCE)
    if not subset(arrays, "grad"):
        return
    grad_error = worst_error(to_published(grads, config.arch), subset(arrays, "grad"))
    yield Check(file, "gradients", grad_error, GRADIENT_TOLERANCE)

    tx = make_optimizer(config.optim, Horizon(NUM_UPDATES * 1000, 0), params)
    opt_state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(NUM_UPDATES):
        _, grads = loss_and_grads(params, batch)
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    step_error = worst_error(to_published(params, config.arch), subset(arrays, "step3"))
    tolerance = UPDATE_TOLERANCE[config.optim.matrices]
    yield Check(file, f"updates ({NUM_UPDATES})", step_error, tolerance)


def check_spectra(
    file: str, meta: dict[str, Any], arrays: dict[str, np.ndarray], weights: Path
) -> Iterator[Check]:
    """Spectra of one rung on twelve sequences, by one forward and one backward pass."""
    from experiments.loss import make_loss
    from lens_jax.lens import ProbeBatch, make_lens
    from lens_jax.probes import spectra
    from lens_jax.step import make_measure_step

    require(meta, SPECTRA_META)
    require(arrays, ("tokens",))
    rung_meta, rung_arrays = load_fixture(weights)
    require(rung_meta, RUNG_META)
    config = fixture_config(rung_meta)
    model, params = model_of(config, rung_arrays)
    layers, matrices = meta["layers"], meta["matrices"]
    sites = tuple(f"h_{layer}/resid_post" for layer in layers)
    paths = {
        f"{layer}/{short}": f"h_{layer}/{name.replace('.', '/')}/kernel"
        for layer in layers
        for short, name in matrices.items()
    }
    kernels = tuple(paths.values())
    lens = make_lens(windows=meta["N"], activations=sites, gradients=kernels, route="one_backward")
    measure = make_measure_step(make_loss(model), lens)
    batch = fixture_batch(rung_meta | meta, config, arrays["tokens"])
    summaries, _ = measure(params, ProbeBatch(batch))
    found = spectra(summaries, resample=False)
    ours = {
        "act_cov_eigenvalues": {
            str(layer): found[f"act_cov_eigenvalues/{site}"]
            for layer, site in zip(layers, sites, strict=True)
        },
        "act_mean_sq": {
            str(layer): found[f"act_mean_sq/{site}"]
            for layer, site in zip(layers, sites, strict=True)
        },
        "grad_singular_values": {
            key: found[f"grad_singular_values/{path}"] for key, path in paths.items()
        },
    }
    for kind, values in ours.items():
        yield Check(file, kind, worst_error(values, subset(arrays, kind)), SPECTRUM_TOLERANCE)


def check_file(path: Path) -> tuple[list[Check], str | None]:
    """The checks of one fixture, or the reason why there are none."""
    meta, arrays = load_fixture(path)
    rung = meta.get("rung")
    if rung not in RUNGS:
        return [], f"rung {rung} is not of this ladder"
    import jax

    try:
        with jax.default_matmul_precision("highest"):  # not through TF32 on NVIDIA cards
            if "weights_from" in meta:
                weights = path.parent / meta["weights_from"]
                return list(check_spectra(path.name, meta, arrays, weights)), None
            return list(check_rung(path.name, meta, arrays)), None
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def main(argv: list[str]) -> int:
    """The command; returns its exit code. Raises UsageError for a file that is no fixture."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    if not argv:
        raise UsageError("no fixture given; name <rung>.npz or spectra_<rung>.npz files")
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("file", "quantity", "error", "tolerance", "", box=box.SIMPLE)
    failed = 0
    for name in argv:
        checks, reason = check_file(Path(name))
        if reason:
            table.add_row(Path(name).name, reason, "", "", "skipped")
        for check in checks:
            failed += not check.passed
            verdict = "ok" if check.passed else "FAILED"
            table.add_row(
                check.file,
                check.quantity,
                f"{check.error:.2e}",
                f"{check.tolerance:.0e}",
                verdict,
            )
    Console().print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    run_command(main)
