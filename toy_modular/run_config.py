"""One run of the toy study as data, readable without importing jax.

A run is a task, a model, an optimizer, a batch size, a seed and a rate. Learning rates of
`optim` are multiples of `lr`, so that a search varies one number.
"""

from collections.abc import Mapping
from typing import Any, Literal

import chz

from models.command_line import Layer, build, flatten
from models.config import ArchConfig, SizeConfig
from optim.config import OptimConfig
from toy_modular.config import BandedConfig, GrokConfig, RffConfig

TORCH_BETAS = (0.9, 0.999)


@chz.chz
class MeasureConfig:
    """When and on what a run is measured (toy spec section 4)."""

    per_doubling: int = chz.field(
        default=2, doc="measurements while the tokens seen double; 0: none at all"
    )
    levels: tuple[float, ...] = chz.field(
        default=(), doc="validation losses at whose first crossing a run is measured too"
    )
    rows: int = chz.field(default=1024, doc="training sequences of the activation spectra, fixed")
    samples: int = chz.field(default=64, doc="how many of them, the first, give gradients")
    chunk: int = chz.field(default=192, doc="sequences in one pass over the others")
    bands: tuple[str, ...] = chz.field(
        default=(), doc="bands c:o whose states are probed, such as 97:200"
    )
    walks: int = chz.field(
        default=30_000, doc="most walks of a band, all of either published one; more are thinned"
    )
    bands_every: int = chz.field(default=1, doc="every how many measurements bands are probed too")

    @chz.validate
    def _ranges(self):
        for name in ("rows", "samples", "chunk", "walks", "bands_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"measure.{name}={getattr(self, name)}: give at least 1")
        if self.per_doubling < 0:
            raise ValueError(f"measure.per_doubling={self.per_doubling}: give 0 or more")
        if self.samples > self.rows:
            raise ValueError(
                f"measure.samples={self.samples} of measure.rows={self.rows}: give at most the rows"
            )
        if (self.rows - self.samples) % self.chunk:
            raise ValueError(
                f"measure.chunk={self.chunk} does not divide the {self.rows - self.samples} rows "
                f"beyond measure.samples={self.samples}; give a divisor"
            )
        for band in self.bands:
            parts = band.split(":")
            if len(parts) != 2 or not all(part.isdigit() for part in parts):
                raise ValueError(f"measure.bands: {band!r} is no band; give modulus:offset, 97:200")


@chz.chz
class RunConfig:
    """Everything that decides a run's numbers. Defaults are those of the published toy."""

    task: Literal["banded", "grok", "rff"] = chz.field(
        default="banded", doc="walks in bands, one operation modulo p, or random Fourier features"
    )
    banded: BandedConfig = chz.field(default_factory=BandedConfig)
    grok: GrokConfig = chz.field(default_factory=GrokConfig)
    rff: RffConfig = chz.field(default_factory=RffConfig)
    stage: str = chz.field(default="baseline", doc="its name in records")
    arch: ArchConfig = chz.field(default_factory=ArchConfig)
    size: SizeConfig = chz.field(default_factory=SizeConfig)
    optim: OptimConfig = chz.field(default_factory=OptimConfig)
    embed_std: float = chz.field(default=1.0, doc="initial standard deviation of the embedding")
    batch: int | None = chz.field(default=128, doc="sequences a step; none: all of them")
    seed: int = 0
    lr: float = chz.field(default=6e-4, doc="rate; those of optim are multiples of it")
    max_steps: int = chz.field(default=5000, doc="steps after which a run ends, target or not")
    target_loss: float | None = chz.field(default=2.0, doc="validation loss that ends a run")
    target_accuracy: float | None = chz.field(
        default=None, doc="validation accuracy that ends a run, where the task has one"
    )
    eval_every: int = chz.field(default=10, doc="steps in a dispatch, after which val is looked at")
    eval_rows: int = chz.field(
        default=512, doc="validation sequences looked at then; a target is confirmed on all"
    )
    measure: MeasureConfig = chz.field(default_factory=MeasureConfig)

    @chz.validate
    def _ranges(self):
        for name in ("max_steps", "eval_every", "eval_rows", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: give at least 1")
        if self.max_steps % self.eval_every:
            raise ValueError(
                f"max_steps={self.max_steps} is no multiple of eval_every={self.eval_every}; "
                f"give a multiple"
            )
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: give 0 or more")
        for name in ("lr", "embed_std"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}: give a positive finite number")
        if self.target_loss is not None and not 0 < self.target_loss < float("inf"):
            raise ValueError(f"target_loss={self.target_loss}: give a positive loss, or none")
        if self.target_accuracy is not None and not 0 < self.target_accuracy <= 1:
            raise ValueError(
                f"target_accuracy={self.target_accuracy}: give a share up to 1, or none"
            )
        if self.target_accuracy is not None and self.task != "grok":
            raise ValueError(
                f"target_accuracy={self.target_accuracy} with task={self.task}: only task=grok has "
                f"an accuracy; give target_loss"
            )
        if not all(0 < level < float("inf") for level in self.measure.levels):
            raise ValueError(f"measure.levels={self.measure.levels}: give positive losses")
        rows = self.train_rows
        if self.batch is not None and self.batch > rows:
            raise ValueError(
                f"batch={self.batch} is larger than the {rows} training sequences; give at most "
                f"as many"
            )
        if self.measure.per_doubling and self.measure.rows > rows:
            raise ValueError(
                f"measure.rows={self.measure.rows} is more than the {rows} training sequences; "
                f"give at most as many"
            )

    @property
    def train_rows(self) -> int:
        """Training sequences of the task."""
        return getattr(self, self.task).train

    @property
    def tokens_per_step(self) -> int:
        """Positions with a target of their own in a step."""
        rows = self.train_rows if self.batch is None else self.batch
        return rows * {"banded": self.banded.seq_len, "grok": 1, "rff": 1}[self.task]


def nested(config: Any) -> dict:
    """A configuration as nested dictionaries of JSON values."""
    tree: dict = {}
    for key, value in flatten(config).items():
        *above, name = key.split(".")
        place = tree
        for part in above:
            place = place.setdefault(part, {})
        place[name] = value
    return tree


def from_nested(tree: Mapping[str, Any]) -> RunConfig:
    """A configuration from nested dictionaries of JSON values, as a member's config.json has it."""

    def flat(tree, prefix=""):
        for key, value in tree.items():
            if isinstance(value, Mapping):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield prefix + key, tuple(value) if isinstance(value, list) else value

    return build(RunConfig, [Layer("stored", dict(flat(tree)))])[0]
