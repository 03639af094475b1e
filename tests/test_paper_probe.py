"""Numbers to be held against the paper's own: fitted as the released code fits them."""

import csv

import numpy as np
import pytest

from experiments.paper_probe import write_summary

PATH = "h_0/attn/c_proj/kernel"
META = {"step": 100, "sample_tokens": 1024, "window_tokens": 1024}


def alphas_of(values, tmp_path):
    arrays = {
        "act_cov_eigenvalues/h_0/resid_post": values,
        f"grad_singular_values/{PATH}": values,
        f"weight_singular_values/{PATH}": values,
    }
    (row,) = csv.DictReader(write_summary(tmp_path, META, arrays).open())
    return [float(row[f"{kind}_alpha"]) for kind in ("cov", "grad", "weight")]


def slope(values, first=30, last=150):
    """The released fit: descending, both ranks included, what is not positive left out."""
    ranks = np.arange(first, last + 1)
    values = np.sort(values)[::-1][first - 1 : last]
    kept = values > 0
    return -np.polyfit(np.log(ranks[kept]), np.log(values[kept]), 1)[0]


@pytest.mark.parametrize("drop", [1e-8, 8.5e-5])
def test_small_values_count_as_they_do_in_the_released_code(drop, tmp_path):
    # from the first, or from rank 80 on, they are below a float32's rounding of the largest
    ranks = np.arange(1, 201.0)
    values = drop * np.minimum(ranks**-1.5, 80 * ranks**-2.5)  # bent there
    values[0] = 1.0
    assert alphas_of(values, tmp_path) == pytest.approx([slope(values)] * 3)


def test_what_is_not_positive_drops_out_and_ranks_stay(tmp_path):
    values = np.arange(1, 201.0) ** -1.2 * (1 + 0.1 * np.cos(np.arange(200)))
    values[100:] = 0.0
    values = np.random.default_rng(0).permutation(values)
    assert alphas_of(values, tmp_path) == pytest.approx([slope(values)] * 3)
