"""The probe of the released code, for numbers that can be held against the paper's own.

Windows as long as the rung's rows, in file order from the first validation token on, 512 of them
under the gradients, ranks 30 to 150, and one CSV a checkpoint with the released columns (protocol
spec 1.2 to 1.6). The released scripts differ from one another; what is kept here is what most do.
Known differences: the window at a step is the training's, not one derived anew; every position has
a target, where the baseline's script leaves out each window's last; arithmetic is the run's
compute_dtype.
"""

import csv
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config import RunConfig
from lens_jax.fits import fit_power_law
from models.atomic_files import write_bytes_atomic

GRADIENT_WINDOWS = 512
FIRST_RANK, LAST_RANK = 30, 150
SPECTRA = {
    "cov": "act_cov_eigenvalues",
    "grad": "grad_singular_values",
    "weight": "weight_singular_values",
}
COLUMNS = (
    "step",
    "layer",
    "matrix",
    *(f"{kind}_{number}" for kind in SPECTRA for number in ("alpha", "r2")),
    "seq_length",
    "window_tokens",
)
_KERNEL = re.compile(r"h_(\d+)/(.+)/kernel")


def paper_tokens(config: RunConfig) -> int:
    """Tokens that the released protocol reads at most: one more than every window has, each."""
    return _rows(config) * (config.row + 1)


def _rows(config: RunConfig) -> int:
    return 512 if config.arch.row == "long" else 32_768


def paper_values(config: RunConfig, available: int) -> dict[str, Any]:
    """Probe keys of the released protocol for a rung, as far as `available` tokens go.

    33.55M tokens under the activations: 32,768 short rows, or 512 long ones.
    """
    stride = config.row + 1
    samples = min(GRADIENT_WINDOWS, available // stride)
    chunk = 1 if config.arch.row == "long" else min(config.probes.chunk, samples)
    samples -= samples % chunk
    more = min(_rows(config), available // stride) - samples
    return {
        "probes.window": config.row,
        "probes.windows": samples + more - more % chunk,
        "probes.gradient_windows": samples,
        "probes.chunk": chunk,
        "probes.data": "fixed",
    }


def write_summary(folder: Path, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Path:
    """Write summary_step_<step>.csv beside a step's spectra, one row a probed layer and matrix."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for layer, matrix, path in _kernels(arrays):
        places = {"cov": f"h_{layer}/resid_post", "grad": path, "weight": path}
        row = {"step": meta["step"], "layer": layer, "matrix": matrix}
        row |= {"seq_length": meta["sample_tokens"], "window_tokens": meta["window_tokens"]}
        for column, place in places.items():
            row |= _fit(column, arrays.get(f"{SPECTRA[column]}/{place}"))
        writer.writerow(row)
    path = folder / f"summary_step_{meta['step']:08d}.csv"
    write_bytes_atomic(path, text.getvalue().encode())
    return path


def _kernels(arrays: Mapping[str, np.ndarray]) -> list[tuple[int, str, str]]:
    """Layer, published name and path of every kernel with a weight spectrum, by layer."""
    prefix = f"{SPECTRA['weight']}/"
    paths = [name.removeprefix(prefix) for name in arrays if name.startswith(prefix)]
    found = [(path, _KERNEL.fullmatch(path)) for path in paths]
    return sorted((int(m[1]), m[2].replace("/", "."), path) for path, m in found if m)


def _fit(column: str, values: np.ndarray | None) -> dict[str, float]:
    """Alpha and R2 as the released code has them, the window cut to a spectrum that is shorter.

    Only what is not positive drops out: values that are rounding count too, as they do nowhere else
    here.
    """
    if values is None or len(values) < 3:
        return {}
    first = min(FIRST_RANK, len(values) - 2)
    fit = fit_power_law(values, first, max(LAST_RANK, first + 2), floor=0.0)
    return {f"{column}_alpha": fit.alpha, f"{column}_r2": fit.r2}
