"""How many threads NumPy's linear algebra takes; imported before NumPy, so it imports nothing."""

import os


def one_blas_thread() -> None:
    """Let OpenBLAS use one thread, unless the user has chosen; must run before NumPy is loaded.

    Eigenvalues of records are taken on a thread beside XLA's, which want all cores: twelve
    covariances of width 96 with all groups left out took 0.15 s so and 0.5 s on two threads, and
    0.10 s against 0.12 s on an idle machine, medians; one of width 768 alone 30 ms against 40 ms
    (two cores, OpenBLAS of NumPy 2.4).
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
