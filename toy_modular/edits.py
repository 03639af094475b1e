"""Keeping or dropping a feature and nothing else: what a band's loss owes to its key mode.

Hidden edits change h (n, D) at the last position, the vectors that the head reads, along a subspace
with projector Q, mu being their mean:

    keep  h <- mu + (h - mu) Q        drop  h <- mu + (h - mu) (I - Q)

Two subspaces stand for the key mode of a table, the mode r of its `h_peak`: `modes`, the span of
Re Ht_r and Im Ht_r, and `components`, as published, the principal components of the table whose
own peak is at r. Each has two controls of its dimension: `control`, of the components of what the
subspace leaves of the table, those nearest to it in the variance of h that they explain, and
`random`, the mean over subspaces without preference. The published control is the next components
by peak mass, which explain less variance, so that dropping them is bound to cost less (toy spec 9,
item 10); therefore the variance explained stands beside every loss.

Losses are those of the last position, where the edit is. The published ones are means over all T
positions, of which T - 1 are not edited: differences T times smaller, given as `_diluted`.

The embedding edit keeps or drops the modes r and -r of the band's rows of the input table, about
their mean row, in all positions; r is the key mode of the table by the current state, the control
is the mode nearest in energy. Only the input look-up is edited, in tied models too.
"""

from collections.abc import Callable
from typing import NamedTuple

import chz
import jax.numpy as jnp
import numpy as np

from models.gpt import GPT, head_kernel
from toy_modular.bands import CHUNK, BandWalks, make_band_probe, make_head_probe, state_means
from toy_modular.edit_names import EDIT_NAMES, advantage_names
from toy_modular.features import (
    centred,
    h_peak,
    mode_shares,
    modes,
    pair_masses,
    principal_modes,
)

DRAWS = 4


def edit_array(effects: dict[str, float]) -> np.ndarray:
    """The result of `edit_effects` as float64 (len(EDIT_NAMES),) in the order of EDIT_NAMES."""
    return np.array([effects[name] for name in EDIT_NAMES], np.float64)


def edit_effects(
    model: GPT,
    params: dict,
    band: BandWalks,
    *,
    chunk: int = CHUNK,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, float]:
    """All edits of one model on one band, by the names of EDIT_NAMES.

    Losses `_keep` and `_drop` are mean losses in nats of the edited model at the last position,
    `base_loss` that of the model as it is. `_variance` is the share of the variance of h that a
    subspace explains, `_energy` the share of a mode in the embedding rows, its partner included.
    An advantage is positive where the key mode matters more than its control:

        keep_advantage = keep of control - keep of key
        drop_advantage = drop of key - drop of control

    draws: random subspaces. NaN where a table is too small or too flat for what is asked: of
    modulus 3, for instance, there is no other mode to compare with.
    """
    model, params = untied(model, params)
    probe, read_out = make_band_probe(model, band, chunk), make_head_probe(model, band, chunk)
    found = probe(params)
    h = found["h"].astype(np.float64)
    probed = _Probed(h, _covariance(h, band), band, lambda h: read_out(params, h))
    base = float(band.weights @ found["losses"].astype(np.float64))
    effects = {"base_loss": base, "positions": float(band.tokens.shape[1] - 1)}
    random = np.random.default_rng(seed)
    tables = {
        "current": state_means(h, band.current, band),
        "next": state_means(h, band.following, band),
    }
    for label, table in tables.items():
        mode = h_peak(table).mode
        effects[f"{label}_mode"] = float(mode)
        keys = {"modes": mode_subspace(table, mode), "components": component_subspace(table, mode)}
        for span, key in keys.items():
            controls = [random_subspace(len(key), h.shape[1], random) for _ in range(draws)]
            matched = matched_subspace(table, key, probed.covariance)
            spans = {"key": [key], "control": [matched], "random": controls}
            effects |= _hidden_effects(f"{label}_{span}", probed, spans)
    return effects | _embedding_effects(params, band, int(effects["current_mode"]), probe)


class _Probed(NamedTuple):
    """h (n, D) float64 and its covariance (D, D) over a band; read_out: h -> mean loss."""

    h: np.ndarray
    covariance: np.ndarray
    band: BandWalks
    read_out: Callable[[np.ndarray], float]


def untied(model: GPT, params: dict) -> tuple[GPT, dict]:
    """The same function of tokens with a head of its own: the input table may then be edited."""
    if model.arch.head == "untied":
        return model, params
    head = {"lm_head": {"kernel": head_kernel(params, model.arch)}}
    return model.clone(arch=chz.replace(model.arch, head="untied")), {**params, **head}


def _covariance(h: np.ndarray, band: BandWalks) -> np.ndarray:
    deviations = h - (band.weights @ h)[None, :]
    return deviations.T @ (band.weights[:, None] * deviations)


# Subspaces, as orthonormal rows (k, D)


def mode_subspace(table, mode: int) -> np.ndarray:
    """The span of Re Ht_r and Im Ht_r of a table (c, D): two rows, or one at the Nyquist mode."""
    mode_vector = modes(table)[mode]
    return _orthonormal(np.stack([mode_vector.real, mode_vector.imag]), np.abs(mode_vector).max())


def component_subspace(table, mode: int, k: int = 8) -> np.ndarray:
    """Of the first k principal components those whose peak is at `mode`, else the sharpest one."""
    found = principal_modes(table, k)
    if not found.modes.size:
        return found.directions
    at_mode = found.modes == mode
    if not np.any(at_mode):
        at_mode = np.arange(at_mode.size) == np.argmax(found.peaks)
    return found.directions[at_mode]


def matched_subspace(table, key: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """As many principal components of the table without `key`, matched in variance explained.

    `key` (k, D) is projected out of the table first, so the result is orthogonal to it, and where
    it consists of components these are the others. To each of the key's directions, from the one
    that explains most of the covariance (D, D) on, the nearest component not taken yet is chosen.
    It has fewer rows than `key` where the table has too few components.
    """
    rows = centred(table)
    candidates = _orthonormal(rows - rows @ key.T @ key, np.linalg.norm(rows))
    variances = _variances(candidates, covariance)
    chosen = []
    for target in np.sort(_variances(key, covariance))[::-1]:
        free = [i for i in range(len(candidates)) if i not in chosen]
        if free:
            chosen.append(min(free, key=lambda i: abs(variances[i] - target)))
    return candidates[chosen]


def random_subspace(k: int, width: int, random: np.random.Generator) -> np.ndarray:
    """k orthonormal rows of which no direction of the D = `width` is preferred."""
    return np.linalg.qr(random.normal(size=(width, k)))[0].T


def _orthonormal(rows: np.ndarray, scale: float) -> np.ndarray:
    """An orthonormal basis of the span of rows (n, D), by falling singular value.

    Values below 1e-6 of `scale` are taken for rounding: the rows are means of float32 numbers.
    """
    _, sigma, directions = np.linalg.svd(rows, full_matrices=False)
    return directions[sigma > 1e-6 * scale]


def _variances(directions: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    return np.sum((directions @ covariance) * directions, axis=1)


# Edits


def _hidden_effects(start: str, probed: _Probed, spans: dict[str, list]) -> dict[str, float]:
    """The numbers of one subspace and its controls; NaN for a control of a lower dimension."""
    dimension = len(spans["key"][0])
    effects = {f"{start}_dimension": float(dimension)}
    for who, subspaces in spans.items():
        whole = dimension > 0 and all(len(directions) == dimension for directions in subspaces)
        edits = [_hidden_edits(probed, directions) for directions in subspaces if whole]
        means = np.mean(edits, axis=0) if edits else np.full(3, np.nan)
        for what, value in zip(("variance", "keep", "drop"), means.tolist(), strict=True):
            effects[f"{start}_{who}_{what}"] = value
    effects |= _advantages(effects, start)
    positions = probed.band.tokens.shape[1] - 1
    return effects | {f"{n}_diluted": effects[n] / positions for n in advantage_names(start)}


def _hidden_edits(probed: _Probed, directions: np.ndarray) -> tuple[float, float, float]:
    """Share of variance in a subspace (k, D), loss with only it kept, loss with it dropped."""
    h, covariance = probed.h, probed.covariance
    mean = (probed.band.weights @ h)[None, :]  # (1, D)
    inside = (h - mean) @ directions.T @ directions  # (n, D)
    share = float(np.sum(_variances(directions, covariance)) / np.trace(covariance))
    return share, probed.read_out(mean + inside), probed.read_out(h - inside)


def _advantages(effects: dict[str, float], start: str) -> dict[str, float]:
    keep, drop = advantage_names(start)
    return {
        keep: effects[f"{start}_control_keep"] - effects[f"{start}_key_keep"],
        drop: effects[f"{start}_key_drop"] - effects[f"{start}_control_drop"],
    }


def edited_rows(rows, mode: int, action: str) -> np.ndarray:
    """Rows (c, D) with only the modes r and -r about their mean row kept, or without these."""
    rows = np.asarray(rows, np.float64)
    angle = 2 * np.pi * mode / len(rows) * np.arange(len(rows))
    pair = 1 if 2 * mode == len(rows) else 2
    mode_vector = modes(rows)[mode][None, :]
    inside = pair * np.real(np.exp(1j * angle)[:, None] * mode_vector)
    return rows.mean(axis=0)[None, :] + inside if action == "keep" else rows - inside


def nearest_mode(rows, mode: int) -> int:
    """The positive mode of rows (c, D) nearest in pair mass to `mode`; 0 for none.

    The Nyquist mode of an even c counts by its one member, which is its pair.
    """
    masses = pair_masses(mode_shares(rows))
    if mode == 0 or not np.all(np.isfinite(masses)):
        return 0
    distance = np.abs(masses - masses[mode - 1])
    distance[mode - 1] = np.inf
    return int(np.argmin(distance)) + 1 if np.isfinite(distance.min()) else 0


def _embedding_effects(params: dict, band: BandWalks, mode: int, probe) -> dict[str, float]:
    table = np.asarray(params["wte"]["embedding"], np.float64)
    tokens = slice(band.o, band.o + band.c)
    rows = table[tokens]
    masses = pair_masses(mode_shares(rows))
    effects = {}
    for who, r in {"key": mode, "control": nearest_mode(rows, mode)}.items():
        start = f"embedding_{who}"
        energy = float(masses[r - 1]) if r else np.nan
        effects |= {f"{start}_mode": float(r), f"{start}_energy": energy}
        for action in ("keep", "drop"):
            loss = np.nan
            if r:
                edited = table.copy()
                edited[tokens] = edited_rows(rows, r, action)
                changed = {**params, "wte": {"embedding": jnp.asarray(edited, jnp.float32)}}
                loss = float(band.weights @ probe(changed)["losses"].astype(np.float64))
            effects[f"{start}_{action}"] = loss
    return effects | _advantages(effects, "embedding")
