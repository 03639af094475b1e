"""Per-sample gradients of chosen weight matrices: by definition, and from one backward pass.

A sample is one row (or window) of tokens and its loss the mean over its own tokens. For a linear
map y_t = x_t W the gradient of sample i is the sum over its tokens of the outer product of x_t and
the cotangent of y_t, so one backward pass of the ordinary training loss holds every sample's
gradient of every matrix. `Watch` forms them inside the vector-Jacobian product of the map and hands
them out as the cotangent of a zero argument, a sink: the step's own backward yields them, layer by
layer, and each is freed before the next is formed.

`per_sample_gradients` is the definition, vmap(grad), and asks nothing of the model.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

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


class Observed(NamedTuple):
    """What is known of one kernel's per-sample gradients after a pass.

    values: what `Sink.of_rows` makes of them. surplus: products that ran beyond those that it holds
    for, (); not 0 where the model repeats what it was traced with once.
    """

    values: jax.Array
    surplus: jax.Array


@dataclass(frozen=True)
class Sink:
    """What a sink's cotangent holds for the samples of one backward pass.

    samples: N of the pass. form: "gram", the matrix (N+1, N+1) of `spectra.gram_with_mean`, so that
    no gradient outlives its layer; or "rows", the per-sample gradients themselves, (N, in * out),
    for Gram matrices over several passes. pieces: into how many equal stretches of its positions
    each row of the pass is cut, a sample each.
    """

    samples: int
    form: Literal["gram", "rows"] = "gram"
    pieces: int = 1

    @property
    def rows(self) -> int:
        """Rows of data in one pass."""
        return self.samples // self.pieces

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

    def check_product(self, x: jax.Array, kernel: jax.Array, path: str, shape: tuple) -> None:
        """Raises ValueError for a product x @ kernel whose rows or kernel would be misread.

        shape: of the parameter at `path`. It may come reshaped or transposed, with all its entries,
        or as one of the L kernels of a stack (L, ...) that the model loops over.
        """
        call = f"linear(x, kernel, {path!r})"
        if x.ndim < 2 or x.shape[0] != self.rows:
            raise ValueError(
                f"{call} got x of shape {x.shape} in a pass of {self.rows} rows: give x with the "
                f"rows first, (B, ..., in); a model of one row under vmap needs route='vmap_grad'"
            )
        if self.pieces > 1 and (x.ndim < 3 or x.shape[1] % self.pieces):
            raise ValueError(
                f"pieces={self.pieces} do not cut x of shape {x.shape} in {call}: give a divisor "
                f"of the positions of a row, its second axis"
            )
        copies = self.copies(kernel, shape)
        if not copies:
            raise ValueError(
                f"{call} got a kernel of shape {kernel.shape}, the parameter there is {shape}: "
                f"pass the parameter itself, or take route='vmap_grad'"
            )
        if copies > 1 and self.form == "rows":
            raise ValueError(
                f"the parameter at {path!r} is a stack of {copies} kernels, {shape}, which one "
                f"backward pass sees in a single pass only: give no chunk, or take "
                f"route='vmap_grad'"
            )

    @staticmethod
    def copies(kernel: jax.Array, shape: tuple) -> int:
        """How many products of such kernels make up a parameter of that shape; 0 if none do."""
        if kernel.ndim == 2 and kernel.size == math.prod(shape):
            return 1
        stacked = len(shape) == 3 and kernel.ndim == 2 and kernel.size == math.prod(shape[1:])
        return shape[0] if stacked else 0


class Watch:
    """Kernels watched in one backward pass: their sinks, and the `linear` that feeds those.

    Differentiate the loss with respect to `sinks`, call the model with `linear`, then `check` and,
    after the backward pass, `observed`.
    """

    def __init__(self, params: Any, paths: Iterable[str], sink: Sink):
        kernels = get_parameters(params, paths)
        self._sink = sink
        self._shapes = {path: kernel.shape for path, kernel in kernels.items()}
        self._uses = dict.fromkeys(kernels, 0)  # products that were traced
        self._copies = dict.fromkeys(kernels, 1)
        self.sinks = {
            path: (jnp.zeros(sink.shape(kernel), jnp.float32), jnp.zeros((), jnp.float32))
            for path, kernel in kernels.items()
        }

    def linear(self, sinks: Mapping[str, Any]) -> Callable:
        """A `linear(x, kernel, path)` that is x @ kernel and feeds the sinks on the way back.

        Kernels whose path has no sink are multiplied as ever. The loss must weigh all samples
        equally. `linear.watched` holds the paths that have one, for models that fuse a product with
        what follows it where nobody watches.
        """

        def linear(x, kernel, path):
            if path not in sinks:
                return x @ kernel
            self._sink.check_product(x, kernel, path, self._shapes[path])
            self._copies[path] = self._sink.copies(kernel, self._shapes[path])
            self._uses[path] += 1
            return _observed_product(x, kernel, sinks[path], self._sink)

        linear.watched = frozenset(sinks)
        return linear

    def check(self) -> None:
        """Raises ValueError after a forward pass that fed a sink never, or a Gram matrix twice.

        The first would measure zeros, the second a sum of Gram matrices for the Gram matrix of a
        sum.
        """
        for path, count in self._uses.items():
            if count == 0:
                raise ValueError(
                    f"the loss never called linear(x, kernel, {path!r}), so one backward pass "
                    f"cannot see it; call it there, or take route='vmap_grad'"
                )
            if count > self._copies[path] and self._sink.form == "gram":
                raise ValueError(
                    f"the loss called linear(x, kernel, {path!r}) {count} times, and the gradient "
                    f"of a kernel in several places has no Gram matrix of its own there; take "
                    f"route='vmap_grad'"
                )

    def observed(self, cotangents: Mapping[str, Any]) -> dict[str, Observed]:
        """What the cotangents of the sinks say of every kernel.

        Every product that runs counts one, also where it was traced once for all: in a scan over
        one kernel, or under vmap, where sums of Gram matrices would pass for a Gram matrix.
        """
        found = {}
        for path, (values, count) in cotangents.items():
            expected = self._copies[path] if self._sink.form == "gram" else self._uses[path]
            found[path] = Observed(values, count - expected)
        return found


def _product(x, kernel, sinks, sink):
    del sinks, sink
    return x @ kernel


def _product_forward(x, kernel, sinks, sink):
    return _product(x, kernel, sinks, sink), (x, kernel)


def _product_backward(sink, residuals, cotangent):
    x, kernel = residuals
    _, pull_back = jax.vjp(jnp.matmul, x, kernel)
    # One, in a way that vmap must sum over what it maps: a plain constant it would leave alone.
    one = jnp.logical_or(True, cotangent.reshape(-1)[0] == 0).astype(jnp.float32)
    return *pull_back(cotangent), (sink.collect(x, cotangent), one)


_observed_product = jax.custom_vjp(_product, nondiff_argnums=(3,))
_observed_product.defvjp(_product_forward, _product_backward)
