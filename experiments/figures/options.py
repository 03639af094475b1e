"""What a reader may choose about the figures; every default is declared before the runs are made.

Figures take what they need and leave the rest, so that a key means the same in all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import chz
import numpy as np

from experiments.rank_windows import Window, check_window, window_of
from experiments.study_records import Run, Study
from lens_jax.claims import Missing
from models.command_line import UsageError


@chz.chz
class Options:
    """The keys that figures read."""

    target: float | None = chz.field(
        default=None, doc="validation loss to compare at; none: the study's"
    )
    window: Window | None = chz.field(
        default=None, doc="main rank window, at width 768; none: the study's"
    )
    tokens: int | None = chz.field(
        default=None, doc="token budget of an early exponent; none: the study's"
    )
    progress: float = chz.field(
        default=0.2, doc="share of a run, for the published alignment that knows its length"
    )
    rung: str | None = chz.field(default=None, doc="rung of figures of one rung; none: theirs")
    batch: int | None = chz.field(default=None, doc="batch of figures of one batch; none: theirs")
    tolerance: float | None = chz.field(
        default=None, doc="greatest distance of a row from a matched loss; none: the study's"
    )

    @chz.validate
    def _ranges(self):
        if self.window is not None:
            check_window(self.window)
        if not 0 < self.progress <= 1:
            raise ValueError(f"progress={self.progress}: give a share above 0 and up to 1")
        for key in ("target", "tokens", "batch", "tolerance"):
            value = getattr(self, key)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{key}={value}: give a positive number")


PUBLISHED_TOLERANCE = 0.005
"""Of a matched loss, where the study names none (protocol spec 1.12)."""


def target_of(study: Study, options: Options) -> float:
    """The loss at which runs are compared; raises Missing where neither names one."""
    target = options.target or study.target_loss
    if target is None:
        raise Missing("a target loss: the study has none, so give target=")
    return target


def resolved(study: Study, options: Options) -> Options:
    """The options with the study's window where none was asked for; figures read it as it is."""
    return chz.replace(options, window=window_of(study, options.window))


def check_target(study: Study, options: Options) -> None:
    """Raises UsageError for a target below the loss at which runs stopped, for they end above it.

    To rank them as if they had failed would put those first that were the last to be cut off.
    """
    target = options.target
    if target is None:
        return
    stopped = [run for run in study.chosen if run.reached and not np.any(run.val["loss"] < target)]
    if stopped:
        least = max(run.config["target_loss"] for run in stopped)
        raise UsageError(
            f"target={target:g}: {len(stopped)} of {len(study.chosen)} runs stopped below loss "
            f"{least:g} and never came so low; give target={least:g} or more"
        )


def narrowed(study: Study, options: Options, keep: Callable[[Run], bool]) -> Study:
    """The study with the runs that `keep` accepts, its target and tolerance those asked for.

    What tests a whole study takes them from its config. Raises Missing without a target.
    """
    asked = {
        "target_loss": target_of(study, options),
        "match_tolerance": tolerance_of(study, options),
    }
    runs = tuple(run for run in study.runs if keep(run))
    return replace(study, runs=runs, config={**study.config, **asked})


def of_tiers(study: Study, options: Options, tiers: Sequence[str]) -> Study:
    """The study with the runs of some tiers, as `narrowed`."""
    return narrowed(study, options, lambda run: run.cell.tier in tiers)


def tokens_of(study: Study, options: Options) -> int:
    """The token budget of an early exponent; raises Missing where neither names one."""
    tokens = options.tokens or study.config.get("early_tokens")
    if tokens is None:
        raise Missing("a token budget: the study has no early_tokens, so give tokens=")
    return int(tokens)


def tolerance_of(study: Study, options: Options) -> float:
    """How far a row may be off a matched loss."""
    own = options.tolerance or study.config.get("match_tolerance")
    return PUBLISHED_TOLERANCE if own is None else float(own)
