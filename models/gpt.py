"""The GPT of the ladder (arXiv 2605.05683; ladder spec sections 2 and 3), one class for all rungs.

Legend of shape comments: B rows, T positions, D width, H heads, K head width, F MLP width, V
vocabulary, L layers. Kernels are stored (in, out). Master weights and the residual stream are
float32; matrix products run in `dtype`.

Every forward pass returns its taps, a dict from `h_i/resid_post` and the like to arrays (B, T, D);
under jit a tap that nobody reads costs nothing. Every matrix product goes through `linear(x,
kernel, path)`, which a caller may replace to observe it (per-sample gradients do).
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.attention import causal_attention
from models.config import ArchConfig, SizeConfig
from models.rotary import rotary_tables, rotate

Linear = Callable[[jnp.ndarray, jnp.ndarray, str], jnp.ndarray]


def dot(x: jnp.ndarray, kernel: jnp.ndarray, path: str) -> jnp.ndarray:
    """The plain linear map of x (..., in) by kernel (in, out); `path` names the kernel."""
    del path
    return x @ kernel


def rms_norm(x: jnp.ndarray, eps: float) -> jnp.ndarray:
    """x over its root mean square along the last axis, in float32, cast back; no learned gain."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype)


def uniform_fan_in(key, shape, dtype=jnp.float32):
    """torch's default for a linear layer, uniform within +- 1/sqrt(in) of an (in, out) kernel."""
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def tied_embedding(key, shape, dtype=jnp.float32):
    """A tied (V, D) matrix starts as the head's linear layer does: uniform within +- 1/sqrt(D)."""
    bound = shape[1] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class Initializers:
    """How each parameter starts.

    | parameter            | init=torch                  | init=gpt2                     |
    |----------------------|-----------------------------|-------------------------------|
    | wte, tied            | uniform +- 1/sqrt(D)        | normal(0.02)                  |
    | wte, untied; wpe     | normal(1)                   | normal(0.02)                  |
    | c_q, c_k, c_v, c_fc  | uniform +- 1/sqrt(in)       | normal(0.02)                  |
    | attn and mlp c_proj  | as above, or 0 (zero_proj)  | normal(0.02/sqrt(2L)), or 0   |
    | lm_head              | as above, or 0 (zero_head)  | normal(0.02), or 0            |
    | biases               | 0                           | 0                             |
    """

    def __init__(self, arch: ArchConfig, n_layer: int):
        torch = arch.init == "torch"
        normal = nn.initializers.normal
        self.hidden = uniform_fan_in if torch else normal(0.02)
        self.proj = self.hidden if torch else normal(0.02 / (2 * n_layer) ** 0.5)
        if arch.zero_proj:
            self.proj = nn.initializers.zeros
        self.head = nn.initializers.zeros if arch.zero_head else self.hidden
        self.table = normal(1.0) if torch else normal(0.02)
        self.wte = tied_embedding if torch and arch.head == "tied" else self.table


class Dense(nn.Module):
    """A linear layer whose product goes through the caller's `linear`."""

    features: int
    start: Callable
    dtype: jnp.dtype
    bias: bool = False

    @nn.compact
    def __call__(self, x, linear: Linear):  # (..., in) -> (..., features)
        kernel = self.param("kernel", self.start, (x.shape[-1], self.features))
        path = "/".join((*self.path, "kernel"))
        y = linear(x.astype(self.dtype), kernel.astype(self.dtype), path)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + jnp.broadcast_to(bias.astype(self.dtype), y.shape)
        return y


class Table(nn.Module):
    """An embedding table (rows, features); calling it gives the table itself."""

    rows: int
    features: int
    start: Callable

    @nn.compact
    def __call__(self):
        return self.param("embedding", self.start, (self.rows, self.features))


def take_rows(table: jnp.ndarray, ids: jnp.ndarray) -> jnp.ndarray:
    """Rows of table (V, D) at ids (B, T), as (B, T, D); an id outside the table gives NaN."""
    return jnp.take(table, ids, axis=0, mode="fill", fill_value=jnp.nan)


class CausalSelfAttention(nn.Module):
    """Multi-head attention; heads are contiguous slices of the width."""

    arch: ArchConfig
    size: SizeConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, linear: Linear):  # (B, T, D) -> (B, T, D)
        arch, size = self.arch, self.size
        init = Initializers(arch, size.n_layer)
        rows, length, width = x.shape
        heads = (rows, length, size.n_head, size.head_dim)
        q, k, v = (
            Dense(width, init.hidden, self.dtype, name=name)(x, linear).reshape(heads)
            for name in ("c_q", "c_k", "c_v")
        )  # (B, T, H, K)
        if arch.qk_norm:
            q, k = rms_norm(q, arch.norm_eps), rms_norm(k, arch.norm_eps)
        if arch.position == "rope":
            table = jnp.bfloat16 if arch.rope_table == "bfloat16" else self.dtype
            cos, sin = rotary_tables(length, size.head_dim, table)
            q, k = (rotate(each, cos, sin, arch.rope_sign) for each in (q, k))
        mixed = causal_attention(q, k, v).reshape(x.shape)
        return Dense(width, init.proj, self.dtype, bias=arch.proj_bias, name="c_proj")(
            mixed, linear
        )


class MLP(nn.Module):
    """Two linear layers around a squared ReLU."""

    arch: ArchConfig
    size: SizeConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, linear: Linear):  # (B, T, D) -> (B, T, D)
        init = Initializers(self.arch, self.size.n_layer)
        width = x.shape[-1]
        hidden = Dense(4 * width, init.hidden, self.dtype, name="c_fc")(x, linear)  # (B, T, F)
        hidden = jnp.square(nn.relu(hidden.astype(jnp.float32)))
        return Dense(width, init.proj, self.dtype, name="c_proj")(hidden, linear)


class Block(nn.Module):
    """x + attention, then x + MLP, each on the RMS-normalised stream."""

    arch: ArchConfig
    size: SizeConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, linear: Linear):  # (B, T, D) -> (B, T, D), taps
        modules = (self.arch, self.size, self.dtype)
        eps = self.arch.norm_eps
        taps = {"resid_pre": x}
        taps["attn_out"] = CausalSelfAttention(*modules, name="attn")(rms_norm(x, eps), linear)
        x = taps["resid_mid"] = x + taps["attn_out"]
        taps["mlp_out"] = MLP(*modules, name="mlp")(rms_norm(x, eps), linear)
        x = taps["resid_post"] = x + taps["mlp_out"]
        return x, taps


class GPT(nn.Module):
    """Tokens to logits. `dtype` is that of the matrix products; logits come back in float32."""

    arch: ArchConfig
    size: SizeConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens, linear: Linear = dot):  # (B, T) -> (B, T, V), taps
        arch, size = self.arch, self.size
        init = Initializers(arch, size.n_layer)
        taps = {}
        wte = Table(size.vocab_size, size.n_embd, init.wte, name="wte")()
        x = take_rows(wte, tokens)
        if arch.position == "learned":
            wpe = Table(size.short_row, size.n_embd, init.table, name="wpe")()
            x = x + wpe[None, : tokens.shape[1]]
        if arch.embed_norm:
            x = rms_norm(x, arch.norm_eps)
        for i in range(size.n_layer):
            x, block_taps = Block(arch, size, self.dtype, name=f"h_{i}")(x, linear)
            taps |= {f"h_{i}/{name}": value for name, value in block_taps.items()}
        x = taps["final_norm"] = rms_norm(x, arch.norm_eps)
        if arch.head == "tied":
            logits = linear(x.astype(self.dtype), wte.astype(self.dtype).T, "wte/embedding")
        else:
            logits = Dense(size.vocab_size, init.head, self.dtype, name="lm_head")(x, linear)
        taps["logits"] = logits = logits.astype(jnp.float32)
        return logits, taps


def token_loss(logits: jnp.ndarray, targets: jnp.ndarray) -> jnp.ndarray:
    """Cross-entropy in nats of each target (B, T) under logits (B, T, V), float32."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="fill")[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def init_params(model: GPT, seed: int) -> dict:
    """Fresh float32 parameters as a nested dict."""
    tokens = jnp.zeros((1, model.size.block), jnp.int32)
    return model.init(jax.random.key(seed), tokens)["params"]


def flops_per_token(size: SizeConfig, row: int) -> float:
    """Forward and backward FLOP per token of the matrix products, attention by its exact mask.

    6 per weight of the blocks and the head, and 12 D per key that a query sees, in every layer; a
    causal row of T tokens shows (T + 1) / 2 keys on average.
    """
    weights = 12 * size.n_layer * size.n_embd**2 + size.n_embd * size.vocab_size
    return 6 * weights + 12 * size.n_embd * (row + 1) / 2 * size.n_layer
