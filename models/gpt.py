"""The GPT of the ladder (arXiv 2605.05683; ladder spec sections 2 and 3), one class for all rungs.

Legend of shape comments: B rows, T positions, D width, H heads, K head width, F MLP width, V
vocabulary, L layers. Kernels are stored (in, out). Master weights and the residual stream are
float32; matrix products run in `dtype`.

Every forward pass returns its taps, a dict from `h_i/resid_post` and the like to arrays (B, T, D);
under jit a tap that nobody reads costs nothing. Every matrix product of the blocks, and that of the
logits unless it is in float8, goes through `linear(x, kernel, path)`, which a caller may replace
to observe it (per-sample gradients do).
The attention window is data, one number of tokens a row, so that its growth compiles nothing anew.
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from models.attention import Implementation, attention
from models.config import ArchConfig, SizeConfig, check_depth
from models.embedding import beyond_end, take_rows
from models.head import head_logits
from models.initializers import Initializers, keep_stream
from models.layers import Layer, layer_plan, num_value_pieces
from models.linear import Dense, Head, Linear, Table, dot
from models.masks import document_ids
from models.rotary import frequencies, half_frequencies, rotary_tables, rotate
from models.sharded import rows_of_cut_table, whole
from models.windows import layer_window, widest_window


def rms_norm(x: jnp.ndarray, eps: float) -> jnp.ndarray:
    """x over its root mean square along the last axis, in float32, cast back; no learned gain."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype)


class Context(NamedTuple):
    """The arrays that every block of one forward pass reads beside its input.

    x0: (B, T, D) embedding of the tokens; documents: (B, T) or None; window: (B,) tokens or None;
    values: pieces of the value embeddings, (B, T, D) each; tables: cosines and sines, or None.
    """

    x0: jnp.ndarray
    documents: jnp.ndarray | None
    window: jnp.ndarray | None
    values: tuple[jnp.ndarray, ...]
    tables: tuple[jnp.ndarray, jnp.ndarray] | None


class CausalSelfAttention(nn.Module):
    """Multi-head attention; heads are contiguous slices of the width."""

    arch: ArchConfig
    size: SizeConfig
    dtype: jnp.dtype
    layer: Layer
    implementation: Implementation
    mesh: Mesh | None

    @nn.compact
    def __call__(self, x, first_value, context: Context, linear: Linear):  # two of (B, T, D)
        """The output (B, T, D), and taps like it.

        q and k as they are compared, v before anything is mixed into it, and z, what the heads have
        gathered, before the output projection.
        first_value: v of the first layer, None in the first layer itself.
        """
        arch, size = self.arch, self.size
        init = Initializers(arch, size.n_layer)
        q, k, value = (
            Dense(x.shape[-1], init.hidden, self.dtype, name=name)(x, linear)
            for name in ("c_q", "c_k", "c_v")
        )  # (B, T, D)
        v = self._mix_values(value, value if first_value is None else first_value, context)
        q, k, v = (each.reshape(*x.shape[:2], size.n_head, size.head_dim) for each in (q, k, v))
        if arch.qk_norm:
            q, k = rms_norm(q, arch.norm_eps), rms_norm(k, arch.norm_eps)
        if context.tables is not None:
            q, k = (rotate(each, *context.tables, arch.rope_sign) for each in (q, k))
        mixed = attention(
            q,
            k,
            v,
            context.documents,
            layer_window(arch, size, context.window, self.layer.long_window),
            rule=arch.window,
            block=size.block,
            widest=widest_window(arch, size, self.layer.long_window),
            scale=arch.attn_scale,
            implementation=self.implementation,
            mesh=self.mesh,
        ).reshape(x.shape)
        out = Dense(x.shape[-1], init.proj, self.dtype, bias=arch.proj_bias, name="c_proj")
        taps = {"q": q.reshape(x.shape), "k": k.reshape(x.shape), "v": value, "z": mixed}
        return out(mixed, linear), taps

    def _mix_values(self, value, first_value, context: Context):
        """Values with what arch.value mixes into them, in float32, cast back.

        The published later rungs mix in bfloat16, which tells in its last digit only.
        """
        if self.arch.value == "plain":
            return value
        piece = self.layer.value_from
        other = first_value if self.arch.value == "residual" else None
        if piece is not None:
            other = context.values[piece]
        mixed = value.astype(jnp.float32)
        if self.arch.value_mix == "pair":
            mix = self.param("mix", nn.initializers.constant(0.5), (2,))
            mixed = mix[0] * mixed
            if other is not None:
                mixed = mixed + mix[1] * other.astype(jnp.float32)
        elif other is not None:
            lamb = self.param("lamb", nn.initializers.constant(0.5), ())
            mixed = (1 - lamb) * mixed + lamb * other.astype(jnp.float32)
        return mixed.astype(value.dtype)


class MLP(nn.Module):
    """Two linear layers around a squared ReLU."""

    arch: ArchConfig
    size: SizeConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, linear: Linear):  # (B, T, D) -> (B, T, D)
        init = Initializers(self.arch, self.size.n_layer)
        width = x.shape[-1]
        hidden = Dense(self.size.mlp_width, init.hidden, self.dtype, name="c_fc")
        hidden = hidden(x, linear)  # (B, T, F)
        hidden = jnp.square(nn.relu(hidden.astype(jnp.float32)))
        return Dense(width, init.proj, self.dtype, name="c_proj")(hidden, linear)


class Block(nn.Module):
    """x + attention, then x + MLP, each on the RMS-normalised stream.

    resid_pre is the stream that attention reads, after any skip has been added to it.
    """

    arch: ArchConfig
    size: SizeConfig
    dtype: jnp.dtype
    layer: Layer
    implementation: Implementation
    mesh: Mesh | None

    @nn.compact
    def __call__(self, x, first_value, context: Context, linear: Linear):  # (B, T, D), taps
        arch, eps = self.arch, self.arch.norm_eps
        if arch.x0_skip:
            lambdas = self.param("lambdas", keep_stream, (2,))
            x = lambdas[0] * x + lambdas[1] * context.x0
        taps = {"resid_pre": x}
        if self.layer.attention:
            attend = CausalSelfAttention(
                arch, self.size, self.dtype, self.layer, self.implementation, self.mesh, name="attn"
            )
            taps["attn_out"], inside = attend(rms_norm(x, eps), first_value, context, linear)
            taps |= inside
            x = x + taps["attn_out"]
        taps["resid_mid"] = x
        mlp = MLP(arch, self.size, self.dtype, name="mlp")
        taps["mlp_out"] = mlp(rms_norm(x, eps), linear)
        x = taps["resid_post"] = x + taps["mlp_out"]
        return x, taps


class GPT(nn.Module):
    """Tokens to logits. `dtype` is that of the matrix products; logits come back in float32.

    attention: an implementation of `models.attention`. remat: keep only the inputs of blocks for
    the backward pass and compute the rest again. mesh: the devices over which rows are split, None
    for one device or where XLA is left to split everything. fsdp: weights lie cut among the devices
    of the mesh, along their last axis, and are gathered where they are multiplied by.
    """

    arch: ArchConfig
    size: SizeConfig
    dtype: jnp.dtype = jnp.float32
    attention: Implementation = "auto"
    remat: bool = False
    mesh: Mesh | None = None
    fsdp: bool = False

    @nn.compact
    def __call__(self, tokens, linear: Linear = dot, window=None):  # (B, T) -> (B, T, V), taps
        """Logits and taps of tokens (B, T).

        window: (B,) int32 or one number, the attention window of each row in tokens
        (`models.windows`), at most the widest; None for the widest. Raises ValueError for patterns
        that the depth does not allow, for rungs with documents without size.eot_token, a size
        without vocab_size, and rows that are longer than a table of positions.
        """
        arch, size = self.arch, self.size
        check_depth(arch, size)
        if size.vocab_size is None:
            raise ValueError("size.vocab_size=None: give the number of tokens (GPT-2: 50304)")
        if arch.position == "learned" and tokens.shape[1] > size.short_row:
            raise ValueError(
                f"rows of {tokens.shape[1]} tokens: the position table has "
                f"size.short_row={size.short_row}; give shorter ones, or arch.position=rope"
            )
        init = Initializers(arch, size.n_layer)
        linear = self._on_whole_kernels(linear)
        wte = Table(size.vocab_size, size.n_embd, init.wte, name="wte")()
        x = self._take_rows(wte, tokens)
        if arch.position == "learned":
            wpe = Table(size.short_row, size.n_embd, init.table, name="wpe")()
            x = x + wpe[None, : tokens.shape[1]]
        if arch.embed_norm:
            x = rms_norm(x, arch.norm_eps)
        context = Context(
            x,
            self._documents(tokens),
            self._window(window, tokens.shape[0]),
            self._value_pieces(tokens, init),
            self._rotary_tables(tokens.shape[1]),
        )
        x, taps = self._blocks(x, context, linear)
        x = taps["final_norm"] = rms_norm(x, arch.norm_eps)
        taps["logits"] = self._logits(x, wte, linear, init)
        return taps["logits"], taps

    def _on_whole_kernels(self, linear: Linear) -> Linear:
        """`linear` with kernels gathered: after their cast, so that half as many bytes travel."""
        if not self.cut:
            return linear
        return lambda x, kernel, path: linear(x, whole(kernel, self.mesh, x), path)

    def _take_rows(self, table, tokens):  # (V, D), (B, T) -> (B, T, D)
        if not self.cut:
            return take_rows(table, tokens)
        return rows_of_cut_table(take_rows, table, tokens, self.mesh)

    @property
    def cut(self) -> bool:
        """Whether weights lie cut among several devices."""
        return self.fsdp and self.mesh is not None and self.mesh.size > 1

    def _documents(self, tokens):
        if not self.arch.documents:
            return None
        if self.size.eot_token is None:
            raise ValueError(
                "size.eot_token=None: arch.documents=True needs it (GPT-2: size.eot_token=50256)"
            )
        return document_ids(tokens, self.size.eot_token)

    def _window(self, window, rows: int):  # (B,)
        widest = widest_window(self.arch, self.size)
        if widest is None:
            return None
        return jnp.broadcast_to(
            jnp.asarray(widest if window is None else window, jnp.int32), (rows,)
        )

    def _value_pieces(self, tokens, init: Initializers):  # (B, T, D) each
        size = self.size
        count = num_value_pieces(self.arch, size.n_layer)
        if self.arch.value == "embed_outer":
            names = [f"value_embed_{i}" for i in range(count)]
            tables = [Table(size.vocab_size, size.n_embd, init.table, name=name) for name in names]
            return tuple(self._take_rows(table(), tokens) for table in tables)
        if not count:
            return ()
        table = Table(size.vocab_size, count * size.n_embd, init.table, name="value_embed")()
        return tuple(jnp.split(self._take_rows(table, tokens), count, axis=-1))

    def _rotary_tables(self, length: int):
        arch, head_dim = self.arch, self.size.head_dim
        if arch.position == "learned":
            return None
        frequency = half_frequencies if arch.position == "half_rope" else frequencies
        dtype = self.dtype if arch.rope_table == "compute" else jnp.dtype(arch.rope_table)
        return rotary_tables(length, frequency(head_dim), dtype)

    def _blocks(self, x, context: Context, linear: Linear):
        """The stream after the last block, and the taps of all."""
        plan = layer_plan(self.arch, self.size.n_layer)
        settings = (self.arch, self.size, self.dtype)
        block = nn.remat(Block, static_argnums=(4,)) if self.remat else Block
        if self.arch.unet:
            start = nn.initializers.ones
            skip_weights = self.param("skip_weights", start, (self.size.n_layer // 2,))
        taps = {}
        for i, layer in enumerate(plan):
            if layer.skip_from is not None:
                weight = skip_weights[i - self.size.n_layer // 2]
                x = x + weight * taps[f"h_{layer.skip_from}/resid_post"]
            run = block(*settings, layer, self.attention, self.mesh, name=f"h_{i}")
            x, block_taps = run(x, taps.get("h_0/v"), context, linear)
            taps |= {f"h_{i}/{name}": value for name, value in block_taps.items()}
        return x, taps

    def _logits(self, x, wte, linear: Linear, init: Initializers):  # (B, T, V)
        arch, size = self.arch, self.size
        if arch.head == "tied":
            kernel = wte.T
        else:
            kernel = Head(size.n_embd, size.vocab_size, init.head, name="lm_head")()
        return head_logits(
            x,
            kernel,
            softcap=arch.softcap,
            dtype=self.dtype,
            float8=arch.head_dtype == "float8",
            product=partial(linear, path=head_path(arch)),
        )


def token_loss(logits: jnp.ndarray, targets: jnp.ndarray) -> jnp.ndarray:
    """Cross-entropy in nats of each target (B, T) under logits (B, T, V), float32.

    A target outside 0..V-1 gives NaN.
    """
    targets = beyond_end(targets, logits.shape[-1])
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="fill")[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def head_path(arch: ArchConfig) -> str:
    """The path of the output head's parameter."""
    return "wte/embedding" if arch.head == "tied" else "lm_head/kernel"


def head_kernel(params: dict, arch: ArchConfig) -> jnp.ndarray:
    """The kernel (D, V) of the output head."""
    module, name = head_path(arch).split("/")
    kernel = params[module][name]
    return kernel.T if arch.head == "tied" else kernel


def init_params(model: GPT, seed: int) -> dict:
    """Fresh float32 parameters as a nested dict."""
    tokens = jnp.zeros((1, model.size.block), jnp.int32)
    return model.init(jax.random.key(seed), tokens)["params"]
