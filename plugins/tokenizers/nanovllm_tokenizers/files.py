"""Reading the small files beside a model. This file knows sizes and JSON, and nothing of what they mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanovllm.errors import TokenizerError

MAX_FILE_BYTES = 256 << 20  # the largest tokenizer.json in use has 33 MB


def read_bytes(path: Path) -> bytes:
    """The file; TokenizerError that names it if it is missing or too large."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as e:
        raise TokenizerError(
            f"cannot read {path}: {e.strerror or e}", hint="check the path and that the download is complete"
        ) from e
    if len(data) > MAX_FILE_BYTES:
        raise TokenizerError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB", hint="this is not a tokenizer's file")
    return data


def read_text(path: Path) -> str:
    """The file as text; TokenizerError that names it if it cannot be read or is not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise TokenizerError(
            f"{path} is not UTF-8 text ({e.reason} at byte {e.start})", hint="download it again"
        ) from e


def read_object(path: Path) -> dict[str, Any]:
    """The file's one JSON object; TokenizerError that names it if it is anything else."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise TokenizerError(f"{path} is not JSON ({e})", hint="download it again") from e
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds a JSON {type(value).__name__}, not an object", hint="download it again")
    return value
