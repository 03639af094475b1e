"""NumPy's linear algebra in training processes: one thread, and nobody loads it before that."""

import subprocess
import sys

import pytest

CODE = """
import os, sys
import experiments.{command} as command
assert "numpy" not in sys.modules  # OpenBLAS reads the variable when it is loaded
try:
    command.main(["--help"])
except SystemExit:
    pass
print(os.environ["OPENBLAS_NUM_THREADS"])
"""


@pytest.mark.parametrize("command", ["train", "measure"])
@pytest.mark.parametrize(("given", "used"), [({}, "1"), ({"OPENBLAS_NUM_THREADS": "3"}, "3")])
def test_training_leaves_the_cores_to_xla_unless_told_otherwise(command, given, used):
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(command=command)],
        env=given,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[-1] == used
