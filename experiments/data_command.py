"""The command `python -m experiments.data`: fetch, make and check token shards."""

import json
import sys
import zlib
from collections.abc import Callable, Sequence
from glob import glob
from pathlib import Path

from models.command_line import UsageError, cast

USAGE = """\
usage: python -m experiments.data COMMAND ...

  fineweb10B [shards=9] [folder=data/fineweb10B]
      fetch the validation shard and the first training shards (1 to 103, of 100 million tokens
      each) of FineWeb-10B; whole shards already there are kept, broken ones fetched again
  encode FILES... [tokenizer=gpt2] [bpe=FOLDER] [out=FOLDER]
      tokenise text: a .txt is one document, a line of .jsonl or .jsonl.xz is one document under
      "text" (with "split": "val" for validation); writes <name>_train_000001.bin and so on, of at
      most 100 million tokens, named after the first file, into a new folder (default data/<name>);
      bpe= is a folder with GPT-2's encoder.json and vocab.bpe, without it tiktoken is asked
  verify GLOB...
      open every shard, check it, and print its tokens, its largest token id and its CRC-32
  corpus [vocab=1024]
      build the embedded corpus (the text of Python's standard library) and describe it

train on shards with: python -m experiments.train data='FOLDER/*.bin'"""


def split_words(words: Sequence[str], allowed: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Plain words and key=value words of a command line; a path may contain '=' after a slash."""
    plain, keys = [], {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            plain.append(word)
        elif key not in allowed:
            keep = f"the keys here are {', '.join(allowed)}" if allowed else "it takes no keys"
            raise UsageError(f"unknown key {word}; {keep}")
        elif key in keys:
            raise UsageError(f"{key} is given twice ({keys[key]!r} and {value!r}); keep one")
        elif not value:
            raise UsageError(f"{word} has no value; write {key}=VALUE or leave it out")
        else:
            keys[key] = value
    return plain, keys


def fineweb_command(words: Sequence[str]) -> None:
    """Fetch FineWeb-10B, one line a shard."""
    from experiments.config import FINEWEB_FOLDER
    from experiments.fineweb import fetch

    keys = _only_keys("fineweb10B", words, ("shards", "folder"))
    shards = cast("shards", keys.get("shards", "9"), int)
    for path, fetched in fetch(shards, Path(keys.get("folder", FINEWEB_FOLDER))):
        print(f"{path}: {'fetched' if fetched else 'already there'}", flush=True)


def encode_command(words: Sequence[str]) -> None:
    """Tokenise text files."""
    from experiments.encode import ENCODINGS, encode_files, name_of

    files, keys = split_words(words, ("tokenizer", "bpe", "out"))
    if not files:
        raise UsageError("encode: no file given; name .txt, .jsonl or .jsonl.xz files")
    tokenizer = keys.get("tokenizer", "gpt2")
    if tokenizer not in ENCODINGS:
        raise UsageError(f"tokenizer={tokenizer}: give one of {', '.join(ENCODINGS)}")
    paths = [Path(name) for name in files]
    out = Path(keys["out"]) if "out" in keys else Path("data") / name_of(paths[0])
    bpe = Path(keys["bpe"]) if "bpe" in keys else None
    tokens = encode_files(paths, out, tokenizer=tokenizer, bpe=bpe)
    print(f"{out}: {tokens['train']:,} training and {tokens['val']:,} validation tokens")


def verify_command(words: Sequence[str]) -> int:
    """Check shards, one line each; 2 when any is broken."""
    from experiments.shards import largest_token, open_shard, read_vocabulary

    patterns, _ = split_words(words, ())
    if not patterns:
        raise UsageError("verify: no shard given; name files or a quoted glob, 'data/x/*.bin'")
    broken = 0
    for pattern in patterns:
        paths = sorted(Path(name) for name in glob(pattern, recursive=True))
        if not paths:
            raise UsageError(f"{pattern}: matches no file; give .bin shards")
        for path in paths:
            try:
                tokens = open_shard(path, read_vocabulary(path.parent)[0])
            except UsageError as error:
                print(f"error: {error}", file=sys.stderr)
                broken += 1
                continue
            checksum = f"{zlib.crc32(tokens):08x}"
            print(
                f"{path}: {len(tokens):,} tokens, largest id {largest_token(path, tokens)}, "
                f"crc32 {checksum}",
                flush=True,
            )
    return 2 if broken else 0


def corpus_command(words: Sequence[str]) -> None:
    """Build the embedded corpus and print what it is."""
    from experiments.corpus import build_corpus

    keys = _only_keys("corpus", words, ("vocab",))
    folder = build_corpus(cast("vocab", keys.get("vocab", "1024"), int))
    print(folder)
    for key, value in json.loads((folder / "meta.json").read_bytes()).items():
        print(f"  {key}: {value:,}" if isinstance(value, int) else f"  {key}: {value}")


COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "fineweb10B": fineweb_command,
    "encode": encode_command,
    "verify": verify_command,
    "corpus": corpus_command,
}


def main(argv: Sequence[str]) -> int | None:
    """Run the sub-command that the first word names; raises UsageError on bad words."""
    if not argv or {"--help", "-h"} & set(argv):
        print(USAGE)
        return 0 if argv else 2
    name, *words = argv
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name}; the commands are {', '.join(COMMANDS)}")
    return COMMANDS[name](words)


def _only_keys(command: str, words: Sequence[str], allowed: Sequence[str]) -> dict[str, str]:
    plain, keys = split_words(words, allowed)
    if plain:
        raise UsageError(f"{command}: {plain[0]!r} is not key=value; write {allowed[0]}=VALUE")
    return keys
