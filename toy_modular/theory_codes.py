"""Codes built to have a property, and what the links of docs/theory.md say of them.

A code of a band is an array h (c, c, D) by current state s and step d. All c^2 pairs are there, so
tables and covariances are sums and not samples. NumPy, seeded.
"""

from functools import partial

import numpy as np

from lens_jax.fits import fit_power_law
from toy_modular.banded import modulus_law, offset_law, step_law
from toy_modular.config import BandedConfig
from toy_modular.features import energies, h_peak, mode_shares, modes, pair_masses
from toy_modular.nulls import (
    kernel,
    next_code_null,
    sampled_null,
    selection_null,
    transfer,
)
from toy_modular.theory_links import (
    additive_parts,
    additive_rows,
    between,
    covariance_rows,
    eigenvalues,
    equivariance_rows,
    frequency_rows,
    next_state_rows,
    parseval_rows,
    shape_rows,
)
from toy_modular.theory_rows import BandTables, Row, row

EXACT = 1e-9
PUBLISHED = BandedConfig()
PROBED = 12_000
"""Walks of a published probe."""


# Codes


def equivariant_table(c: int, energy, width: int, random: np.random.Generator) -> np.ndarray:
    """A table (c, width) with E_r = energy[r - 1] for r = 1..c//2 that a shift of m turns.

    Every positive mode has a plane of its own, the Nyquist mode a line. Raises ValueError where
    `width` has no room for them.
    """
    angle = 2 * np.pi * np.arange(c)[:, None] / c  # (c, 1)
    columns = []
    for r, weight in enumerate(energy, start=1):
        if weight == 0:
            continue
        if 2 * r == c:
            columns.append(np.sqrt(weight) * np.cos(r * angle))
        else:
            columns += [np.sqrt(2 * weight) * turn(r * angle) for turn in (np.cos, np.sin)]
    table = np.concatenate(columns, axis=1)
    if table.shape[1] > width:
        raise ValueError(f"width={width}: these modes need {table.shape[1]} directions")
    directions = np.linalg.qr(random.normal(size=(width, width)))[0]
    return table @ directions[: table.shape[1]]


def next_state_code(table) -> np.ndarray:
    """h (c, c, D) with h[s, d] = table[s + d]."""
    c = len(table)
    return np.asarray(table)[(np.arange(c)[:, None] + np.arange(c)[None, :]) % c]


def band_tables(h: np.ndarray, law: np.ndarray, where: str) -> BandTables:
    """Tables and covariance of a code h (c, c, D) under a law (c,) of d and uniform s."""
    c = len(law)
    states, steps = np.arange(c)[:, None], np.arange(c)[None, :]
    following = h[(states - steps) % c, steps]  # (next state, d, D)
    rows = h.reshape(c * c, -1)
    weights = np.tile(law / c, c)
    deviations = rows - (weights @ rows)[None, :]
    covariance = deviations.T @ (weights[:, None] * deviations)
    tables = (np.einsum("sdj,d->sj", each, law) for each in (h, following))
    return BandTables(where, *tables, covariance, law, EXACT)


def parity_table(c: int, o: int) -> np.ndarray:
    """A table (c, 1) of (-1)^t over the tokens t = o..o+c-1."""
    return (-1.0) ** (o + np.arange(c))[:, None]


def token_frequency_table(c: int, o: int, f: float) -> np.ndarray:
    """A table (c, 2) of cos and sin of 2 pi f t over the tokens t = o..o+c-1."""
    angle = 2 * np.pi * f * (o + np.arange(c))
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


# Links


def constructed_rows(seed: int = 0) -> list[Row]:
    """All claims on constructed codes, in the order of the links; about two seconds."""
    random = np.random.default_rng(seed)
    rows = [
        *_equivariant(random),
        *_additive(random),
        *_mixture(random),
        *_averaged(random),
        *_two_states(random),
        *_sampled(random),
        *_shared_frequencies(),
    ]
    return sorted(rows, key=lambda found: found.link)


def _equivariant(random) -> list[Row]:
    """Links 1 and 2 on a next-state code with energies falling as a power of the rank."""
    c, exponent, where = 97, 1.2, "equivariant code, c=97"
    energy = np.arange(1, 49) ** -exponent
    table = equivariant_table(c, random.permutation(energy), 120, random)
    band = band_tables(next_state_code(table), step_law(c, PUBLISHED), where)
    fit = fit_power_law(eigenvalues(between(band.next)), 10, 40)
    claim = "alpha(10:40) of Sb = exponent of E_r by rank"
    return [
        *parseval_rows(band),
        *equivariance_rows(band, exact=True),
        *shape_rows(band)[1:],
        row(2, where, "next", claim, fit.alpha, "=", exponent, 0.05),
        *next_state_rows(band, EXACT),
    ]


def _additive(random) -> list[Row]:
    """Link 2, the unconditional part, where state, next state and step are all coded, and mixed."""
    c, width = 36, 24
    parts = random.normal(size=(3, c, width)) * np.array([2.0, 1.0, 0.7])[:, None, None]
    h = parts[0][:, None] + next_state_code(parts[1]) + parts[2][None]
    h = np.tanh(h + 0.5 * random.normal(size=h.shape))
    return covariance_rows(band_tables(h, step_law(c, PUBLISHED), "mixed code, c=36"))


def _two_states(random) -> list[Row]:
    """Link 3 where both states are coded: together they explain all, each table holds both."""
    c, law, where = 97, step_law(97, PUBLISHED), "A(s) + B(s + d), c=97"
    own, following = random.normal(size=(2, c, 8))
    band = band_tables(own[:, None] + next_state_code(following), law, where)
    found = additive_parts(band)
    errors = [np.abs(a - modes(b)).max() for a, b in zip(found, (own, following), strict=True)]
    claim = "A and B recovered from the tables, largest error"
    return [*additive_rows(band), row(3, where, "", claim, max(errors), "=", 0.0, EXACT)]


def _mixture(random) -> list[Row]:
    """Link 2 over bands: one direction for parity in all of them, planes of their own else."""
    moduli, law = (36, 48, 96, 98), np.array([0.4, 0.3, 0.2, 0.1])
    width = 2 * len(moduli) + 1
    directions = np.linalg.qr(random.normal(size=(width, width)))[0]
    covariance = np.zeros((width, width))
    for i, c in enumerate(moduli):
        own = equivariant_table(c, np.eye(c // 2)[4] / 2, 2, random)  # E_5 = 1/2: a pair sums to 1
        code = own @ directions[2 * i + 1 : 2 * i + 3] + parity_table(c, 0) @ directions[:1]
        covariance += law[i] * between(code)
    found = eigenvalues(covariance)
    weight = modulus_law(PUBLISHED)[97 - PUBLISHED.c_min] * offset_law(97, PUBLISHED)[200]
    count = "training sequences expected"
    where, own = "four bands, parity shared", np.sort(np.repeat(law / 2, 2))[::-1]
    off = float(np.abs(found[1:] - own).max())
    return [
        row(2, where, "", "shared mode: sum_b P(b) E_b", found[0], "=", 1.0, EXACT),
        row(2, where, "", "modes of one band: P(b) E_b, largest error", off, "=", 0.0, EXACT),
        row(2, "band 97:200", "", count, PUBLISHED.train * weight, "=", 0.02, 0.005),
    ]


def _averaged(random) -> list[Row]:
    """Link 3: the kernel, its closed form, and what unstructured codes show through it."""
    rows = []
    for c, share, mode in ((97, 0.134, 1), (179, 0.133, 1), (96, 0.200, 48)):
        law, where = step_law(c, PUBLISHED), f"white next-state code, c={c}"

        claim = partial(row, 3, where, "current")
        code = random.normal(size=(c, 4))
        rows += next_state_rows(band_tables(next_state_code(code), law, where), EXACT)
        found, total = kernel(law)[1:], c * law @ law - 1
        rows.append(claim("sum |kappa_r|^2 = c sum P^2 - 1", found.sum(), "=", total, EXACT))
        if mode == 1:  # the closed form is that of a prime c
            angle = np.pi * np.arange(1, c) / c
            form = (np.sin(angle * (c // 8)) / ((c - c // 8) * np.sin(angle))) ** 2
            error = np.abs(found - form).max()
            rows.append(claim("|kappa_r|^2 off its closed form", error, "=", 0.0, EXACT))
        null, chance = next_code_null(c, law), selection_null(c, 10, law)
        many = np.mean([_peak(random, c, 500, law) for _ in range(8)])
        few = np.mean([_peak(random, c, 10, law) for _ in range(200)])
        rows += [
            claim("H_peak of an unstructured code", null.share, "=", share, 5e-4),
            claim("mode of that peak", null.mode, "=", mode, 0.0),
            claim("H_peak, 500 directions, mean of 8", many, "=", null.share, 0.01),
            claim("H_peak, 10 directions, mean of 200", few, "=", chance.mean, 0.01),
        ]
    return rows


def _peak(random, c: int, width: int, law) -> float:
    """H_peak in the current table of a white code of the next state."""
    averaged = transfer(law)[:, None] * np.fft.fft(random.normal(size=(c, width)), axis=0)
    return h_peak(np.fft.ifft(averaged, axis=0).real).share


def _sampled(random, width: int = 64, codes: int = 6) -> list[Row]:
    """Link 4: the same with a finite number of walks drawn from the law."""
    rows = []
    for c in (97, 179):
        law, energy = step_law(c, PUBLISHED), np.zeros(c)
        for _ in range(codes):
            code, total = random.normal(size=(c, width)), np.zeros((c, width))
            states, steps = random.integers(0, c, PROBED), random.choice(c, PROBED, p=law)
            np.add.at(total, states, code[(states + steps) % c])
            energy += energies(total / np.bincount(states, minlength=c)[:, None])
        expected = sampled_null(c, law, PROBED).share
        where = f"white next-state code, c={c}, n=12,000"
        claim = f"q_1 of the mean energies of {codes} x {width} directions"
        share = energy[1] / energy.sum()
        rows.append(row(4, where, "current", claim, share, "=", expected, 0.2 * expected))
    return rows


def leak(c: int, f: float, r: int) -> float:
    """Pair mass at r of cos and sin of 2 pi f t seen on Z_c, whatever the offset.

    E_r = (D(f - r/c)^2 + D(f + r/c)^2) / 2 with D(x) = sin(pi c x) / (c sin(pi x)), over the
    variance 1 - D(f)^2. For f = 1/2, an odd c and r = (c - 1) / 2 it is
    2 / (c sin(pi / 2c))^2 / (1 - 1 / c^2), which tends to 8 / pi^2.
    """

    def dirichlet(x):
        return np.sin(np.pi * c * x) / (c * np.sin(np.pi * x))

    energy = (dirichlet(f - r / c) ** 2 + dirichlet(f + r / c) ** 2) / 2
    return float(2 * energy / (1 - dirichlet(f) ** 2))


def _shared_frequencies() -> list[Row]:
    """Link 5: a frequency in tokens that other moduli have, seen on a prime one."""
    c, rows = 97, []
    for o in (200, 201):
        where = f"parity code, c=97, o={o}"
        mass = pair_masses(mode_shares(parity_table(c, o)))
        near = (c - 1) // 2
        claim = "pair mass at r=48, exact form"
        rows.append(row(5, where, "", claim, mass[near - 1], "=", leak(c, 0.5, near), EXACT))
        claim = "pair mass at r=48, limit 8/pi^2"
        rows.append(row(5, where, "", claim, mass[near - 1], "=", 8 / np.pi**2, 1e-3))
    table = token_frequency_table(c, 200, 1 / 3)
    mass, where = pair_masses(mode_shares(table)), "code of period 3, c=97, o=200"
    rows.append(row(5, where, "", "pair mass at r=32", mass[31], "=", leak(c, 1 / 3, 32), EXACT))
    code = next_state_code(parity_table(c, 200))
    band = band_tables(code, step_law(c, PUBLISHED), "parity of the next token, c=97")
    return [*rows, *frequency_rows(band)[1:], *shape_rows(band)[1:]]
