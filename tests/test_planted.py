"""Spectra that were planted come back: exponents, ranks, error bars; and the traps are there.

What is measured at full width runs in a process of its own, whose BLAS has one thread: on a busy
machine several threads in one small eigen-problem take ten times as long. This file is its script.
"""

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lens_jax.fits import GRAM_FLOOR, fit_power_law, rankme
from lens_jax.probes import spectra
from lens_jax.spectra import gram_with_mean
from models.command_line import UsageError, run_command

ROOT = Path(__file__).resolve().parents[1]
WIDTH, WINDOW = 768, (30, 150)
NARROW, NARROW_WINDOW = 96, (4, 19)


def files() -> SimpleNamespace:
    """The scripts, once their folder is on the path."""
    names = ("laws", "draws", "sections", "spectra")
    return SimpleNamespace(**{name: importlib.import_module(f"planted_{name}") for name in names})


@pytest.fixture(scope="module")
def planted():
    """The files of benchmarks/, which is a folder of scripts and no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield files()


def run_python(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    """Run a script from the root, with one thread of BLAS and no implicit rank promotion."""
    settings = {"OPENBLAS_NUM_THREADS": "1", "JAX_NUMPY_RANK_PROMOTION": "raise"}
    settings |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | settings | env,
        capture_output=True,
        text=True,
    )


def measured(name: str):
    """What the function of this file returns in a process of its own."""
    done = run_python(__file__, name)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def alpha_of(eigenvalues, window=WINDOW) -> float:
    return fit_power_law(eigenvalues, *window).alpha


# Exponents


def exponents() -> list:
    """(planted, fitted, by float64 or None); flat laws need most vectors, steep ones digits."""
    laws, found = files().laws, []
    for alpha, count in ((0.5, 32_768), (1.0, 16_384), (2.0, 16_384), (3.0, 16_384)):
        rng = np.random.default_rng(1)
        law = laws.make_law(laws.power_law(WIDTH, alpha), WIDTH, rng)
        twin = laws.Twin(law.mean)
        chunks = laws.draw_chunks(law, count, rng)
        chunks = twin.watch(chunks) if alpha == 3 else chunks
        eigenvalues = laws.make_instrument(count)(chunks, resample=False)["act_cov_eigenvalues"]
        reference = alpha_of(twin.eigenvalues()) if alpha == 3 else None
        found.append((alpha, alpha_of(eigenvalues), reference))
    return found


def test_planted_exponents_come_back():
    """Bias of few vectors included."""
    found = measured("exponents")
    assert [alpha for alpha, _, _ in found] == [0.5, 1, 2, 3]
    for alpha, fitted, reference in found:
        assert abs(fitted - alpha) < 0.01
        assert reference is None or abs(fitted - reference) < 1e-4


def biases() -> list:
    """(planted, mean error, its standard error, theory) of few vectors."""
    laws, draws, found = files().laws, 200, []
    for alpha, count in ((1.0, 1024), (3.0, 512)):
        rng = np.random.default_rng(1)
        law = laws.make_law(laws.power_law(NARROW, alpha), NARROW, rng)
        measure = laws.make_instrument(count, 2)
        each = [measure(laws.draw_chunks(law, count, rng), resample=False) for _ in range(draws)]
        fitted = np.array([alpha_of(one["act_cov_eigenvalues"], NARROW_WINDOW) for one in each])
        theory = laws.first_order_bias(law.eigenvalues, *NARROW_WINDOW, count)
        found.append((alpha, fitted.mean() - alpha, fitted.std() / math.sqrt(draws), theory))
    return found


def test_bias_of_few_vectors_has_the_sign_and_size_of_theory():
    for alpha, mean, error, theory in measured("biases"):
        assert np.sign(theory) == np.sign(alpha - 1.5)  # flat laws come out too flat
        assert abs(mean) > 3 * error
        assert mean == pytest.approx(theory, abs=3 * error)


def test_first_order_bias_against_a_loop(planted):
    values = np.sort(np.random.default_rng(2).uniform(1, 2, size=9))[::-1].copy()
    shift = []
    for i in range(9):
        shift.append(sum(values[j] / (values[i] - values[j]) for j in range(9) if j != i))
    n = 1e9  # so many that the logarithm of 1 + shift / n is its second term
    fitted = alpha_of(values * (1 + np.array(shift) / n), (2, 7)) - alpha_of(values, (2, 7))
    assert planted.laws.first_order_bias(values, 2, 7, n) == pytest.approx(fitted, rel=1e-4)


def test_enough_vectors_are_enough_in_every_window_and_from_there_on(planted):
    rows = [
        {"planted_alpha": alpha, "vectors": n, "first_order_bias": bias, "jackknife_se": se}
        for alpha, n, bias, se in [
            (1.0, 10, -0.001, 0.004),  # enough by luck, for the next is not
            (1.0, 20, -0.001, 0.004),
            (1.0, 20, -0.001, 0.005),
            (1.0, 40, -0.005, 0.002),
            (2.0, 40, 0.0, 0.006),
        ]
    ]
    assert planted.sections.vectors_needed(rows) == {1.0: 40, 2.0: None}


# Ranks


def activation_ranks(laws) -> list:
    """(planted, RankMe of eigenvalues); few vectors lower it by half of rank over vectors."""
    rng, found = np.random.default_rng(3), []
    for rank in (1, 4, 32, 256):
        count = max(4096, 64 * rank)
        law = laws.make_law(np.ones(rank), WIDTH, rng)
        each = laws.make_instrument(count, 4)(laws.draw_chunks(law, count, rng), resample=False)
        found.append((rank, rankme(each["act_cov_eigenvalues"])))
    return found


def gradient_ranks(laws) -> list:
    """(planted, RankMe of singular values, of those above the floor, of their squares)."""
    names = "grad_singular_values/x", "grad_singular_values_centred/x"
    rng, found = np.random.default_rng(4), []
    for rank in (1, 4, 32, 256):
        rows = laws.gradient_rows(512, 4096, rank, rng)
        for name, each in zip(names, rows, strict=True):
            sigma = spectra({"grad/x": gram_with_mean(each)}, resample=False)[name]
            found.append((rank, rankme(sigma), rankme(sigma, GRAM_FLOOR), rankme(sigma**2)))
    return found


def ranks() -> list:
    """Those of activations and those of gradients."""
    modules = files()
    return [activation_ranks(modules.laws), gradient_ranks(modules.laws)]


def test_planted_ranks_come_back():
    """What float32 products make of zero singular values counts for little beside many others."""
    activations, gradients = measured("ranks")
    assert (len(activations), len(gradients)) == (4, 8)
    for rank, fitted in activations:
        assert fitted == pytest.approx(rank, rel=0.01)
    for rank, of_all, above_floor, of_squares in gradients:
        assert above_floor == pytest.approx(rank, rel=0.01)
        assert of_squares == pytest.approx(rank, rel=0.01)
        assert of_all == pytest.approx(rank, rel=0.01 if rank == 256 else 0.25)


def test_gradient_rows_have_the_rank_they_are_said_to_have(planted):
    plain, mean = planted.laws.gradient_rows(24, 60, 3, np.random.default_rng(5))
    for rows in (np.float64(plain), np.float64(mean) - np.float64(mean).mean(0)[None]):
        values = np.linalg.svd(rows, compute_uv=False)
        np.testing.assert_allclose(values[:3], 1, rtol=1e-5)
        assert values[3] < 1e-5
    assert np.linalg.norm(np.float64(mean).mean(0)) == pytest.approx(3, rel=1e-5)


# Error bars


def independent_errors() -> dict:
    """Ratios of 21 tokens per direction."""
    return error_ratios(files().draws.INDEPENDENT, 2048)


def block_errors() -> dict:
    """Ratios of 24 effective tokens per direction, 43 in number."""
    laws = files().laws
    return error_ratios(laws.Correlation("blocks of 4", laws.blocks(4, 0.5)), 4096)


def error_ratios(correlation, tokens: int) -> dict:
    """Reported errors over the spread of 400 draws, by statistic."""
    draws = files().draws
    cell = draws.Cell(1.0, correlation, tokens)
    found = draws.draw_cell(cell, 400, [6], groups=8, windows=("default",))
    return {name: draws.error_ratio(each.values, each.errors) for name, each in found.items()}


@pytest.mark.parametrize("tokens", ["independent_errors", "block_errors"])
def test_reported_errors_are_the_spread_over_draws(tokens):
    """With blocks dealt to any group the ratio would be 0.76."""
    found = measured(tokens)
    assert set(found) == {"default", "RankMe"}
    for ratio in found.values():
        assert ratio == pytest.approx(1, abs=0.15)


def test_effective_tokens_are_as_many_as_would_tell_the_covariance_as_well(planted):
    laws, rng, draws, tokens = planted.laws, np.random.default_rng(7), 3000, 64
    share = 0.8
    paired = laws.Correlation("", laws.blocks(8, share))
    assert paired.effective_share == pytest.approx(1 / (1 + 7 * share**2))
    fading = laws.Correlation("", laws.fading(1024, 0.9))
    assert fading.effective_share == pytest.approx((1 - 0.81) / (1 + 0.81), rel=0.01)
    for correlation in (paired, paired._replace(cut=4)):
        normals = [correlation.normals(tokens, 1, rng)[:, 0] for _ in range(draws)]
        spread = np.var([np.mean(x**2) for x in normals])  # 2 / n of n independent ones
        assert 2 / spread == pytest.approx(tokens * correlation.effective_share, rel=0.1)


def test_tokens_have_the_correlation_they_are_said_to_have(planted):
    laws, rng = planted.laws, np.random.default_rng(8)
    correlation = laws.Correlation("", laws.fading(4, 0.7), cut=1)
    normals = np.float64(correlation.normals(8, 20_000, rng))
    found = normals @ normals.T / 20_000
    expected = np.kron(np.eye(2), laws.fading(4, 0.7))
    np.testing.assert_allclose(found, np.roll(expected, (-1, -1), (0, 1)), atol=0.04)


# Traps


def traps() -> list:
    """Rows of the command, of 16,384 vectors."""
    return list(files().sections.trap_rows(WIDTH, (16_384,), 0))


def test_traps_lower_the_exponent_and_the_instrument_does_not():
    rows = measured("traps")
    alphas = {row["way"]: row["fitted_alpha"] for row in rows}
    assert alphas["the instrument"] == pytest.approx(2, abs=0.01)
    assert alphas["float32, centred"] == pytest.approx(alphas["float64, centred"], abs=1e-4)
    assert 1.6 < alphas["float32, E[xx'] - mm'"] < 1.9  # by the order of the sums
    assert alphas["bfloat16 taps, float64"] == pytest.approx(1.76, abs=0.02)
    assert alphas["bfloat16 taps, expected"] == pytest.approx(1.77, abs=0.005)
    assert [row["way"] for row in rows if row["limit"] is None] == list(alphas)[:3]
    assert all(row["passed"] == (row["limit"] is None) for row in rows)


# The command


def test_the_command_prints_and_writes_every_section(tmp_path):
    out = tmp_path / "planted.json"
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); import planted_draws, planted_spectra\n"
        "planted_draws.CELLS = planted_draws.CELLS[-2:-1]\n"
        "sys.exit(planted_spectra.main(sys.argv[1:]))"
    )
    words = [f"out={out}", "width=16", "vectors=64,128", "draws=2", "seed=3"]
    done = run_python("-c", code, *words, XLA_FLAGS="--xla_backend_optimization_level=0")
    assert done.returncode in (0, 1), done.stderr
    document = json.loads(out.read_text())
    assert document["command"] == f"python benchmarks/planted_spectra.py {' '.join(words)}"
    assert (document["width"], document["vectors"], document["draws"]) == (16, [64, 128], 2)
    assert document["environment"]["numpy"] == np.__version__
    assert {name: len(rows) for name, rows in document["results"].items()} == {
        "alpha": 4 * 2 * 4,
        "rank": 2 + 4 * 4,
        "error_bars": 5,
        "traps": 2 * 6,
    }
    assert done.returncode == bool(document["failed"])
    assert "E[xx'] - mm'" in done.stdout
    assert "blocks of 8" in done.stdout
    assert f"failed claims: {len(document['failed']) or 'none'}" in done.stdout


def test_a_row_that_fails_its_claim_fails_the_command(planted, monkeypatch, capsys):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")  # so that what main sets is undone
    row = {"way": "some", "vectors": 64, "ranks": [1, 3], "fitted_alpha": 1.0}
    for passed, limit, code in [(True, None, 0), (False, "rounding", 0), (False, None, 1)]:
        rows = [row | {"passed": passed, "limit": limit}]
        monkeypatch.setattr(planted.sections, "SECTIONS", {"traps": lambda plan, r=rows: r})
        assert planted.spectra.main([]) == code
        assert ("FAILED" in capsys.readouterr().out) == code


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("widht=96", "unknown key widht=96; did you mean width?"),
        ("width=8", "width=8: give 16 to 4096"),
        ("vectors=1000", "vectors=1000: give powers of two above width=768, from 64 on"),
        ("vectors=512", "vectors=512: give powers of two above width=768, from 64 on"),
        ("vectors=4096,4096", "vectors=4096,4096: name at least one number, and none twice"),
        ("vectors=", "vectors=: name at least one number, and none twice"),
        ("vectors=many", "vectors=many: give a whole number several times"),
        ("draws=1", "draws=1: a spread needs at least 2"),
        ("seed=-1", "seed=-1: give 0 or more"),
        ("out=absent/x.json", "out=absent/x.json: its folder does not exist"),
    ],
)
def test_bad_words_are_refused_in_one_line(planted, monkeypatch, capsys, word, message):
    monkeypatch.setattr(sys, "argv", ["planted_spectra.py", word])
    with pytest.raises(SystemExit, match="2"):
        run_command(planted.spectra.main)
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_help_names_every_key(planted, capsys):
    assert planted.spectra.main(["--help"]) == 0
    printed = capsys.readouterr().out
    for key in ("out=", "width=768", "vectors=4096,16384,65536,262144", "draws=400", "seed=0"):
        assert f"  {key}" in printed
    with pytest.raises(UsageError, match="is not key=value"):
        planted.spectra.main(["--halp"])


SLOW = exponents, biases, ranks, independent_errors, block_errors, traps
MEASUREMENTS: dict[str, Callable] = {measure.__name__: measure for measure in SLOW}

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "benchmarks"))
    json.dump(MEASUREMENTS[sys.argv[1]](), sys.stdout)
