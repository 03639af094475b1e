"""What a figure of the study says in one sentence, with the numbers it stands on.

Verdicts are by fixed rules, so that a sentence does not depend on who reads the figure. NumPy.
"""

import json
from collections.abc import Sequence
from itertools import product
from math import isfinite
from typing import NamedTuple

import numpy as np

from lens_jax.correlations import PermutationTest
from lens_jax.plain_rows import csv_text, plain

LEVEL = 0.05
MOST_SIGNS = 16
HELD, FAILED, UNDECIDED = "held", "did not hold", "undecided"


class Missing(ValueError):
    """A figure has not the runs it needs; the message says which."""


class Claim(NamedTuple):
    """One row of claims.csv.

    n: members or pairs compared; statistic and p: of the test that decides, NaN where there is
    none; control: what the same test says of a predictor that needs no spectrum, or the null.
    """

    figure: str
    claim: str
    n: int
    seeds: int
    window: str
    statistic: float
    p: float
    control: str
    verdict: str
    sentence: str


def verdict(statistic: float, p: float, least_p: float) -> str:
    """Returns what a two-sided test says of a claim that a statistic is above 0.

    held: above 0 with p <= 0.05. did not hold: below 0 with p <= 0.05, for to say so takes as much
    evidence as the claim itself. undecided: anything else, so also whatever so few members show
    that no outcome of theirs has p <= 0.05, which is what least_p says. A p of one side only is
    near 1 where the other sign is clear: by it a claim is held or undecided.
    """
    if not (isfinite(statistic) and isfinite(p)) or max(p, least_p) > LEVEL or statistic == 0:
        return UNDECIDED
    return HELD if statistic > 0 else FAILED


def sign_flip_test(differences: Sequence[float], *, seed: int = 0) -> PermutationTest:
    """Tests that paired differences have mean 0, two-sided, by their signs; p is 2^(1-n) at best.

    Null: each difference might as well have the other sign. All 2^n choices up to MOST_SIGNS
    pairs, drawn ones beyond. What is not finite is left out.
    """
    values = np.asarray(differences, np.float64)
    values = values[np.isfinite(values)]
    if not values.size:
        return PermutationTest(np.nan, np.nan, 0, True)
    exact = values.size <= MOST_SIGNS
    if exact:
        signs = np.array(list(product((1.0, -1.0), repeat=values.size)))
    else:
        drawn = np.random.default_rng(seed).choice((1.0, -1.0), (19_999, values.size))
        signs = np.concatenate([np.ones((1, values.size)), drawn])
    sums = np.abs(signs @ values)
    p = float(np.mean(sums >= sums[0] * (1 - 1e-9)))
    return PermutationTest(float(values.mean()), p, len(signs) - (not exact), exact)


def number(value: float, form: str = ".2f") -> str:
    """Writes a number for a sentence, n/a for one that is not finite."""
    return format(value, form) if isfinite(value) else "n/a"


def p_text(test: PermutationTest) -> str:
    """Writes a p for a sentence, with what it was counted over."""
    if not isfinite(test.p):
        return "p = n/a"
    return f"p = {test.p:.2g}" + ("" if test.exact else " (Monte Carlo)")


def claims_json(claims: Sequence[Claim]) -> str:
    """The claims as strict JSON, null for what is not finite."""
    rows = [plain(claim._asdict()) for claim in claims]
    return json.dumps(rows, indent=2, allow_nan=False) + "\n"


def claims_csv(claims: Sequence[Claim]) -> str:
    """The claims as CSV, empty for what is not finite."""
    return csv_text((claim._asdict() for claim in claims), Claim._fields)
