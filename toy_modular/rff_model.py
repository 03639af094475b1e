"""Regression on averaged random features as a problem (toy spec 1.2).

Both tracks see the teacher's features phi(z_t), which are frozen, and not its coefficients.

A   Linear(P, D) + learned positions (none with rotary ones), L pre-LayerNorm blocks of causal
    attention and a GELU MLP, all with biases; the last position's h, without another norm, is read
    out by Linear(D, 1).
B   h = mean_t phi(z_t), read out by Linear(P, 1): the teacher's own form.

The settings of the ladder that mean something here are arch.position (learned or rope), qk_norm,
unet, attn_scale, window (none or token), init, zero_proj and zero_head; parameters are named so
that `optim.groups` knows them. The output head is a matrix of its own whatever arch.head says.

Legend of shape comments: B rows, T positions, Z width of a latent, P features, D width, H heads.
"""

from functools import lru_cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from models.attention import attention
from models.config import ArchConfig, SizeConfig, check_depth
from models.gpt import rms_norm
from models.initializers import Initializers
from models.layers import layer_plan
from models.linear import Table
from models.rotary import frequencies, rotary_tables, rotate
from models.windows import widest_window
from optim.groups import make_optimizer
from optim.schedules import Horizon
from toy_modular.config import RffConfig
from toy_modular.language import POSITION_STD
from toy_modular.problem import Data, Problem
from toy_modular.rff import make_splits, make_teacher
from toy_modular.run_config import RunConfig

SEEDS = 64
"""Teachers that a program knows: one program serves members of all seeds, each with its own."""

LAYER_NORM_EPS = 1e-5
READ, PROXY = "final/last", "residual_proxy/last"
MEANINGLESS = (
    "documents",
    "long_short",
    "drop_attention",
    "value",
    "x0_skip",
    "softcap",
    "embed_norm",
)


def make_problem(config: RunConfig) -> Problem:
    """Model, loss and optimizer of a run; rows are those of `load_data`.

    The loss is the mean squared error. Taps: final/last, the h that is read out, (B, D), which on
    track B is the mean of the features (B, P); residual_proxy/last, 2 (prediction - y) h, the
    gradient of a row's loss by the readout's kernel. Raises ValueError for a setting of the
    architecture that the model does not have.
    """
    model = make_model(config)
    teachers = [jnp.asarray(part) for part in _teachers(config.rff)]

    def features(rows):  # (B, T, P)
        omega, phase = (part[rows["teacher"][0]] for part in teachers)
        angles = jnp.einsum("btz,pz->btp", rows["latents"], omega, precision="highest")
        return (2 / config.rff.num_features) ** 0.5 * jnp.cos(angles + phase[None, None, :])

    def loss(params, rows):
        prediction, h = model.apply({"params": params}, features(rows))
        residual = prediction - rows["targets"]
        return jnp.mean(residual**2), {READ: h, PROXY: 2 * residual[:, None] * h}

    def init(key):
        shape = (1, config.rff.seq_len, config.rff.num_features)
        return model.init(key, jnp.zeros(shape))["params"]

    kernels = ("lm_head/kernel",)
    if config.rff.track == "A":
        ends = sorted({0, config.size.n_layer - 1})
        blocks = tuple(f"h_{i}/{part}/c_proj/kernel" for i in ends for part in ("attn", "mlp"))
        kernels = ("wte/kernel", *kernels, *blocks)
    return Problem(
        init=init,
        loss=loss,
        score=lambda params, rows: {"loss": loss(params, rows)[0]},
        tx=make_optimizer(
            config.optim, Horizon(config.max_steps), jax.eval_shape(init, jax.random.key(0))
        ),
        activations=(READ, PROXY),
        gradients=kernels,
        weights=kernels,
    )


@lru_cache(maxsize=4)
def _teachers(config: RffConfig) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies (SEEDS, P, Z) and phases (SEEDS, P) of the teachers of all seeds, float32."""
    teachers = [make_teacher(config, seed) for seed in range(SEEDS)]
    omega, phase = (np.stack([t[i] for t in teachers]).astype(np.float32) for i in range(2))
    return omega, phase


def load_data(config: RunConfig) -> Data:
    """Latents (N, T, Z), targets (N,) and the number of their teacher (N,), the seed, by split.

    Raises ValueError for a seed that has no teacher.
    """
    if config.seed >= SEEDS:
        raise ValueError(f"seed={config.seed} with task=rff: give at most {SEEDS - 1}")
    return Data(
        *(
            {
                "latents": split.latents,
                "targets": split.targets,
                "teacher": np.full(len(split.targets), config.seed, np.int32),
            }
            for split in make_splits(config.rff, config.seed)
        )
    )


def make_model(config: RunConfig) -> nn.Module:
    """The model of a run's track; raises ValueError for a setting that it does not have."""
    arch, plain = config.arch, ArchConfig()
    if config.rff.track == "B":
        return LinearModel(arch)
    foreign = [name for name in MEANINGLESS if getattr(arch, name) != getattr(plain, name)]
    foreign += ["position"] * (arch.position == "half_rope")
    foreign += ["window"] * (arch.window not in ("none", "token"))
    if foreign:
        name = foreign[0]
        raise ValueError(
            f"arch.{name}={getattr(arch, name)} with task=rff: its model has no such thing; "
            f"set arch.{name}={getattr(plain, name)}"
        )
    check_depth(arch, config.size)
    return Transformer(arch, config.size)


class LinearModel(nn.Module):
    """Track B. Features (B, T, P) -> predictions (B,), and their mean (B, P)."""

    arch: ArchConfig

    @nn.compact
    def __call__(self, features):
        h = jnp.mean(features, axis=1)
        return _linear("lm_head", 1, Initializers(self.arch, 1).head, h)[:, 0], h


class Transformer(nn.Module):
    """Track A. Features (B, T, P) -> predictions (B,), and h at the last position (B, D)."""

    arch: ArchConfig
    size: SizeConfig

    @nn.compact
    def __call__(self, features):
        arch, size = self.arch, self.size
        init = Initializers(arch, size.n_layer)
        x = _linear("wte", size.n_embd, init.hidden, features)  # (B, T, D)
        if arch.position == "learned":
            start = nn.initializers.normal(POSITION_STD)
            x = x + Table(features.shape[1], size.n_embd, start, name="wpe")()[None]
        if arch.unet:
            half = (size.n_layer // 2,)
            skip_weights = self.param("skip_weights", nn.initializers.ones, half)
        outputs = []
        for i, layer in enumerate(layer_plan(arch, size.n_layer)):
            if layer.skip_from is not None:
                x = x + skip_weights[i - size.n_layer // 2] * outputs[layer.skip_from]
            x = Block(arch, size, name=f"h_{i}")(x)
            outputs.append(x)
        h = x[:, -1]
        return _linear("lm_head", 1, init.head, h)[:, 0], h


class Block(nn.Module):
    """x + attention, then x + MLP, each on the layer-normalised stream (B, T, D)."""

    arch: ArchConfig
    size: SizeConfig

    @nn.compact
    def __call__(self, x):
        normed = nn.LayerNorm(epsilon=LAYER_NORM_EPS, name="ln_1")(x)
        x = x + Attention(self.arch, self.size, name="attn")(normed)
        normed = nn.LayerNorm(epsilon=LAYER_NORM_EPS, name="ln_2")(x)
        return x + MLP(self.arch, self.size, name="mlp")(normed)


class Attention(nn.Module):
    """Causal multi-head attention on (B, T, D); heads are contiguous slices of the width."""

    arch: ArchConfig
    size: SizeConfig

    @nn.compact
    def __call__(self, x):
        arch, size = self.arch, self.size
        init = Initializers(arch, size.n_layer)
        q, k, v = (
            _linear(name, size.n_embd, init.hidden, x).reshape(
                *x.shape[:2], size.n_head, size.head_dim
            )
            for name in ("c_q", "c_k", "c_v")
        )  # (B, T, H, D / H)
        if arch.qk_norm:
            q, k = rms_norm(q, arch.norm_eps), rms_norm(k, arch.norm_eps)
        if arch.position == "rope":
            tables = rotary_tables(x.shape[1], frequencies(size.head_dim), x.dtype)
            q, k = (rotate(each, *tables, arch.rope_sign) for each in (q, k))
        widest = widest_window(arch, size)
        mixed = attention(
            q,
            k,
            v,
            window=None if widest is None else jnp.full(x.shape[:1], widest, jnp.int32),
            rule=arch.window,
            block=size.block,
            widest=widest,
            scale=arch.attn_scale,
        )
        return _linear("c_proj", size.n_embd, init.proj, mixed.reshape(x.shape))


class MLP(nn.Module):
    """Two linear layers around an exact GELU."""

    arch: ArchConfig
    size: SizeConfig

    @nn.compact
    def __call__(self, x):
        init = Initializers(self.arch, self.size.n_layer)
        hidden = nn.gelu(_linear("c_fc", self.size.mlp_width, init.hidden, x), approximate=False)
        return _linear("c_proj", self.size.n_embd, init.proj, hidden)


def _linear(name: str, features: int, start, x: jax.Array) -> jax.Array:
    """A linear layer (..., in) -> (..., features) whose bias starts as torch's does."""
    bound = x.shape[-1] ** -0.5

    def start_bias(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nn.Dense(features, kernel_init=start, bias_init=start_bias, name=name)(x)
