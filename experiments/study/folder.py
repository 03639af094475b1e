"""The folder of a study: one writer, one configuration, and the rates that were selected.

config.json  selected.json  pruned.json  runs/  logs/  compiled/  table.csv  figures/  report.html
"""

from pathlib import Path

from experiments.study.grid import Study
from models.claimed_folder import ClaimedFolder
from models.command_line import flatten

FREE = (
    *("preset", "rungs", "tiers", "batches", "seeds", "more"),
    *("launcher", "workers", "figures", "out"),
)
"""Keys that a study may change when it goes on: they add members, or say where they train."""


class StudyFolder(ClaimedFolder):
    """Opened by one study at a time; use it as a context manager."""

    def __init__(self, study: Study):
        own = {key: v for key, v in flatten(study.config).items() if not key.startswith("slurm.")}
        document = own | {
            "words": dict(sorted(study.words.items())),
            "target_loss": study.target_loss,
        }
        super().__init__(Path(study.out).expanduser(), document, FREE, own=("runs",))
        self.runs, self.logs = self.path / "runs", self.path / "logs"
        self.compiled = self.path / "compiled"

    def __enter__(self) -> "StudyFolder":
        super().__enter__()
        self.runs.mkdir(exist_ok=True)
        return self

    @property
    def selected(self) -> dict:
        """What was selected, by the name of a cell."""
        return self.kept("selected.json")

    def add_selected(self, found: dict) -> None:
        """Keeps what a search has selected."""
        self.keep_more("selected.json", found)

    @property
    def pruned(self) -> dict:
        """Why runs were given up, by the name of a family."""
        return self.kept("pruned.json")

    def add_pruned(self, found: dict) -> None:
        """Keeps what was given up."""
        self.keep_more("pruned.json", found)
