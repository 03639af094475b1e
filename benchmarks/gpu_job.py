"""What the sections of the first GPU measurement share: sizes, and a record of what they found."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

ABSENT = "not on this device"


class Shapes(NamedTuple):
    """Sizes of everything that is measured; of attention, windows and mask blocks in tokens.

    average_window: the one at which a query sees as many keys as in the mean over a ramp to 1,792.
    sweep: launches of a flash kernel, as "kernel QUERIESxKEYS/warps/stages". batch_s: seconds of
    calls that are timed as one. call_limit_s, step_limit_s: of one timing, warm-up apart. judged:
    whether the goals mean anything at these sizes. run: words of every training step.
    """

    tokens: int
    width: int
    vocab: int
    cube: int
    heads: int
    head_dim: int
    layers: int
    block: int
    windows: tuple[int, ...]
    sweep_window: int
    sweep: tuple[str, ...]
    short_row: int
    check_length: int
    chunks: tuple[int, ...]
    eigen: tuple[int, ...]
    eigen_batch: tuple[int, int]
    average_window: int
    repeats: int
    batch_s: float
    call_limit_s: float
    step_limit_s: float
    judged: bool
    run: Mapping[str, str]


PAPER = Shapes(
    tokens=65_536,
    width=768,
    vocab=50_304,
    cube=8192,
    heads=6,
    head_dim=128,
    layers=12,
    block=128,
    windows=(1024, 768, 512, 128, 1792),
    sweep_window=1024,
    sweep=(
        "forward 128x64/8/3",
        "forward 128x128/8/2",
        "forward 64x64/4/2",
        "dkv 64x128/8/2",
        "dkv 64x64/4/2",
    ),
    short_row=1024,
    check_length=2048,
    chunks=(2048, 8192, 65_536),
    eigen=(512, 768, 1280, 1600, 3072),
    eigen_batch=(12, 768),
    average_window=768,
    repeats=10,
    batch_s=0.05,
    call_limit_s=3.0,
    step_limit_s=30.0,
    judged=True,
    run={"profile": "paper"},
)
TINY = Shapes(
    tokens=256,
    width=32,
    vocab=64,
    cube=64,
    heads=2,
    head_dim=16,
    layers=2,
    block=16,
    windows=(64, 32),
    sweep_window=64,
    sweep=("dkv 64x64/4/2",),
    short_row=32,
    check_length=96,
    chunks=(64, 256),
    eigen=(16, 24),
    eigen_batch=(2, 16),
    average_window=40,
    repeats=2,
    batch_s=0.0,
    call_limit_s=1.0,
    step_limit_s=1.0,
    judged=False,
    run={
        "profile": "laptop",
        "size.n_layer": "2",
        "size.n_head": "2",
        "size.n_embd": "32",
        "size.block": "8",
        "size.short_row": "16",
        "size.long_row": "32",
        "size.vocab_size": "64",
        "data.val_tokens": "32",
        "probes.window": "16",
        "probes.matrices": "mlp.c_proj",
    },
)
SIZES = {"paper": PAPER, "tiny": TINY}


class Job:
    """One section at work: `found` is its part of the document, saved as it grows.

    size: a key of SIZES. budget_s: seconds after which no more entries are begun. rungs: those
    of whole steps. save() writes the document.
    """

    def __init__(
        self, size: str, budget_s: float, rungs: tuple[str, ...], save: Callable[[], None]
    ):
        self.shapes, self.budget_s, self.rungs, self._save = SIZES[size], budget_s, rungs, save
        self._began = time.monotonic()
        self.found: dict[str, Any] = {"entries": {}, "goals": {}, "skipped": [], "failures": []}

    def measure(self, name: str, function: Callable[..., Any], *arguments) -> None:
        """Keep what function(*arguments) returns as the entry `name`, or the line of its error.

        A dict with a key "wrong" is kept too, and that line counts among the failures.
        """
        if self.found["entries"] and time.monotonic() - self._began > self.budget_s:
            self.found["skipped"].append(name)
            say(f"  {name}: no time left")
            return
        try:
            entry = plain(function(*arguments))
        except Exception as error:
            entry = {"error": one_line(error)}
        if isinstance(entry, dict):
            wrongs = (entry[key] for key in ("error", "wrong") if key in entry)
            self.found["failures"] += [f"{name}: {line}" for line in wrongs]
        self.found["entries"][name] = entry
        say(f"  {name}: {headline(entry)}")
        self._save()

    def goal(self, name: str, measured: float | None, must: float, goal: float) -> None:
        """Hold a number, the smaller the better, against a goal; nothing to hold where None."""
        if measured is not None and self.shapes.judged:
            verdict = "goal" if measured <= goal else "must" if measured <= must else "missed"
            row = {"measured": measured, "must": must, "goal": goal, "verdict": verdict}
            self.found["goals"][name] = row
            say(f"  {name}: {measured:.4g}, must {must:g}, goal {goal:g}: {verdict}")

    def close(self) -> None:
        """The section has ended."""
        self.found["seconds"] = time.monotonic() - self._began


def plain(value: Any) -> Any:
    """A value as strict JSON holds it: arrays of one number too; infinities and NaN as words."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def one_line(error: BaseException) -> str:
    """An error by its type and the first line of its message."""
    message = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {message[0][:300]}"


def headline(entry: Any) -> str:
    """The numbers at the top of an entry, or its error, for a progress line."""
    if not isinstance(entry, dict):
        return str(entry)
    if "error" in entry:
        return entry["error"]
    numbers = {key: value for key, value in entry.items() if isinstance(value, float)}
    return ", ".join(f"{key} {value:.4g}" for key, value in numbers.items())


def say(line: str) -> None:
    """A progress line."""
    print(line, flush=True)
