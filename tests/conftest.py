"""Settings of every test: no rank promotion by itself, no time limits, no network asked for."""

import os

# Eigenvalues of small matrices take ten times as long on several threads that others want too;
# read by OpenBLAS when NumPy is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import jax

jax.config.update("jax_numpy_rank_promotion", "raise")

# No test asserts a time: on a machine that is shared any example may take long.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
