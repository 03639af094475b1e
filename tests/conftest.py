"""Settings of every test: implicit rank promotion is an error, and nothing asks for a network."""

import os

# Eigenvalues of small matrices take ten times as long on several threads that others want too;
# read by OpenBLAS when NumPy is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
