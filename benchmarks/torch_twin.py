"""A PyTorch twin of two rungs, untied and attnscale, to time our step beside PyTorch's own.

Written from the ladder specification (sections 2 to 4) on our configuration classes, with the
published parameter names, so that `models.interop.to_published` gives its weights. It is the usual
PyTorch of its kind: modules over float32 master weights, SDPA, or FlexAttention on CUDA. Its update
is `torch_step.py` beside it, and `experiments.bench_peer` times both; torch is no dependency of
this repository.

Legend of shape comments: B rows, T positions, D width, H heads, K head width, V vocabulary, N tiles
of a mask.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from models.config import ArchConfig, SizeConfig, check_depth
from models.layers import Layer, layer_plan, num_value_pieces
from models.windows import layer_window, widest_window
from optim.config import OptimConfig

COVERED = {
    "position": ("rope", "half_rope"),
    "rope_table": ("compute", "float32"),
    "qk_norm": (True,),
    "proj_bias": (False,),
    "window": ("none", "block"),
    "value": ("plain", "embed_outer"),
    "embed_norm": (True,),
    "head": ("untied",),
}
TILE = 128  # of a flex mask, whatever the window counts in
X_SCALE, W_SCALE = 2.0, 32.0
GRADIENT_SCALE, GRADIENT_SCALE_TOKENS = 2.0**29, 65_536


def check_covered(arch: ArchConfig, optim: OptimConfig) -> None:
    """Raises ValueError for a configuration that the twin does not have."""
    for name, values in COVERED.items():
        if getattr(arch, name) not in values:
            raise ValueError(
                f"arch.{name}={getattr(arch, name)}: the PyTorch twin has only "
                f"{' and '.join(map(str, values))}; choose rung=untied or rung=attnscale"
            )
    if arch.documents != (arch.window != "none"):
        raise ValueError(
            f"arch.documents={arch.documents} with arch.window={arch.window}: the PyTorch twin has "
            f"both or neither; choose rung=untied or rung=attnscale"
        )
    if optim.weight_decay:
        raise ValueError(
            f"optim.weight_decay={optim.weight_decay}: the PyTorch twin has none; set it to 0"
        )


# Masks (ladder spec 3.4, rule `block`)


def boolean_mask(documents, blocks, block: int):
    """(B, 1, T, T) over queries and keys, from documents (B, T) and windows (B,) in mask blocks."""
    position = torch.arange(documents.shape[1], device=documents.device)
    query, key = position[:, None], position[None, :]
    near = (query // block - key // block)[None] < blocks[:, None, None]
    same = documents[:, :, None] == documents[:, None, :]
    return ((key <= query)[None] & near & same)[:, None]


def flex_mask(documents, blocks, block: int) -> BlockMask:
    """The same pairs for FlexAttention; tiles that all queries see whole are not masked at all.

    Documents are contiguous, so the numbers at the ends of a tile tell which ones are in it.
    """
    length, device = documents.shape[1], documents.device
    tile = min(TILE, length)

    def visible(row, head, query, key):
        near = query // block - key // block < blocks[row]
        return (key <= query) & near & (documents[row, query] == documents[row, key])

    tiles = torch.arange(length // tile, device=device)
    query, key = tiles[None, :, None], tiles[None, None, :]
    start, end = (each // block for each in (tiles * tile, tiles * tile + tile - 1))
    nearest = (start[:, None] - end[None, :])[None]
    farthest = (end[:, None] - start[None, :])[None]
    first, last = documents[:, ::tile], documents[:, tile - 1 :: tile]  # (B, N)
    reach = blocks[:, None, None]
    some = (key <= query) & (nearest < reach) & (last[:, None, :] >= first[:, :, None])
    one_document = first[:, None, :] == last[:, :, None]
    whole = (key < query) & (farthest < reach) & one_document
    return BlockMask.from_kv_blocks(
        *_tile_list(some & ~whole),
        *_tile_list(whole),
        BLOCK_SIZE=tile,
        mask_mod=visible,
        seq_lengths=(length, length),
    )


def _tile_list(tiles):  # (B, N, N) -> (B, 1, N), (B, 1, N, N)
    """How many key tiles each query tile reads, and their numbers ahead of all others."""
    order = torch.argsort(tiles.to(torch.int8), dim=-1, descending=True, stable=True)
    return tiles.sum(-1).to(torch.int32)[:, None], order.to(torch.int32)[:, None]


# The head (ladder spec 2 and 3.5)


class Float8Head(torch.autograd.Function):
    """x (N, D) times weight (V, D) through float8 in both directions, constant scales.

    What goes into these products and comes out is bfloat16, but for the weight's gradient.
    """

    @staticmethod
    def forward(ctx, x, weight):
        x8 = quantize(x.bfloat16(), X_SCALE, torch.float8_e4m3fn)
        w8 = quantize(weight.bfloat16(), W_SCALE, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, w8)
        ctx.dtype = x.dtype
        return float8_product(x8, w8.T, X_SCALE * W_SCALE, torch.bfloat16, fast=True)

    @staticmethod
    def backward(ctx, g):  # (N, V), of a mean over N
        x8, w8 = ctx.saved_tensors
        scale = GRADIENT_SCALE * g.shape[0] / GRADIENT_SCALE_TOKENS
        g8 = quantize(g.bfloat16(), scale, torch.float8_e5m2)
        dx = float8_product(g8, w8, scale * W_SCALE, torch.bfloat16)
        dw = float8_product(g8.T, x8, scale * X_SCALE, torch.float32)
        return dx.to(ctx.dtype), dw


class SoftCap(torch.autograd.Function):
    """c tanh(z / c) in the dtype of z, its slope in float32: the logits' gradient rounds once."""

    @staticmethod
    def forward(ctx, z, cap: float):
        capped = cap * torch.tanh(z / cap)
        ctx.save_for_backward(capped)
        ctx.cap = cap
        return capped.float()

    @staticmethod
    def backward(ctx, g):
        (capped,) = ctx.saved_tensors
        return (g * (1 - (capped.float() / ctx.cap).square())).to(capped.dtype), None


def quantize(x, scale: float, dtype):
    """scale * x rounded to `dtype`, saturating."""
    limit = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-limit, limit).to(dtype)


def float8_product(a, b, scale: float, out_dtype, fast: bool = False):
    """a (m, k) times b (k, n) over `scale`; in float32 where the hardware has no float8 units."""
    if not (a.is_cuda and torch.cuda.get_device_capability(a.device) >= (8, 9)):
        return (a.float() @ b.float() / scale).to(out_dtype)
    one = torch.ones((), device=a.device)
    columns = b.T.contiguous().T  # the only order of the second operand that cuBLASLt takes
    return torch._scaled_mm(
        a.contiguous(),
        columns,
        scale_a=one / scale,
        scale_b=one,
        out_dtype=out_dtype,
        use_fast_accum=fast,
    )


# The model (ladder spec 2 and 3)


def rms_norm(x, eps: float):
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


def rotary_tables(arch: ArchConfig, head_dim: int, length: int):
    """Cosines and sines, (T, K/2) each, the sign of the turn included."""
    if arch.position == "half_rope":
        turning = torch.arange(head_dim // 4, dtype=torch.float32) / (head_dim // 4 - 1)
        frequency = F.pad(1024.0**-turning, (0, head_dim // 4))
    else:
        frequency = 10_000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = arch.rope_sign * torch.arange(length, dtype=torch.float32)[:, None] * frequency[None]
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):  # (B, H, T, K)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1).to(x.dtype)


class Shared(NamedTuple):
    """What all blocks of a pass read: x0 (B, T, D), value pieces (B, T, D), masks by kind."""

    x0: torch.Tensor
    values: tuple[torch.Tensor, ...]
    masks: dict[bool, torch.Tensor | BlockMask]  # of long windows (True) and short ones


class Attention(nn.Module):
    def __init__(self, arch: ArchConfig, size: SizeConfig, layer: Layer, flex: Callable | None):
        super().__init__()
        self.arch, self.size, self.layer, self.flex = arch, size, layer, flex
        for name in ("c_q", "c_k", "c_v", "c_proj"):
            setattr(self, name, nn.Linear(size.n_embd, size.n_embd, bias=False))
        if arch.value != "plain":
            self.mix = nn.Parameter(torch.full((2,), 0.5))

    def forward(self, x, shared: Shared, cos, sin):  # (B, T, D) -> (B, T, D)
        arch, size = self.arch, self.size
        q, k, v = self.c_q(x), self.c_k(x), self.c_v(x)
        if arch.value != "plain":
            v = self._mix_values(v, shared.values)
        q, k, v = (
            each.view(*x.shape[:2], size.n_head, size.head_dim).transpose(1, 2)
            for each in (q, k, v)
        )  # (B, H, T, K)
        q, k = rms_norm(q, arch.norm_eps).to(v.dtype), rms_norm(k, arch.norm_eps).to(v.dtype)
        if arch.rope_table == "compute":
            cos, sin = cos.to(v.dtype), sin.to(v.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = self._attend(q, k, v, shared.masks).transpose(1, 2).reshape(x.shape)
        return self.c_proj(mixed)

    def _mix_values(self, v, pieces):
        mixed = self.mix[0] * v
        if self.layer.value_from is not None:
            mixed = mixed + self.mix[1] * pieces[self.layer.value_from].to(v.dtype)
        return mixed

    def _attend(self, q, k, v, masks):
        scale = self.arch.attn_scale
        if not masks:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        mask = masks[self.layer.long_window]
        if self.flex is not None:
            return self.flex(q, k, v, block_mask=mask, scale=scale)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=False)
        self.c_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).float().square())


class Block(nn.Module):
    def __init__(self, arch: ArchConfig, size: SizeConfig, layer: Layer, flex: Callable | None):
        super().__init__()
        self.eps = arch.norm_eps
        self.lambdas = nn.Parameter(torch.tensor([1.0, 0.0])) if arch.x0_skip else None
        self.attn = Attention(arch, size, layer, flex) if layer.attention else None
        self.mlp = MLP(size.n_embd)

    def forward(self, x, shared: Shared, cos, sin):  # (B, T, D) -> (B, T, D)
        if self.lambdas is not None:
            x = self.lambdas[0] * x + self.lambdas[1] * shared.x0
        if self.attn is not None:
            x = x + self.attn(rms_norm(x, self.eps), shared, cos, sin)
        return x + self.mlp(rms_norm(x, self.eps))


class Twin(nn.Module):
    """Tokens and targets (B, T) to their mean cross-entropy in nats.

    Weights start as torch does; `load_state_dict` gives it those of a run. `length` is T. Masks go
    to FlexAttention with `flex`, which torch differentiates on CUDA only, else to SDPA as booleans.
    Raises ValueError for patterns that the depth does not allow.
    """

    def __init__(self, arch: ArchConfig, size: SizeConfig, length: int, flex: bool):
        super().__init__()
        check_depth(arch, size)
        self.arch, self.size, self.flex = arch, size, flex
        # uncompiled it would form all scores, so also the eager model has this part compiled
        call = torch.compile(flex_attention) if flex else None
        self.plan = layer_plan(arch, size.n_layer)
        blocks = [Block(arch, size, layer, call) for layer in self.plan]
        tables = [
            nn.Embedding(size.vocab_size, size.n_embd)
            for _ in range(num_value_pieces(arch, size.n_layer))
        ]
        wte = nn.Embedding(size.vocab_size, size.n_embd)
        self.transformer = nn.ModuleDict({"wte": wte, "h": nn.ModuleList(blocks)})
        self.value_embeds = nn.ModuleDict({"emb": nn.ModuleList(tables)})
        if arch.unet:
            self.skip_weights = nn.Parameter(torch.ones(size.n_layer // 2))
        self.lm_head = nn.Linear(size.n_embd, size.vocab_size, bias=False)
        cos, sin = rotary_tables(arch, size.head_dim, length)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def attention(self) -> str:
        """What runs, for a report."""
        if self.arch.window == "none":
            return "sdpa, causal"
        return "flex_attention" if self.flex else "sdpa, boolean mask"

    def forward(self, tokens, targets, window=None):
        """window: (B,) tokens, the attention window of each row; None for the widest."""
        arch = self.arch
        x = rms_norm(self.transformer["wte"](tokens), arch.norm_eps)
        values = tuple(table(tokens) for table in self.value_embeds["emb"])
        shared = Shared(x, values, self._masks(tokens, window))
        outputs = []
        for i, (layer, block) in enumerate(zip(self.plan, self.transformer["h"], strict=True)):
            if layer.skip_from is not None:
                x = x + self.skip_weights[i - len(self.plan) // 2] * outputs[layer.skip_from]
            x = block(x, shared, self.cos, self.sin)
            outputs.append(x)
        logits = self._logits(rms_norm(x, arch.norm_eps))  # (B, T, V)
        if arch.softcap is not None:
            logits = SoftCap.apply(logits, arch.softcap)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def _masks(self, tokens, window) -> dict:
        if self.arch.window == "none":
            return {}
        if window is None:
            window = tokens.new_full(tokens.shape[:1], widest_window(self.arch, self.size))
        documents = (tokens == self.size.eot_token).cumsum(1)
        make = flex_mask if self.flex else boolean_mask
        masks = {}
        for long_window in {layer.long_window for layer in self.plan if layer.attention}:
            tokens_seen = layer_window(self.arch, self.size, window, long_window)
            blocks = (tokens_seen // self.size.block).clamp(min=1)
            masks[long_window] = make(documents, blocks, self.size.block)
        return masks

    def _logits(self, x):
        if self.arch.head_dtype != "float8":
            return self.lm_head(x)
        flat = Float8Head.apply(x.flatten(0, 1), self.lm_head.weight)
        return flat.view(*x.shape[:2], -1)
