"""What to measure, declared once: `make_lens` names taps and parameters of any JAX model.

The model is a function loss_fn(params, batch) -> (loss, taps): the loss a mean over the rows of
the batch, params any pytree, taps a dict of arrays (B, ..., D). Nothing else is asked of it for
route="vmap_grad". Where its products go through a third argument, `linear(x, kernel, path)`, the
gradients of all kernels come from one backward pass (route="one_backward").
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax

from lens_jax.gradients import Sink
from lens_jax.probes import Probe, activation_probe, gradient_probe, weight_probe
from lens_jax.records import check_site
from lens_jax.resampling import MOST_GROUPS, even_groups
from lens_jax.taps import num_rows

Route = Literal["one_backward", "vmap_grad"]


class Sweep(NamedTuple):
    """The per-sample gradients that one visit of the samples yields, and by which route.

    rows: of the data in one pass of that visit.
    """

    probe: Probe
    sink: Sink
    route: Route
    rows: int

    @property
    def paths(self) -> tuple[str, ...]:
        """The kernels whose gradients it yields."""
        return self.probe.reads

    def check_rows(self, count: int) -> None:
        """Raises ValueError unless a pass of `count` rows is what the sweep was made for."""
        if count != self.rows:
            raise ValueError(
                f"a pass of {count} rows, where the lens has {self.rows} a pass for its gradients"
            )


class Lens(NamedTuple):
    """Probes to run together.

    sweeps: visits of the gradient samples, the first together with the probes; more than one where
    memory does not hold the gradients of all kernels. passes: into how many equal consecutive
    parts the samples are cut, each with a forward and a backward pass of its own, where memory does
    not hold the activations of all. windows: rows of data that the activation probe must be shown
    (None: it does not say).
    """

    probes: tuple[Probe, ...] = ()
    sweeps: tuple[Sweep, ...] = ()
    passes: int = 1
    windows: int | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """The kernels whose per-sample gradients are measured."""
        return tuple(path for sweep in self.sweeps for path in sweep.paths)

    def check_windows(self, count: int) -> None:
        """Raises ValueError unless `count` rows are what the lens was made for."""
        if self.windows is not None and count != self.windows:
            raise ValueError(f"the lens was made for windows={self.windows}, the data has {count}")


class ProbeBatch(NamedTuple):
    """A held-out probe set: `samples` go forward and backward, `more` forward only.

    samples: a batch; more: batches stacked along a new leading axis, or None.
    """

    samples: Any
    more: Any = None


def make_lens(
    *,
    windows: int,
    activations: Sequence[str] = (),
    gradients: Sequence[str] = (),
    weights: Sequence[str] = (),
    probes: Sequence[Probe] = (),
    samples: int | None = None,
    chunk: int | None = None,
    pieces: int = 1,
    sweeps: int = 1,
    route: Route = "vmap_grad",
    spread: bool = False,
    groups: int = MOST_GROUPS,
    normalise: bool = True,
) -> Lens:
    """A lens on `windows` rows of data.

    activations: names of taps. gradients, weights: paths of parameters, as
    `lens_jax.taps.parameter_paths` lists them. probes: of one's own, on taps or parameters
    (`lens_jax.probes.Probe`). samples: how many of the rows, the first, are
    samples of the gradient probe (None: all). chunk: rows in one pass of the model (None: all
    samples at once). pieces: into how many equal stretches a row is cut, each a gradient sample
    with the mean loss of its own positions (one backward pass only). sweeps: visits of the samples,
    each for a part of the gradients. spread: every pass has rows from all over the data, in order
    (else one pass goes on where the last one ended), which decides what the groups of rows are
    that are left out for error bars. groups: at most so many of those, each with a covariance of
    its own (8 D^2 bytes a tap); 1: no error bars of activations. normalise: divide every activation
    vector by its root mean square first (protocol spec 1.2).
    Raises ValueError for numbers that do not fit together and for names that no record may have.
    """
    for name, places in (
        ("activations", activations),
        ("gradients", gradients),
        ("weights", weights),
    ):
        if isinstance(places, str):
            raise ValueError(f"{name}={places!r} is one name: give a list of names")
        for place in places:
            check_site(place)
    counts = {"windows": windows, "chunk": chunk, "pieces": pieces, "sweeps": sweeps}
    for name, count in (counts | {"groups": groups}).items():
        if count is not None and count < 1:
            raise ValueError(f"{name}={count}: give at least 1")
    if route not in get_args(Route):
        raise ValueError(f"route={route!r}: give one of {', '.join(get_args(Route))}")
    samples = windows if samples is None else samples
    if not 1 <= samples <= windows:
        raise ValueError(f"samples={samples}: give 1 to windows={windows}")
    chunk = samples if chunk is None else chunk
    rows = min(chunk, samples)  # of a pass over the samples
    if samples % rows or (windows - samples) % chunk:
        raise ValueError(
            f"chunk={chunk} does not divide samples={samples} and the {windows - samples} windows "
            f"beyond them; give a divisor"
        )
    if pieces > 1 and route == "vmap_grad":
        raise ValueError(f"pieces={pieces} of a row are samples to route='one_backward' only")
    _check_own(probes)
    passes, own, probes = samples // rows, tuple(probes), []
    if activations:
        passes_of = (rows, chunk) if windows > samples else (rows,)
        groups = even_groups(windows, *passes_of, spread=spread, most=groups)
        settings = {"spread": spread, "normalise": normalise}
        probes.append(activation_probe(activations, windows, groups, **settings))
    if weights:
        probes.append(weight_probe(tuple(weights)))
    sink = Sink(rows * pieces, "rows" if passes > 1 else "gram", pieces)
    parts = [part for k in range(sweeps) if (part := _part(gradients, sweeps, k))]
    on_taps = bool(activations) or any(probe.needs == "taps" for probe in own)
    return Lens(
        (*probes, *own),
        tuple(Sweep(gradient_probe(part, sink, passes), sink, route, rows) for part in parts),
        passes,
        windows if on_taps else None,
    )


def _check_own(probes: Sequence[Probe]) -> None:
    """Raises ValueError for probes that would take the place of others, or read no evidence."""
    taken = {"activation", "gradient", "weight"}
    for probe in probes:
        if probe.name in taken:
            raise ValueError(f"there are two probes called {probe.name!r}: give each its own name")
        if probe.needs not in ("taps", "params"):
            raise ValueError(
                f"the probe {probe.name!r} needs {probe.needs!r}: a probe of one's own reads "
                f"'taps' or 'params'"
            )
        taken.add(probe.name)


def _part(paths: Sequence[str], parts: int, k: int) -> tuple[str, ...]:
    """The k-th of nearly equal consecutive parts."""
    return tuple(paths[len(paths) * k // parts : len(paths) * (k + 1) // parts])


def split_windows(batch: Any, samples: int, chunk: int) -> ProbeBatch:
    """A batch whose leaves have all windows in their leading axis, as a probe set.

    The first `samples` rows are gradient samples, the rest is stacked in chunks.
    """
    more = num_rows(batch) - samples
    if more < 0 or more % chunk:
        raise ValueError(
            f"{num_rows(batch)} rows are not {samples} samples and whole chunks of {chunk}"
        )
    first = jax.tree.map(lambda leaf: leaf[:samples], batch)
    rest = jax.tree.map(lambda leaf: leaf[samples:], batch)
    if not more:
        return ProbeBatch(first)
    return ProbeBatch(
        first, jax.tree.map(lambda leaf: leaf.reshape(-1, chunk, *leaf.shape[1:]), rest)
    )
