"""Which package may import what, and what stays out of the way of `--help`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OWN = ("lens_jax", "models", "optim", "experiments", "toy_modular")
ARRAYS = {"jax", "numpy"}
ALLOWED = {
    "lens_jax": ARRAYS | {"optax", "matplotlib"},
    "models": ARRAYS | {"flax", "chz", "rich", "safetensors", "ml_dtypes"},
    "optim": ARRAYS | {"optax", "chz"},
    "experiments": ARRAYS
    | {"lens_jax", "models", "optim", "optax", "chz", "grain", "orbax", "rich", "matplotlib"}
    | {"tensorstore", "tokenizers", "tiktoken", "huggingface_hub"}  # tensorstore is orbax's own
    | {"torch"},  # a peer to time against, never a dependency
    "toy_modular": ARRAYS
    | {"lens_jax", "models", "optim", "flax", "optax", "chz", "rich", "matplotlib"},
}
# Slow or optional: imported inside the function that needs them, except where it is all about them.
LAZY = {"rich", "matplotlib", "tokenizers", "tiktoken", "huggingface_hub", "torch"}
ALL_ABOUT = {
    "lens_jax/panels.py": "matplotlib",
    "lens_jax/axis_style.py": "matplotlib",
    "experiments/progress.py": "rich",
}
CONFIGURATION = (
    "experiments.config",
    "experiments.resolve",
    "models.ladder",
    "models.ladder_table",
    "optim.config",
    "toy_modular.study_config",
)
SLOW = ("jax", "flax", "optax", "orbax", "grain", "matplotlib", "rich")


def imports(path: Path) -> list[tuple[str, str, bool]]:
    """(imported top-level package, name as written, whether at the top of the file)."""
    found = []
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module]
        found += [(name.split(".")[0], name, node in tree.body) for name in names]
    return found


@pytest.mark.parametrize("package", OWN)
def test_no_arrow_outside_the_plan(package):
    for path in (ROOT / package).rglob("*.py"):
        for top, name, _ in imports(path):
            fine = top in sys.stdlib_module_names or top == package or top in ALLOWED[package]
            assert fine, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("package", OWN)
def test_slow_packages_are_imported_where_they_are_needed(package):
    for path in (ROOT / package).rglob("*.py"):
        here = path.relative_to(ROOT).as_posix()
        for top, name, outside in imports(path):
            fine = not outside or top not in LAZY or ALL_ABOUT.get(here) == top or "figures" in here
            assert fine, f"{here} imports {name} at the top"


def loaded_by(code: str) -> list[str]:
    """The slow packages in sys.modules after running `code` in a fresh interpreter."""
    code = f"import sys\n{code}\nprint(*sorted(set({SLOW!r}) & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout.splitlines()[-1].split()


def test_configuration_needs_nothing_slow():
    assert loaded_by(f"import {', '.join(CONFIGURATION)}") == []


def test_help_of_every_command_needs_nothing_slow():
    commands = ("experiments.train", "experiments.verify", "experiments.data_command")
    commands += ("toy_modular.study", "toy_modular.figures", "toy_modular.theory")
    mains = [f"import {name}; assert {name}.main(['--help']) == 0" for name in commands]
    mains += ["import models.ladder; assert models.ladder.main(['-h']) == 0"]
    mains += ["import lens_jax.show; assert lens_jax.show.main(['--help']) == 0"]
    assert loaded_by("\n".join(mains)) == []
