"""One task of a Slurm array: become the training process of a line of the task list.

python -m experiments.study.slurm_task LIST NUMBER
"""

import json
import os
import sys
from pathlib import Path

from models.command_line import UsageError, run_command


def main(argv: list[str]) -> int:
    """Replaces this process; returns only for --help. Raises UsageError on bad words."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    if len(argv) != 2 or not argv[1].isdecimal():
        raise UsageError(f"give LIST and NUMBER, not {' '.join(argv) or 'nothing'}")
    os.execv(sys.executable, [sys.executable, "-m", "experiments.train", *task_words(*argv)])  # noqa: S606


def task_words(path: str, number: str) -> list[str]:
    """The words of a line of a task list; raises UsageError where it has none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        words = json.loads(lines[int(number)])
    except (OSError, ValueError, IndexError) as error:
        raise UsageError(f"{path}: no task {number} in it ({error})") from error
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UsageError(f"{path}: task {number} is no list of words")
    return words


if __name__ == "__main__":
    run_command(main)
