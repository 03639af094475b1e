"""Tokens to a loss, excess within a family, and the states at which runs are compared."""

from math import exp, inf, isnan, log
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_language_study import TARGET, WIDTH, make_study, name

from experiments.efficiency import (
    alpha_at,
    crossing_tokens,
    early_row,
    efficiency,
    excess_tokens,
    first_below_tokens,
    loss_at,
    matched_row,
    ranks_of,
)
from experiments.figures.taxonomy import gradient_head
from experiments.figures.trajectories import gradient_alpha
from experiments.study_records import ACTIVATION, Run, read_study
from lens_jax.alignment import alpha_of
from lens_jax.fits import GRAM_FLOOR, fit_power_law, window_alpha
from lens_jax.saved_run import gradient_window


class Curve(Run):
    """A run that is nothing but a validation curve."""

    def __init__(self, tokens, losses, reason="target", label="run"):
        result = {"reason": reason} if reason else {}
        super().__init__(Path(label), {}, result)
        columns = {"tokens": np.array(tokens, float), "loss": np.array(losses, float)}
        object.__setattr__(self, "_columns", columns)

    @property
    def val(self):
        return self._columns


def test_a_spectrum_that_ends_inside_the_ranks_has_no_exponent():
    """One rule for points of figures and rows of a table."""
    values = np.arange(1, 97) ** -2.0
    assert alpha_of(values, (11, 25)).value == pytest.approx(2.0)
    values[18:] = 1e-9 * values[0]  # rounding
    found = alpha_of(values, (11, 25), np.stack([values, values]))
    assert isnan(found.value)
    assert isnan(window_alpha(values, 11, 25))
    assert isnan(found.r2)
    assert isnan(found.error)
    assert alpha_of(values, (6, 12)).value == pytest.approx(2.0)


def test_gradients_end_at_the_rounding_of_their_gram_matrix():
    """Ten directions and rounding at 1e-5 of the largest: no exponent on ranks 4-19."""
    values = np.where(np.arange(64) < 10, 1.0 / np.arange(1, 65), 1e-5)
    assert gradient_window(values.size) == (4, 19)
    assert isnan(gradient_alpha(values))
    assert isnan(alpha_of(values, (4, 19), floor=GRAM_FLOOR).value)
    assert fit_power_law(values, 4, 19).alpha > 5  # what the floor of a covariance would say
    assert gradient_head(values) == pytest.approx(1.0)
    values[7:] = 1e-5
    assert isnan(gradient_head(values))


def test_the_crossing_is_interpolated_in_the_logarithm_of_tokens():
    run = Curve([0, 100, 400], [7.0, 5.0, 3.0])
    assert crossing_tokens(run, 4.0) == pytest.approx(200.0)
    assert crossing_tokens(run, 3.5) == pytest.approx(exp(log(100) + 0.75 * log(4)))
    assert first_below_tokens(run, 4.0) == 400


def test_the_first_fall_counts_also_where_the_loss_rises_again():
    run = Curve([100, 200, 400, 800], [5.0, 3.9, 4.2, 3.0])
    assert crossing_tokens(run, 4.0) < 200
    assert first_below_tokens(run, 4.0) == 200


def test_a_loss_equal_to_the_target_is_not_below_it():
    assert first_below_tokens(Curve([100, 200], [5.0, 4.0], "budget"), 4.0) == inf


def test_who_never_gets_there_is_censored_and_who_still_trains_is_unknown():
    losses = [7.0, 5.0]
    assert crossing_tokens(Curve([0, 100], losses, "budget"), 4.0) == inf
    assert crossing_tokens(Curve([0, 100], losses, "diverged"), 4.0) == inf
    assert isnan(crossing_tokens(Curve([0, 100], losses, ""), 4.0))
    assert isnan(first_below_tokens(Curve([0, 100], losses, ""), 4.0))


def test_who_stopped_at_a_higher_target_is_no_failure_at_a_lower_one():
    run = Curve([0, 100, 400], [7.0, 5.0, 3.9], "target")
    assert isnan(crossing_tokens(run, 3.8))
    assert isnan(first_below_tokens(run, 3.8))
    assert crossing_tokens(run, 4.0) < 400
    found = efficiency([run, Curve([100, 200], [5.0, 3.0], label="a")], 3.8)
    assert isnan(found["run"])
    assert found["a"] == 0


def test_a_first_look_below_the_target_is_taken_as_it_is():
    assert crossing_tokens(Curve([0, 100], [7.0, 3.0]), 4.0) == 100  # from 0 tokens no logarithm


@given(st.lists(st.floats(1.0, 8.0), min_size=2, max_size=12), st.floats(1.5, 7.5))
def test_a_crossing_lies_between_the_looks_around_it(losses, target):
    tokens = [100 * 2**i for i in range(len(losses))]
    run = Curve(tokens, losses, "budget")
    crossed = crossing_tokens(run, target)
    below = next((k for k, loss in enumerate(losses) if loss < target), None)
    if below is None:
        assert crossed == inf
    elif below == 0:
        assert crossed == tokens[0]
    else:
        # the logarithm rounds
        assert tokens[below - 1] * (1 - 1e-9) <= crossed <= tokens[below] * (1 + 1e-9)


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=8), st.floats(0.02, 0.98))
def test_a_falling_curve_is_read_like_its_inverse(falls, share):
    losses = 8.0 - np.cumsum([0.0, *falls])
    tokens = 100 * 1.7 ** np.arange(losses.size)
    target = losses[0] + share * (losses[-1] - losses[0])
    twin = exp(np.interp(-target, -losses, np.log(tokens)))
    assert crossing_tokens(Curve(tokens, losses), target) == pytest.approx(twin, rel=1e-9)
    assert loss_at(Curve(tokens, losses), twin) == pytest.approx(target, abs=1e-9)


def test_a_target_above_the_first_loss_is_refused():
    with pytest.raises(ValueError, match=r"target_loss=8\.0: .* before training"):
        crossing_tokens(Curve([0, 100], [7.0, 3.0]), 8.0)


def test_a_loss_is_early_only_where_the_run_was_at_its_tokens():
    run = Curve([0, 100, 200, 400], [7.0, 5.0, 4.0, 3.0])
    assert loss_at(run, 200) == 4.0
    assert loss_at(run, 100 * 2**0.5) == pytest.approx(4.5)
    assert loss_at(run, 440) == 3.0  # nearer than a measured step may be
    assert isnan(loss_at(run, 800))  # not there yet, or over: another time says nothing
    assert isnan(loss_at(run, 50))
    assert isnan(loss_at(Curve([0], [7.0]), 50))


def test_without_any_that_reached_the_target_there_is_no_excess():
    runs = [Curve([100], [5.0], "budget", label="a"), Curve([100], [5.0], "", label="b")]
    assert all(isnan(own) for own in excess_tokens(runs, 4.0).values())
    assert all(isnan(own) for own in efficiency(runs, 4.0).values())


def test_excess_and_efficiency_are_within_the_runs_given():
    runs = [
        Curve([100, 200], [5.0, 3.0], label="a"),
        Curve([100, 800], [5.0, 3.0], label="b"),
        Curve([100, 800], [5.0, 4.5], "budget", label="c"),
        Curve([100], [5.0], "", label="d"),
    ]
    excess, worth = excess_tokens(runs, 4.0), efficiency(runs, 4.0)
    assert excess["a"] == 0
    assert excess["b"] == pytest.approx(crossing_tokens(runs[1], 4.0) / 141.42 - 1, rel=1e-4)
    assert worth["b"] == pytest.approx(-log(1 + excess["b"]))
    assert (excess["c"], worth["c"]) == (inf, -inf)
    assert isnan(excess["d"])
    assert isnan(worth["d"])


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "one"
    censored = (name("untied", batch=8),)
    return read_study(
        make_study(folder, rungs=("untied",), seed_cells=(), trials=(), censored=censored)
    )


def test_planted_costs_come_back(study):
    by_batch = {run.batch: crossing_tokens(run, TARGET) for run in study.chosen}
    assert by_batch[8] == inf
    assert by_batch[4] == pytest.approx(2e5 * 2.2 * 1.15, rel=0.08)
    assert by_batch[32] > by_batch[16] > by_batch[4]


def test_an_exponent_is_that_of_its_ranks_with_a_jackknife_error(study):
    run = study.chosen[0]
    row = early_row(run, 2**16)
    assert row.tokens == 2**16
    found = alpha_at(row, run.final_site(), ranks_of(run, (90, 200)))
    assert (found.first, found.last) == (round(90 * WIDTH / 768), round(200 * WIDTH / 768))
    values = row.array(ACTIVATION, run.final_site())
    assert found.value == fit_power_law(values, found.first, found.last).alpha
    assert 0 < found.error < 0.1


def test_no_state_is_taken_from_afar(study):
    run = study.chosen[0]
    assert early_row(run, 2**30) is None
    assert early_row(run, 1.4 * 2**16) is None
    assert early_row(run, 1.4 * 2**16, 0.35).tokens == 2**16
    assert matched_row(run, TARGET, 0.05) is run.steps[-1]
    assert matched_row(run, TARGET - 1, 0.05) is None
