"""What ends a run before its time: a signal, or a number that is not finite."""

import signal


class NotFinite(Exception):
    """A loss or gradient that is not finite; raised before that step updates or saves anything."""

    def __init__(self, kind: str, step: int, numbers: dict[str, float]):
        spelled = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        super().__init__(f"not finite at {kind} step {step}: {spelled}")
        self.kind, self.step, self.numbers = kind, step, numbers


class Interrupt:
    """Turns SIGINT and SIGTERM into a number that the loop reads between steps."""

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
