"""Edits against the formula walk by walk, on models whose code of the band is known."""

import math

import chz
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import quick_compiler, shake

from models.config import ArchConfig, SizeConfig
from models.gpt import GPT, init_params, token_loss
from toy_modular.bands import band_arrays, band_walks, make_band_probe
from toy_modular.config import BandedConfig
from toy_modular.edit_names import EDIT_NAMES
from toy_modular.edits import (
    component_subspace,
    edit_array,
    edit_effects,
    edited_rows,
    matched_subspace,
    mode_subspace,
    nearest_mode,
    random_subspace,
    untied,
)
from toy_modular.features import energies, h_peak, modes, principal_modes

CONFIG = BandedConfig(vocab_size=32, seq_len=8)
SIZE = SizeConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=32, block=8, short_row=8, long_row=16)
C, O = 11, 4  # noqa: E741


@pytest.fixture(scope="module", autouse=True)
def _quick_compiler():
    with quick_compiler():
        yield


def make(head: str):
    arch = ArchConfig(position="rope", head=head)
    model = GPT(arch, SIZE)
    return model, jax.tree.map(np.float32, shake(init_params(model, 0)))


@pytest.fixture(scope="module")
def walks():
    return band_walks(C, O, CONFIG, most=10_000)


@pytest.fixture(scope="module")
def tied():
    return make("tied")


@pytest.fixture(scope="module")
def effects(tied, walks):
    return edit_effects(*tied, walks)


@pytest.fixture(scope="module")
def probed(tied, walks):
    """h, losses and the arrays of the band, of the tied model as it is."""
    found = make_band_probe(tied[0], walks)(tied[1])
    h = found["h"].astype(np.float64)
    table = tied[1]["wte"]["embedding"]
    return h, found["losses"], band_arrays(h, found["losses"], walks, table)


def slow_loss(h, walks, kernel) -> float:
    """The mean loss of vectors, one walk after another."""
    total = 0.0
    for vector, target, weight in zip(h, walks.tokens[:, -1], walks.weights, strict=True):
        logits = vector @ np.asarray(kernel, np.float64)
        total += weight * (np.log(np.sum(np.exp(logits - logits.max()))) + logits.max())
        total -= weight * logits[target]
    return total


# Subspaces


def test_mode_subspace_spans_the_mode():
    table = np.random.default_rng(0).normal(size=(12, 7))
    for mode, dimension in ((1, 2), (5, 2), (6, 1)):
        found = mode_subspace(table, mode)
        assert found.shape == (dimension, 7)
        np.testing.assert_allclose(found @ found.T, np.eye(dimension), atol=1e-12)
        inside = modes(table)[mode] @ found.T @ found
        np.testing.assert_allclose(inside, modes(table)[mode], atol=1e-12)


def test_component_subspace_is_the_published_choice():
    table = np.random.default_rng(1).normal(size=(13, 9))
    found = principal_modes(table)
    present = int(found.modes[2])
    assert np.array_equal(
        component_subspace(table, present), found.directions[found.modes == present]
    )
    absent = next(r for r in range(1, 7) if r not in found.modes)
    sharpest = component_subspace(table, absent)
    assert np.array_equal(sharpest, found.directions[[np.argmax(found.peaks)]])


def test_control_is_the_nearest_in_variance_and_orthogonal():
    rng = np.random.default_rng(2)
    table, spread = rng.normal(size=(13, 9)) * 0.8 ** np.arange(9), rng.normal(size=(9, 9))
    covariance = spread @ spread.T
    all_components = principal_modes(table, k=9).directions
    key = all_components[[3]]
    found = matched_subspace(table, key, covariance)
    assert found.shape == (1, 9)
    np.testing.assert_allclose(found @ key.T, 0, atol=1e-10)
    explained = [v @ covariance @ v for v in all_components]
    others = [abs(explained[i] - explained[3]) for i in range(9) if i != 3]
    control = (found[0] @ covariance @ found[0]).item()
    assert abs(control - explained[3]) == pytest.approx(min(others))
    # every component once
    pair = matched_subspace(table, all_components[[0, 1]], covariance)
    np.testing.assert_allclose(pair @ pair.T, np.eye(2), atol=1e-10)


def test_no_control_is_made_of_rounding():
    angle = 2 * np.pi * np.arange(7) / 7
    table = np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=1)
    assert matched_subspace(table, mode_subspace(table, 1), np.eye(3)).shape == (0, 3)


def test_random_subspaces_prefer_no_direction():
    random = np.random.default_rng(3)
    projectors = [v.T @ v for v in (random_subspace(2, 5, random) for _ in range(2000))]
    np.testing.assert_allclose(np.mean(projectors, axis=0), np.eye(5) * 0.4, atol=0.04)


# Hidden edits


def test_names_and_numbers_are_one_list(effects):
    assert set(effects) == set(EDIT_NAMES)
    assert len(set(EDIT_NAMES)) == len(EDIT_NAMES)
    array = edit_array(effects)
    assert array.dtype == np.float64
    assert array.shape == (len(EDIT_NAMES),)
    assert dict(zip(EDIT_NAMES, array.tolist(), strict=True)) == effects
    assert all(type(value) is float and math.isfinite(value) for value in effects.values())


def test_base_loss_is_that_of_the_model(effects, probed, walks):
    _, losses, arrays = probed
    assert effects["base_loss"] == pytest.approx(float(arrays["loss"]), rel=1e-5)
    assert effects["base_loss"] == pytest.approx(walks.weights @ losses, rel=1e-5)
    assert effects["positions"] == 8


@pytest.mark.parametrize("label", ["current", "next"])
@pytest.mark.parametrize("span", ["modes", "components"])
def test_hidden_edits_are_their_formula(effects, probed, walks, tied, label, span):
    h, _, arrays = probed
    kernel = tied[1]["wte"]["embedding"].T
    table = arrays[label].astype(np.float64)
    mode = h_peak(table).mode
    assert effects[f"{label}_mode"] == mode
    key = mode_subspace(table, mode) if span == "modes" else component_subspace(table, mode)
    covariance = np.cov(h.T, aweights=walks.weights, ddof=0)
    control = matched_subspace(table, key, covariance)
    mean = np.average(h, axis=0, weights=walks.weights)
    losses = {}
    for who, rows in (("key", key), ("control", control)):
        projector = rows.T @ rows
        kept = np.stack([mean + projector @ (x - mean) for x in h])
        dropped = np.stack([mean + (np.eye(16) - projector) @ (x - mean) for x in h])
        for what, edited in (("keep", kept), ("drop", dropped)):
            name = f"{label}_{span}_{who}_{what}"
            losses[who, what] = slow_loss(edited, walks, kernel)
            assert effects[name] == pytest.approx(losses[who, what], rel=1e-4), name
        share = np.trace(projector @ covariance) / np.trace(covariance)
        assert effects[f"{label}_{span}_{who}_variance"] == pytest.approx(share, rel=1e-3)
    assert effects[f"{label}_{span}_dimension"] == len(key) == len(control)
    keep, drop = (effects[f"{label}_{span}_{what}_advantage"] for what in ("keep", "drop"))
    assert keep == pytest.approx(losses["control", "keep"] - losses["key", "keep"], abs=1e-3)
    assert drop == pytest.approx(losses["key", "drop"] - losses["control", "drop"], abs=1e-3)
    assert effects[f"{label}_{span}_drop_advantage_diluted"] == pytest.approx(drop / 8)


def test_diluted_numbers_are_means_over_all_positions(probed, walks, tied):
    """The published loss, all positions, moves by the last one's change over T."""
    h, _, arrays = probed
    model, params = tied
    logits, taps = model.apply({"params": params}, walks.tokens[:, :-1])
    key = mode_subspace(arrays["current"], h_peak(arrays["current"]).mode)
    mean = walks.weights @ h
    x = np.asarray(taps["final_norm"]).copy()
    x[:, -1] = h - (h - mean) @ key.T @ key
    edited = token_loss(jnp.asarray(x @ params["wte"]["embedding"].T), walks.tokens[:, 1:])
    base = token_loss(logits, walks.tokens[:, 1:])
    change = walks.weights @ np.asarray(edited - base, np.float64)  # (T,)
    np.testing.assert_allclose(change[:-1], 0, atol=1e-5)
    effects = edit_effects(model, params, walks, draws=1)
    last = effects["current_modes_key_drop"] - effects["base_loss"]
    assert change.mean() == pytest.approx(last / 8, rel=1e-3, abs=1e-5)


def test_dropping_what_the_loss_needs_costs_more_than_its_control():
    """A head that reads one mode of a known code, and nothing else of it."""
    model, params = make("untied")
    params = jax.tree.map(np.zeros_like, params)  # blocks do nothing: h is the embedding, normed
    angle = 2 * np.pi * np.arange(C) / C
    turns = [f(r * angle) for r in (2, 3) for f in (np.cos, np.sin)]
    rows = np.stack([*turns, *[0 * angle] * 12], axis=1)
    params["wte"]["embedding"][O : O + C] = rows
    # logits of a step of 1, which is one step of ten, from mode 2 alone
    aim = np.stack([f(2 * (angle - 2 * np.pi / C)) for f in (np.cos, np.sin)])
    params["lm_head"]["kernel"][:2, O : O + C] = 3 * aim
    walks = band_walks(C, O, chz.replace(CONFIG, min_step_frac=0.0), most=10_000)
    only_one = np.where(walks.d == 1, walks.weights, 0)
    law = np.eye(C)[1]
    walks = walks._replace(weights=only_one / only_one.sum(), law=law)
    found = edit_effects(model, params, walks)
    for label in ("current", "next"):
        start = f"{label}_modes"
        key_is_read = found[f"{label}_mode"] == 2
        drop, keep = found[f"{start}_drop_advantage"], found[f"{start}_keep_advantage"]
        # the modes tie in energy, so either may be the key, and the other its control
        assert (drop > 1) == (keep > 1) == key_is_read
        assert abs(drop) > 1
        for who in ("key", "control"):
            assert found[f"{start}_{who}_variance"] == pytest.approx(0.5, abs=1e-4)
        assert found[f"{start}_random_variance"] == pytest.approx(2 / 16, abs=0.1)


# Embedding edits


@pytest.mark.parametrize("c", [12, 13])
def test_edited_rows_have_only_the_mode_or_all_but_it(c):
    rows = 3.0 + np.random.default_rng(4).normal(size=(c, 5))
    for mode in range(1, c // 2 + 1):
        kept, dropped = (edited_rows(rows, mode, action) for action in ("keep", "drop"))
        np.testing.assert_allclose(kept + dropped, rows + rows.mean(axis=0), atol=1e-12)
        inside = np.isin(np.arange(c), (mode, c - mode))
        np.testing.assert_allclose(energies(kept)[~inside], 0, atol=1e-20)
        np.testing.assert_allclose(energies(dropped)[inside], 0, atol=1e-20)
        np.testing.assert_allclose(energies(kept)[inside], energies(rows)[inside])
        np.testing.assert_allclose(dropped.mean(axis=0), rows.mean(axis=0))


def test_embedding_edits_leave_the_head_alone(effects, tied, walks):
    model, params = tied
    mode = int(effects["current_mode"])
    other = nearest_mode(params["wte"]["embedding"][O : O + C], mode)
    assert effects["embedding_key_mode"] == mode
    assert effects["embedding_control_mode"] == other != mode
    head = np.asarray(params["wte"]["embedding"]).T
    for who, r in (("key", mode), ("control", other)):
        for action in ("keep", "drop"):
            table = np.array(params["wte"]["embedding"])
            table[O : O + C] = edited_rows(table[O : O + C], r, action)
            _, taps = model.apply(
                {"params": params | {"wte": {"embedding": table}}}, walks.tokens[:, :-1]
            )
            loss = slow_loss(np.asarray(taps["final_norm"])[:, -1], walks, head)
            assert effects[f"embedding_{who}_{action}"] == pytest.approx(loss, rel=1e-4)


def test_untying_changes_nothing_that_the_model_computes(tied):
    model, params = tied
    free, free_params = untied(model, params)
    tokens = np.arange(16, dtype=np.int32).reshape(2, 8)
    before, _ = model.apply({"params": params}, tokens)
    after, _ = free.apply({"params": free_params}, tokens)
    np.testing.assert_array_equal(before, after)
    assert "lm_head" not in params
    assert untied(free, free_params) == (free, free_params)


def test_nearest_mode():
    angle = 2 * np.pi * np.arange(12) / 12
    rows = np.stack([2 * np.cos(angle), 3 * np.cos(2 * angle), np.cos(6 * angle)], axis=1)
    # pair masses, all over 12: 2, 4.5, 0, 0, 0, 1
    assert nearest_mode(rows, 1) == 6
    assert nearest_mode(rows, 2) == 1
    assert nearest_mode(np.eye(3), 1) == 0
    assert nearest_mode(np.ones((5, 2)), 1) == 0


def test_a_band_of_three_states_has_no_controls(tied):
    found = edit_effects(*tied, band_walks(3, 0, CONFIG, most=100), draws=1)
    assert math.isfinite(found["current_modes_key_drop"])
    assert math.isnan(found["current_modes_control_drop"])
    assert math.isnan(found["current_modes_drop_advantage"])
    assert math.isnan(found["embedding_control_drop"])
