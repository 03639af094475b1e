"""The folder of a study: one writer, one configuration, and the rates that were selected.

config.json  selected.json  search/  runs/  table.csv  figures/  compiled/
"""

from pathlib import Path

from models.claimed_folder import ClaimedFolder
from toy_modular.run_config import nested
from toy_modular.study_config import Study

FREE = (
    *("engine", "figures", "out", "stages", "batches", "seeds"),
    *("side_stages", "side_batches", "side_seeds"),
)
"""Keys that a study may change when it goes on: they add members, or say how to train them."""


class StudyFolder(ClaimedFolder):
    """Opened for one study at a time; use it as a context manager."""

    def __init__(self, study: Study):
        out = study.config.out
        out = f"runs/toy_{study.name}" if out == "auto" else out
        typed = {k: study.typed[k] for k in sorted(study.typed)}
        document = {**nested(study.config), "run": typed}
        super().__init__(Path(out).expanduser(), document, FREE, flat=_flat)

    @property
    def selected(self) -> dict:
        """What was selected, by the name of a kind."""
        return self.kept("selected.json")

    def add_selected(self, found: dict) -> None:
        """Keeps what a search has selected."""
        self.keep_more("selected.json", found)


def _flat(document: dict) -> dict:
    """Keys of the study and what was typed of its runs, as one."""
    return {k: v for k, v in document.items() if k != "run"} | document.get("run", {})
