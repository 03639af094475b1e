"""Training of members: dispatch after dispatch, with validation, target stop and measurements.

After every dispatch the curve and the state of each member are on disk, so that a kill loses at
most one dispatch.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toy_modular.measuring import Instrument
from toy_modular.member_folder import MemberFolder
from toy_modular.members import Member, make_program, stack, take
from toy_modular.problem import Data
from toy_modular.run_config import MeasureConfig, RunConfig
from toy_modular.tasks import TASKS

NOTE_SECONDS = 10.0
NEAR_LOSS, NEAR_ACCURACY = 0.15, 0.005
"""How far from its target a score of some validation rows sends for that of all of them."""

Note = Callable[[str], None]


def train_members(
    configs: Sequence[RunConfig],
    folders: Sequence[str | Path],
    *,
    until: int | None = None,
    note: Note = lambda text: None,
) -> list[dict]:
    """Trains members of one kind together, each from where its folder says it stands.

    configs: differ in seed and lr only. until: the step at which they pause, max_steps by default,
    where a member ends for good, as it does on its target or on a loss that is not finite.
    Members are measured as config.measure says. Returns for every member its result, or
    {"reason": "paused", "step", "tokens", "val_loss"} for one that has not ended by `until`,
    whether or not it has gone on since.
    """
    until = configs[0].max_steps if until is None else min(until, configs[0].max_steps)
    pairs = list(zip(configs, folders, strict=True))
    known = [outcome(config, folder, until) for config, folder in pairs]
    if None in known:
        runs, told = _Runs(configs, folders), time.monotonic()
        while runs.advance(until):
            if time.monotonic() - told >= NOTE_SECONDS:
                told = time.monotonic()
                note(runs.describe(until))
        known = [outcome(config, folder, until) for config, folder in pairs]
    return known


def outcome(config: RunConfig, folder: str | Path, until: int) -> dict | None:
    """What a member's folder says of it at step `until`; None if it has not come that far."""
    member = MemberFolder(folder, config)
    result = member.result
    if result is not None and result["step"] <= until:
        return result
    seen = [row for row in member.rows() if row["kind"] == "val"]
    if until >= config.max_steps or not seen or seen[-1]["step"] < until:
        return None
    row = [row for row in seen if row["step"] <= until][-1]
    return {"reason": "paused", **{k: row[k] for k in ("step", "tokens")}, "val_loss": row["loss"]}


class _Runs:
    """Members in company, and what is known of each."""

    def __init__(self, configs, folders):
        self.configs = list(configs)
        self.config = configs[0]
        self.program = make_program(self.config)
        seeds = sorted({config.seed for config in configs})
        data = {config.seed: _data_of(config) for config in configs}
        self.train = _stack_rows([data[seed].train for seed in seeds])
        self.val = _stack_rows([data[seed].val for seed in seeds])
        self.glance = jax.tree.map(lambda leaf: leaf[:, : self.config.eval_rows], self.val)
        self.test = None
        if data[seeds[0]].test is not None:
            self.test = _stack_rows([data[seed].test for seed in seeds])
        self.rates = np.array([config.lr for config in configs], np.float32)
        self.seeds = np.array([config.seed for config in configs], np.int32)
        self.slots = np.array([seeds.index(config.seed) for config in configs], np.int32)
        self.folders = [MemberFolder(*pair) for pair in zip(folders, self.configs, strict=True)]
        self.instruments = [
            Instrument(config, data[config.seed], folder.path)
            for config, folder in zip(configs, self.folders, strict=True)
        ]
        self.ended = [folder.result for folder in self.folders]
        self.members = stack([self._place(i) for i in range(len(configs))])
        self.steps = [int(step) for step in np.asarray(self.members.step)]
        self.curves = [
            [row for row in folder.rows() if row["step"] <= step]
            for folder, step in zip(self.folders, self.steps, strict=True)
        ]
        self.began, self.done_before = time.monotonic(), sum(self.steps)
        for i, step in enumerate(self.steps):
            if step == 0 and not self.curves[i]:
                self._record(i, train_loss=None, scores=self._scores(self.glance, i))

    def _place(self, i: int) -> Member:
        """Where a member stands on disk, or at its start."""
        fresh = self.program.start(self.configs[i].seed)
        restored = self.folders[i].restore(fresh)
        return fresh if restored is None else restored

    def advance(self, until: int) -> bool:
        """One dispatch of all that have not paused or ended; False if there are none."""
        alive = np.array(
            [e is None and s < until for e, s in zip(self.ended, self.steps, strict=True)]
        )
        if not alive.any():
            return False
        self.members, losses = self.program.advance(
            self.members, self.rates, self.seeds, self.slots, alive, self.train
        )
        scores = self.program.evaluate(self.members.params, self.slots, self.glance)
        losses, scores = jax.device_get((losses, scores))
        for i in np.flatnonzero(alive):
            self.steps[i] += self.config.eval_every
            self._record(i, float(losses[i]), {k: float(v[i]) for k, v in scores.items()})
        return True

    def _record(self, i: int, train_loss: float | None, scores: dict) -> None:
        """Takes in what a dispatch showed of a member; measures, ends and saves it.

        scores: of the validation rows that are looked at every time. Near the target all rows are
        scored as well, and those scores decide; where the member is measured too, for runs are
        compared at equal losses of all rows.
        """
        config, step = self.configs[i], self.steps[i]
        at = {"step": step, "tokens": step * config.tokens_per_step}
        rows = self.curves[i]
        if not (math.isfinite(scores["loss"]) and math.isfinite(train_loss or 0.0)):
            self._end(i, "diverged", at, {})  # what is no number has no place in a curve
            return
        if self.program.problem.score_train:
            rows.append({"kind": "train", **at, **self._scores(self.train, i)})
        elif train_loss is not None:
            rows.append({"kind": "train", **at, "loss": train_loss})
        earlier_losses = [row["loss"] for row in rows if row["kind"] == "val"]
        row = {"kind": "val", **at, **scores, "rows": _count(self.glance)}
        full = scores if _count(self.glance) == _count(self.val) else None
        if full is None and _is_near(config, scores):
            full = self._scores(self.val, i)
            row |= {f"full_{name}": value for name, value in full.items()}
        rows.append(row)
        reason = _ending(config, step, full or scores)
        member = take(self.members, i)
        crossed = self.instruments[i].crossed(scores["loss"], earlier_losses)
        if self.instruments[i].is_due(step, crossed, reason):
            full = full or self._scores(self.val, i)
            at_loss = at | {"val_loss": full["loss"]}
            self.instruments[i].look(member.params, at_loss, crossed, reason)
        self.folders[i].write_rows(rows)
        if reason is not None:
            ends = {"val": full or self._scores(self.val, i)}
            if self.test is not None:
                ends["test"] = self._scores(self.test, i)
            self._end(i, reason, at, ends)
        self.folders[i].save(member)

    def _end(self, i: int, reason: str, at: dict, scores: dict[str, dict]) -> None:
        """Writes how a member ended; scores by split, of all its rows."""
        reached = at["tokens"] if reason == "target" else None
        crossing = crossing_tokens(self.curves[i], self.configs[i].target_loss) if reached else None
        self.ended[i] = {
            "reason": reason,
            **at,
            **{f"{s}_{name}": value for s, of in scores.items() for name, value in of.items()},
            "tokens_to_target": reached,
            "crossing_tokens": crossing,
            "seconds": time.monotonic() - self.began,
        }
        self.folders[i].write_result(self.ended[i])

    def _scores(self, rows: Any, i: int) -> dict:
        params = jax.tree.map(lambda leaf: leaf[i : i + 1], self.members.params)
        found = self.program.evaluate(params, self.slots[i : i + 1], rows)
        return {name: float(value[0]) for name, value in found.items()}

    def describe(self, until: int) -> str:
        """A line on how far the members are and when they may be there at the latest."""
        going = [i for i, e in enumerate(self.ended) if e is None and self.steps[i] < until]
        spent = time.monotonic() - self.began
        done = sum(self.steps) - self.done_before
        left = sum(until - self.steps[i] for i in going)
        best = min(rows[-1]["loss"] for rows in self.curves if rows)
        return (
            f"{self.config.stage} batch {self.config.batch}: step {max(self.steps)}/{until}, "
            f"val loss {best:.3f}, {done * self.config.tokens_per_step / spent:,.0f} tok/s, "
            f"{left * spent / max(done, 1):.0f} s left at most"
        )


def _data_of(config: RunConfig) -> Data:
    """The data of a run, made once for all runs of its task and seed."""
    laws = {name: getattr(config, name) for name in ("task", "seed", "banded", "grok", "rff")}
    return _load(RunConfig(**laws, batch=None, measure=MeasureConfig(per_doubling=0)))


@lru_cache(maxsize=4)
def _load(laws: RunConfig) -> Data:
    return TASKS[laws.task].load_data(laws)


def _stack_rows(rows: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


def _count(rows: Any) -> int:
    """Sequences of one slot."""
    return jax.tree.leaves(rows)[0].shape[1]


def _is_near(config: RunConfig, scores: dict) -> bool:
    """Whether scores of some rows leave it open that all rows reach the target."""
    if config.target_loss is not None and scores["loss"] <= config.target_loss + NEAR_LOSS:
        return True
    target = config.target_accuracy
    return target is not None and scores["accuracy"] >= target - NEAR_ACCURACY


def _ending(config: RunConfig, step: int, scores: dict) -> str | None:
    """Why a member ends here, None where it goes on."""
    if config.target_loss is not None and scores["loss"] <= config.target_loss:
        return "target"
    if config.target_accuracy is not None and scores["accuracy"] >= config.target_accuracy:
        return "target"
    return "max_steps" if step >= config.max_steps else None


def crossing_tokens(rows: Sequence[dict], target: float | None) -> float | None:
    """Tokens at which the loss of all validation rows crosses the target, by the last two looks.

    Linear in tokens. A look at some rows only is off by as much as the next one is. None without a
    target or a look above it.
    """
    seen = [row for row in rows if row["kind"] == "val"]
    if target is None or len(seen) < 2:
        return None
    first, last = seen[-2:]
    end = last.get("full_loss", last["loss"])
    begin = first.get("full_loss", first["loss"] + end - last["loss"])
    if not begin > target >= end:
        return None
    share = (begin - target) / (begin - end)
    return first["tokens"] + (last["tokens"] - first["tokens"]) * share
