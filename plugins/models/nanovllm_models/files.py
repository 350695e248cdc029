"""Reading the files of a model directory that somebody else wrote.

Confinement: a name is followed only to a regular file inside the directory, or inside `blobs/` of
the same Hugging Face hub cache repository (whose snapshots are links into it). JSON is bounded,
strict and returned as plain data. This file knows nothing of what the files say.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nanovllm.errors import ModelError

MAX_JSON_BYTES = 100_000_000  # the safetensors format's own limit for its header
# What goes with the weights of a model, whatever their format.
COMPANIONS = (
    "config.json", "generation_config.json", "model_info.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "*.tiktoken",
    "chat_template.jinja", "chat_template.json",
    "README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.md", "NOTICE.txt",
)  # fmt: skip


def find_file(directory: Path, name: str) -> Path | None:
    """The path of the file `name` in the model directory; None if there is none.

    Raises ModelError if it is not a regular file or, links followed, lies outside.
    """
    try:
        if not (directory / name).exists() and not (directory / name).is_symlink():
            return None
        root, real = directory.resolve(strict=True), (directory / name).resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as e:  # too long, NUL, a loop of links, a dangling link
        raise ModelError(
            f"{name!r} in the model directory {directory} cannot be opened: {e}", hint="download the model again"
        ) from e
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise ModelError(
            f"{name!r} in the model directory {directory} leads outside of it, to {real}",
            hint="copy the file into the directory if you trust it",
        )
    if not real.is_file():
        raise ModelError(f"{name!r} in the model directory {directory} is not a regular file", hint="remove it")
    return directory / name


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file. Raises ModelError naming the file and what is wrong with it."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            raw = file.read(min(size, MAX_JSON_BYTES) + 1)  # which reserves as much
    except OSError as e:
        raise ModelError(f"{path} cannot be read: {e.strerror or e}", hint="check its permissions") from e
    return parse_json(raw, str(path))


def parse_json(raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object out of untrusted bytes: bounded, UTF-8, no duplicate keys, no NaN."""
    hint = "the file is damaged or not what its name says: download the model again"
    if len(raw) > MAX_JSON_BYTES:
        raise ModelError(f"{what} is larger than {MAX_JSON_BYTES:,} bytes", hint=hint)
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as e:
        raise ModelError(f"{what} is not usable JSON: nested too deeply", hint=hint) from e
    except ValueError as e:  # JSONDecodeError, UnicodeDecodeError, an endless number, and our two below
        raise ModelError(f"{what} is not usable JSON: {e}", hint=hint) from e
    if not isinstance(value, dict):
        raise ModelError(f"{what} holds a JSON {type(value).__name__} where an object is expected", hint=hint)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} appears twice")
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
