"""What ends a run before its time: a signal, a number that is not finite, or a full disk."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments.checkpoint_damage import reason
from models.command_line import UsageError


class NotFinite(Exception):
    """A loss or gradient that is not finite; raised before that step updates or saves anything."""

    def __init__(self, kind: str, step: int, numbers: dict[str, float]):
        spelled = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        super().__init__(f"not finite at {kind} step {step}: {spelled}")
        self.kind, self.step, self.numbers = kind, step, numbers


@contextmanager
def failed_record_in_one_line(folder: Path) -> Iterator[None]:
    """A UsageError in place of what a RecordWriter of `folder` raises when it cannot write.

    Enter it before the writer, whose last error comes when it is closed.
    """
    try:
        yield
    except OSError as error:
        # the writer's thread notes on what it raises which step it was about
        about = [note for note in getattr(error, "__notes__", ()) if note.startswith("while ")]
        if not about:
            raise
        raise UsageError(
            f"cannot write in {folder}: {reason(error)}, {about[0]}; free some space and resume"
        ) from error


class Interrupt:
    """Turns SIGINT and SIGTERM into a number that the loop reads between steps.

    A second Ctrl-C ends the process at once, as if there were no handler: a step, or a program that
    compiles, would hold up any other. A run can go on after that as after a kill.
    """

    def __init__(self):
        self.received: int | None = None

    def __enter__(self) -> "Interrupt":
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        del frame
        self.received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if sys.stdout.isatty():  # the live line has hidden the cursor
                os.write(sys.stdout.fileno(), b"\x1b[?25h")
