"""A study of the toy as data, and the members it consists of; readable without importing jax.

Precedence, whatever the order typed: defaults < stage < profile < typed keys.
"""

from collections.abc import Mapping
from itertools import product
from typing import Any, Literal, NamedTuple

import chz

from models.command_line import (
    Layer,
    UsageError,
    build,
    cast_words,
    check_path,
    flatten,
    leaves,
    parse_words,
)
from toy_modular.presets import GROK, GROK_PUBLISHED, RFF, RFF_PUBLISHED
from toy_modular.published import RUNS
from toy_modular.run_config import RunConfig
from toy_modular.stages import CELLS, CORE, check_stages, stage_values
from toy_modular.workers import Engine

PROFILES: dict[str, dict[str, Any]] = {
    "paper": {
        "rates": "published",
        "batches": (32, 128, 512),
        "seeds": (0,),
        "stages": CORE,
        "measure.bands": (
            *("97:200", "179:50", "96:200", "98:200", "99:200"),
            *("12:3", "30:5"),
        ),
        "measure.bands_every": 3,
        "measure.levels": (5.0, 4.0, 3.0, 2.5),
    },
    "laptop": {
        "base_rate": 2.4e-3,
        "multipliers": (1.0, 2.0, 4.0),
        "stages": ("muon", "untied"),
        "side_stages": ("baseline", "rope"),
        "batches": (32, 64, 128, 256, 512),
        "seeds": (0, 1, 2),
        "sequences": 2**17,
        "eval_sequences": 2**10,
        "target_loss": 3.0,
        "banded.vocab_size": 256,
        "banded.seq_len": 32,
        "size.n_embd": 64,
        "measure.bands": ("37:60", "36:60", "12:3"),
        "measure.levels": (5.0, 4.5, 4.0, 3.5),
    },
}
"""What the published toy has, and a reduced tier that is ten times cheaper a sequence.

Searches of the reduced tier from the published base_rate of 3e-4, and from 1.2e-3, ended at or
beyond the upper edge in most kinds, so its own begins higher. Batch sizes are compared at equal
tokens: validation, measurements and the end of a run come after equal numbers of sequences, not of
steps.
"""


def _least(given: int | tuple[int, ...]) -> int:
    return min(given) if isinstance(given, tuple) else given


@chz.chz
class StudyConfig:
    """Which members a study has, and how they are trained."""

    profile: Literal["laptop", "paper"] = chz.field(
        default="laptop", doc="a reduced tier for two cores, or the published sizes"
    )
    stages: tuple[str, ...] = chz.field(
        default=CORE, doc="stages of the ladder; cells: all cells of the factorial"
    )
    batches: tuple[int, ...] = chz.field(default=(32, 128, 512), doc="sequences a step")
    seeds: tuple[int, ...] = chz.field(default=(0,), doc="of data, weights and batches alike")
    side_stages: tuple[str, ...] = chz.field(
        default=(), doc="stages to stand beside, at side_batches and side_seeds only"
    )
    side_batches: tuple[int, ...] = chz.field(default=(128,), doc="sequences a step of side_stages")
    side_seeds: tuple[int, ...] = chz.field(default=(0,), doc="seeds of side_stages")
    sequences: int | None = chz.field(
        default=None, doc="longest run in sequences, whatever the batch size; none: max_steps"
    )
    eval_sequences: int | None = chz.field(
        default=None, doc="sequences from one validation to the next; none: eval_every steps"
    )
    rates: Literal["search", "published"] | float = chz.field(
        default="search", doc="learning rates: searched, those the authors selected, or one number"
    )
    multipliers: tuple[float, ...] = chz.field(
        default=(0.5, 1.0, 2.0, 4.0),
        doc="rates tried at batch B, in units of base_rate (B / 32)^0.5",
    )
    base_rate: float = chz.field(default=3e-4, doc="rate at batch 32 that multipliers multiply")
    search_seed: int = chz.field(default=0, doc="seed of the search; all seeds take its rate")
    engine: Engine = chz.field(
        default="auto",
        doc="a process a core, all members of a kind together in one program, or one by one; auto: "
        "processes on a CPU, together on an accelerator",
    )
    figures: bool = chz.field(default=True, doc="draw all figures at the end")
    out: str = chz.field(default="auto", doc="folder of the study; auto: runs/toy_[task_]<profile>")

    @chz.validate
    def _ranges(self):
        for name in ("stages", "batches", "seeds", "side_batches", "side_seeds", "multipliers"):
            if not getattr(self, name):
                raise ValueError(f"{name}=: give at least one")
        for name in ("batches", "side_batches", "sequences", "eval_sequences"):
            given = getattr(self, name)
            if given is not None and _least(given) < 1:
                raise ValueError(f"{name}={given}: give at least 1 sequence")
        for name in ("seeds", "side_seeds", "search_seed"):
            if _least(getattr(self, name)) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: give 0 or more")
        rates = (*self.multipliers, self.base_rate)
        rates += (self.rates,) if isinstance(self.rates, float) else ()
        if not all(0 < rate < float("inf") for rate in rates):
            raise ValueError(f"rates={self.rates}, multipliers={self.multipliers}: give positive")
        check_path("out", self.out)


def expand_stages(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names with those of all cells in place of `cells`."""
    cells = tuple(cell.name for cell in CELLS)
    return tuple(n for name in names for n in (cells if name == "cells" else (name,)))


class Kind(NamedTuple):
    """Members that differ in seed and rate only."""

    stage: str
    batch: int | None

    @property
    def name(self) -> str:
        return self.stage if self.batch is None else f"{self.stage}-b{self.batch}"


class Study(NamedTuple):
    """A resolved study. typed: what was typed of the keys of a run."""

    config: StudyConfig
    typed: Mapping[str, Any]

    @property
    def task(self) -> str:
        """The task of all its runs."""
        return self.typed.get("task", "banded")

    @property
    def name(self) -> str:
        """What its folder is called by default."""
        parts = [] if self.task == "banded" else [self.task]
        return "_".join([*parts, self.config.profile])

    def kinds(self) -> list[Kind]:
        """All kinds, in the order of stages, then batches; the side stages come last."""
        return list(self._seeds())

    def seeds(self, kind: Kind) -> tuple[int, ...]:
        """The seeds of a kind."""
        return self._seeds()[kind]

    def _seeds(self) -> dict[Kind, tuple[int, ...]]:
        config, found = self.config, {}
        if self.task != "banded":
            return {Kind(self.task, None): config.seeds}
        for names, batches, seeds in (
            (config.stages, config.batches, config.seeds),
            (config.side_stages, config.side_batches, config.side_seeds),
        ):
            for name, batch in product(expand_stages(names), batches):
                found.setdefault(Kind(name, batch), seeds)
        return found

    def member(self, kind: Kind, seed: int, lr: float) -> RunConfig:
        """The run of a kind at a seed and a rate. Raises UsageError where values do not fit."""
        if self.task != "banded":
            preset = Layer(f"task={self.task}", PRESETS[self.task][self.config.profile])
            member = Layer("member", {"seed": seed, "lr": lr})
            return build(RunConfig, [preset, Layer("typed", self.typed), member])[0]
        profile = {k: v for k, v in PROFILES[self.config.profile].items() if k in _RUN_KEYS}
        layers = [
            Layer(f"stage={kind.stage}", stage_values(kind.stage)),
            Layer(f"profile={self.config.profile}", profile),
            Layer("sequences", self._lengths(kind)),
            Layer("typed", self.typed),
            Layer("member", {"batch": kind.batch, "seed": seed, "lr": lr}),
        ]
        config, _ = build(RunConfig, layers)
        laws = config.banded
        sized = {
            "size.vocab_size": laws.vocab_size,
            "size.short_row": laws.seq_len,
            "size.long_row": laws.seq_len,
        }
        config, _ = build(RunConfig, [*layers, Layer("task", sized)])
        _check_bands(config)
        return config

    def _lengths(self, kind: Kind) -> dict[str, int]:
        """Steps of a kind between validations and in all, where they are given in sequences."""
        found, config = {}, self.config
        steps = self.typed.get("eval_every", 1)
        if config.eval_sequences is not None and "eval_every" not in self.typed:
            steps = found["eval_every"] = max(1, config.eval_sequences // kind.batch)
        if config.sequences is not None:
            found["max_steps"] = max(1, config.sequences // kind.batch // steps) * steps
        return found

    def candidates(self, kind: Kind) -> list[float]:
        """Rates to try for a kind, ascending; a single one where there is nothing to search."""
        config = self.config
        if config.rates == "published" and self.task == "banded":
            known = RUNS.get(kind)
            if known is None:
                raise UsageError(
                    f"rates=published: none is for stage {kind.stage} at batch {kind.batch}; "
                    f"give rates=search, or a number"
                )
            return [known.lr]
        if isinstance(config.rates, float):
            return [config.rates]
        if self.task != "banded":
            return [PRESETS[self.task][config.profile]["lr"]]
        centre = config.base_rate * (kind.batch / 32) ** 0.5
        return sorted({float(f"{centre * factor:.4g}") for factor in config.multipliers})


OF_WALKS = (
    *("stages", "batches", "side_stages", "side_batches", "side_seeds"),
    *("sequences", "eval_sequences", "multipliers", "base_rate", "search_seed"),
    *("measure.bands", "measure.walks"),
)
"""Keys of walks in bands alone, beside those that begin with the name of the task."""
PRESETS = {
    "grok": {"laptop": GROK, "paper": GROK_PUBLISHED},
    "rff": {"laptop": RFF, "paper": RFF_PUBLISHED},
}
_RUN_KEYS = frozenset(leaves(RunConfig)) - {
    *("stage", "batch", "seed", "lr"),
    *("size.vocab_size", "size.short_row", "size.long_row"),
}
"""Keys of a run that may be typed; the others vary within a study, or follow from the task."""


def known_keys() -> dict:
    """Every key of the command: those of the study and those of its runs."""
    return leaves(StudyConfig) | {k: v for k, v in leaves(RunConfig).items() if k in _RUN_KEYS}


def help_values(arguments: list[str]) -> tuple[dict[str, Any], dict]:
    """The value every key would have, of a run by the first stage that is asked for, and the keys.

    The keys are those that the task takes.
    """
    words = [word for word in arguments if "=" in word]
    study = resolve(parse_words(words))
    kind = study.kinds()[0]
    shown = flatten(study.member(kind, 0, study.candidates(kind)[0]))
    keys = {key: leaf for key, leaf in known_keys().items() if _owner(key) in (None, study.task)}
    return shown | flatten(study.config), keys


def _owner(key: str) -> str | None:
    """The one task that takes a key; None: all do."""
    if key in OF_WALKS:
        return "banded"
    section, dot, _ = key.partition(".")
    return section if dot and section in ("banded", *PRESETS) else None


def resolve(words: Mapping[str, str]) -> Study:
    """The study that typed words ask for. Raises UsageError with one line for what is wrong."""
    typed = cast_words(StudyConfig, words, known_keys())
    of_study = leaves(StudyConfig).keys()
    profile = typed.get("profile", StudyConfig().profile)
    task = typed.get("task", "banded")
    _refuse_misplaced(task, words, typed)
    profile_values = PROFILES.get(profile, {}) if task == "banded" else {}
    layers = [
        Layer(
            f"profile={profile}",
            {k: v for k, v in profile_values.items() if k in of_study},
        ),
        Layer("typed", {k: v for k, v in typed.items() if k in of_study}),
    ]
    config, _ = build(StudyConfig, layers)
    check_stages(expand_stages((*config.stages, *config.side_stages)))
    study = Study(config, {k: v for k, v in typed.items() if k not in of_study})
    for kind in study.kinds():
        study.member(kind, 0, study.candidates(kind)[0])
    return study


def _refuse_misplaced(task: str, words: Mapping[str, str], typed: Mapping[str, Any]) -> None:
    """Refuses what would change nothing: keys of another task, a search where there is none."""
    for key in typed:
        owner = _owner(key)
        if owner not in (None, task):
            raise UsageError(
                f"{key}={words[key]} with task={task}: it is a key of task={owner}; leave it out"
            )
    if task != "banded" and isinstance(typed.get("rates"), str):
        raise UsageError(f"rates={words['rates']} with task={task}: give a number, or leave it out")


def _check_bands(config: RunConfig) -> None:
    """Refuses bands outside the vocabulary, or larger than measure.walks, before training."""
    for text in config.measure.bands:
        c, o = (int(part) for part in text.split(":"))
        if c < 2 or o + c > config.banded.vocab_size:
            raise UsageError(
                f"measure.bands={text}: the band leaves the vocabulary of "
                f"{config.banded.vocab_size} tokens; give modulus:offset with modulus from 2 on "
                f"and a sum of at most that"
            )
        if config.measure.walks < c:
            raise UsageError(
                f"measure.walks={config.measure.walks}: band {text} has {c} phases; give as many"
            )
