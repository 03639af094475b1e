"""The scripts of examples/ and the blocks of the pages, run as a reader would run them."""

import ast
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lens_jax.records import read_records

ROOT = Path(__file__).parents[1]
OURS = {"models", "optim", "experiments", "toy_modular"}
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|nan|inf)\b")
ACTIVATION = {"act_cov_eigenvalues", "act_cov_eigenvalues_left_out", "act_cov_eigenvalues_halves"}
GRADIENT = {"grad_singular_values_centred", "grad_singular_values_left_out", "grad_mean_sq"}
WEIGHT = {"weight_singular_values"}
# what each script measures: steps, taps, parameters of which it takes gradients and weights
MEASURED = {
    "mlp": (
        {0, 1, 2, 4, 8, 16, 32, 64},
        {"h_0/out", "h_1/out"},
        {"h_0/kernel", "h_1/kernel"},
        {"h_0/kernel", "h_1/kernel"},
    ),
    "nnx_transformer": ({0, 16, 32, 48, 64}, {"h_0/mid"}, {"up/kernel/value"}, set()),
    "convnet": (
        {0, 64},
        {"conv_0/out", "conv_1/out"},
        {"conv_0/kernel", "conv_1/kernel"},
        {"dense/kernel"},
    ),
}


def run(arguments: list[str], folder: Path) -> str:
    """What a command prints; it runs on the CPU, in an empty folder, where nothing is imported."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(MEASURED)


@pytest.mark.parametrize("name", MEASURED)
def test_an_example_is_short_and_stands_on_the_lens_alone(name):
    source = (ROOT / "examples" / f"{name}.py").read_text()
    assert len(source.splitlines()) < 90
    tree = ast.parse(source)
    assert ast.get_docstring(tree)
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert "lens_jax" in imported
    assert not imported & OURS


@pytest.mark.parametrize("name", MEASURED)
def test_an_example_leaves_records_a_figure_and_one_line(name, tmp_path):
    printed = run([str(ROOT / "examples" / f"{name}.py"), str(tmp_path / "out")], tmp_path)
    (line,) = printed.splitlines()
    assert all(math.isfinite(float(number)) for number in NUMBER.findall(line))
    errors = re.findall(r"\+- (\d+\.\d+)", line)
    assert errors
    assert float(errors[0]) > 0

    steps, taps, gradients, weights = MEASURED[name]
    found = {
        (record.step, record.kind, record.site) for record in read_records(tmp_path / "out/spectra")
    }
    for kinds, sites in ((ACTIVATION, taps), (GRADIENT, gradients), (WEIGHT, weights)):
        assert found >= {(step, kind, site) for step in steps for kind in kinds for site in sites}
    assert {step for step, _, _ in found} == steps
    assert {site for _, _, site in found} == taps | gradients | weights
    assert (tmp_path / "out/summary.png").stat().st_size > 10_000
    assert os.listdir(tmp_path) == ["out"]


def run_blocks(page: str, folder: Path) -> list[float]:
    """The numbers that the blocks of a page print, run in order in one namespace; all finite."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.S | re.M)
    (folder / "page.py").write_text("\n".join(blocks))
    numbers = [float(number) for number in NUMBER.findall(run(["page.py"], folder))]
    assert all(map(math.isfinite, numbers))
    return numbers


def test_every_page_with_blocks_is_run():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    found = {str(page.relative_to(ROOT)) for page in pages if "```python" in page.read_text()}
    assert found == {"README.md", "docs/lens.md", "docs/models.md"}


def test_the_block_of_the_front_page_runs(tmp_path):
    assert len(run_blocks("README.md", tmp_path)) == 3


def test_the_block_of_the_models_page_runs(tmp_path):
    run_blocks("docs/models.md", tmp_path)
    assert (tmp_path / "weights.safetensors").is_file()


def test_the_blocks_of_the_page_run_in_order(tmp_path):
    assert len(run_blocks("docs/lens.md", tmp_path)) > 10
    assert (tmp_path / "run/summary.png").is_file()
    assert {record.step for record in read_records(tmp_path / "after/spectra")} == {33}
