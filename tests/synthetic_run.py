"""A run folder made up from random matrices with the shapes and the drift of a real run."""

import json

import numpy as np

from lens_jax.records import write_step

STEPS = (0, 25, 50, 100, 150, 200, 300, 400, 500)
TOKENS_PER_STEP = 16_384
MATRICES = ("attn/c_q", "attn/c_v", "attn/c_proj", "mlp/c_proj")
PROBED_LAYERS = (0, 3, 6, 9, 11)


def activation_eigenvalues(rng, width, progress, layer):
    """A rank power law that steepens with depth and training, with a rogue top and a soft end."""
    rank = np.arange(1, width + 1)
    dip = 0.5 * np.exp(-(((progress - 0.12) / 0.1) ** 2))
    alpha = 0.55 + 0.045 * layer * progress**0.3 + 0.35 * np.sqrt(progress) + dip
    values = rank**-alpha * np.exp(-((rank / width) ** 4)) * np.exp(0.05 * rng.normal(size=width))
    values[0] *= 1 + 2 * progress
    return np.sort(values / values.sum())[::-1] * width


def leading_eigenvectors(rng, width, progress):
    """Ten orthonormal columns that turn from one random frame towards another."""
    start, end = (np.linalg.qr(rng.normal(size=(width, min(10, width))))[0] for _ in range(2))
    return np.linalg.qr((1 - progress) * start + progress * end)[0].astype(np.float32)


def replicates(rng, values, groups, count=None):
    """Values with one of `groups` groups left out: (groups, ...), each near the whole, float32."""
    values = values[:count] if values.ndim else values
    noisy = values[None] * np.exp(0.3 / groups * rng.normal(size=(groups, *values.shape)))
    return (np.sort(noisy, axis=-1)[:, ::-1] if values.ndim else noisy).astype(np.float32)


def gradient_spectra(rng, num_samples, size, progress, alpha):
    """Uncentred and centred singular values and the squared norm of the mean of N samples.

    The samples are a mean and power-law noise; all is zero at the start.
    """
    if progress == 0:
        return np.zeros(num_samples), np.zeros(num_samples), np.zeros(())
    scales = np.arange(1, size + 1) ** -(alpha + 0.25 * progress)
    samples = rng.normal(size=(num_samples, size)) * scales
    samples += (1 - 0.6 * progress) * scales * rng.normal(size=size)
    uncentred = np.linalg.svd(samples, compute_uv=False)
    centred = np.linalg.svd(samples - samples.mean(axis=0), compute_uv=False)
    return 1e-2 * uncentred, 1e-2 * centred, np.asarray(1e-4 * np.sum(samples.mean(axis=0) ** 2))


def weight_singular_values(rng, width, progress, spikes):
    """A random matrix with a few directions that grow in training."""
    weight = rng.normal(size=(width, width)) / np.sqrt(width)
    left, right = (np.linalg.qr(rng.normal(size=(width, 24)))[0] for _ in range(2))
    growth = spikes * progress * np.arange(1, 25) ** -0.7
    return np.linalg.svd(weight + (left * growth) @ right.T, compute_uv=False)


def make_run(
    folder,
    *,
    width=96,
    num_layers=12,
    num_samples=64,
    steps=STEPS,
    groups=8,
    seed=0,
    leave_out=(),
):
    """Writes config.json, metrics.jsonl and spectra/ below `folder`; returns it.

    groups: of the measurements, 1 for none. `leave_out` names record kinds, or "config", "metrics",
    "spectra", that are not written.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    last = max(*steps, 1)
    if "config" not in leave_out:
        config = {"rung": "untied", "tier": "d12", "profile": "laptop", "seed": seed, "batch": 8}
        config |= {"optim": {"matrix_lr": 0.02}, "data": {"unigram_entropy": 6.48}}
        (folder / "config.json").write_text(json.dumps(config))
    if "metrics" not in leave_out:
        (folder / "metrics.jsonl").write_text("".join(_metrics_lines(rng, last)))
    if "spectra" not in leave_out:
        for step in steps:
            arrays = _arrays(rng, width, num_layers, num_samples, groups, step / last)
            arrays = {k: v for k, v in arrays.items() if k.partition("/")[0] not in leave_out}
            write_step(
                folder / "spectra", step, arrays, _meta(step, width, num_layers, num_samples)
            )
    return folder


def _metrics_lines(rng, last):
    for step in range(last + 1):
        clean = 3.6 + 4.7 * (1 + step / 12) ** -0.55
        tokens = step * TOKENS_PER_STEP
        if step % 50 == 0:
            row = {"kind": "val", "step": step, "tokens": tokens, "loss": clean + 0.05}
            yield json.dumps(row | {"val_tokens": 65_536, "seconds": 0.4}) + "\n"
        if step < last:
            loss = clean + 0.06 * rng.normal()
            row = {"kind": "train", "step": step, "tokens": tokens + TOKENS_PER_STEP, "loss": loss}
            yield json.dumps(row | {"grad_norm": 1.0, "lr_matrix": 0.02}) + "\n"


def _arrays(rng, width, num_layers, num_samples, groups, progress):
    arrays = {}
    for layer in range(num_layers):
        site = f"h_{layer}/resid_post"
        arrays[f"act_cov_eigenvalues/{site}"] = activation_eigenvalues(rng, width, progress, layer)
        last_token = activation_eigenvalues(rng, width, min(1, progress * 1.3), layer + 2)
        arrays[f"act_last_cov_eigenvalues/{site}"] = last_token
        arrays[f"act_mean_sq/{site}"] = np.array(width * 0.1)
        turning = np.random.default_rng(layer)  # the same frames at every step
        arrays[f"act_cov_eigenvectors/{site}"] = leading_eigenvectors(turning, width, progress)
    for layer in (layer for layer in PROBED_LAYERS if layer < num_layers):
        for index, matrix in enumerate(MATRICES):
            path = f"h_{layer}/{matrix}/kernel"
            uncentred, centred, mean_sq = gradient_spectra(
                rng, num_samples, 4 * width, progress, 0.25 + 0.17 * index
            )
            arrays[f"grad_singular_values/{path}"] = uncentred
            arrays[f"grad_singular_values_centred/{path}"] = centred
            arrays[f"grad_mean_sq/{path}"] = mean_sq
            weight = weight_singular_values(rng, width, progress, 2 + 2 * index)
            arrays[f"weight_singular_values/{path}"] = weight
    return arrays | (_with_a_part_left_out(rng, arrays, groups) if groups > 1 else {})


def _with_a_part_left_out(rng, arrays, groups):
    found = {}
    for name, values in arrays.items():
        kind, _, site = name.partition("/")
        if kind == "act_cov_eigenvalues":
            found[f"{kind}_halves/{site}"] = replicates(rng, values, 2)
        if kind in ("act_cov_eigenvalues", "grad_mean_sq"):
            found[f"{kind}_left_out/{site}"] = replicates(rng, values, groups)
        if kind.startswith("grad_singular_values"):
            kept = len(values) - len(values) // groups
            found[f"{kind}_left_out/{site}"] = replicates(rng, values, groups, kept)
    return found


def _meta(step, width, num_layers, num_samples):
    return {
        "step": step,
        "tokens": step * TOKENS_PER_STEP,
        "rung": "untied",
        "tier": "d12",
        "batch": 8,
        "seed": 0,
        "width": width,
        "num_layers": num_layers,
        "probe_data": "fixed",
        "probe_hash": "3f2a91c07be4d815",
        "gradient_samples": num_samples,
        "sample_tokens": 128,
        "act_tokens": 8192,
        "dtype": "float32",
        "eigen": "host",
        "loss": 5.0,
    }
