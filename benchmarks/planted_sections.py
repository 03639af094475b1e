"""What `planted_spectra` measures, as rows of its document: exponents, ranks, error bars, traps."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from planted_draws import error_rows
from planted_laws import (
    Law,
    Twin,
    draw_chunks,
    first_order_bias,
    gradient_rows,
    make_instrument,
    make_law,
    power_law,
    rank_windows,
    resolution,
)

from lens_jax.fits import GRAM_FLOOR, fit_power_law, rankme
from lens_jax.jackknife import alpha_error
from lens_jax.probes import spectra
from lens_jax.spectra import gram_with_mean

Row = dict[str, Any]
ALPHAS = (0.5, 1.0, 2.0, 3.0)
RANKS = (1, 4, 32, 256)
AVERAGED = 65_536  # vectors in all the draws over which a bias is averaged, 16 draws at most
MANY = 65_536  # vectors of ranks and, at most, of traps
SAMPLES, PARAMETERS = 512, 65_536  # of a gradient matrix
ALPHA_LIMIT, RANK_LIMIT = 0.01, 0.01
BFLOAT16_STEP = 2.0**-6  # between neighbours from 2 to 4, where coordinates of mean 3 lie


# Exponents


def alpha_rows(width: int, vectors: Sequence[int], seed: int) -> Iterator[Row]:
    """Planted exponents through the instrument, by exponent, number of vectors and window."""
    instruments = {count: make_instrument(count) for count in vectors}
    for alpha in ALPHAS:
        law = make_law(power_law(width, alpha), width, np.random.default_rng(seed))
        for count, measure in instruments.items():
            rng = np.random.default_rng([seed, count, round(10 * alpha)])
            yield from rows_of_law(law, alpha, count, measure, rng, count == max(vectors))


def rows_of_law(
    law: Law, alpha: float, count: int, measure: Callable, rng: np.random.Generator, enough: bool
) -> Iterator[Row]:
    """One exponent and number of vectors; the bias is the mean over several draws of few.

    enough: whether so many vectors are claimed to bring out the exponent.
    """
    width = len(law.mean)
    watching = Twin(law.mean)
    first = measure(watching.watch(draw_chunks(law, count, rng)))
    others = range(1, max(1, min(16, AVERAGED // count)))
    found = [first, *(measure(draw_chunks(law, count, rng), resample=False) for _ in others)]
    twin = watching.eigenvalues()
    for name, ranks in rank_windows(width).items():
        fitted = [fit_power_law(each["act_cov_eigenvalues"], *ranks).alpha for each in found]
        error = alpha_error(first["act_cov_eigenvalues_left_out"], *ranks)
        yield {
            "planted_alpha": alpha,
            "vectors": count,
            "vectors_per_direction": count / width,
            "window": name,
            "ranks": list(ranks),
            "fitted_alpha": fitted[0],
            "error": fitted[0] - alpha,
            "jackknife_se": error,
            "minus_float64": fitted[0] - fit_power_law(twin, *ranks).alpha,
            "draws": len(fitted),
            "mean_error": float(np.mean(fitted)) - alpha,
            "mean_error_se": error / math.sqrt(len(fitted)),
            "first_order_bias": first_order_bias(law.eigenvalues, *ranks, count),
            "resolution": resolution(law.eigenvalues, *ranks, count),
            "limit": None if enough else "too few vectors",
            "passed": abs(fitted[0] - alpha) < ALPHA_LIMIT,
        }


def vectors_needed(rows: Sequence[Row]) -> dict[float, int | None]:
    """By exponent, the fewest vectors with |first-order bias| + 2 standard errors below 0.01.

    In every window, for as many vectors and all greater numbers; None where no number is enough.
    """
    needed: dict[float, int | None] = {}
    for alpha in dict.fromkeys(row["planted_alpha"] for row in rows):
        same = [row for row in rows if row["planted_alpha"] == alpha]
        doubt = {
            row["vectors"]
            for row in same
            if abs(row["first_order_bias"]) + 2 * row["jackknife_se"] >= ALPHA_LIMIT
        }
        enough = {row["vectors"] for row in same if row["vectors"] > max(doubt, default=0)}
        needed[alpha] = min(enough, default=None)
    return needed


# Ranks


def rank_rows(width: int, vectors: Sequence[int], seed: int) -> Iterator[Row]:
    """Planted ranks: RankMe_lambda of activations, RankMe_sigma of gradients.

    `limit` names what is known to hold it back; such a row fails nothing.
    """
    rng = np.random.default_rng(seed)
    count = min(max(vectors), MANY)
    measure = make_instrument(count)
    for rank in (rank for rank in RANKS if 3 * rank <= width):
        law = make_law(np.ones(rank), width, rng)
        found = measure(draw_chunks(law, count, rng), resample=False)
        expected = rank * math.exp(-rank / (2 * count))  # the spread of sample eigenvalues
        yield rank_row(
            "RankMe_lambda, activations", rank, found["act_cov_eigenvalues"], expected=expected
        )
    for rank in RANKS:
        rows = gradient_rows(SAMPLES, min(width**2, PARAMETERS), rank, rng)
        plain, centred = (
            spectra({"grad/x": gram_with_mean(each)}, resample=False) for each in rows
        )
        for name, sigma in (
            ("plain", plain["grad_singular_values/x"]),
            ("centred", centred["grad_singular_values_centred/x"]),
        ):
            name = f"RankMe_sigma, gradients {name}"
            yield rank_row(name, rank, sigma, limit="float32 products" if rank <= 32 else None)
            yield rank_row(f"{name}, above the floor", rank, sigma, floor=GRAM_FLOOR)


def rank_row(
    name: str,
    rank: int,
    values,
    *,
    floor: float = 0.0,
    expected: float | None = None,
    limit: str | None = None,
) -> Row:
    """One planted rank against RankMe of the values found."""
    found = rankme(values, floor)
    return {
        "quantity": name,
        "planted_rank": rank,
        "rankme": found,
        "expected": rank if expected is None else expected,
        "relative_error": found / rank - 1,
        "limit": limit,
        "passed": abs(found / rank - 1) < RANK_LIMIT,
    }


# Traps


def trap_rows(width: int, vectors: Sequence[int], seed: int) -> Iterator[Row]:
    """Alpha of rank^-2 on the default window, by ways that lose digits and ways that do not."""
    ranks = rank_windows(width)["default"]
    eigenvalues = power_law(width, 2.0)
    law = make_law(eigenvalues, width, np.random.default_rng(seed))
    rounding = BFLOAT16_STEP**2 / 12  # variance of a coordinate's rounding
    for count in sorted({min(each, MANY) for each in vectors}):
        rng = np.random.default_rng([seed, count])
        chunks = list(draw_chunks(law, count, rng))
        x = np.concatenate(chunks)
        rounded = x.astype(jnp.bfloat16).astype(np.float32)
        measured = make_instrument(count)(chunks, resample=False)
        true = np.linalg.eigvalsh(float64_covariance(x))
        ways = {
            "the instrument": (measured["act_cov_eigenvalues"], None),
            "float64, centred": (true, None),
            "float32, centred": (float32_eigenvalues(centred_covariance, x), None),
            "float32, E[xx'] - mm'": (float32_eigenvalues(uncentred_covariance, x), "cancellation"),
            "bfloat16 taps, float64": (np.linalg.eigvalsh(float64_covariance(rounded)), "rounding"),
            "bfloat16 taps, expected": (eigenvalues + rounding, "rounding"),
        }
        reference = fit_power_law(true, *ranks).alpha
        for way, (values, limit) in ways.items():
            fitted = fit_power_law(values, *ranks).alpha
            yield {
                "way": way,
                "vectors": count,
                "ranks": list(ranks),
                "planted_alpha": 2.0,
                "fitted_alpha": fitted,
                "minus_float64": fitted - reference,
                "limit": limit,
                "passed": abs(fitted - reference) < ALPHA_LIMIT,
            }


def float32_eigenvalues(covariance: Callable, x: np.ndarray) -> np.ndarray:
    """Eigenvalues in float64 of a covariance formed in float32."""
    return np.linalg.eigvalsh(np.asarray(covariance(x), np.float64))


def float64_covariance(x: np.ndarray) -> np.ndarray:
    """Covariance (D, D) of vectors (n, D) in float64."""
    return np.cov(x, rowvar=False, dtype=np.float64)


@jax.jit
def uncentred_covariance(x: jax.Array) -> jax.Array:
    """E[xx'] - mm' in float32, which cancels where the mean is strong."""
    mean = jnp.mean(x, axis=0)
    return jnp.matmul(x.T, x, precision="highest") / len(x) - jnp.outer(mean, mean)


@jax.jit
def centred_covariance(x: jax.Array) -> jax.Array:
    """E[(x - m)(x - m)'] in float32."""
    x = x - jnp.mean(x, axis=0)[None]
    return jnp.matmul(x.T, x, precision="highest") / len(x)


SECTIONS: dict[str, Callable] = {
    "alpha": lambda plan: alpha_rows(plan.width, plan.vectors, plan.seed),
    "rank": lambda plan: rank_rows(plan.width, plan.vectors, plan.seed),
    "error_bars": lambda plan: error_rows(plan.draws, plan.seed),
    "traps": lambda plan: trap_rows(plan.width, plan.vectors, plan.seed),
}
