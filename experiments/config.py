"""The configuration of a run: typed fields and every check on them.

The defaults are the published d12 run. Nothing here imports jax, so a wrong key is refused at once;
`experiments.resolve` lays tiers, profiles, rungs and typed keys over one another.
"""

from typing import Literal

import chz

from models.command_line import check_path
from models.config import ArchConfig, SizeConfig, check_depth
from models.ladder import ALL_RUNGS, DEFAULT_RUNG, LADDERS
from models.layers import layer_plan
from optim.config import OptimConfig, reference_to_run_steps

PROBES = ("activation", "gradient", "weight")
MATRICES = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
FINEWEB_FOLDER = "data/fineweb10B"
MOST_TOKENS = 10**15  # a thousand times the largest published training runs
MOST_STEPS = 2**31 - 1  # steps are counted in int32


@chz.chz
class DataConfig:
    """Where tokens come from and which of them are held out."""

    source: str = chz.field(
        default="auto",
        doc="auto (FineWeb shards if present, else the corpus), corpus, or a glob of .bin shards",
    )
    folder: str = chz.field(default=FINEWEB_FOLDER, doc="where auto looks for FineWeb shards")
    order: Literal["shuffled", "sequential"] = chz.field(
        default="shuffled", doc="order of training rows; sequential is the published one"
    )
    val_tokens: int = chz.field(default=10_485_760, doc="tokens of one validation")
    probe_offset: int = chz.field(
        default=2**24, doc="where the fixed probe set begins in the validation stream"
    )
    probe_spread: bool = chz.field(
        default=False,
        doc="probe windows at equal distances to the end of the validation text, not in one piece",
    )
    corpus_vocab: int = chz.field(default=50_304, doc="byte-pair vocabulary of the corpus")

    @chz.validate
    def _ranges(self):
        check_path("data.source", self.source)
        check_path("data.folder", self.folder)
        if self.val_tokens < 1:
            raise ValueError(f"data.val_tokens={self.val_tokens}: give at least one row")
        if self.probe_offset < self.val_tokens:
            raise ValueError(
                f"data.probe_offset={self.probe_offset} lies inside the validation tokens; "
                f"give at least data.val_tokens={self.val_tokens}"
            )
        if not 257 <= self.corpus_vocab <= 65_536:
            raise ValueError(
                f"data.corpus_vocab={self.corpus_vocab}: give 257 to 65,536 (uint16 shards)"
            )


@chz.chz
class ProbeConfig:
    """What the lens measures, on which tokens, and when (protocol spec 1.9)."""

    names: tuple[str, ...] = chz.field(default=PROBES, doc="probes to run, or nothing at all")
    data: Literal["fixed", "batch"] = chz.field(
        default="fixed", doc="held-out probe set, or the training batch's own pass"
    )
    window: int = chz.field(default=1024, doc="tokens in one probe window, one gradient sample")
    windows: int = chz.field(default=1024, doc="windows under the activation probe")
    gradient_windows: int = chz.field(default=512, doc="of these, samples of the gradient probe")
    chunk: int = chz.field(default=64, doc="windows in one pass of the model")
    groups: int = chz.field(
        default=32, doc="most groups of windows left out for error bars of activations; 1: none"
    )
    sweeps: int | None = chz.field(
        default=None,
        doc="visits of the gradient samples, each for a part of the kernels; none: as few as fit",
    )
    layers: tuple[int, ...] | None = chz.field(
        default=None, doc="layers under the gradient and weight probes; none: five, evenly spread"
    )
    matrices: tuple[str, ...] = chz.field(
        default=("attn.c_q", "attn.c_v", "attn.c_proj", "mlp.c_proj"),
        doc="matrices under the gradient and weight probes, among " + ", ".join(MATRICES),
    )
    sample: Literal["row", "window"] = chz.field(
        default="row",
        doc="a gradient sample of the training batch: a whole row, or probes.window tokens of it",
    )
    eigen: Literal["host", "graph"] = chz.field(
        default="host", doc="eigenvalues in float64 on a host thread, or inside the compiled step"
    )
    first: int = chz.field(
        default=2**23, doc="tokens at the first measurement after step 0; then doubling"
    )
    linear_from: int = chz.field(default=2**28, doc="tokens from which the spacing stops doubling")
    every: int | None = chz.field(default=None, doc="measure also every so many steps")

    @chz.validate
    def _ranges(self):
        for name in self.names:
            if name not in PROBES:
                raise ValueError(f"probes.names={name}: choose among {', '.join(PROBES)}")
        for name in self.matrices:
            if name not in MATRICES:
                raise ValueError(f"probes.matrices={name}: choose among {', '.join(MATRICES)}")
        for name in ("window", "windows", "chunk", "groups", "first", "linear_from"):
            if getattr(self, name) < 1:
                raise ValueError(f"probes.{name}={getattr(self, name)}: give at least 1")
        if self.sweeps is not None and self.sweeps < 1:
            raise ValueError(f"probes.sweeps={self.sweeps}: give at least 1, or none")
        if self.data == "batch" and (self.sweeps or 1) > 1:
            raise ValueError(
                f"probes.sweeps={self.sweeps}: a training batch is visited once; give 1, or "
                f"probes.data=fixed"
            )
        if self.every is not None and self.every < 1:
            raise ValueError(f"probes.every={self.every}: give at least 1 step, or none")
        if not 2 <= self.gradient_windows <= self.windows:
            raise ValueError(
                f"probes.gradient_windows={self.gradient_windows}: give 2 to "
                f"probes.windows={self.windows}"
            )
        if self.gradient_windows > self.chunk and self.gradient_windows % self.chunk:
            raise ValueError(
                f"probes.chunk={self.chunk} does not divide "
                f"probes.gradient_windows={self.gradient_windows}; give a divisor"
            )
        rest = self.windows - self.gradient_windows
        if rest % self.chunk:
            raise ValueError(
                f"probes.chunk={self.chunk} does not divide the {rest} windows beyond the "
                f"gradient samples; give a divisor"
            )


@chz.chz
class RunConfig:
    """Everything that decides a training run."""

    tier: Literal["d12", "d24", "d36", "d48"] = chz.field(default="d12", doc="size of the model")
    profile: Literal["paper", "laptop", "auto"] = chz.field(
        default="auto",
        doc="published sizes, or small ones; auto: paper on an accelerator of 40 GB or more",
    )
    rung: Literal[ALL_RUNGS] = chz.field(default=DEFAULT_RUNG, doc="architecture and optimizer")
    ladder: Literal[tuple(LADDERS)] = chz.field(
        default="published", doc="rungs with the published riders, or one change a rung"
    )
    batch: int = chz.field(default=8, doc="long rows per optimizer step (the batch tier)")
    accumulate: int | None = chz.field(
        default=None,
        doc="micro-batches per optimizer step; none: as many as leave every device one long row",
    )
    seed: int = chz.field(default=0, doc="initial weights and order of the data")
    max_tokens: int | None = chz.field(
        default=None, doc="training budget; none: the rung's published number of steps"
    )
    published_target: float = chz.field(default=3.2, doc="validation loss that ended the paper run")
    target_loss: float | Literal["published"] | None = chz.field(
        default="published", doc="stop at the first validation below it"
    )
    pause_tokens: int | None = chz.field(
        default=None,
        doc="save and leave at the first validation with that many; the same command without it, "
        "or with more, goes on",
    )
    anneal: Literal["published", "budget"] = chz.field(
        default="published", doc="end of the learning-rate schedule: the rung's, or max_tokens"
    )
    time_scale: float = chz.field(
        default=1.0, doc="schedule lengths relative to the published reference steps"
    )
    val_every: int = chz.field(default=2**23, doc="tokens between validations")
    checkpoint_every: int = chz.field(default=2**28, doc="tokens between checkpoints")
    keep_checkpoints: int | None = chz.field(
        default=None, doc="newest checkpoints kept beside step 0; none: all"
    )
    compute_dtype: Literal["auto", "float32", "bfloat16"] = chz.field(
        default="auto",
        doc="of the matrix products; auto: bfloat16 on accelerators; float32: in full, never TF32",
    )
    attention: Literal["auto", "dense", "blocked", "cudnn", "pallas"] = chz.field(
        default="auto", doc="implementation; auto: the fastest that device and rung allow"
    )
    remat: bool = chz.field(
        default=False, doc="compute blocks again in the backward pass instead of keeping them"
    )
    fsdp: bool = chz.field(
        default=False,
        doc="cut weights and optimizer state among the devices, which gather what they multiply by",
    )
    out: str = chz.field(default="auto", doc="run folder; auto: runs/<name of the configuration>")
    resume: Literal["auto", "never", "must"] = chz.field(
        default="auto", doc="continue from the newest checkpoint in the run folder"
    )
    arch: ArchConfig = chz.field(default_factory=ArchConfig)
    size: SizeConfig = chz.field(default_factory=SizeConfig)
    optim: OptimConfig = chz.field(default_factory=OptimConfig)
    data: DataConfig = chz.field(default_factory=DataConfig)
    probes: ProbeConfig = chz.field(default_factory=ProbeConfig)

    @property
    def row(self) -> int:
        """Tokens in a row of this rung."""
        return self.size.long_row if self.arch.row == "long" else self.size.short_row

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.size.long_row

    @property
    def rows_per_step(self) -> int:
        return self.tokens_per_step // self.row

    @property
    def micro_rows(self) -> int:
        """Rows of a micro-batch, once it is known how many there are (`devices.settled`)."""
        return self.rows_per_step // self.accumulate

    @property
    def published_steps(self) -> int:
        """Length of the published schedule in steps of this run."""
        return self.run_steps(self.optim.num_steps)

    @property
    def num_steps(self) -> int:
        """Updates that the whole run makes, unless its target comes first."""
        if self.max_tokens is None:
            return self.published_steps
        return self.max_tokens // self.tokens_per_step

    def run_steps(self, reference_steps: int) -> int:
        """A length in reference steps as one in steps of this run."""
        return reference_to_run_steps(reference_steps, batch=self.batch, time_scale=self.time_scale)

    @chz.validate
    def _ranges(self):
        for name in ("batch", "accumulate", "val_every", "checkpoint_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1")
        check_path("out", self.out)
        check_depth(self.arch, self.size)
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed={self.seed}: give 0 to {2**31 - 1}")
        if self.accumulate is not None and self.rows_per_step % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate} does not divide the {self.rows_per_step} rows of "
                f"a step; give a divisor"
            )
        if self.max_tokens is not None and self.max_tokens < self.tokens_per_step:
            raise ValueError(
                f"max_tokens={self.max_tokens} is less than one step of "
                f"{self.tokens_per_step} tokens; give more, or a smaller batch"
            )
        if self.max_tokens is not None and self.max_tokens > MOST_TOKENS:
            raise ValueError(f"max_tokens={self.max_tokens:.3g}: give at most {MOST_TOKENS:.0e}")
        if self.pause_tokens is not None and self.pause_tokens < 1:
            raise ValueError(f"pause_tokens={self.pause_tokens}: give at least 1, or none")
        if not 0 < self.published_target < float("inf"):
            raise ValueError(f"published_target={self.published_target}: give a positive loss")
        if self.anneal == "budget" and self.max_tokens is None:
            raise ValueError("anneal=budget needs a budget; set max_tokens, or anneal=published")
        if not 0 < self.time_scale < float("inf"):
            raise ValueError(f"time_scale={self.time_scale}: give a positive number")
        longest = max(self.optim.num_steps, self.optim.momentum_steps, self.arch.window_steps)
        if longest * self.time_scale > MOST_STEPS or self.run_steps(longest) > MOST_STEPS:
            raise ValueError(
                f"time_scale={self.time_scale:g} stretches {longest:,} reference steps over more "
                f"than {MOST_STEPS:,} steps; give a smaller factor"
            )
        if self.num_steps > MOST_STEPS:
            raise ValueError(
                f"max_tokens={self.max_tokens} are more than {MOST_STEPS:,} steps of "
                f"{self.tokens_per_step} tokens; give fewer, or a larger batch"
            )
        if isinstance(self.target_loss, float) and not 0 < self.target_loss < float("inf"):
            raise ValueError(f"target_loss={self.target_loss}: give a positive loss, or none")
        if self.keep_checkpoints is not None and self.keep_checkpoints < 1:
            raise ValueError(f"keep_checkpoints={self.keep_checkpoints}: give at least 1, or none")
        if self.data.val_tokens % self.row:
            raise ValueError(
                f"data.val_tokens={self.data.val_tokens} is not a multiple of the row of "
                f"{self.row} tokens; give a multiple"
            )
        if self.probes.sample == "window" and self.row % self.probes.window:
            raise ValueError(
                f"probes.window={self.probes.window} does not divide the row of {self.row} tokens; "
                f"give a divisor, or probes.sample=row"
            )
        if self.probes.window > self.row and self.arch.position == "learned":
            raise ValueError(
                f"probes.window={self.probes.window} is longer than the position table of "
                f"{self.row}; give at most that"
            )
        for layer in self.probes.layers or ():
            if not 0 <= layer < self.size.n_layer:
                raise ValueError(
                    f"probes.layers={layer}: the model has layers 0 to {self.size.n_layer - 1}"
                )
        self._refuse_empty_probes()

    def _refuse_empty_probes(self):
        """Matrices of attention were asked for, of layers that have none."""
        layers, matrices = self.probes.layers, self.probes.matrices
        if not (layers and matrices and {"gradient", "weight"} & set(self.probes.names)):
            return
        plan = layer_plan(self.arch, self.size.n_layer)
        if any(plan[layer].attention for layer in layers):
            return
        if all(matrix.startswith("attn.") for matrix in matrices):
            raise ValueError(
                f"probes.layers={','.join(map(str, layers))} has no attention in this rung, and "
                f"probes.matrices={','.join(matrices)} nothing else; give other layers, or "
                f"matrices of the mlp"
            )


def probed_layers(config: RunConfig) -> tuple[int, ...]:
    """The layers under the gradient and weight probes: the published five, or as configured.

    Published: 0, 3, 6, 9, 11 at d12, else round(k (L-1) / 4) (protocol spec 1.6).
    """
    if config.probes.layers is not None:
        return config.probes.layers
    n_layer = config.size.n_layer
    if n_layer == 12:
        return (0, 3, 6, 9, 11)
    return tuple(sorted({round(k * (n_layer - 1) / 4) for k in range(5)}))
