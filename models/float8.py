"""The float8 product of the output head, with constant scales (ladder spec section 3.5).

x8 = e4m3(2 x),  w8 = e4m3(32 w),  z = (x8 w8) / 64;  g8 = e5m2(s g),  dx = (g8 w8') / (32 s),
dw = (x8' g8) / (2 s), with s from `gradient_scale`; x, w, z, g and dx are rounded to bfloat16 on
the way, in models of every dtype. Nothing is measured at run time. Every float8
number is a float32 number too, so where the hardware has no float8 units (`native=False`) operands
are widened without loss and multiplied in float32: the roundings are the same, the speed is not.

Shapes: x is (..., D), kernel (D, V), z and g (..., V).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from models.hardware import nvidia_capability

FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2
X_SCALE, W_SCALE = 2.0, 32.0
# What goes into a float8 product and comes out of it. The reference logits of the released code are
# met bit by bit with this rounding before e4m3, and in a quarter of the cases without it.
AROUND = jnp.bfloat16
# The published constant, and the tokens of the mean loss for which it was chosen.
GRADIENT_SCALE, GRADIENT_SCALE_TOKENS = 2.0**29, 65_536
FIRST_NATIVE = (8, 9)  # compute capability of the first NVIDIA cards with float8 matrix units


def gradient_scale(num_tokens: int) -> float:
    """Factor on d loss / d z before e5m2, for a loss that is a mean over `num_tokens`.

    Each term of the gradient shrinks as the number of tokens grows, so the published constant is
    scaled along: a fixed one saturates at small batches. |s g| stays within 2**13, a seventh of the
    largest e5m2 number.
    """
    return GRADIENT_SCALE * num_tokens / GRADIENT_SCALE_TOKENS


def has_native_float8() -> bool:
    """Whether the default device is an NVIDIA card whose matrix units take float8 operands."""
    capability = nvidia_capability()
    return capability is not None and capability >= FIRST_NATIVE


def quantize(x: jax.Array, scale: float, dtype) -> jax.Array:
    """scale * x rounded to the nearest float8 number; beyond the largest one it stays there.

    The limit is explicit because casts differ: some saturate, others give inf or NaN. A NaN stays.
    """
    limit = float(jnp.finfo(dtype).max)
    return jnp.clip(x.astype(jnp.float32) * scale, -limit, limit).astype(dtype)


def operands(x: jax.Array, scale: float) -> jax.Array:
    """An activation or a kernel as the forward product takes it: to bfloat16, then to e4m3."""
    return quantize(round_to(x.astype(jnp.float32), AROUND), scale, FORWARD)


def round_to(x: jax.Array, dtype) -> jax.Array:
    """float32 to `dtype`; unlike a bare cast, XLA may not skip it to keep excess precision."""
    kept = jnp.finfo(dtype)
    return lax.reduce_precision(x, kept.nexp, kept.nmant).astype(dtype)


def forward_product(x8: jax.Array, w8: jax.Array, *, native: bool) -> jax.Array:
    """z (..., V) bfloat16 from x8 (..., D) and w8 (D, V); fast accumulation where native."""
    axes = ((x8.ndim - 1,), (0,))
    z = _dot(x8, w8, axes, lax.Precision.DEFAULT, AROUND, native)
    return z * (1 / (X_SCALE * W_SCALE))  # a power of two, so nothing is rounded a second time


def input_gradient(g8: jax.Array, w8: jax.Array, *, num_tokens: int, native: bool) -> jax.Array:
    """dx (..., D) bfloat16 from g8 (..., V) and w8 (D, V)."""
    axes = ((g8.ndim - 1,), (1,))
    dx = _dot(g8, w8, axes, lax.Precision.HIGHEST, jnp.float32, native)
    return round_to(dx / (gradient_scale(num_tokens) * W_SCALE), AROUND)


def kernel_gradient(x8: jax.Array, g8: jax.Array, *, num_tokens: int, native: bool) -> jax.Array:
    """dw (D, V) float32, summed over all leading axes of x8 (..., D) and g8 (..., V)."""
    leading = tuple(range(x8.ndim - 1))
    dw = _dot(x8, g8, (leading, leading), lax.Precision.HIGHEST, jnp.float32, native)
    return dw / (gradient_scale(num_tokens) * X_SCALE)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def float8_linear(x: jax.Array, kernel: jax.Array, num_tokens: int, native: bool) -> jax.Array:
    """x (..., D) times kernel (D, V) through float8 in both directions, z (..., V) bfloat16.

    The gradient that comes back must be that of a mean over `num_tokens`: its scale depends on it.
    """
    return forward_product(operands(x, X_SCALE), operands(kernel, W_SCALE), native=native)


def _linear_forward(x, kernel, num_tokens, native):
    return float8_linear(x, kernel, num_tokens, native), (x, kernel)


def _linear_backward(num_tokens, native, saved, g):
    x, kernel = saved
    x8, w8 = operands(x, X_SCALE), operands(kernel, W_SCALE)
    g8 = quantize(g, gradient_scale(num_tokens), BACKWARD)
    dx = input_gradient(g8, w8, num_tokens=num_tokens, native=native)
    dw = kernel_gradient(x8, g8, num_tokens=num_tokens, native=native)
    return dx.astype(x.dtype), dw.astype(kernel.dtype)


float8_linear.defvjp(_linear_forward, _linear_backward)


def native_float8_products(compiled_text: str) -> int:
    """Number of cuBLASLt float8 products in the text of a compiled program.

    XLA turns a float8 product that it cannot hand to cuBLASLt into a bfloat16 one without a word;
    this count is the only sign of it.
    """
    return compiled_text.count('custom_call_target="__cublas$lt$matmul$f8"')


def _dot(lhs, rhs, axes, precision, out_dtype, native):
    if native:
        return lax.dot_general(
            lhs, rhs, (axes, ((), ())), precision=precision, preferred_element_type=out_dtype
        )
    lhs, rhs = lhs.astype(jnp.float32), rhs.astype(jnp.float32)
    # Highest: float32 products may otherwise run in TF32 or bfloat16.
    return round_to(lax.dot_general(lhs, rhs, (axes, ((), ())), lax.Precision.HIGHEST), out_dtype)
