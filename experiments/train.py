"""Train a rung of the ladder with the lens inside the compiled step.

    python -m experiments.train tier=d12
    python -m experiments.train rung=muon data='shards/*.bin' max_tokens=1e6 seed=1
    python -m experiments.train --help

Results go to a run folder: config.json, metrics.jsonl, spectra/, checkpoints/, summary.png. The
same command again goes on where the run stopped, and a finished run is only reported.
"""

import chz

from experiments.host_threads import one_blas_thread
from experiments.processes import joined, open_together
from experiments.resolve import (
    FREE_ON_RESUME,
    describe_layers,
    help_text,
    parse_command,
    resolve_here,
    resolve_somewhere,
    run_name,
    sized_by,
)
from models.command_line import flatten, run_command


def main(argv: list[str]) -> int:
    """The command; returns its exit code."""
    one_blas_thread()
    if any(word in ("-h", "--help") for word in argv):
        rest = [word for word in argv if word not in ("-h", "--help")]
        print(help_text(__doc__, parse_command(rest)))
        return 0
    words = parse_command(argv)
    if words.get("profile", "auto") == "auto":
        resolve_somewhere(words)  # a mistake is answered before any device is asked
    with joined():
        return run(words)


def run(words: dict[str, str]) -> int:
    """Train as the words of a command say; returns its exit code."""
    config, origin, reason = resolve_here(words)
    from experiments.data import resolve_source

    files = resolve_source(config.data)
    config = sized_by(config, files.vocab_size, files.eot_token)
    files = files._replace(vocab_size=config.size.vocab_size)  # every token id must fit the model
    if config.out == "auto":
        config = chz.replace(config, out=f"runs/{run_name(config)}")
    print(f"profile {config.profile}: {reason}", *describe_layers(config, origin), sep="\n")
    print(f"data {files.name}: {len(files.train)} training shards, vocabulary {files.vocab_size:,}")

    shards = (*files.train, *files.val)
    with open_together(
        config.out, config.resume, flatten(config), FREE_ON_RESUME, shards
    ) as folder:
        from experiments.devices import split_cpu
        from experiments.loop import train  # imports jax, after everything cheap has been checked

        split_cpu()
        return train(config, files, folder)


if __name__ == "__main__":
    run_command(main)
