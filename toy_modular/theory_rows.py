"""Rows of the theory check: a claim, what was measured and predicted, and the verdict. NumPy."""

from typing import NamedTuple

import numpy as np

HELD, FAILED, UNDECIDED = "held", "failed", "undecided"


class Row(NamedTuple):
    """One claim on one object: measured `relation` predicted, up to `tolerance`.

    link: 1 to 5 (docs/theory.md); table: by which state, or empty; relation: =, <=, >= or
    `>>`, where predicted is what chance gives and clear of it means by more than the tolerance.
    """

    link: int
    where: str
    table: str
    claim: str
    measured: float
    predicted: float
    relation: str
    tolerance: float
    verdict: str


class BandTables(NamedTuple):
    """What is known of a band: tables (c, D), covariance (D, D), law (c,).

    rounding: relative error of the arrays, 1e-4 if stored as float32; leading: (D, k), leading
    eigenvectors of the activations of training, or None.
    """

    where: str
    current: np.ndarray
    next: np.ndarray
    covariance: np.ndarray
    law: np.ndarray
    rounding: float
    leading: np.ndarray | None = None


def row(link, where, table, claim, measured, relation, predicted, tolerance) -> Row:
    """A row with its verdict; a number that is not finite leaves it undecided.

    `>>` holds above predicted + tolerance, fails below predicted and is undecided in between.
    """
    above = float(measured) - float(predicted)
    if not np.isfinite(above):
        verdict = UNDECIDED
    elif relation == ">>":
        verdict = HELD if above > tolerance else FAILED if above < 0 else UNDECIDED
    else:
        wrong = {"=": abs(above), "<=": above, ">=": -above}[relation]
        verdict = HELD if wrong <= tolerance else FAILED
    numbers = float(measured), float(predicted), relation, float(tolerance)
    return Row(link, where, table, claim, *numbers, verdict)
