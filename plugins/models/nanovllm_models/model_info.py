"""`model_info.json`, the eight facts that the seeds' model directories carry: read and written.

Where the file is absent, the same facts are taken from config.json, whatever it calls them. This
file knows no architecture: the facts are not enough to compute a model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanovllm.errors import ModelError

from .files import find_file, read_json

FILE_NAME = "model_info.json"
_TOKENS = ("eos_token_id", "bos_token_id", "pad_token_id")
_SIZES = ("vocab_size", "hidden_size", "num_layers", "num_heads")
_IN_CONFIG = {  # our key -> what config.json may call it
    "hidden_size": ("hidden_size", "n_embd"),
    "num_layers": ("num_hidden_layers", "n_layer"),
    "num_heads": ("num_attention_heads", "n_head"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    model_name: str
    vocab_size: int
    eos_token_id: int | None
    bos_token_id: int | None
    pad_token_id: int | None
    hidden_size: int
    num_layers: int
    num_heads: int

    @classmethod
    def read(cls, directory: Path) -> ModelInfo:
        """From model_info.json or else config.json. Raises ModelError naming the file and the key."""
        if path := find_file(directory, FILE_NAME):
            return cls._from(read_json(path), path)
        if path := find_file(directory, "config.json"):
            return cls._from_config(read_json(path), path)
        raise ModelError(
            f"the model directory {directory} has neither {FILE_NAME} nor config.json", hint="download the model again"
        )

    @classmethod
    def _from_config(cls, config: Mapping[str, Any], path: Path) -> ModelInfo:
        """The directory gives the name, the first of several eos ids counts."""
        values: dict[str, Any] = {
            "model_name": directory_name(path.parent),
            **{key: config.get(key) for key in (*_TOKENS, *_SIZES)},
        }
        for key in _TOKENS:
            if isinstance(values[key], list):
                values[key] = values[key][0] if values[key] else None
        for key, names in _IN_CONFIG.items():
            values[key] = next((config[name] for name in names if name in config), None)
        return cls._from(values, path)

    @classmethod
    def _from(cls, values: Mapping[str, Any], path: Path) -> ModelInfo:
        name = values.get("model_name")
        if not isinstance(name, str):
            raise _bad(path, "model_name", "a text", name)
        for key in _SIZES:
            if type(values.get(key)) is not int or values[key] < 1:
                raise _bad(path, key, "a whole number of at least 1", values.get(key))
        for key in _TOKENS:
            token = values.get(key)
            if token is not None and (type(token) is not int or token < -1):
                raise _bad(path, key, "a token id or null", token)
        # -1 is how several exporters write "none".
        tokens: dict[str, Any] = {key: None if values.get(key) == -1 else values.get(key) for key in _TOKENS}
        return cls(model_name=name, **tokens, **{key: values[key] for key in _SIZES})

    def write(self, directory: Path) -> Path:
        path = directory / FILE_NAME
        path.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return path


def directory_name(directory: Path) -> str:
    """`org/name` for a snapshot in a hub cache (models--org--name/snapshots/REV), else the directory's name."""
    directory = directory.resolve()
    if directory.parent.name == "snapshots":
        return directory.parent.parent.name.removeprefix("models--").replace("--", "/")
    return directory.name


def _bad(path: Path, key: str, wanted: str, value: object) -> ModelError:
    found = "is missing" if value is None else f"is {value!r:.60}"
    return ModelError(f"{path}: {key} {found}; it must be {wanted}", hint="correct or restore the file")
