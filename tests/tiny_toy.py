"""The toy at a size that trains in seconds: 64 tokens, walks of 16, width 16."""

from pathlib import Path

from toy_modular import training
from toy_modular.run_config import RunConfig
from toy_modular.study_config import Kind, resolve

WORDS = {
    "banded.vocab_size": "64",
    "banded.seq_len": "16",
    "banded.train": "256",
    "banded.val": "64",
    "banded.test": "64",
    "size.n_embd": "16",
    "size.n_head": "2",
    "eval_rows": "32",
    "eval_every": "2",
    "max_steps": "8",
    "measure.rows": "32",
    "measure.samples": "8",
    "measure.chunk": "8",
    "measure.bands": "12:3,7:20",
    "measure.levels": "4",
    "batches": "4",
    "sequences": "none",
    "eval_sequences": "none",
    "side_stages": "",
    "seeds": "0",
    "target_loss": "2",
    "rates": "1e-3",
}


def tiny_study(out: Path | str, **words):
    """A resolved tiny study; keys with dots are written with two underscores."""
    typed = {key.replace("__", "."): str(value) for key, value in words.items()}
    return resolve(WORDS | {"out": str(out)} | typed)


def tiny_member(stage: str = "untied", seed: int = 0, lr: float = 1e-3, **words) -> RunConfig:
    """A member of the tiny study at its batch size of 4."""
    study = tiny_study("none", stages=stage, **words)
    return study.member(Kind(stage, study.config.batches[0]), seed, lr)


def record_dispatches(monkeypatch) -> list[int]:
    """The steps at which dispatches ended, of the first of the members that train in this process.

    Training is deterministic, so a run that began anew looks like one that went on but for these.
    """
    steps, advance = [], training._Runs.advance

    def counted(runs, until):
        if went_on := advance(runs, until):
            steps.append(runs.steps[0])
        return went_on

    monkeypatch.setattr(training._Runs, "advance", counted)
    return steps
