"""Statements about a band's tables and its covariance, as rows that hold or fail (docs/theory.md).

Notation: s the current state, d the step, s + d the next state; H[m] the mean of h given one of the
two states, a table (c, D); Ht_r its modes with energies E_r and shares q_r (`features`); Sb the
covariance of the rows H[m], cov(h) that of h, Sw = cov(h) - Sb; beta = tr Sb / tr cov(h). NumPy.
"""

from functools import partial
from itertools import product

import numpy as np

from lens_jax.comparisons import subspace_overlap
from lens_jax.fits import ranked_shares, rankme, topk_share
from toy_modular.config import is_prime
from toy_modular.features import (
    centred,
    concentration,
    dominant_modes,
    effective_modes,
    energies,
    h_peak,
    mode_shares,
    modes,
)
from toy_modular.nulls import effective_width, state_nulls, transfer
from toy_modular.theory_rows import BandTables, Row, row

TOP = 3
"""Modes in the set S of H_S here."""
RANK, MASS = 0.1, 0.05
"""Tolerances where a claim is an approximation: of a RankMe, relative, and of shares that sum 1."""


def between(table) -> np.ndarray:
    """Sb (D, D): the covariance of the rows of a table, all states alike."""
    rows = centred(table)
    return rows.T @ rows / len(rows)


def labelled(band: BandTables) -> tuple[tuple[str, np.ndarray], ...]:
    """Both tables with their names."""
    return ("current", band.current), ("next", band.next)


def eigenvalues(covariance) -> np.ndarray:
    """Of a symmetric matrix, descending."""
    return np.linalg.eigvalsh(covariance)[::-1]


# Link 1


def parseval_rows(band: BandTables) -> list[Row]:
    """Parseval: the energies add up to the trace of Sb, which cov(h) bounds."""
    rows, trace = [], np.trace(band.covariance)
    for label, table in labelled(band):
        own = np.trace(np.cov(np.asarray(table, np.float64).T, ddof=0))
        share = energies(table).sum() / own if own > 0 else np.nan
        claim = "sum E_r / tr Sb"
        rows.append(row(1, band.where, label, claim, share, "=", 1.0, 1e-9))
        claim = "beta = tr Sb / tr cov(h) is at most 1"
        rows.append(row(1, band.where, label, claim, own / trace, "<=", 1.0, band.rounding))
    return rows


# Link 2


def covariance_rows(band: BandTables) -> list[Row]:
    """What holds of every code whatever: law of total covariance, Ky Fan, concave entropies."""
    rows = []
    whole = eigenvalues(band.covariance)
    for label, table in labelled(band):
        claim = partial(row, 2, band.where, label)
        sb, q, chosen = between(table), mode_shares(table), dominant_modes(table, TOP)
        beta = np.trace(sb) / np.trace(band.covariance)
        least = eigenvalues(band.covariance - sb)[-1] / np.trace(band.covariance)
        own, count, h_s = eigenvalues(sb), _members(chosen, len(q)), concentration(table, chosen)
        n = effective_modes(q)
        low, high = entropy_bounds(sb, band.covariance, q)
        near, rough = 1e-9, band.rounding
        of_cov, bounded = topk_share(whole, count), rankme(whole)
        rows += [
            claim("least eigenvalue of cov(h) - Sb over tr cov(h)", least, ">=", 0.0, rough),
            claim("RankMe(Sb) <= exp entropy q", rankme(own), "<=", n, near * n),
            claim(f"top share of Sb >= H_S, {TOP} modes", topk_share(own, count), ">=", h_s, near),
            claim(f"top share of cov(h) >= beta H_S, {TOP} modes", of_cov, ">=", beta * h_s, rough),
            claim("RankMe(cov h) >= its lower bound", bounded, ">=", low, 10 * rough * high),
            claim("RankMe(cov h) <= its upper bound", bounded, "<=", high, 10 * rough * high),
        ]
    return rows


def _members(chosen, c: int) -> int:
    return sum(1 if 2 * r == c else 2 for r in chosen)


def entropy_bounds(sb, covariance, shares) -> tuple[float, float]:
    """Bounds of RankMe(cov h) by the parts Sb and Sw and by the shares q of the table.

    RankMe(Sb)^beta RankMe(Sw)^(1 - beta) <= RankMe(cov h) <= e^{h(beta)} N^beta RankMe(Sw)^(1-beta)
    with N = exp entropy q >= RankMe(Sb) and h the binary entropy. A part without trace counts 1.
    """
    sb, covariance = np.asarray(sb, np.float64), np.asarray(covariance, np.float64)
    beta = float(np.clip(np.trace(sb) / np.trace(covariance), 0.0, 1.0))
    # the rest of a code without spread is rounding, and so is its RankMe
    inner = rankme(eigenvalues(covariance - sb)) if beta < 1 - 1e-9 else 1.0
    own, count = (rankme(eigenvalues(sb)), effective_modes(shares)) if beta > 0 else (1.0, 1.0)
    binary = -sum(p * np.log(p) for p in (beta, 1 - beta) if p > 0)
    rest = (1 - beta) * np.log(inner)
    return (
        float(np.exp(beta * np.log(own) + rest)),
        float(np.exp(binary + beta * np.log(count) + rest)),
    )


def crossed_modes(table) -> float:
    """Share of the squared Gram matrix <Ht_r, Ht_r'> off its diagonal; 0 for an equivariant code.

    Between 0 and 1: for two equal modes along one line it is 1/2.
    """
    found = modes(table)[1:]
    gram = np.abs(found @ found.conj().T) ** 2  # (c - 1, c - 1)
    return float(1 - np.trace(gram) / gram.sum()) if gram.sum() > 0 else float("nan")


def spectrum_distance(table) -> float:
    """Total variation between the eigenvalues of Sb and the sorted energies, both with sum 1."""
    found, expected = ranked_shares(eigenvalues(between(table))), mode_shares(table)
    expected = np.sort(expected)[::-1]
    if found is None or not np.all(np.isfinite(expected)):
        return float("nan")
    size = max(len(found), len(expected))
    found, expected = (np.pad(p, (0, size - len(p))) for p in (found, expected))
    return float(np.abs(found - expected).sum() / 2)


def equivariance_rows(band: BandTables, exact: bool = False) -> list[Row]:
    """What holds where shifting the state turns the code: Sb has the energies for eigenvalues."""
    rows = []
    small, mass = (1e-9, 1e-9) if exact else (RANK, MASS)
    for label, table in labelled(band):
        claim = partial(row, 2, band.where, label)
        own, chosen = eigenvalues(between(table)), dominant_modes(table, TOP)
        n, h_s = effective_modes(mode_shares(table)), concentration(table, chosen)
        top = topk_share(own, _members(chosen, len(table)))
        rows += [
            claim("share of crossed modes", crossed_modes(table), "=", 0.0, small),
            claim("eigenvalues of Sb off sorted E_r", spectrum_distance(table), "=", 0.0, small),
            claim("RankMe(Sb) = exp entropy q", rankme(own), "=", n, small * n),
            claim(f"top share of Sb = H_S, {TOP} modes", top, "=", h_s, mass),
        ]
    return rows


def overlap_rows(band: BandTables) -> list[Row]:
    """Whether Sb's leading directions are among training's, more than those of any other grouping.

    The means of whatever groups of a band's walks lie along the directions in which h varies most,
    so what chance gives is no share k / D of the space but what random groups have.
    """
    if band.leading is None:
        return []
    rows, chances = [], {0: np.array([np.nan])}
    for label, table in labelled(band):
        values, vectors = np.linalg.eigh(between(table))
        rank = int(np.count_nonzero(values > 1e-6 * max(values[-1], 0.0)))
        k = min(band.leading.shape[1], rank)
        overlap = np.nan
        if k:
            overlap = subspace_overlap(vectors[:, ::-1][:, :k], band.leading[:, :k])
        if k not in chances:
            chances[k] = random_overlaps(band, k)
        chance = chances[k]
        claim = "Sb's leading directions are training's, beyond random groups"
        margin = float(np.quantile(chance, 0.95) - chance.mean())
        rows.append(row(2, band.where, label, claim, overlap, ">>", chance.mean(), margin))
    return rows


def random_overlaps(band: BandTables, k: int, draws: int = 100, seed: int = 0) -> np.ndarray:
    """Overlaps (draws,) of k leading directions of random groups' means with training's.

    The means of c groups drawn without regard to the state are, but for their length, c normal
    vectors with the covariance of h.
    """
    values, vectors = np.linalg.eigh(band.covariance)
    root = vectors * np.sqrt(np.maximum(values, 0.0))[None, :]  # (D, D)
    normal = np.random.default_rng(seed).normal(size=(draws, len(band.law), len(values)))
    means = normal @ root.T
    means -= means.mean(axis=1, keepdims=True)
    directions = np.linalg.svd(means, full_matrices=False)[2][:, :k]  # (draws, k, D)
    return np.sum((directions @ band.leading[:, :k]) ** 2, axis=(1, 2)) / k


# Link 3


def transfer_residuals(band: BandTables) -> tuple[float, float]:
    """Shares of a table's energy that one state alone does not explain, for the next and current.

    First |Ht_r(current) - kappa_r Ht_r(next)|^2 over r != 0 as a share of the current table's
    energy: 0 for a code of the next state. Then |Ht_r(next) - conj(kappa_r) Ht_r(current)|^2 of the
    next table's: 0 for a code of the current state.
    """
    kappa = transfer(band.law)[:, None]
    current, following = modes(band.current), modes(band.next)

    def share(table, explained):
        total = np.sum(np.abs(table) ** 2)
        return float(np.sum(np.abs(table - explained) ** 2) / total) if total > 0 else float("nan")

    return share(current, kappa * following), share(following, kappa.conj() * current)


def next_state_rows(band: BandTables, tolerance: float) -> list[Row]:
    """Whether the current table is what averaging leaves of a code of the next state."""
    found, _ = transfer_residuals(band)
    claim = "energy unlike kappa_r times the next table"
    return [row(3, band.where, "current", claim, found, "=", 0.0, tolerance)]


def current_state_rows(band: BandTables, tolerance: float) -> list[Row]:
    """Whether the next table is what averaging leaves of a code of the current state."""
    _, found = transfer_residuals(band)
    claim = "energy unlike conj kappa_r times the current table"
    return [row(3, band.where, "next", claim, found, "=", 0.0, tolerance)]


def additive_parts(band: BandTables) -> tuple[np.ndarray, np.ndarray]:
    """Modes (c, D) of A and B in the best fit of h by mean + A(s) + B(s + d).

    The normal equations of least squares are, mode by mode,

        current_r = A_r + kappa_r B_r        next_r = B_r + conj(kappa_r) A_r

    so both tables are undone for what each takes over from the other. NaN for a law with
    |kappa_r| = 1, under which one state tells the other.
    """
    kappa = transfer(band.law)[:, None]
    current, following = modes(band.current), modes(band.next)
    rest = 1 - np.abs(kappa) ** 2  # (c, 1)
    rest[0] = 1.0  # the means are 0
    scale = np.where(rest < 1e-9, np.nan, 1 / np.maximum(rest, 1e-9))
    return (current - kappa * following) * scale, (following - kappa.conj() * current) * scale


def additive_rows(band: BandTables) -> list[Row]:
    """How much of the variance of h the two states explain together, and the part of each."""
    own, following = additive_parts(band)
    energy = np.sum(own.conj() * modes(band.current) + following.conj() * modes(band.next)).real
    share = energy / np.trace(band.covariance)
    claim = "share of cov(h) explained by A(s) + B(s + d)"
    return [row(3, band.where, "", claim, share, "<=", 1.0, band.rounding)]


def null_rows(band: BandTables) -> list[Row]:
    """Whether H_peak is above that of unstructured codes of either state, as wide as the band's."""
    c, rows = len(band.law), []
    width = effective_width(band.covariance)
    if not np.isfinite(width):
        return rows
    own, other = state_nulls(c, width, band.law)
    for code, (label, table) in product(("current", "next"), labelled(band)):
        null = own if code == label else other
        claim = f"H_peak above an unstructured code of the {code} state"
        margin = null.upper - null.mean
        rows.append(row(3, band.where, label, claim, h_peak(table).share, ">>", null.mean, margin))
    return rows


# Link 5


def flatness(table, mode: int) -> float:
    """|Ht_r . Ht_r| / E_r, without conjugation: 0 where a mode goes round a circle, 1 on a line.

    A mode of Z_c that a shift turns needs a plane. What leaks into it from a frequency of two
    tokens' period, +1 and -1, has one direction only.
    """
    found = modes(table)[mode]
    energy = np.sum(np.abs(found) ** 2)
    return float(np.abs(found @ found) / energy) if energy > 0 else float("nan")


def shape_rows(band: BandTables) -> list[Row]:
    """Whether the peak of an odd c is a circle, or, next to frequency 1/2, the line of parity."""
    c, rows = len(band.law), []
    for label, table in labelled(band):
        mode = h_peak(table).mode
        if c % 2 == 0 or mode == 0:
            continue
        near = mode == (c - 1) // 2
        link, shape, expected = (5, "line", 1.0) if near else (2, "circle", 0.0)
        claim = f"flatness of a peak {'at' if near else 'off'} (c - 1) / 2, a {shape}"
        rows.append(row(link, band.where, label, claim, flatness(table, mode), "=", expected, 0.2))
    return rows


def frequency_rows(band: BandTables) -> list[Row]:
    """Where the peak lies as a frequency r / c in cycles a token: universal ones are 1/2 and 1/3.

    1/2 for an even c and for a prime; 1/3 for an odd multiple of 3. No claim on other moduli.
    """
    c, rows = len(band.law), []
    prime = is_prime(c)
    if c % 2 == 0 or prime:
        expected, claim = 1 / 2, "frequency of the peak is 1/2"
    elif c % 3 == 0:
        expected, claim = 1 / 3, "frequency of the peak is 1/3"
    else:
        return rows
    for label, table in labelled(band):
        mode = h_peak(table).mode
        found = mode / c if mode else np.nan
        claim_of = f"{claim}, c {'prime' if prime else 'composite'}"
        rows.append(row(5, band.where, label, claim_of, found, "=", expected, 1 / c))
    return rows


def trained_rows(band: BandTables) -> list[Row]:
    """All that is asked of a trained model's band."""
    return [
        *parseval_rows(band),
        *covariance_rows(band),
        *equivariance_rows(band),
        *overlap_rows(band),
        *next_state_rows(band, RANK),
        *current_state_rows(band, RANK),
        *additive_rows(band),
        *null_rows(band),
        *frequency_rows(band),
        *shape_rows(band),
    ]
