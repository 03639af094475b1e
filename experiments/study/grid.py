"""A study as data: which members it has, and the words that train each of them. No jax.

A member is a rung at a tier, a batch and a seed; its learning rate is one multiplier on the
published rates of all groups. Precedence, whatever the order typed: defaults < preset < typed keys.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Literal, NamedTuple

import chz

from experiments.config import RunConfig
from experiments.rank_windows import MAIN_WINDOW, check_window
from experiments.resolve import own_words, resolve_here, run_name
from experiments.study.presets import PRESETS
from experiments.study.rates import rounded, transferred
from experiments.study.slurm import SlurmConfig
from experiments.study_records import Cell
from models.command_line import Layer, UsageError, build, check_path
from models.config import TIERS
from models.ladder import ALL_RUNGS

_MEMBER = re.compile(r"(?P<rung>\w+)-(?P<tier>d\d+)-b(?P<batch>\d+)-s(?P<seed>\d+)")
OF_THE_GRID = ("rung", "tier", "batch", "seed", "optim.lr_scale", "pause_tokens", "resume")
LIST_KEYS = {"rung": "rungs", "tier": "tiers", "batch": "batches", "seed": "seeds"}


@chz.chz
class StudyConfig:
    """Which members a study has, how their rates are found, and what its tests will look at."""

    preset: Literal[tuple(PRESETS)] = chz.field(
        default="laptop", doc="a grid with a name, see experiments/study/presets.py"
    )
    rungs: tuple[str, ...] = chz.field(default=(), doc="rungs of the ladder; all: all of them")
    tiers: tuple[str, ...] = chz.field(default=("d12",), doc="sizes, among " + ", ".join(TIERS))
    batches: tuple[int, ...] = chz.field(default=(4, 8, 16, 32), doc="long rows a step")
    seeds: tuple[int, ...] = chz.field(default=(0,), doc="of initial weights and order of data")
    more: tuple[str, ...] = chz.field(
        default=(), doc="single members beside the grid, as flexwin-d12-b16-s1"
    )
    lr: Literal["search", "published"] | float = chz.field(
        default="search", doc="multiplier of each cell: searched, 1, or one number"
    )
    transfer: tuple[Literal["sqrt", "linear"], ...] = chz.field(
        default=("sqrt", "linear"), doc="laws by which a rate is carried to another batch"
    )
    factors: tuple[float, ...] = chz.field(
        default=(0.5, 0.70710678, 1.0, 1.41421356, 2.0),
        doc="tried around each of them",
    )
    lr_base: tuple[str, ...] = chz.field(
        default=(), doc="where to begin instead of 1, at the reference batch, as baseline:8"
    )
    rung_tokens: tuple[int, ...] = chz.field(
        default=(50_000_000, 150_000_000, 500_000_000),
        doc="tokens after which all but the best trials of a cell are given up",
    )
    eta: int = chz.field(default=3, doc="one trial in so many goes on, at least one")
    beyond: int = chz.field(
        default=0, doc="how often a best rate at an end of its grid is tried against the next one"
    )
    search_seed: int = chz.field(default=0, doc="seed of the trials; all seeds take their rate")
    early_tokens: int = chz.field(
        default=250_000_000, doc="tokens at which efficiency is predicted, the primary test's"
    )
    window: tuple[int, int] = chz.field(
        default=MAIN_WINDOW, doc="rank window of the primary test, at width 768, last layer"
    )
    match_tolerance: float = chz.field(
        default=0.005, doc="greatest distance in validation loss of states called matched"
    )
    prune: Literal["none", "alpha", "loss"] = chz.field(
        default="none",
        doc="give up all but the best batches of a family at early_tokens, by this; seeds' mean",
    )
    keep: int = chz.field(default=2, doc="batches of a family that prune leaves, all their seeds")
    launcher: Literal["local", "slurm"] = chz.field(
        default="local", doc="processes on this machine, or an sbatch array"
    )
    workers: int | Literal["auto"] = chz.field(
        default="auto",
        doc="runs side by side, a share of cores and GPUs each; auto: one a core, or GPU",
    )
    figures: bool = chz.field(default=True, doc="draw figures and report at the end")
    out: str = chz.field(default="auto", doc="folder of the study; auto: runs/study_<preset>")
    slurm: SlurmConfig = chz.field(default_factory=SlurmConfig)

    @chz.validate
    def _ranges(self):
        for name in ("tiers", "batches", "seeds", "transfer", "factors", "rung_tokens"):
            if not getattr(self, name):
                raise ValueError(f"{name}=: give at least one")
        for name in ("batches", "rung_tokens"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give 1 or more")
        for name, least in (("eta", 2), ("beyond", 0), ("keep", 1), ("early_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: give at least {least}")
        if self.workers != "auto" and self.workers < 1:
            raise ValueError(f"workers={self.workers}: give at least 1, or auto")
        if list(self.rung_tokens) != sorted(set(self.rung_tokens)):
            raise ValueError(f"rung_tokens={self.rung_tokens}: give ascending numbers of tokens")
        for rung in self.rungs:
            if rung not in (*ALL_RUNGS, "all"):
                raise ValueError(f"rungs={rung}: choose among {', '.join(ALL_RUNGS)}, or all")
        for tier in self.tiers:
            if tier not in TIERS:
                raise ValueError(f"tiers={tier}: choose among {', '.join(TIERS)}")
        if not all(0 < factor < float("inf") for factor in self.factors):
            raise ValueError(f"factors={self.factors}: give positive numbers")
        if isinstance(self.lr, float) and not 0 < self.lr < float("inf"):
            raise ValueError(f"lr={self.lr}: give a positive number, search or published")
        if not 0 < self.match_tolerance < float("inf"):
            raise ValueError(f"match_tolerance={self.match_tolerance}: give a positive loss")
        check_window(self.window)
        for text in self.more:
            parse_member(text)
        _parse_bases(self.lr_base)
        check_path("out", self.out)


class Member(NamedTuple):
    """One chosen run to be: a cell and a seed."""

    cell: Cell
    seed: int

    @property
    def name(self) -> str:
        return f"{self.cell.name}-s{self.seed}"


def parse_member(text: str) -> Member:
    """The member of that name; raises ValueError where it is none."""
    match = _MEMBER.fullmatch(text)
    if not match or match["rung"] not in ALL_RUNGS or match["tier"] not in TIERS:
        raise ValueError(f"more={text}: write rung-tier-bBATCH-sSEED, as flexwin-d12-b16-s1")
    return Member(Cell(match["rung"], match["tier"], int(match["batch"])), int(match["seed"]))


def _parse_bases(words: Iterable[str]) -> dict[str, float]:
    bases = {}
    for word in words:
        rung, colon, number = word.partition(":")
        try:
            bases[rung] = float(number)
        except ValueError:
            colon = ""
        if not colon or rung not in ALL_RUNGS or not 0 < bases[rung] < float("inf"):
            raise ValueError(f"lr_base={word}: write rung:multiplier, as baseline:8") from None
    return bases


class Study:
    """A resolved study.

    config: its own keys; words: those of a run, from the preset and as typed, without what the
    grid gives.
    """

    def __init__(self, config: StudyConfig, words: Mapping[str, str]):
        self.config, self.words = config, dict(words)

    @property
    def out(self) -> str:
        """Its folder."""
        named = self.config.out != "auto"
        return self.config.out if named else f"runs/study_{self.config.preset}"

    @cached_property
    def members(self) -> list[Member]:
        """All chosen runs to be, in the order of rungs, tiers, batches and seeds."""
        config = self.config
        rungs = ALL_RUNGS if "all" in config.rungs else config.rungs
        found = [
            Member(Cell(rung, tier, batch), seed)
            for rung in rungs
            for tier in config.tiers
            for batch in config.batches
            for seed in config.seeds
        ]
        return list(dict.fromkeys([*found, *map(parse_member, config.more)]))

    @property
    def cells(self) -> list[Cell]:
        """The cells of all members, each once."""
        return list(dict.fromkeys(member.cell for member in self.members))

    def seeds(self, cell: Cell) -> list[int]:
        """The seeds of a cell."""
        return [member.seed for member in self.members if member.cell == cell]

    def candidates(self, cell: Cell) -> list[float]:
        """Multipliers to try for a cell, ascending; one where there is nothing to search."""
        config = self.config
        if config.lr != "search":
            return [1.0 if config.lr == "published" else rounded(config.lr)]
        base = _parse_bases(config.lr_base).get(cell.rung, 1.0)
        found = transferred(cell.rung, cell.batch, config.transfer, config.factors)
        return [rounded(round(base * multiplier, 6)) for multiplier in found]

    def run_words(self, cell: Cell, seed: int, lr_scale: float) -> dict[str, str]:
        """The words of `experiments.train` for a run, without out= and pause_tokens=."""
        words = dict(self.words)
        return words | {
            "rung": cell.rung,
            "tier": cell.tier,
            "batch": str(cell.batch),
            "seed": str(seed),
            "optim.lr_scale": f"{lr_scale:.8g}",
        }

    def run_config(self, cell: Cell, seed: int, lr_scale: float) -> RunConfig:
        """The configuration of a run. Raises UsageError where the words do not fit each other."""
        return resolve_here(self.run_words(cell, seed, lr_scale))[0]

    def target(self, cell: Cell) -> float | None:
        """The validation loss at which the runs of a cell end."""
        return self.run_config(cell, 0, 1.0).target_loss

    @property
    def target_loss(self) -> float | None:
        """The validation loss at which all runs end. Raises UsageError where they differ."""
        found = {cell.rung: self.target(cell) for cell in self.cells}
        if len(set(found.values())) > 1:
            said = ", ".join(f"{rung} {target}" for rung, target in found.items())
            raise UsageError(
                f"target_loss={self.words.get('target_loss', 'published')}: it is not the same for "
                f"all rungs ({said}), and tokens to it would not compare; give one number"
            )
        return next(iter(found.values()))

    def run_name(self, cell: Cell, seed: int, lr_scale: float) -> str:
        """The name of a run's folder: it has the hash of everything that decides the run."""
        return run_name(self.run_config(cell, seed, lr_scale))


def resolve_study(argv: list[str]) -> Study:
    """The study that typed words ask for; raises UsageError with one line."""
    values, words = own_words(StudyConfig, argv)
    for key in OF_THE_GRID:
        if key in words:
            mend = f"give {LIST_KEYS[key]}=" if key in LIST_KEYS else "the study sets it itself"
            raise UsageError(f"{key}={words[key]}: {mend}")
    preset = PRESETS[values.get("preset", "laptop")]
    config, _ = build(StudyConfig, [Layer("preset", preset.study), Layer("typed", values)])
    study = Study(config, {**preset.run, **words})
    if not study.members:
        raise UsageError(preset.elsewhere or "the study has no members; give rungs=")
    for cell in study.cells:  # a mistake in any of them is answered before the first one trains
        study.run_config(cell, 0, study.candidates(cell)[0])
    _ = study.target_loss  # raises where it is not one
    return study
