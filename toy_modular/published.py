"""What the authors report of their toy (toy spec 8.1: seed 0, target 2.0), to stand beside ours.

They trained for 5,000 steps at most and looked at validation every 10.
"""

from typing import NamedTuple


class Published(NamedTuple):
    """One run: selected rate, final losses, tokens at the stop, and whether it hit the target."""

    lr: float
    val_loss: float
    test_loss: float
    tokens: float
    steps: int
    reached: bool


RUNS = {
    ("baseline", 32): Published(6.00e-4, 3.7632, 3.7977, 10.24e6, 5000, False),
    ("baseline", 128): Published(1.697e-3, 3.1412, 3.1362, 40.96e6, 5000, False),
    ("baseline", 512): Published(3.394e-3, 2.1866, 2.1967, 163.84e6, 5000, False),
    ("rope", 32): Published(6.00e-4, 3.5154, 3.5449, 10.24e6, 5000, False),
    ("rope", 128): Published(2.40e-3, 2.6315, 2.6044, 40.96e6, 5000, False),
    ("rope", 512): Published(6.787e-3, 1.9938, 1.9829, 121.57e6, 3710, True),
    ("muon", 32): Published(4.24e-4, 2.0907, 2.1252, 10.24e6, 5000, False),
    ("muon", 128): Published(1.697e-3, 1.9929, 2.0016, 15.56e6, 1900, True),
    ("muon", 512): Published(2.40e-3, 1.9839, 1.9785, 36.04e6, 1100, True),
    ("untied", 32): Published(6.00e-4, 1.9938, 2.0082, 3.748e6, 1830, True),
    ("untied", 128): Published(1.20e-3, 1.9741, 1.9861, 4.424e6, 540, True),
    ("untied", 512): Published(1.697e-3, 1.9905, 1.9962, 8.192e6, 250, True),
}
"""By (stage, batch)."""
