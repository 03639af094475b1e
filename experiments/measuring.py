"""The work of `experiments.measure`: find weights and probe tokens, measure, tell, draw."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiments.checkpoints import Checkpoints
from experiments.config import RunConfig
from experiments.data import TokenFiles, cut_windows, held_out_stream, resolve_source
from experiments.instrument import Instrument
from experiments.metrics import read_metrics
from experiments.paper_probe import paper_tokens, paper_values, write_summary
from experiments.resolve import from_flat, read_stored, sized_by
from experiments.schedule import make_schedule
from experiments.setup import hold_out
from experiments.stops import failed_record_in_one_line
from lens_jax.fits import rankme, window_alpha
from lens_jax.jackknife import estimate
from lens_jax.records import read_step, step_path
from lens_jax.saved_run import depth, display_windows, layer_name
from lens_jax.show import draw_run
from models.atomic_files import write_json
from models.command_line import UsageError, flatten
from models.published import load_published
from models.windows import widest_window, window_at

if TYPE_CHECKING:
    from experiments.measure import MeasureConfig

EIGENVALUES = "act_cov_eigenvalues"


class Target(NamedTuple):
    """Weights to measure: what the record says of them, and read() -> nested NumPy arrays."""

    step: int
    tokens: int
    window: int | None
    facts: Mapping[str, Any]
    read: Callable[[], Any]


def measure(plan: "MeasureConfig", stored: RunConfig, config: RunConfig) -> int:
    """Measure what the plan names; returns the command's exit code.

    stored: the run's own configuration, which says what was held out; config: the one to measure
    with.
    """
    files = resolve_source(config.data)
    stored, config = (sized_by(c, files.vocab_size, files.eot_token) for c in (stored, config))
    files = files._replace(vocab_size=config.size.vocab_size)
    if plan.run is not None:
        folder, targets = Path(plan.run), run_targets(plan, stored, files)
    else:
        folder, targets = Path(config.out).expanduser(), [file_target(plan, config)]
    config, windows = probe_windows(plan.probe, stored, config, files)
    if plan.checkpoint is not None:
        _claim(folder, config)
    records = folder / plan.records
    with failed_record_in_one_line(records), Instrument(config, windows, records) as instrument:
        _measure_all(instrument, targets)
    for target in targets:
        path = step_path(instrument.folder, target.step)
        if plan.probe == "paper":
            write_summary(instrument.folder, *read_step(path))
    _print_results(instrument.folder, [target.step for target in targets], config.tier)
    if plan.records == "spectra":
        print(f"figure {draw_run(folder)}")
    return 0


def probe_windows(
    probe: str, stored: RunConfig, config: RunConfig, files: TokenFiles
) -> tuple[RunConfig, np.ndarray]:
    """The configuration with the sizes of its probe set, and the windows themselves.

    They come from the tokens that the run held out, so that none was trained on.
    Raises UsageError when those are too few.
    """
    held = hold_out(stored, files)
    if probe == "paper":
        spread, stream = False, held_out_stream(files, held, paper_tokens(config))
        config = from_flat(flatten(config) | paper_values(config, len(stream)))
    else:
        spread = config.data.probe_spread and not held.exclude
        stream = held_out_stream(files, held)[config.data.probe_offset :]
    count, length = config.probes.windows, config.probes.window + 1
    if not 0 < count * length <= len(stream):
        raise UsageError(
            f"probes.windows={count} windows of {length} tokens: {len(stream):,} tokens of "
            f"{files.name} are held out for them; give fewer or shorter windows"
        )
    return config, cut_windows(stream, count, length, spread)


def run_targets(plan: "MeasureConfig", stored: RunConfig, files: TokenFiles) -> list[Target]:
    """The checkpoints of a run that the plan asks for, by step; raises UsageError."""
    folder = Path(plan.run)
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    steps = checkpoints.steps()
    if not steps:
        raise UsageError(f"run={folder}: there is no checkpoint in it yet")
    if plan.tokens is not None:
        wanted = [_nearest(steps, count / stored.tokens_per_step) for count in plan.tokens]
        steps = sorted(set(wanted))
    data = checkpoints.read_meta(steps[0])["data"]
    if data != files.name:
        raise UsageError(
            f"run={folder} was trained on {data}, not on {files.name}; bring that data back, or "
            f"name its shards with data="
        )
    rows = read_metrics(folder / "metrics.jsonl")
    losses = {row["step"]: row["loss"] for row in rows if row["kind"] == "val"}
    window_steps = make_schedule(stored).window_steps
    return [
        Target(
            step,
            step * stored.tokens_per_step,
            window_at(stored.arch, stored.size, step, window_steps),
            {"val_loss": losses[step]} if step in losses else {},
            partial(checkpoints.restore_numpy, step, "params"),
        )
        for step in steps
    ]


def _nearest(steps: list[int], wanted: float) -> int:
    """The step nearest by ratio; step 0 only where it is asked for."""
    if wanted < 1 and 0 in steps:
        return 0
    return min((step for step in steps if step), key=lambda step: abs(np.log(step / wanted)))


def file_target(plan: "MeasureConfig", config: RunConfig) -> Target:
    """The weights of a published file; they are read at once, so that a wrong file is told early.

    Raises UsageError for a file that does not fit the rung.
    """
    try:
        params = load_published(plan.checkpoint, config.arch, config.size)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None
    window = widest_window(config.arch, config.size) if plan.window is None else plan.window
    tokens = plan.tokens[0] if plan.tokens else 0
    return Target(plan.step, tokens, window, {"checkpoint": plan.checkpoint}, lambda: params)


def _claim(folder: Path, config: RunConfig) -> None:
    """Make the folder of a file's records; refuse one that belongs to something else."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"out={folder}: {error.strerror}; choose another") from None
    if not (folder / "config.json").exists():
        return write_json(folder / "config.json", flatten(config))
    known = read_stored(folder)
    if (known.arch, known.size) != (config.arch, config.size):
        raise UsageError(
            f"out={folder} holds records of rung {known.rung} at {known.tier}; choose another"
        )


def _measure_all(instrument: Instrument, targets: list[Target]) -> None:
    """Measure the targets that have no record yet, with a line each."""
    metas = [
        instrument.meta(target.step, target.tokens, target.window, **target.facts)
        for target in targets
    ]
    pairs = zip(targets, metas, strict=True)
    todo = [(target, meta) for target, meta in pairs if not instrument.is_done(meta)]
    if len(todo) < len(targets):
        print(f"{len(targets) - len(todo)} of {len(targets)} are measured already")
    began = time.monotonic()
    for done, (target, meta) in enumerate(todo, start=1):
        loss = instrument.measure(target.read(), meta)
        took = time.monotonic() - began
        print(
            f"step {target.step:,} ({target.tokens:,} tokens): "
            + (f"probe loss {loss:.4f}, " if loss is not None else "")
            + f"{done} of {len(todo)}, ETA {took / done * (len(todo) - done):.0f} s",
            flush=True,
        )


def _print_results(folder: Path, steps: list[int], tier: str) -> None:
    """A line a checkpoint: loss, alpha and RankMe of the last layer with their errors."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    rows = [read_step(step_path(folder, step)) for step in steps]
    site = _last_site(rows[0][1])
    if site is None:
        print(f"records in {folder}")
        return
    table = Table("step", "tokens", "probe loss", box=box.SIMPLE)
    width = len(rows[0][1][f"{EIGENVALUES}/{site}"])
    window = next(iter(display_windows(tier, width).values()))
    table.add_column(f"alpha {window[0]}-{window[1]}, {layer_name(site)}")
    table.add_column(f"RankMe, {layer_name(site)}")

    def alpha(spectrum):
        return window_alpha(spectrum, *window)

    for meta, arrays in rows:
        table.add_row(
            f"{meta['step']:,}",
            f"{meta['tokens']:,}",
            f"{meta['probe_loss']:.4f}" if "probe_loss" in meta else "",
            _with_error(*estimate(alpha, arrays, site, EIGENVALUES), 3),
            _with_error(*estimate(rankme, arrays, site, EIGENVALUES), 2),
        )
    Console().print(table)
    print(f"± is a jackknife error over groups of windows; records in {folder}")


def _last_site(arrays: Mapping[str, np.ndarray]) -> str | None:
    """Site of the activations of the last layer; None without activations."""
    prefix = f"{EIGENVALUES}/"
    sites = [name.removeprefix(prefix) for name in arrays if name.startswith(prefix)]
    return max(sites, key=depth, default=None)


def _with_error(value: float, error: float, digits: int) -> str:
    """A number and its error, which is NaN where nothing was left out."""
    return f"{value:.{digits}f}" + ("" if np.isnan(error) else f" ± {error:.{digits}f}")
