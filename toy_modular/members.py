"""Members of a sweep in the compiled program: many steps a dispatch, many members at once.

All members of a program have one configuration but for seed and rate, which are data. Which rows a
step sees depends on the seed and the number of the step alone, so a member that goes on after a
kill, or in other company, sees what it would have seen.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import chz
import jax
import jax.numpy as jnp
import optax

from toy_modular.problem import Problem, Rows
from toy_modular.run_config import MeasureConfig, RunConfig
from toy_modular.tasks import TASKS

STREAM_OFFSET = 11  # batches are drawn from seed + 11 (toy spec section 3)
EVAL_CHUNK = 512


class Member(NamedTuple):
    """Everything a step reads and writes; step counts completed updates.

    In company every leaf has a leading axis of members.
    """

    step: jax.Array
    params: Any
    opt_state: Any


class Program(NamedTuple):
    """The compiled functions of one kind of member.

    For one member: start(seed) -> Member. For members in company, M of them, with the data of S
    seeds, leaves (S, N, ...), of which slot says whose (all but data have a leading axis M):
    advance(member, rate, seed, slot, alive, train) -> (member, mean training loss of its eval_every
    steps), one dispatch, after which a member that is not alive is as before;
    evaluate(params, slot, rows) -> scores.
    """

    problem: Problem
    start: Callable[[int], Member]
    advance: Callable[..., tuple[Member, jax.Array]]
    evaluate: Callable[..., dict]


def make_program(config: RunConfig) -> Program:
    """The program of a run; runs that differ in seed, rate, target or measurements share one."""
    return _program(chz.replace(shared(config), measure=MeasureConfig(per_doubling=0)))


def shared(config: RunConfig) -> RunConfig:
    """The configuration without what differs between members of one kind."""
    return chz.replace(config, seed=0, lr=1.0, target_loss=None, target_accuracy=None, stage="")


@lru_cache(maxsize=32)
def _program(config: RunConfig) -> Program:
    problem = TASKS[config.task].make_problem(config)

    def start(seed):
        params = problem.init(jax.random.key(seed))
        return Member(jnp.zeros((), jnp.int32), params, problem.tx.init(params))

    def advance(member, rate, seed, slot, alive, train):
        key = jax.random.key(seed + STREAM_OFFSET)

        def step(member, _):
            rows = draw_rows(train, slot, config.batch, jax.random.fold_in(key, member.step))
            (loss, _), grads = jax.value_and_grad(problem.loss, has_aux=True)(member.params, rows)
            updates, opt_state = problem.tx.update(grads, member.opt_state, member.params)
            params = optax.apply_updates(member.params, optax.tree.scale(rate, updates))
            return Member(member.step + 1, params, opt_state), loss

        after, losses = jax.lax.scan(step, member, length=config.eval_every)
        kept = jax.tree.map(partial(jnp.where, alive), after, member)
        return kept, jnp.mean(losses)

    return Program(
        problem,
        jax.jit(start),
        jax.jit(in_company(advance), donate_argnums=0),
        jax.jit(in_company(partial(mean_scores, problem.score))),
    )


def draw_rows(train: Rows, slot: jax.Array, batch: int | None, key: jax.Array) -> Rows:
    """`batch` rows of one slot drawn with replacement, or all its rows for None."""
    if batch is None:
        return jax.tree.map(lambda leaf: leaf[slot], train)
    count = jax.tree.leaves(train)[0].shape[1]
    index = jax.random.randint(key, (batch,), 0, count)
    return jax.tree.map(lambda leaf: leaf[slot, index], train)


def mean_scores(score: Callable, params: Any, slot: jax.Array, rows: Rows) -> dict:
    """Scores of all rows of one slot, a chunk of them at a time.

    Sums over chunks are divided once, so that an accuracy of which no row is wrong is 1 exactly.
    """
    count = jax.tree.leaves(rows)[0].shape[1]
    total = None
    for first in range(0, count, EVAL_CHUNK):
        part = jax.tree.map(lambda leaf, at=first: leaf[slot, at : at + EVAL_CHUNK], rows)
        size = jax.tree.leaves(part)[0].shape[0]
        found = optax.tree.scale(size, score(params, part))
        total = found if total is None else optax.tree.add(total, found)
    return jax.tree.map(lambda leaf: leaf / count, total)


def in_company(function: Callable) -> Callable:
    """`function` over members stacked along a leading axis of all arguments but the last.

    A member alone runs the plain program: a batch axis of one costs time on a CPU.
    """

    def together(*arguments):
        *of_members, data = arguments
        if jax.tree.leaves(of_members)[0].shape[0] > 1:
            return jax.vmap(function, in_axes=(*(0 for _ in of_members), None))(*arguments)
        alone = jax.tree.map(lambda leaf: leaf[0], of_members)
        return jax.tree.map(lambda leaf: leaf[None], function(*alone, data))

    return together


def stack(members: Sequence[Any]) -> Any:
    """Trees of one structure as one tree with a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


def take(members: Any, index: int) -> Any:
    """One of the trees that `stack` put together."""
    return jax.tree.map(lambda leaf: leaf[index], members)
