"""`Beside`: the small files beside a tokenizer's own, which name its special and added tokens.

    tokenizer_config.json     bos_token ..., add_bos_token, chat_template, added_tokens_decoder (wins)
    special_tokens_map.json   bos_token ..., additional_special_tokens
    added_tokens.json         {text: id}

This file knows no tokenizer; chat.py reads the chat template.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nanovllm.errors import TokenizerError

from .files import read_object

_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Beside(NamedTuple):
    directory: Path | None  # None: an encoding known by name, with no files
    config: dict[str, Any]  # tokenizer_config.json, {} if there is none
    special_map: dict[str, Any]  # special_tokens_map.json

    @property
    def names(self) -> dict[str, str]:
        """bos_token and the like: {"eos_token": "</s>", ...}."""
        return _token_names(self.special_map) | _token_names(self.config)

    def switch(self, key: str, default: bool) -> bool:
        """add_bos_token and the like. Raises TokenizerError for anything but true, false and null."""
        value = self.config.get(key)
        if value is not None and not isinstance(value, bool):
            raise TokenizerError(
                f"tokenizer_config.json: {key} must be true or false, not {value!r}", hint="correct it there"
            )
        return default if value is None else value

    def added(self) -> list[dict[str, Any]]:
        """The added tokens as a tokenizer.json has them: id, content, special and its flags; sorted by id.

        Raises TokenizerError that names the file.
        """
        if self.directory is None:
            return []
        file, added = self.directory / "added_tokens.json", {}
        if (decoder := self.config.get("added_tokens_decoder")) is not None:
            file, added = self.directory / "tokenizer_config.json", _from_decoder(decoder)
        elif file.exists():
            key = "additional_special_tokens"
            special = {*self.names.values(), *_texts(self.special_map.get(key) or self.config.get(key))}
            added = {i: added_token(i, text, text in special) for text, i in read_object(file).items()}
        for i, token in added.items():
            if token is None or type(i) is not int or i < 0 or not isinstance(token["content"], str):
                raise TokenizerError(f"{file}: added token {i!r} has no text or no id", hint="download it again")
        return [added[i] for i in sorted(added)]


def read_beside(directory: Path | None) -> Beside:
    """Raises TokenizerError that names the file."""
    if directory is None:
        return Beside(None, {}, {})
    config_file, map_file = directory / "tokenizer_config.json", directory / "special_tokens_map.json"
    config = read_object(config_file) if config_file.exists() else {}
    return Beside(directory, config, read_object(map_file) if map_file.exists() else {})


def added_token(token_id: int, content: str, special: bool, **flags: bool) -> dict[str, Any]:
    """A token as a tokenizer.json writes it."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": content, **plain, **flags, "special": special}


def _from_decoder(decoder: Any) -> dict[Any, dict[str, Any] | None]:
    if not isinstance(decoder, dict):
        return {"added_tokens_decoder": None}
    added: dict[Any, dict[str, Any] | None] = {}
    for key, value in decoder.items():
        i = int(key) if key.isascii() and key.isdecimal() else key
        if isinstance(value, dict) and "content" in value:
            flags = {k: bool(value.get(k)) for k in ("single_word", "lstrip", "rstrip", "normalized")}
            added[i] = added_token(i, value["content"], bool(value.get("special")), **flags)
        else:
            added[i] = None
    return added


def _texts(tokens: Any) -> list[str]:
    values = [t.get("content") if isinstance(t, dict) else t for t in (tokens if isinstance(tokens, list) else [])]
    return [text for text in values if isinstance(text, str)]


def _token_names(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and the like; each is written as text or as {"content": text}."""
    return {name: text for name in _NAMES for text in _texts([config.get(name)])}
