"""From typed words to the configuration of a run, and back to what explains and names it.

Precedence, whatever the order typed: defaults < tier < profile < rung < typed keys. Nothing here
imports jax.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import chz

from experiments.config import RunConfig
from models.command_line import (
    Layer,
    UsageError,
    build,
    cast_words,
    flatten,
    help_page,
    leaves,
    parse_words,
)
from models.config import TIERS
from models.ladder import LADDERS, rung_values
from models.type_words import as_typed

CORPUS_EOT = 0  # as experiments.corpus numbers it
# where results go, how far a run goes this time, and how the same numbers are computed
FREE_ON_RESUME = ("out", "resume", "attention", "remat", "fsdp", "pause_tokens")
ALIASES = {
    "data": "data.source",
    "probes": "probes.names",
    "probe_data": "probes.data",
    "measure_every": "probes.every",
}


FIRST_IN_HELP = (
    *("rung", "ladder", "tier", "profile", "batch", "seed", "data.source"),
    *("probes.names", "probes.data", "probes.every", "target_loss", "max_tokens", "out", "resume"),
)


def laptop(tier: str) -> dict[str, Any]:
    """Sizes at which a run takes minutes on two CPU cores, every mechanism kept.

    Width is an eighth, a mask block 16 tokens instead of 128, a long row 32 blocks instead of 512;
    published schedule lengths shrink tenfold in steps (1,280-fold in tokens).
    """
    return {
        "size.n_embd": TIERS[tier]["size.n_embd"] // 8,
        "size.block": 16,
        "size.short_row": 128,
        "size.long_row": 512,
        "accumulate": 1,
        "remat": False,
        "max_tokens": 5 * 2**17,
        "target_loss": None,
        "anneal": "budget",
        "time_scale": 0.1,
        "val_every": 2**17,
        "checkpoint_every": 2**18,
        "data.val_tokens": 2**15,
        "data.probe_offset": 2**16,
        # documents of the corpus are long: one piece of text would show the style of a few files
        "data.probe_spread": True,
        "data.corpus_vocab": 1024,
        "probes.window": 128,
        "probes.windows": 128,
        "probes.gradient_windows": 64,
        "probes.first": 2**14,
        "probes.linear_from": 2**20,
    }


PROFILES = {"paper": lambda tier: {}, "laptop": laptop}


def resolve(words: Mapping[str, str], auto_profile: str) -> tuple[RunConfig, dict[str, str]]:
    """The run that typed words ask for, and for every key set the layer that set it.

    `auto_profile` is what profile=auto stands for on this machine. Raises UsageError with one line
    naming the key, the value and the mend.
    """
    typed = cast_words(RunConfig, words)
    defaults = RunConfig()
    tier = typed.get("tier", defaults.tier)
    profile = typed.get("profile", defaults.profile)
    profile = auto_profile if profile == "auto" else profile
    rung = typed.get("rung", defaults.rung)
    ladder = typed.get("ladder", defaults.ladder)
    layers = (
        Layer(f"tier={tier}", TIERS[tier]),
        Layer(f"profile={profile}", PROFILES[profile](tier)),
        Layer(f"rung={rung}", rung_values(rung, ladder)),
        Layer("typed", typed | {"profile": profile}),
    )
    config, origin = build(RunConfig, layers)
    _refuse_rate_of_zero(config)
    if config.target_loss == "published":
        config = chz.replace(config, target_loss=config.published_target)
    return config, origin


def _refuse_rate_of_zero(config: RunConfig) -> None:
    """A budget past the end of the published schedule would train on without moving."""
    if config.anneal == "published" and config.num_steps > config.published_steps:
        most = config.published_steps * config.tokens_per_step
        raise UsageError(
            f"max_tokens={config.max_tokens} with anneal=published: the learning rate of this run "
            f"is 0 after {most} tokens; set anneal=budget, or give at most that"
        )


def resolve_somewhere(words: Mapping[str, str]) -> tuple[RunConfig, dict[str, str]]:
    """As `resolve` on some machine, none of whose devices is asked; to refuse mistakes early.

    profile=auto is the first of laptop and paper that the words fit. Raises UsageError, with the
    line of laptop, for words that fit neither.
    """
    try:
        return resolve(words, "laptop")
    except UsageError as refused:
        with contextlib.suppress(UsageError):
            return resolve(words, "paper")
        raise refused from None


def resolve_here(words: Mapping[str, str]) -> tuple[RunConfig, dict[str, str], str]:
    """As `resolve`, with profile=auto as this machine allows, and why that profile in a phrase."""
    if words.get("profile", "auto") != "auto":
        return *resolve(words, "laptop"), "as asked"
    from experiments.devices import auto_profile

    profile, reason = auto_profile()
    return *resolve(words, profile), reason


def sized_by(config: RunConfig, vocab_size: int, eot_token: int) -> RunConfig:
    """The configuration with the data's vocabulary and document start where it has none.

    Raises UsageError for a vocabulary without that document start.
    """
    size = config.size
    found = {"vocab_size": size.vocab_size or vocab_size}
    found["eot_token"] = eot_token if size.eot_token is None else size.eot_token
    if found["eot_token"] >= found["vocab_size"]:
        if size.vocab_size is None:
            raise UsageError(
                f"size.eot_token={size.eot_token}: the data have a vocabulary of {vocab_size}; "
                f"give one of its tokens, or none"
            )
        raise UsageError(
            f"size.vocab_size={size.vocab_size}: documents of this data begin with token "
            f"{found['eot_token']}; give at least {found['eot_token'] + 1}, or none"
        )
    return chz.replace(config, size=chz.replace(size, **found))


def sized(words: dict[str, str]) -> RunConfig:
    """The configuration that words give on this machine, its vocabulary that of the corpus."""
    config, _, _ = resolve_here(words)
    return sized_by(config, config.data.corpus_vocab, CORPUS_EOT)


def own_words(command: type, argv: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """A command's own keys with typed values, and the words that are left for the run.

    Every value is cast, the run's too, so that a mistake is answered at once; raises UsageError.
    """
    words = parse_words(argv, ALIASES)
    own = leaves(command)
    typed = cast_words(RunConfig, words, leaves(RunConfig) | own)
    values = {key: value for key, value in typed.items() if key in own}
    return values, {key: text for key, text in words.items() if key not in own}


def parse_command(argv: list[str]) -> dict[str, str]:
    """Words of a command line with aliases resolved; every key is known."""
    words = parse_words(argv, ALIASES)
    ladder = words.get("ladder", "published")
    if "rung" in words and ladder in LADDERS:
        rung_values(words["rung"], ladder)  # names the rungs there are
    cast_words(RunConfig, words)
    return words


def help_text(usage: str, words: Mapping[str, str]) -> str:
    """`--help` of a command that takes a run's keys, with the values the other words give."""
    config, _ = resolve_somewhere(words)
    return help_page(usage, RunConfig, ALIASES, flatten(config), first=FIRST_IN_HELP)


def describe_layers(config: RunConfig, origin: Mapping[str, str]) -> list[str]:
    """One line a layer: the keys whose final value that layer set and that differ from default."""
    flat, known = flatten(config), leaves(RunConfig)
    order = {"tier": 0, "profile": 1, "rung": 2, "typed": 3}
    by_layer: dict[str, list[str]] = {}
    for key, layer in sorted(origin.items(), key=lambda item: order[item[1].partition("=")[0]]):
        default = known[key].default
        default = list(default) if isinstance(default, tuple) else default
        if flat[key] != default and key not in ("tier", "profile", "rung"):
            by_layer.setdefault(layer, []).append(f"{key}={as_typed(flat[key])}")
    return [f"{layer}: {' '.join(values)}" for layer, values in by_layer.items()]


def from_flat(flat: Mapping[str, Any]) -> RunConfig:
    """The configuration stored in a run folder's config.json (dotted keys, lists for tuples)."""
    known = leaves(RunConfig)
    unknown = sorted(set(flat) - set(known))
    if unknown:
        raise UsageError(
            f"stored configuration has the unknown key {unknown[0]}={flat[unknown[0]]}"
        )
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in flat.items()}
    return build(RunConfig, [Layer("stored", values)])[0]


def read_stored(folder: Path) -> RunConfig:
    """The configuration of a run folder; raises UsageError where there is none."""
    path = folder / "config.json"
    try:
        return from_flat(json.loads(path.read_bytes()))
    except OSError as error:
        raise UsageError(
            f"{folder}: cannot read {path.name} ({error.strerror}); give the folder of a run"
        ) from None
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON ({error})") from None


def run_name(config: RunConfig) -> str:
    """A folder name that is the same for the same configuration and tells runs apart.

    FREE_ON_RESUME plays no part, so that a run is found again whatever these are.
    """
    flat = {k: v for k, v in flatten(config).items() if k not in FREE_ON_RESUME}
    flat |= {"attention": "auto", "remat": False}  # which the names of earlier records contain
    digest = hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:8]
    return f"{config.rung}-{config.tier}-{config.profile}-b{config.batch}-s{config.seed}-{digest}"
