"""FineWeb-10B as GPT-2 shards, fetched from the Hugging Face hub."""

from collections.abc import Iterator
from pathlib import Path

from experiments.shards import GPT2_VOCAB, open_shard
from models.command_line import UsageError

REPOSITORY = "kjj0/fineweb10B-gpt2"
NUM_SHARDS = 103  # training shards of 100 million tokens


def shard_names(shards: int) -> list[str]:
    """The validation shard and the first training shards."""
    numbers = range(1, shards + 1)
    return ["fineweb_val_000000.bin", *(f"fineweb_train_{number:06d}.bin" for number in numbers)]


def fetch(shards: int, folder: Path) -> Iterator[tuple[Path, bool]]:
    """Each shard's path in `folder` once it is there and whole, and whether it was fetched.

    Whole shards are left alone, broken ones fetched again. Raises UsageError.
    """
    if not 1 <= shards <= NUM_SHARDS:
        raise UsageError(f"shards={shards}: give 1 to {NUM_SHARDS}")
    folder.mkdir(parents=True, exist_ok=True)
    for name in shard_names(shards):
        path = folder / name
        fetched = not _is_whole(path)
        if fetched:
            _download(name, folder)
            open_shard(path, GPT2_VOCAB)
        yield path, fetched


def _is_whole(path: Path) -> bool:
    try:
        open_shard(path, GPT2_VOCAB)
    except UsageError:
        return False
    return True


def _download(name: str, folder: Path) -> None:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise UsageError(
            f"fetching {name} needs huggingface_hub; run pip install 'lens_jax[data]'"
        ) from None
    try:
        hf_hub_download(
            repo_id=REPOSITORY,
            filename=name,
            repo_type="dataset",
            local_dir=folder,
            # what lies there did not pass, whatever the hub's own records say of it
            force_download=(folder / name).exists(),
        )
    except Exception as error:  # its transport's errors share no base from release to release
        raise UsageError(
            f"{name}: could not be fetched from {REPOSITORY} ({_root_cause(error)}); run the "
            f"command again when the network is there, whole shards are kept"
        ) from error


def _root_cause(error: BaseException) -> str:
    """First line of the error that began a chain of them."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
