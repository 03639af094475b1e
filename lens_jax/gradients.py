"""Per-sample gradients of chosen weight matrices: by definition, and from one backward pass.

A sample is one row (or window) of tokens and its loss the mean over its own tokens. For a linear
map y_t = x_t W the gradient of sample i is the sum over its tokens of the outer product of x_t and
the cotangent of y_t, so one backward pass of the ordinary training loss holds every sample's
gradient of every matrix. `observed_linear` forms them inside the vector-Jacobian product of the
map and hands them out as the cotangent of a zero argument, a sink: the step's own backward yields
them, layer by layer, and each is freed before the next is formed.

`per_sample_gradients` is the definition, vmap(grad), and asks nothing of the model.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lens_jax.spectra import gram_with_mean
from lens_jax.taps import call_loss, check_trainable, get_parameters, replace_parameters


def per_sample_gradients(
    loss_fn: Callable, params: Any, batch: Any, paths: Iterable[str]
) -> dict[str, jax.Array]:
    """Gradient of every sample's own loss: path -> (N, *shape of the parameter), float32.

    loss_fn(params, batch) -> (loss, aux), the loss a mean over samples; every leaf of batch has
    samples in its leading axis and is passed one sample (of leading size 1) at a time.
    """
    chosen = get_parameters(params, paths)
    check_trainable(params, chosen)

    def loss_of_one(values, sample):
        batch_of_one = jax.tree.map(lambda leaf: leaf[None], sample)
        return call_loss(loss_fn, replace_parameters(params, values), batch_of_one)[0]

    return jax.vmap(jax.grad(loss_of_one), in_axes=(None, 0))(chosen, batch)


@dataclass(frozen=True)
class Sink:
    """What a sink's cotangent holds for the samples of one backward pass.

    samples: N, how many equal consecutive pieces the rows of the pass are cut into.
    form: "gram", the matrix (N+1, N+1) of `spectra.gram_with_mean`, so that no gradient outlives
    its layer; or "rows", the per-sample gradients themselves, (N, in * out), for Gram matrices
    over several passes.
    """

    samples: int
    form: Literal["gram", "rows"] = "gram"

    def shape(self, kernel: jax.Array) -> tuple[int, int]:
        """Shape of the sink of one kernel."""
        if self.form == "gram":
            return (self.samples + 1, self.samples + 1)
        return (self.samples, kernel.size)

    def collect(self, x: jax.Array, cotangent: jax.Array) -> jax.Array:
        """The sink's cotangent from inputs (..., in) and output cotangents (..., out) of a map."""
        x = x.reshape(self.samples, -1, x.shape[-1]).astype(jnp.float32)
        cotangent = cotangent.reshape(self.samples, -1, cotangent.shape[-1])
        # a sample's own loss is `samples` times its share of the mean over samples
        cotangent = cotangent.astype(jnp.float32) * self.samples
        return self.of_rows(jnp.einsum("nti,nto->nio", x, cotangent, precision="highest"))

    def of_rows(self, gradients: jax.Array) -> jax.Array:
        """What the sink holds of per-sample gradients (N, ...)."""
        rows = gradients.reshape(self.samples, -1)
        return gram_with_mean(rows) if self.form == "gram" else rows


def make_sinks(params: Any, paths: Iterable[str], sink: Sink) -> dict[str, jax.Array]:
    """Zero sinks for the kernels at `paths`; differentiate the loss with respect to them."""
    kernels = get_parameters(params, paths)
    return {path: jnp.zeros(sink.shape(kernel)) for path, kernel in kernels.items()}


def observed_linear(sinks: Mapping[str, jax.Array], sink: Sink) -> Callable:
    """A `linear(x, kernel, path)` that is x @ kernel and feeds the sinks on the way back.

    Kernels whose path has no sink are multiplied as ever. The loss must weigh all samples equally.
    `linear.watched` holds the paths that have one, for models that fuse a product with what
    follows it where nobody watches; `linear.uses` counts the products of each, for `check_uses`.
    """
    uses = dict.fromkeys(sinks, 0)

    def linear(x, kernel, path):
        if path not in sinks:
            return x @ kernel
        uses[path] += 1
        return _observed_product(x, kernel, sinks[path], sink)

    linear.watched, linear.uses = frozenset(sinks), uses
    return linear


def check_uses(linear: Callable, sink: Sink) -> None:
    """Raises ValueError after a forward pass that fed a sink never, or a Gram matrix twice.

    The first would measure zeros, the second a sum of Gram matrices for the Gram matrix of a sum.
    """
    for path, count in linear.uses.items():
        if count == 0:
            raise ValueError(
                f"the loss never called linear(x, kernel, {path!r}), so one backward pass cannot "
                f"see it; call it there, or take route='vmap_grad'"
            )
        if count > 1 and sink.form == "gram":
            raise ValueError(
                f"the loss called linear(x, kernel, {path!r}) {count} times, and the gradient of "
                f"a kernel in several places has no Gram matrix of its own there; take "
                f"route='vmap_grad'"
            )


def _product(x, kernel, values, sink):
    del values, sink
    return x @ kernel


def _product_forward(x, kernel, values, sink):
    return _product(x, kernel, values, sink), (x, kernel)


def _product_backward(sink, residuals, cotangent):
    x, kernel = residuals
    _, pull_back = jax.vjp(jnp.matmul, x, kernel)
    return *pull_back(cotangent), sink.collect(x, cotangent)


_observed_product = jax.custom_vjp(_product, nondiff_argnums=(3,))
_observed_product.defvjp(_product_forward, _product_backward)
