"""The released procedure of the benchmark: the spectra it ends in are those of the lens."""

import numpy as np
import pytest
from test_bench import TINY
from tiny_models import quick_compiler

from experiments.bench import parse_bench, resolve_rung
from experiments.bench_paper import paper_way
from experiments.bench_steps import Bench
from experiments.config import PROBES
from lens_jax.probes import spectra


@pytest.fixture(scope="module")
def bench():
    plan, words = parse_bench([word for word in TINY if "rung=" not in word])
    with quick_compiler():
        yield Bench(resolve_rung(words, plan.rung), lambda line: None)


@pytest.mark.parametrize("data", ["fixed", "batch"])
def test_the_released_procedure_ends_in_the_same_spectra(bench, data):
    way = paper_way(bench, data, None)  # before the step moves the weights on
    found = way.all()
    expected = spectra(bench.program(PROBES, data).call())
    kinds = {
        "activation": "act_cov_eigenvalues",
        "gradient": "grad_singular_values",
        "weight": "weight_singular_values",
    }
    for name, kind in kinds.items():
        assert len(found[name]) == 2  # one place in each of the two layers
        for place, values in found[name].items():
            wanted = expected[f"{kind}/{place}"]
            np.testing.assert_allclose(
                values, wanted, atol=3e-4 * wanted.max(), err_msg=f"{name} at {place}"
            )
