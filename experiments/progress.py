"""What a person sees while a run goes on: a live line on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable
from functools import cache

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

PLAIN_SECONDS = 10.0


def format_rate(tokens_per_second: float) -> str:
    """Tokens per second in three or four characters, `4.1k` or `512k`."""
    if tokens_per_second < 1e3:
        return f"{tokens_per_second:.0f}"
    if tokens_per_second < 1e6:
        return f"{tokens_per_second / 1e3:.{0 if tokens_per_second >= 1e5 else 1}f}k"
    return f"{tokens_per_second / 1e6:.2f}M"


def format_tokens(tokens: float) -> str:
    """A token count with a unit, `1.23M`."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:.2f}{unit}"
    return f"{tokens:.0f}"


def format_seconds(seconds: float) -> str:
    """A duration as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Display:
    """Shows the newest losses and speed of a run; use it as a context manager.

    On a terminal one line is rewritten in place; elsewhere a line is printed at every validation
    and otherwise every ten seconds. flops_at(window in mask blocks, or None) -> FLOP per token; it
    is asked only where `peak`, the devices' FLOP/s, is known.
    """

    def __init__(
        self,
        num_steps: int,
        start: int,
        flops_at: Callable[[float | None], float],
        peak: float | None,
    ):
        self._num_steps = num_steps
        self._flops_at, self._peak = cache(flops_at), peak
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._live = self._console.is_terminal
        self._began, self._start = time.monotonic(), start
        self._printed = float("-inf")
        self._val: float | None = None
        columns = (BarColumn(bar_width=20), TextColumn("{task.description}"))
        self._progress = Progress(*columns, console=self._console, disable=not self._live)
        self._task = self._progress.add_task("compiling", total=num_steps, completed=start)

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        """Print a line of its own."""
        self._console.print(text, markup=False)

    def train(self, row: dict, tokens_per_second: float | None) -> None:
        """Take in a row of kind train and the typical speed so far, None before it is known."""
        text = self._describe(row, tokens_per_second)
        self._progress.update(self._task, completed=row["step"] + 1, description=text)
        if not self._live and time.monotonic() - self._printed >= PLAIN_SECONDS:
            self._printed = time.monotonic()
            self.note(text)

    def validation(self, row: dict) -> None:
        """Take in a row of kind val."""
        self._val = row["loss"]
        tokens = format_tokens(row["tokens"])
        self.note(
            f"step {row['step']}/{self._num_steps}  {tokens} tokens  val loss {row['loss']:.4f}  "
            f"({row['seconds']:.1f} s)"
        )

    def _describe(self, row: dict, speed: float | None) -> str:
        done = row["step"] + 1
        elapsed = time.monotonic() - self._began
        left = elapsed / max(1, done - self._start) * (self._num_steps - done)
        mfu = "-"
        if self._peak and speed:
            flops = self._flops_at(row["window_blocks"])
            mfu = f"{100 * flops * speed / self._peak:.1f}%"
        val = "-" if self._val is None else f"{self._val:.3f}"
        return (
            f"step {done}/{self._num_steps}  {format_tokens(row['tokens'])} tokens  "
            f"loss {row['loss']:.3f}  val {val}  {format_rate(speed) if speed else '-'} tok/s  "
            f"ETA {format_seconds(left)}  MFU {mfu}"
        )
