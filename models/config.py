"""Architecture and size of a model as data, readable without importing jax.

One field a feature: a rung of the ladder (`models.ladder`) is a set of values for these fields.
Lengths are in tokens and multiples of `size.block`, the mask block of the windowed rungs.
"""

from typing import Literal

import chz


@chz.chz
class ArchConfig:
    """What the model computes, apart from its size (ladder spec 2 and 3)."""

    position: Literal["learned", "rope"] = chz.field(
        default="learned", doc="position table, or rotary embedding with base 10,000"
    )
    rope_sign: Literal[-1, 1] = chz.field(
        default=-1, doc="direction in which RoPE turns; matters only for published weights"
    )
    rope_table: Literal["bfloat16", "compute"] = chz.field(
        default="compute", doc="precision of the cosine and sine tables"
    )
    qk_norm: bool = chz.field(default=False, doc="RMS norm of queries and keys before RoPE")
    proj_bias: bool = chz.field(default=False, doc="bias on the attention output projection")
    head: Literal["tied", "untied"] = chz.field(
        default="tied", doc="output head: the embedding transposed, or a matrix of its own"
    )
    embed_norm: bool = chz.field(default=False, doc="RMS norm right after the embedding")
    norm_eps: float = chz.field(default=2.0**-23, doc="epsilon inside every RMS norm")
    init: Literal["torch", "gpt2"] = chz.field(
        default="torch", doc="torch's layer defaults, or normal(0.02) with scaled projections"
    )
    zero_proj: bool = chz.field(default=True, doc="both output projections of a block start at 0")
    zero_head: bool = chz.field(default=False, doc="an untied head starts at 0")

    @chz.validate
    def _ranges(self):
        if not 0 < self.norm_eps < 1:
            raise ValueError(f"arch.norm_eps={self.norm_eps}: give a number between 0 and 1")
        if self.zero_head and self.head == "tied":
            raise ValueError(
                "arch.zero_head=True with arch.head=tied would zero the embedding too; "
                "set arch.head=untied"
            )


@chz.chz
class SizeConfig:
    """How large the model and its rows are; the defaults are the published d12."""

    n_layer: int = 12
    n_head: int = 6
    n_embd: int = 768
    vocab_size: int | None = chz.field(default=None, doc="none: as the data says (GPT-2: 50,304)")
    block: int = chz.field(default=128, doc="tokens in a mask block")
    short_row: int = chz.field(default=1024, doc="tokens of context in the rungs without windows")
    long_row: int = chz.field(default=65_536, doc="tokens in a long row; batch counts these")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @chz.validate
    def _ranges(self):
        for name in ("n_layer", "n_head", "n_embd", "block", "short_row", "long_row"):
            if getattr(self, name) < 1:
                raise ValueError(f"size.{name}={getattr(self, name)}: give at least 1")
        if self.vocab_size is not None and self.vocab_size < 2:
            raise ValueError(f"size.vocab_size={self.vocab_size}: give at least 2, or none")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"size.n_head={self.n_head} does not divide size.n_embd={self.n_embd}; "
                f"choose a number of heads that does"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"size.n_embd={self.n_embd} over size.n_head={self.n_head} heads gives odd heads "
                f"of {self.head_dim}; rotary halves need an even width"
            )
        for name in ("short_row", "long_row"):
            if getattr(self, name) % self.block:
                raise ValueError(
                    f"size.{name}={getattr(self, name)} is not a multiple of "
                    f"size.block={self.block}; give a multiple"
                )
        if self.long_row % self.short_row:
            raise ValueError(
                f"size.long_row={self.long_row} is not a multiple of "
                f"size.short_row={self.short_row}; give a multiple"
            )


# Depth, heads and width of the published tiers (ladder spec 10). The laptop row of a tier keeps
# depth and heads and takes an eighth of the width.
TIERS = {
    "d12": {"size.n_layer": 12, "size.n_head": 6, "size.n_embd": 768},
    "d24": {"size.n_layer": 24, "size.n_head": 16, "size.n_embd": 1024},
    "d36": {"size.n_layer": 36, "size.n_head": 20, "size.n_embd": 1280},
    "d48": {"size.n_layer": 48, "size.n_head": 25, "size.n_embd": 1600},
}
