"""A finished or running run as its folder tells it: config.json, metrics.jsonl and spectra/.

Every part may be missing; what is there is read once and checked. `headline` and `conditions` name
a run in words, and the rank windows of its page are chosen here. No jax, no matplotlib.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lens_jax.fits import PAPER_WINDOWS, REFERENCE_WIDTH, scale_ranks
from lens_jax.records import SpectrumRecord, read_records

_LAYER = re.compile(r"^(.*?\d+)[/.](.*)$")
_DEEP_TIERS = ("d36", "d48")

REFERENCE_SAMPLES = 512
"""Gradient samples, and so values of a gradient spectrum, with which its window was published."""


@dataclass(frozen=True)
class SavedRun:
    """What a run folder holds: flat config, metric columns, records by kind, site and step."""

    path: Path
    config: dict
    train: dict[str, np.ndarray]
    val: dict[str, np.ndarray]
    spectra: dict[str, dict[str, list[SpectrumRecord]]]

    @property
    def meta(self) -> dict:
        """Meta of the last measured step; empty without spectra."""
        records = [r for sites in self.spectra.values() for rs in sites.values() for r in rs]
        return max(records, key=lambda record: record.step).meta if records else {}

    def fact(self, name: str):
        """Returns a setting by its last word from config.json, else from the records, else None."""
        for key, value in self.config.items():
            if key.rpartition(".")[2] == name and value is not None:
                return value
        return self.meta.get(name)

    @property
    def target_loss(self) -> float | None:
        """Validation loss the run aims at; `published` stands for the setting published_target."""
        target = self.fact("target_loss")
        target = self.fact("published_target") if target == "published" else target
        return float(target) if isinstance(target, int | float) else None

    def token_counts(self) -> np.ndarray:
        """Returns every training-token count that a metric or a spectrum stands at, unsorted."""
        return np.concatenate([self.train["tokens"], self.val["tokens"], self.measured_tokens()])

    def measured_tokens(self) -> np.ndarray:
        """Returns the training-token counts at which spectra were measured, ascending."""
        by_site = [records for sites in self.spectra.values() for records in sites.values()]
        return np.unique([float(record.tokens) for records in by_site for record in records])

    def sites(self, kind: str) -> list[str]:
        """Returns the sites of a kind, shallow to deep, a layer's output after its parts."""
        return sorted(self.spectra.get(kind, {}), key=depth)

    def final_site(self, kind: str) -> str | None:
        """Returns the site of the deepest layer, None where the kind was not measured."""
        sites = self.sites(kind)
        return sites[-1] if sites else None

    def layers(self, kind: str) -> list[str]:
        """Returns one site a layer: those with the same tap as the final site."""
        final = self.final_site(kind)
        return [site for site in self.sites(kind) if site_name(site) == site_name(final)]

    def last_layer_sites(self, kind: str) -> dict[str, str]:
        """Returns {short name: site} of the deepest layer measured for a kind."""
        sites = self.sites(kind)
        if not sites:
            return {}
        return {site_name(s): s for s in sites if layer_name(s) == layer_name(sites[-1])}

    def records(self, kind: str, site: str | None) -> list[SpectrumRecord]:
        """Returns the records of one kind and site by step; empty where there are none."""
        return self.spectra.get(kind, {}).get(site, [])

    def left_out(self, kind: str, site: str | None) -> dict[int, np.ndarray]:
        """Returns {step: replicates (G, ...)} with a group left out, of steps cut into groups."""
        records = self.records(f"{kind}_left_out", site)
        return {r.step: r.values for r in records if len(r.values) > 1}


def layer_name(site: str) -> str:
    """Returns the layer of a site, `h_11` of `h_11/attn/c_proj/kernel`; the site if it has none."""
    match = _LAYER.match(site)
    return match[1] if match else site


def site_name(site: str) -> str:
    """Returns a site without its layer, `attn.c_proj` of `h_11/attn/c_proj/kernel`."""
    match = _LAYER.match(site)
    return (
        (match[2] if match else site)
        .removesuffix("/value")
        .removesuffix("/kernel")
        .replace("/", ".")
    )


def depth(site: str) -> tuple:
    """Returns the key that sorts sites shallow to deep, a layer's output after its parts."""
    parts = [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", layer_name(site))]
    return layer_name(site) != site, parts, site_name(site) == "resid_post", site


def display_windows(tier: str | None, width: int) -> dict[str, tuple[int, int]]:
    """Returns {published window: rank window} of a summary page, the main window first.

    Tiers d36 and d48 have 200-400 for main window, all others 30-150. From width 768 up the
    published ranks are used as they stand; below, they are scaled by `scale_ranks`. There is none
    below width 3, where no line can be fitted.
    """
    if width < 3:
        return {}
    deep = tier in _DEEP_TIERS
    names = ("200-400", "40-90", "90-200") if deep else ("default", "10-40", "40-90", "90-200")
    windows = {}
    for name in names:
        first, last = PAPER_WINDOWS[name]
        windows[f"{first}-{last}"] = (
            (first, last) if width >= REFERENCE_WIDTH else scale_ranks(first, last, width)
        )
    return windows


def weight_window(count: int) -> tuple[int, int]:
    """Returns the rank window of `count` singular values of a weight: 30-150, scaled below 768.

    The released code fits weights and gradients there in every tier (protocol spec 1.5).
    """
    first, last = PAPER_WINDOWS["default"]
    return (first, last) if count >= REFERENCE_WIDTH else scale_ranks(first, last, max(count, 3))


def gradient_window(samples: int) -> tuple[int, int]:
    """Returns the rank window of the gradients of `samples` samples: 30-150, scaled below 512.

    A gradient spectrum is as long as there are samples, whatever the width, so its ranks go with
    their number.
    """
    first, last = PAPER_WINDOWS["default"]
    if samples >= REFERENCE_SAMPLES:
        return first, last
    return scale_ranks(first, last, max(samples * REFERENCE_WIDTH // REFERENCE_SAMPLES, 3))


def short_count(value: float) -> str:
    """Formats a count for people: 950, 16.4k, 8.2M, 1.05B."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def headline(run: SavedRun) -> list[str]:
    """Returns what names the run: rung, tier, profile, tokens, validation loss, seed, probes."""
    words = [str(fact) for name in ("rung", "tier") if (fact := run.fact(name))]
    words = words or [run.path.resolve().name]
    if run.fact("profile"):
        words.append(f"{run.fact('profile')} profile")
    if run.token_counts().size:
        words.append(f"{short_count(run.token_counts().max())} tokens")
    if run.val["loss"].size:
        words.append(f"val loss {run.val['loss'][-1]:.3f}")
    words += [
        f"{name} {fact}" for name in ("batch", "seed") if (fact := run.fact(name)) is not None
    ]
    if (run.path / "nonfinite.json").is_file():
        words.append("STOPPED: not finite")
    if "probe_data" in run.meta:
        probe = {"fixed": "fixed probe set", "batch": "probes on training batches"}
        words.append(probe.get(run.meta["probe_data"], str(run.meta["probe_data"])))
    return words


def conditions(run: SavedRun) -> list[str]:
    """Returns what the numbers depend on: probe sizes, rank windows, what alpha is."""
    meta, words = run.meta, []
    if not meta:
        return ["no spectra in this folder"]
    if "gradient_samples" in meta and "sample_tokens" in meta:
        samples, length = meta["gradient_samples"], meta["sample_tokens"]
        words.append(f"gradients: N = {samples} samples of T = {length} tokens")
    if "act_tokens" in meta:
        words.append(f"activations: {meta['act_tokens']:,} tokens")
    if "probe_hash" in meta:
        words.append(f"probe set {str(meta['probe_hash'])[:12]}")
    if "width" in meta:
        windows = display_windows(run.fact("tier"), int(meta["width"]))
        used = ", ".join(f"{first}-{last}" for first, last in windows.values())
        published = ", ".join(windows)
        scaled = "" if used == published else f" ({published} at width {REFERENCE_WIDTH})"
        ranks = f", rank windows {used}{scaled}" if windows else ""
        words.append(f"width {meta['width']}{ranks}")
    words.append("alpha = minus the OLS slope of ln eigenvalue on ln rank")
    return words


def read_run(folder: str | Path, name: str | None = None) -> SavedRun:
    """Reads a run folder, with the records in spectra/ or, with a name, in spectra_<name>/.

    Raises ValueError with one line when the folder is missing, holds neither metrics.jsonl nor
    spectra/, or when one of its files is damaged. A last metrics line without its newline is left
    out: the run was killed while writing it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such run folder")
    spectra = folder / ("spectra" if name is None else f"spectra_{name}")
    if name is not None and not spectra.is_dir():
        there = sorted(path.name.removeprefix("spectra_") for path in folder.glob("spectra_*"))
        mend = f"give one of {', '.join(there)}" if there else "no measurement there has a name"
        raise ValueError(f"name={name}: {folder} has no {spectra.name}; {mend}")
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file() and not spectra.is_dir():
        raise ValueError(f"{folder}: no run folder (neither metrics.jsonl nor spectra/ in it)")
    rows = _read_metrics(metrics) if metrics.is_file() else []
    by_kind: dict[str, dict[str, list[SpectrumRecord]]] = {}
    for record in read_records(spectra) if spectra.is_dir() else []:
        by_kind.setdefault(record.kind, {}).setdefault(record.site, []).append(record)
    return SavedRun(
        path=folder,
        config=_read_config(folder / "config.json"),
        train=_columns(rows, "train"),
        val=_columns(rows, "val"),
        spectra=by_kind,
    )


def _read_config(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: not a JSON object")
    return _flatten(config)


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    # Shallow keys first, so that a run's own `seed` is found before a section's.
    return dict(sorted(flat.items(), key=lambda item: item[0].count(".")))


def _read_metrics(path: Path) -> list[dict]:
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if row["kind"] in ("train", "val"):
                numbers = {name: float(row[name]) for name in ("tokens", "loss")}
                rows.append({"kind": row["kind"], **numbers})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is no metrics row ({error!r})") from error
    return rows


def _columns(rows: list[dict], kind: str) -> dict[str, np.ndarray]:
    rows = [row for row in rows if row["kind"] == kind]
    return {name: np.array([row[name] for row in rows]) for name in ("tokens", "loss")}
