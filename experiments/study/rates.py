"""Which learning rates are tried at a batch size (ladder spec 8)."""

from collections.abc import Iterable

REFERENCE = {"muon": 1, "untied": 1, "valuemix": 1, "unet": 1}
"""Long rows a step at which the published rates of a rung were found, where they are not 8."""


def rounded(multiplier: float) -> float:
    """The multiplier as words and records have it, eight digits."""
    return float(f"{multiplier:.8g}")


def transferred(
    rung: str, batch: int, laws: Iterable[str], factors: Iterable[float]
) -> list[float]:
    """Multipliers on the published rates, ascending, each once.

    With r = batch / reference batch: every factor times sqrt(r) and times r, as the laws say,
    rounded to six decimals.
    """
    ratio = batch / REFERENCE.get(rung, 8)
    carried = {"sqrt": ratio**0.5, "linear": ratio}
    return sorted({round(carried[law] * factor, 6) for law in laws for factor in factors})
