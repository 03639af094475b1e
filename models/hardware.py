"""What the accelerator under a program is, as far as the choice of a kernel depends on it."""

import re

import jax


def nvidia_capability() -> tuple[int, int] | None:
    """Compute capability (major, minor) of the default device, None where it is no NVIDIA card."""
    if jax.default_backend() != "gpu":
        return None
    # AMD cards name an architecture here, such as gfx942.
    found = re.fullmatch(r"(\d+)\.(\d+)", str(jax.devices()[0].compute_capability))
    return None if found is None else (int(found[1]), int(found[2]))
