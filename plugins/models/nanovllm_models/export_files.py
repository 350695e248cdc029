"""What every export of a model does: what it is made from, a place for it, whole or not at all, and the companions.

Knows no format.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from nanovllm.errors import ConfigError
from nanovllm.plugins import resolve_model

from .checkpoint import Checkpoint, load_checkpoint
from .files import COMPANIONS, find_file


def find_place(output: str | Path) -> Path:
    """The directory that `output` names. Raises ConfigError if it is something else."""
    target = Path(output).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is not a directory", hint="choose another --output")
    return target


def is_free(target: Path) -> bool:
    return not target.exists() or not any(target.iterdir())


def find_free_place(output: str | Path) -> Path:
    """As `find_place`, of a directory that is not there yet or is empty."""
    target = find_place(output)
    if not is_free(target):
        raise ConfigError(f"{target} is not empty", hint="choose another --output")
    return target


def open_source(model: str, max_length: int | None) -> tuple[Checkpoint, int]:
    """The checkpoint that is to be exported, and for how many tokens of a sequence: by default all its positions.

    `model` is a directory, or `demo`. Raises ConfigError for more tokens than positions, ModelError for a checkpoint
    that cannot be used.
    """
    name, directory = resolve_model(model)
    checkpoint = load_checkpoint(directory or name)
    positions = checkpoint.spec.max_positions
    max_len = positions if max_length is None else max_length
    if not 1 <= max_len <= positions:
        raise ConfigError(
            f"max_length is {max_len}, but {checkpoint.name} has {positions} positions", hint=f"give 1 to {positions}"
        )
    return checkpoint, max_len


@contextmanager
def directory_for(target: Path) -> Iterator[Path]:
    """A new directory that takes the place of `target` in the end; if anything fails, nothing is left of it."""
    part, old = (target.with_name(f".{target.name}.{secrets.token_hex(4)}.{kind}") for kind in ("part", "old"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        yield part
        if target.exists():
            target.rename(old)
        part.rename(target)
    except OSError as e:
        raise ConfigError(f"{target} cannot be written: {e}", hint="make room, or choose another --output") from e
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def copy_companions(source: Path, target: Path) -> None:
    """Configuration, tokenizer and licence, from one directory into another. Raises ModelError as `find_file` does."""
    for path in sorted(source.iterdir()):
        is_companion = any(fnmatchcase(path.name, pattern) for pattern in COMPANIONS)
        if is_companion and (found := find_file(source, path.name)):
            shutil.copyfile(found, target / path.name)


def describe(directory: Path) -> str:
    """For people: how much an export wrote."""
    sizes = [file.stat().st_size for file in directory.iterdir() if file.is_file()]
    return f"{len(sizes)} files, {sum(sizes):,} bytes"
