"""How fast the toy trains, by whom, and what looking at it costs.

  python benchmarks/toy_engines.py out=benchmarks/results/cpu_toy_engines.json
  python benchmarks/toy_engines.py profile=paper members=2 batch=128

step     Tokens a second of one member on all cores: dispatches of 10 steps in one
         compiled scan, and the plain way, a Python loop that indexes its batch, calls a jitted
         step and reads the loss, step by step. In turns.
engines  members= rates at one batch size: one by one, all in one program with a batch axis, in
         single-thread processes, one a core, and by the plain loop, one by one, with a glance at
         validation as often as the others have it but without files. Each to `short` and to `long`
         steps in fresh folders; the difference counts, without start and compilation, which stand
         beside it.
looking  A measurement (spectra, and features of all bands) and a glance at validation, against a
         dispatch; and the share of the time of a run of `run_steps` steps that both take.
"""

import json
import shlex
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import chz

from experiments.bench_timing import paired_ratio, spread, time_in_turns
from models.atomic_files import write_json
from models.command_line import check_report, flatten, read_command, run_command
from toy_modular.study_config import Kind, resolve

DISPATCH = 10
ENGINES = ("sequential", "together", "processes", "loop")


@chz.chz
class ToyBenchConfig:
    """The keys of the command."""

    out: str | None = chz.field(default=None, doc="file for the JSON document, beside stdout")
    profile: str = chz.field(default="laptop", doc="laptop or paper, as in toy_modular.study")
    stage: str = chz.field(default="untied", doc="stage of the toy that is trained")
    batch: int = chz.field(default=32, doc="sequences a step")
    members: int = chz.field(default=4, doc="rates of the section engines")
    short: int = chz.field(default=20, doc="steps that every engine first makes")
    long: int = chz.field(default=80, doc="steps it makes the second time")
    run_steps: int = chz.field(default=1000, doc="length of the run whose shares are told")
    repeats: int = chz.field(default=5, doc="timed calls of every variant of step and looking")

    @chz.validate
    def _ranges(self):
        for name in ("batch", "members", "short", "long", "run_steps", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1")
        for name in ("short", "long", "run_steps"):
            if getattr(self, name) % DISPATCH:
                raise ValueError(
                    f"{name}={getattr(self, name)}: give a multiple of {DISPATCH}, the steps of a "
                    f"dispatch"
                )
        if self.short >= self.long:
            raise ValueError(f"long={self.long}: give more than short={self.short}")
        if self.out is not None:
            check_report(self.out)


def main(argv: list[str]) -> int:
    """The command; returns its exit code. Raises UsageError."""
    plan = read_command(ToyBenchConfig, __doc__, argv)
    if plan is None:
        return 0
    members = make_members(plan)
    from first_gpu import environment

    report = {"command": shlex.join(["python", "benchmarks/toy_engines.py", *argv])}
    report |= {**flatten(plan), "environment": environment()}
    report["engines"] = time_engines(plan, members)
    report["step"], report["looking"] = time_step(plan, members[0]), time_looking(plan, members[0])
    print(json.dumps(report, indent=2, allow_nan=False))
    if plan.out is not None:
        write_json(plan.out, report)
    return 0


def make_members(plan: ToyBenchConfig) -> list:
    """Members of one kind without a target, at rates a tenth apart."""
    words = {"profile": plan.profile, "stages": plan.stage, "rates": "6e-4"}
    words |= {"target_loss": "none", "eval_every": str(DISPATCH), "side_stages": ""}
    words |= {"sequences": "none", "eval_sequences": "none", "batches": str(plan.batch)}
    words |= {"max_steps": str(DISPATCH * max(plan.long, plan.run_steps))}
    study = resolve(words)
    return [
        study.member(Kind(plan.stage, plan.batch), 0, 6e-4 * 1.1**i) for i in range(plan.members)
    ]


def _unmeasured(config):
    return chz.replace(config, measure=chz.replace(config.measure, per_doubling=0))


def time_engines(plan: ToyBenchConfig, members: list) -> dict[str, Any]:
    """Seconds of every engine for `long` less `short` steps of all members, and to start."""
    configs = [_unmeasured(config) for config in members]
    tokens = (plan.long - plan.short) * sum(config.tokens_per_step for config in configs)
    found = {}
    for engine in ENGINES:
        timed = _time_loop if engine == "loop" else partial(_time_engine, engine=engine)
        seconds, to_start = timed(plan, configs)
        found[engine] = {
            "seconds": round(seconds, 3),
            "tokens_per_second": round(tokens / seconds),
            "seconds_to_start": round(to_start, 3),
        }
    for engine in ENGINES:
        ratio = found["sequential"]["seconds"] / found[engine]["seconds"]
        found[engine]["speed_over_sequential"] = round(ratio, 2)
    return found


def _time_engine(plan: ToyBenchConfig, configs: list, engine: str) -> tuple[float, float]:
    """Seconds of `long` less `short` steps of all members, and to start."""
    first = _train_all(configs, plan.short, engine)
    # processes start and compile anew every time, the others have compiled now
    short = first if engine == "processes" else _train_all(configs, plan.short, engine)
    seconds = _train_all(configs, plan.long, engine) - short
    return seconds, first - seconds * plan.short / (plan.long - plan.short)


def _time_loop(plan: ToyBenchConfig, configs: list) -> tuple[float, float]:
    """The same of a script for each member; it starts with a first dispatch, where it compiles."""
    began = time.perf_counter()
    scripts = [PlainLoop(config) for config in configs]
    for script in scripts:
        script()
        script.look()
    started = time.perf_counter()
    for script in scripts:
        for _ in range((plan.long - plan.short) // script.config.eval_every):
            script()
            script.look()
    return time.perf_counter() - started, started - began


def _train_all(configs: list, steps: int, engine: str) -> float:
    from toy_modular.search import grouped
    from toy_modular.workers import run_jobs

    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / str(i) for i in range(len(configs))]
        jobs = list(grouped(configs, places, steps, engine))
        began = time.perf_counter()
        for _, results in run_jobs(jobs, engine, lambda text: None):
            assert isinstance(results, list), results  # noqa: S101
        return time.perf_counter() - began


def time_step(plan: ToyBenchConfig, config) -> dict[str, Any]:
    """Tokens a second of a dispatch and of the loop step by step, in turns."""
    variants = {"scan": scanned(config), "loop": PlainLoop(config)}
    timed = time_in_turns(variants, plan.repeats)
    tokens = config.eval_every * config.tokens_per_step
    found: dict[str, Any] = {
        name: spread(one.seconds) | {"tokens_per_second": round(tokens / min(one.seconds))}
        for name, one in timed.items()
    }
    ratio = paired_ratio(timed["loop"].seconds, timed["scan"].seconds)
    return found | {"loop_over_scan": round(ratio, 3)}


def scanned(config) -> Callable[[], Any]:
    """A dispatch of eval_every steps of one member."""
    import jax
    import numpy as np

    from toy_modular.members import make_program, stack
    from toy_modular.tasks import TASKS

    program = make_program(config)
    train = jax.tree.map(lambda leaf: leaf[None], TASKS[config.task].load_data(config).train)
    member = stack([program.start(config.seed)])
    fixed = (np.full(1, config.lr, np.float32), np.zeros(1, np.int32), np.zeros(1, np.int32))

    def dispatch():
        nonlocal member
        member, losses = program.advance(member, *fixed, np.ones(1, bool), train)
        return float(losses[0])

    return dispatch


class PlainLoop:
    """A training script without scan: calling it makes eval_every steps, one by one in Python."""

    def __init__(self, config):
        import jax
        import numpy as np
        import optax

        from toy_modular.members import mean_scores
        from toy_modular.tasks import TASKS

        problem, data = (
            TASKS[config.task].make_problem(config),
            TASKS[config.task].load_data(config),
        )
        self.config, self.train = config, data.train
        self.val = jax.tree.map(lambda leaf: leaf[None, : config.eval_rows], data.val)
        self.random = np.random.default_rng(0)
        self.params = problem.init(jax.random.key(config.seed))
        self.opt_state = problem.tx.init(self.params)

        @jax.jit
        def step(params, opt_state, rows):
            (loss, _), grads = jax.value_and_grad(problem.loss, has_aux=True)(params, rows)
            updates, opt_state = problem.tx.update(grads, opt_state, params)
            updates = optax.tree.scale(config.lr, updates)
            return optax.apply_updates(params, updates), opt_state, loss

        self.step = step
        self.score = jax.jit(lambda params, rows: mean_scores(problem.score, params, 0, rows))

    def __call__(self) -> float:
        """The mean loss of the steps, each read where it was made."""
        import jax.numpy as jnp

        total = 0.0
        for _ in range(self.config.eval_every):
            index = self.random.integers(len(self.train["tokens"]), size=self.config.batch)
            rows = {name: jnp.asarray(leaf[index]) for name, leaf in self.train.items()}
            self.params, self.opt_state, loss = self.step(self.params, self.opt_state, rows)
            total += float(loss)
        return total / self.config.eval_every

    def look(self) -> float:
        """The loss of the validation rows that are looked at after every dispatch."""
        return float(self.score(self.params, self.val)["loss"])


def time_looking(plan: ToyBenchConfig, config) -> dict[str, Any]:
    """Seconds of a measurement and of a glance at validation, and their shares of a run."""
    import jax
    import numpy as np

    from toy_modular.measuring import Instrument, is_on_grid
    from toy_modular.members import make_program
    from toy_modular.tasks import TASKS

    program, data = make_program(config), TASKS[config.task].load_data(config)
    params = program.start(config.seed).params
    several = jax.tree.map(lambda leaf: leaf[None], params)
    rows = jax.tree.map(lambda leaf: leaf[None, : config.eval_rows], data.val)
    features = TASKS[config.task].make_features(config)
    with tempfile.TemporaryDirectory() as folder:
        instrument = Instrument(config, data, Path(folder))
        variants = {
            "dispatch": scanned(config),
            "glance": lambda: jax.device_get(
                program.evaluate(several, np.zeros(1, np.int32), rows)
            ),
            "spectra": lambda: instrument.spectra(params),
            "features": lambda: features(params, False),
        }
        timed = time_in_turns(variants, plan.repeats)
    seconds = {name: min(one.seconds) for name, one in timed.items()}
    steps = range(0, plan.run_steps + 1, config.eval_every)
    looks = sum(is_on_grid(step, config.eval_every, config.measure.per_doubling) for step in steps)
    total = {
        "dispatch": seconds["dispatch"] * (len(steps) - 1),
        "glance": seconds["glance"] * len(steps),
        "spectra": seconds["spectra"] * looks,
        "features": seconds["features"] * -(-looks // config.measure.bands_every),
    }
    whole = sum(total.values())
    return {
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "times_in_run": {"dispatch": len(steps) - 1, "glance": len(steps), "spectra": looks},
        "share_of_run": {name: round(value / whole, 3) for name, value in total.items()},
    }


if __name__ == "__main__":
    run_command(main)
