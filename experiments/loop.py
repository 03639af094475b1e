"""The training loop: dispatch, fetch one step late, validate, measure, save, stop cleanly.

Order within step s, as published (ladder spec 9): validation and checkpoint s see the state after s
updates, then the step measures that state and makes update s + 1. A measurement at the very end
runs the step once more and drops its update.
"""

import math
import signal
import statistics
import sys
import time
from contextlib import ExitStack
from functools import partial
from typing import Any

import jax
import numpy as np

from experiments.checkpoints import Checkpoints
from experiments.config import RunConfig
from experiments.data import (
    TokenFiles,
    TrainWindows,
    make_train_stream,
    sample_indices,
)
from experiments.data_identity import data_change, data_identity, keep_identity
from experiments.devices import peak_flops, place_rows, settled
from experiments.metrics import MetricsFile
from experiments.probe_set import probe_at, with_window
from experiments.processes import is_first, make_poll, share
from experiments.progress import Display, format_rate, format_tokens
from experiments.run_folder import RunFolder
from experiments.schedule import Schedule, make_schedule
from experiments.setup import (
    Run,
    hold_out,
    make_run,
    read_yardstick,
)
from experiments.start import circumstances, greet, initial_state
from experiments.stops import Interrupt, NotFinite, failed_record_in_one_line
from lens_jax.probes import spectra
from lens_jax.records import RecordWriter
from lens_jax.show import draw_run
from lens_jax.step import TrainState
from models.atomic_files import write_json
from models.command_line import UsageError, flatten
from models.flops import flops_per_token
from models.windows import widest_window, window_at
from optim.groups import learning_rates


def train(config: RunConfig, files: TokenFiles, folder: RunFolder) -> int:
    """Train until the target, the budget or a signal; returns the command's exit code."""
    config = settled(config)
    held = hold_out(config, files)
    identity = data_identity(files, held)
    if change := share(data_change(folder.path, identity)):
        raise UsageError(change)
    result = folder.path / "result.json"
    if share(result.exists()):
        print(f"this run is finished, see {result}; another seed= or out= makes a new one")
        return 0
    if is_first() and not folder.resumed:
        keep_identity(folder.path, identity)
    schedule = make_schedule(config)
    windows = TrainWindows(files, row=config.row, exclude=held.exclude)
    run = make_run(config, schedule, held, read_yardstick(files))
    with ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt())
        checkpoints = stack.enter_context(
            Checkpoints(folder.checkpoints, keep=config.keep_checkpoints)
        )
        here = circumstances(config, run, files.name)
        state, start = initial_state(run, checkpoints, here)
        metrics = stack.enter_context(MetricsFile(folder.metrics_path)) if is_first() else None
        kept = metrics.truncate_from(start) if metrics else []
        known = dict(share([(row["step"], row["loss"]) for row in kept if row["kind"] == "val"]))
        stack.enter_context(failed_record_in_one_line(folder.spectra))
        writer = stack.enter_context(RecordWriter(folder.spectra))
        flops = partial(_flops_at, config, held.val[:, :-1])
        display = stack.enter_context(
            Display(schedule.num_steps, start, flops, peak_flops(run.mesh))
        )
        greet(display, config, run, schedule, start)
        loop = Loop(
            config, schedule, run, folder, checkpoints, metrics, writer, display, known, here
        )
        return loop.run(state, start, windows, interrupt)


def _flops_at(config: RunConfig, rows: np.ndarray, blocks: float | None) -> float:
    """FLOP per token at a window in mask blocks; keys are counted on the validation rows (R, T)."""
    window = None if blocks is None else round(blocks * config.size.block)
    return flops_per_token(config.arch, config.size, rows, window)


class Loop:
    """One pass through the steps of a run, with everything it writes to.

    Of several processes only the first writes metrics (None in the others) and records. here: the
    circumstances that checkpoints tell of (experiments.start).
    """

    def __init__(
        self,
        config: RunConfig,
        schedule: Schedule,
        run: Run,
        folder: RunFolder,
        checkpoints: Checkpoints,
        metrics: MetricsFile | None,
        writer: RecordWriter,
        display: Display,
        known_losses: dict[int, float],
        here: dict[str, Any],
    ):
        self.config, self.schedule, self.run_ = config, schedule, run
        self.folder, self.checkpoints, self.metrics = folder, checkpoints, metrics
        self.writer, self.display = writer, display
        self.val_losses, self.here = known_losses, here
        self.pending: tuple[int, dict, dict] | None = None  # step in flight, metrics, measured
        self.clock: float | None = None  # when the step in flight could begin, if that is known
        self.compiled = False  # whether a step that measures nothing has run
        self.measured = False  # whether one that measures has been dispatched
        self.rates: list[float] = []
        self.poll = make_poll(run.mesh) if jax.process_count() > 1 else None
        self.signal = 0  # that any process had got when the last fetched step was dispatched

    def run(self, state: TrainState, start: int, windows: TrainWindows, interrupt) -> int:
        """Steps from `start` to the end; returns the exit code."""
        config = self.config
        order = {
            "order": config.data.order,
            "seed": config.seed,
            "rows": config.rows_per_step,
            "chunk_rows": config.size.long_row // config.row,
        }
        stream = make_train_stream(windows, start=start * config.rows_per_step, **order)
        try:
            for step in range(start, self.schedule.num_steps + 1):
                if received := self.signal if self.poll else interrupt.received:
                    return self._leave(step, state, received)
                reason = self._look(step, state)
                if not reason and self._is_pause(step):
                    return self._pause(step, state)
                if reason or step in self.schedule.checkpoint:
                    self._save(step, state)
                measure = step in self.schedule.measure or bool(reason and config.probes.names)
                if reason and not measure:
                    break
                state, metrics, measured = self._dispatch(step, state, next(stream), measure)
                if self.poll:
                    metrics["signal"] = self.poll(interrupt.received or 0)
                self._fetch()
                self.pending = (step, metrics, measured)
                if reason:
                    self._fetch(measured_only=True)  # the run was over, its update is dropped
                    break
        except NotFinite as error:
            return self._report_not_finite(error, windows, order)
        return self._finish(step, reason)

    def _look(self, step: int, state: TrainState) -> str | None:
        """Validate if it is time; why the run ends here, or None."""
        if step in self.schedule.validate and step not in self.val_losses:
            self._validate(step, state)
        target = self.config.target_loss
        loss = self.val_losses.get(step)
        if target is not None and step > 0 and loss is not None and loss < target:
            return "target"
        return "budget" if step == self.schedule.num_steps else None

    def _is_pause(self, step: int) -> bool:
        pause = self.config.pause_tokens
        due = pause is not None and step * self.config.tokens_per_step >= pause
        return due and step in self.schedule.validate

    def _pause(self, step: int, state: TrainState) -> int:
        self._save(step, state)
        self.checkpoints.wait()
        self.display.note(
            f"paused after step {step}, val loss {self.val_losses[step]:.4f}, checkpoint saved"
        )
        return 0

    def _validate(self, step: int, state: TrainState) -> None:
        self._fetch()
        began = time.monotonic()
        window, widest = self._window(step), widest_window(self.config.arch, self.config.size)
        loss = float(self.run_.evaluate(state.params, window))
        if not math.isfinite(loss):
            raise NotFinite("validation", step, {"loss": loss})
        # The published loss is that of the step's own window, which punishes an early one; the
        # other costs a validation more, so it is taken where the state is kept.
        at_widest = loss if window == widest else None
        if at_widest is None and step in self.schedule.checkpoint:
            at_widest = float(self.run_.evaluate(state.params, widest))
        self.val_losses[step] = loss
        row = {
            "kind": "val",
            "step": step,
            "tokens": step * self.config.tokens_per_step,
            "loss": loss,
            "loss_widest_window": at_widest,
            "window_blocks": self._window_blocks(step),
            "val_tokens": self.config.data.val_tokens,
            "seconds": time.monotonic() - began,
        }
        self._write(row)
        self.display.validation(row)
        self.clock = time.monotonic()  # nothing is in flight

    def _window(self, step: int) -> int | None:
        return window_at(self.config.arch, self.config.size, step, self.schedule.window_steps)

    def _window_blocks(self, step: int) -> float | None:
        window = self._window(step)
        return None if window is None else window / self.config.size.block

    def _dispatch(self, step: int, state: TrainState, rows: np.ndarray, measure: bool):
        mesh, window = self.run_.mesh, self._window(step)
        stacked = rows.reshape(self.config.accumulate, -1, rows.shape[1])
        batches = with_window({"tokens": place_rows(mesh, stacked, axis=1)}, mesh, window)
        probe_batch = probe_at(self.run_.probe_batch, mesh, window) if measure else None
        if measure and not self.measured:
            self.measured, self.clock = True, None  # it compiles while a step may be in flight
        return self.run_.step(state, batches, probe_batch, measure=measure)

    def _fetch(self, measured_only: bool = False) -> None:
        """Wait for the step in flight, refuse what is not finite, and write its record and row."""
        if self.pending is None:
            return
        (step, metrics, measured), self.pending = self.pending, None
        metrics = jax.device_get(metrics)
        now = time.monotonic()
        timed = self.clock is not None and self.compiled and not measured
        seconds = now - self.clock if timed else None
        self.clock, self.compiled = now, self.compiled or not measured
        self.signal = int(metrics.pop("signal", 0))
        finite = metrics.pop("finite")
        probe_loss = metrics.pop("probe_loss", None)
        numbers = {name: float(value) for name, value in metrics.items()}
        if not finite:
            raise NotFinite("training", step, numbers)
        if measured:
            self._submit(step, measured, probe_loss)
        if measured_only:
            return
        rate = None if seconds is None else self.config.tokens_per_step / seconds
        row = {
            "kind": "train",
            "step": step,
            "tokens": (step + 1) * self.config.tokens_per_step,
            **numbers,
            **learning_rates(self.config.optim, self.schedule.horizon, step),
            "window_blocks": self._window_blocks(step),
            "step_time_s": seconds,
            "tokens_per_s": rate,
        }
        self._write(row)
        if rate is not None:
            self.rates.append(rate)
        self.display.train(row, self._typical_rate())

    def _write(self, row: dict) -> None:
        if self.metrics is not None:
            self.metrics.append(row)

    def _typical_rate(self) -> float | None:
        return statistics.median(self.rates[-50:]) if self.rates else None

    def _submit(self, step: int, measured: dict, probe_loss) -> None:
        if not is_first():
            return
        meta = {"step": step, "tokens": step * self.config.tokens_per_step, **self.run_.facts}
        meta["window_tokens"] = self._window(step)
        if probe_loss is not None:
            meta["probe_loss"] = float(probe_loss)
        if step in self.val_losses:
            meta["val_loss"] = self.val_losses[step]
        if self.config.probes.eigen == "graph":
            self.writer.submit(step, meta, partial(jax.device_get, measured))
        else:
            self.writer.submit(step, meta, partial(spectra, measured))

    def _save(self, step: int, state: TrainState) -> None:
        """Save a checkpoint; all that was written about earlier steps is on disk before it is."""
        self._fetch()
        self.writer.drain()
        meta = {
            "step": step,
            "sample_index": step * self.config.rows_per_step,
            "tokens": step * self.config.tokens_per_step,
            "config": flatten(self.config),
            **self.here,
        }
        self.checkpoints.save(step, state, meta)
        self.clock = None  # the files are written beside the next step

    def _leave(self, step: int, state: TrainState, number: int) -> int:
        self._save(step, state)
        self.checkpoints.wait()
        self.display.note(
            f"stopped by {signal.Signals(number).name} after step {step}, checkpoint saved; the "
            f"same command with out={self.folder.path} goes on from here"
        )
        return 128 + number

    def _report_not_finite(self, error: NotFinite, windows: TrainWindows, order: dict) -> int:
        training = error.kind == "training"
        self.checkpoints.wait()
        if not is_first():
            return 1
        report = {
            "kind": error.kind,
            "step": error.step,
            "tokens": error.step * self.config.tokens_per_step,
            **{name: str(value) for name, value in error.numbers.items()},
            "window_indices": sample_indices(error.step, windows, **order) if training else None,
            "last_checkpoint": self.checkpoints.latest(),
        }
        path = self.folder.path / "nonfinite.json"
        write_json(path, report)
        print(
            f"error: {error}; stopped there, checkpoint {report['last_checkpoint']} is kept, "
            f"details in {path}; lower optim.lr_scale, with another out=",
            file=sys.stderr,
        )
        return 1

    def _finish(self, step: int, reason: str) -> int:
        self.writer.drain()
        self.checkpoints.wait()
        if not is_first():
            return 0
        loss = self.val_losses[step]
        rate = statistics.median(self.rates) if self.rates else None
        tokens = step * self.config.tokens_per_step
        result = {
            "reason": reason,
            "step": step,
            "tokens": tokens,
            "val_loss": loss,
            "target_loss": self.config.target_loss,
            "unigram_entropy": self.run_.facts["unigram_entropy"],
            "tokens_per_s": rate,
        }
        figure = draw_run(self.folder.path)
        write_json(self.folder.path / "result.json", result)  # last: now the run is finished
        against = ""
        if result["unigram_entropy"] is not None:
            against = f", unigram entropy {result['unigram_entropy']:.3f}"
        self.display.note(
            f"finished ({reason}): val loss {loss:.4f} nats{against}, after "
            f"{format_tokens(tokens)} tokens" + (f" at {format_rate(rate)} tok/s" if rate else "")
        )
        self.display.note(f"records in {self.folder.path}, figure {figure}")
        return 0
