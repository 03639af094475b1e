"""Rules of the toy's claims that have no test of their own: what holds, fails, or is left open."""

from types import SimpleNamespace

import numpy as np
import pytest

from lens_jax.correlations import PermutationTest
from toy_modular import figures_modes, figures_prediction
from toy_modular.stages import CORE


def looked_at(rho: float, p: float, control: float, partials) -> figures_prediction.Tests:
    test = PermutationTest(rho, p, 120, True)
    own = np.full(len(partials), rho)
    return figures_prediction.Tests(
        test, test, test, control, own, np.array(partials), 2 / 120, 5, 5 * len(partials)
    )


@pytest.mark.parametrize(
    ("rho", "p", "control", "partials", "verdict"),
    [
        (1.0, 0.017, 0.7, [0.5, 0.6, 0.4], "held"),
        (1.0, 0.017, 0.7, [0.5, -0.1, 0.4], "undecided"),
        (0.5, 0.30, 0.7, [-0.1, 0.1, -0.2], "undecided"),  # the smaller rho alone is no evidence
        (-0.5, 0.30, 0.7, [-0.1, -0.1, -0.2], "undecided"),
        (-1.0, 0.017, 0.7, [-0.5, -0.6, -0.4], "did not hold"),
        (-1.0, 0.017, 0.7, [-0.5, 0.6, -0.4], "undecided"),
        (-1.0, 0.017, 0.7, [-0.5, np.nan, -0.4], "undecided"),
    ],
)
def test_beyond_the_batch_size_takes_evidence_either_way(rho, p, control, partials, verdict):
    assert figures_prediction.beyond_batch(looked_at(rho, p, control, partials)) == verdict


@pytest.mark.parametrize(
    ("ends", "seeds", "verdict"),
    [
        ((0.1, 0.1, 0.1, 0.9), 3, "held"),
        ((0.1, 0.1, 0.1, 0.9), 2, "undecided"),
        ((0.1, 0.3, 0.1, 0.2), 3, "undecided"),  # not the largest: three of four stages are not
        ((0.1, 0.1, 0.1, 0.4), 3, "undecided"),  # the largest, and within chance
        ((0.3, 0.4, 0.3, 0.2), 3, "did not hold"),
        ((0.3, 0.4, 0.3, 0.2), 2, "undecided"),
    ],
)
def test_concentration_is_denied_only_where_untied_is_the_smallest(
    monkeypatch, ends, seeds, verdict
):
    monkeypatch.setattr(figures_modes, "peak", lambda row, table, band: row)
    chance = {code: SimpleNamespace(upper=0.5) for code in ("next", "current")}
    monkeypatch.setattr(figures_modes, "chance_peaks", lambda row, table, band: chance)
    runs = {
        stage: [SimpleNamespace(seed=seed, features=[end]) for seed in range(seeds)]
        for stage, end in zip(CORE, ends, strict=True)
    }
    assert figures_modes._curves_claim(runs, 32, "23_4").verdict == verdict
