"""Which ranks an exponent is fitted on where nobody says so, and what a window has to be.

A window is two ranks, both included, at width 768. The tests of a study take the one that it
declares, at all of its tiers if it has only deep ones. Beside d12, for which it is then declared,
deeper tiers take the published one of their own. Source: protocol spec 1.11 T3.
"""

from collections.abc import Collection

from experiments.study_records import Study
from lens_jax.fits import PAPER_WINDOWS

Window = tuple[int, int]
MAIN_WINDOW: Window = PAPER_WINDOWS["90-200"]
DEEP_WINDOW: Window = PAPER_WINDOWS["200-400"]
DEEP_TIERS = ("d24", "d36", "d48")
LEAST_RANKS = 3
"""Below this a line through the ranks says nothing of how well it fits."""


def check_window(window: Window) -> None:
    """Raises ValueError with one line for what is no window, or has too few ranks for a fit."""
    first, last = window
    if not 1 <= first <= last - LEAST_RANKS + 1:
        raise ValueError(f"window={first},{last}: give FIRST,LAST, {LEAST_RANKS} ranks or more")


def window_of(study: Study, asked: Window | None = None, tier: str | None = None) -> Window:
    """Returns the window of a study, at one of its tiers if that is given: `asked`, or its own.

    Raises ValueError with one line for a study that declares what is no window.
    """
    tiers = {run.cell.tier for run in study.runs}
    if tier in DEEP_TIERS and not only_deep(tiers):
        return DEEP_WINDOW
    if asked is not None:
        return asked
    declared = study.config.get("window")
    if declared is None:
        return DEEP_WINDOW if only_deep(tiers) else MAIN_WINDOW
    try:
        check_window(tuple(declared))
    except (TypeError, ValueError) as error:
        raise ValueError(f"study={study.path}: {error}, in its config.json or as window=") from None
    return tuple(declared)


def only_deep(tiers: Collection[str]) -> bool:
    """Whether tiers are all beyond d12."""
    return bool(tiers) and all(tier in DEEP_TIERS for tier in tiers)
