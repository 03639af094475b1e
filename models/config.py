"""Architecture and size of a model as data, readable without importing jax.

One field a feature: a rung of the ladder (`models.ladder`) is a set of values for these fields.
Lengths are in tokens and multiples of `size.block`, the mask block of the windowed rungs.
"""

from typing import Literal

import chz


@chz.chz
class ArchConfig:
    """What the model computes, apart from its size (ladder spec 2 and 3)."""

    position: Literal["learned", "rope", "half_rope"] = chz.field(
        default="learned",
        doc="position table, rotary embedding, or one of half of each head with base 1,024",
    )
    rope_sign: Literal[-1, 1] = chz.field(
        default=-1, doc="direction in which RoPE turns; matters only for published weights"
    )
    rope_table: Literal["bfloat16", "compute", "float32"] = chz.field(
        default="compute", doc="precision of the cosine and sine tables"
    )
    qk_norm: bool = chz.field(default=False, doc="RMS norm of queries and keys before RoPE")
    proj_bias: bool = chz.field(default=False, doc="bias on the attention output projection")
    attn_scale: float | None = chz.field(
        default=None, doc="factor on attention scores; none: one over the root of the head width"
    )
    row: Literal["short", "long"] = chz.field(
        default="short", doc="rows to train on, those of size"
    )
    documents: bool = chz.field(default=False, doc="no attention across document starts")
    window: Literal["none", "token", "token_block", "block"] = chz.field(
        default="none", doc="how far back a query sees: by tokens, by mask blocks, or by both"
    )
    window_blocks: int = chz.field(default=14, doc="the window at its widest, in mask blocks")
    window_ramp: Literal["none", "half_blocks", "floor", "ceil"] = chz.field(
        default="none",
        doc="growth from half a block on: by half blocks, or by whole ones rounded down or up",
    )
    window_steps: int = chz.field(default=0, doc="length of that growth in reference steps")
    long_short: bool = chz.field(
        default=False, doc="half the window in three layers of four, mirrored in the decoder"
    )
    drop_attention: bool = chz.field(
        default=False, doc="no attention in the second layer of the decoder"
    )
    value: Literal["plain", "residual", "embed", "embed_mirrored", "embed_outer"] = chz.field(
        default="plain",
        doc="what is mixed into values: nothing, the first layer's values, or token embeddings of "
        "each layer's own, shared by encoder and decoder, or three in the outer layers",
    )
    value_mix: Literal["convex", "pair"] = chz.field(
        default="convex", doc="weights of that mixture: 1-l and l, or two of their own"
    )
    x0_skip: bool = chz.field(default=False, doc="every block mixes the embedding into its input")
    unet: bool = chz.field(default=False, doc="encoder outputs are added to decoder inputs")
    softcap: float | None = chz.field(default=None, doc="logits become c tanh(logits / c)")
    head_dtype: Literal["compute", "float8"] = chz.field(
        default="compute", doc="arithmetic of the output head"
    )
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

    @property
    def masked(self) -> bool:
        """Whether documents or a window narrow the causal mask."""
        return self.documents or self.window != "none"

    @chz.validate
    def _ranges(self):
        if not 0 < self.norm_eps < 1:
            raise ValueError(f"arch.norm_eps={self.norm_eps}: give a number between 0 and 1")
        for name in ("attn_scale", "softcap"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"arch.{name}={value}: give a positive finite number, or none")
        if self.window_blocks < 1:
            raise ValueError(f"arch.window_blocks={self.window_blocks}: give at least 1 block")
        if self.window_steps < 0:
            raise ValueError(f"arch.window_steps={self.window_steps}: give 0 or more steps")
        if self.window == "none":
            for name in ("window_ramp", "long_short"):
                if getattr(self, name) not in ("none", False):
                    raise ValueError(
                        f"arch.{name}={getattr(self, name)} needs a window; set arch.window, or "
                        f"arch.{name}={'none' if name == 'window_ramp' else 'false'}"
                    )
        elif self.window_ramp != "none" and self.window_steps == 0:
            raise ValueError(
                f"arch.window_ramp={self.window_ramp} with arch.window_steps=0: give the ramp a "
                f"length in steps, or set arch.window_ramp=none"
            )
        elif self.window_ramp == "half_blocks" and self.window == "block":
            raise ValueError(
                "arch.window_ramp=half_blocks with arch.window=block: a window by blocks grows by "
                "whole blocks; set arch.window_ramp=floor"
            )
        if self.window_ramp == "half_blocks" and self.long_short:
            raise ValueError(
                "arch.long_short=true with arch.window_ramp=half_blocks: half of half a block is "
                "no window; set arch.window_ramp=floor"
            )
        if self.position == "learned" and self.row == "long":
            raise ValueError(
                "arch.row=long with arch.position=learned: the position table has a short row; set "
                "arch.position=rope"
            )
        if self.head_dtype == "float8" and self.head == "tied":
            raise ValueError(
                "arch.head_dtype=float8 with arch.head=tied: a float8 head is a matrix of its own; "
                "set arch.head=untied, or arch.head_dtype=compute"
            )
        if self.zero_head and self.head == "tied":
            raise ValueError(
                "arch.zero_head=True with arch.head=tied would zero the embedding too; "
                "set arch.head=untied"
            )


@chz.chz
class SizeConfig:
    """How large the model and its rows are; the defaults are the published d12."""

    n_layer: int = chz.field(default=12, doc="blocks, one above the other")
    n_head: int = chz.field(default=6, doc="heads of attention in a block; divides n_embd")
    n_embd: int = chz.field(default=768, doc="width: entries of the vector of a token")
    mlp_ratio: int = chz.field(default=4, doc="width of an MLP's hidden layer over n_embd")
    vocab_size: int | None = chz.field(default=None, doc="none: as the data says (GPT-2: 50,304)")
    eot_token: int | None = chz.field(
        default=None, doc="token that opens a document; none: as the data says (GPT-2: 50,256)"
    )
    block: int = chz.field(default=128, doc="tokens in a mask block")
    short_row: int = chz.field(default=1024, doc="tokens of context in the rungs without windows")
    long_row: int = chz.field(default=65_536, doc="tokens in a long row; batch counts these")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def mlp_width(self) -> int:
        return self.mlp_ratio * self.n_embd

    @chz.validate
    def _ranges(self):
        for name in ("n_layer", "n_head", "n_embd", "mlp_ratio", "block", "short_row", "long_row"):
            if getattr(self, name) < 1:
                raise ValueError(f"size.{name}={getattr(self, name)}: give at least 1")
        if self.vocab_size is not None and self.vocab_size < 2:
            raise ValueError(f"size.vocab_size={self.vocab_size}: give at least 2, or none")
        if self.eot_token is not None:
            vocab = float("inf") if self.vocab_size is None else self.vocab_size
            if not 0 <= self.eot_token < vocab:
                raise ValueError(
                    f"size.eot_token={self.eot_token}: give a token of the vocabulary of {vocab}"
                )
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


def check_depth(arch: ArchConfig, size: SizeConfig) -> None:
    """Raises ValueError where a pattern of the architecture has no meaning at this size."""
    patterned = {"arch.unet": arch.unet, "arch.long_short": arch.long_short}
    patterned |= {"arch.drop_attention": arch.drop_attention}
    patterned |= {"arch.value": arch.value in ("embed_mirrored", "embed_outer")}
    for key, used in patterned.items():
        if used and size.n_layer % 2:
            raise ValueError(
                f"size.n_layer={size.n_layer} with {key}: encoder and decoder need the same depth; "
                f"give an even number of layers"
            )
    if arch.window_ramp == "half_blocks" and size.block % 2:
        raise ValueError(
            f"size.block={size.block} with arch.window_ramp=half_blocks: give an even block"
        )
    if arch.position == "half_rope" and (size.head_dim % 4 or size.head_dim < 8):
        raise ValueError(
            f"size.n_embd={size.n_embd} over size.n_head={size.n_head} heads gives heads of "
            f"{size.head_dim}; arch.position=half_rope needs a multiple of 4 from 8 on"
        )


# Depth, heads and width of the published tiers (ladder spec 10). The laptop row of a tier keeps
# depth and heads and takes an eighth of the width. The two largest do not keep the activations of
# a long row, as published.
TIERS = {
    "d12": {"size.n_layer": 12, "size.n_head": 6, "size.n_embd": 768},
    "d24": {"size.n_layer": 24, "size.n_head": 16, "size.n_embd": 1024},
    "d36": {"size.n_layer": 36, "size.n_head": 20, "size.n_embd": 1280, "remat": True},
    "d48": {"size.n_layer": 48, "size.n_head": 25, "size.n_embd": 1600, "remat": True},
}
