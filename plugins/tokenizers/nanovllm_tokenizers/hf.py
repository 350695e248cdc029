"""`HFTokenizer`: a tokenizer.json through the tokenizers library, and the files beside it.

This file knows where things are in those files. What a token shows is pieces.py, which text may
become a control token is controls.py, and how a conversation is written is chat.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanovllm.errors import RequestError, TokenizerError
from nanovllm.tokenizer import checked_messages

from .chat import ChatTemplate, find_template
from .controls import ControlTokens
from .files import read_object, read_text
from .pieces import piece_decoder

MAX_VOCAB = 1 << 24
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def load(path: Path, chat_template: Path | None = None) -> HFTokenizer:
    """The tokenizer of a tokenizer.json or its directory; `chat_template` replaces the directory's own.

    Raises TokenizerError that names the file: missing, not JSON, of a wrong shape, or with a decoder
    that cannot be applied token by token.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise TokenizerError(f"there is no {file}", hint="set tokenizer.path to a tokenizer.json or to its directory")
    directory = file.parent
    config_file, map_file = directory / "tokenizer_config.json", directory / "special_tokens_map.json"
    config = read_object(config_file) if config_file.exists() else {}
    names = _token_names(read_object(map_file) if map_file.exists() else {}) | _token_names(config)
    found = (read_text(chat_template), chat_template) if chat_template else find_template(directory, config)
    template = ChatTemplate(found[0], str(found[1])) if found else None
    spec = read_object(file)
    try:
        return HFTokenizer(spec, names, template, str(file))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as e:
        raise TokenizerError(
            f"{file} does not have the shape of a tokenizer.json ({type(e).__name__}: {e})", hint="download it again"
        ) from e


def _token_names(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and the like; each is written as text or as {"content": text}."""
    values = {name: config.get(name) for name in _NAMES}
    texts = {name: v.get("content") if isinstance(v, dict) else v for name, v in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


class HFTokenizer:
    """See nanovllm.tokenizer.Tokenizer for the methods."""

    def __init__(self, spec: dict[str, Any], names: dict[str, str], template: ChatTemplate | None, name: str) -> None:
        """`spec`: the parsed tokenizer.json, which is changed. `names`: {"eos_token": "</s>", ...}."""
        from tokenizers import Tokenizer

        added = spec.get("added_tokens") or []
        vocabulary = _vocabulary(spec["model"])
        id_of = vocabulary | {token["content"]: token["id"] for token in added}
        if not id_of or not all(type(i) is int and 0 <= i < MAX_VOCAB for i in id_of.values()):
            raise TokenizerError(
                f"{name}: token ids must be at least 0 and below {MAX_VOCAB}, and there must be some",
                hint="download it again",
            )
        self.vocab_size = max(id_of.values()) + 1
        self.eos_ids = (_eos_id(names["eos_token"], id_of, name),) if "eos_token" in names else ()
        self._name = name
        self._names = names
        self._template = template
        decode = piece_decoder(spec.get("decoder"), name)
        self._bytes = _token_bytes(id_of, added, decode, self.vocab_size)

        self._controls = ControlTokens(added, vocabulary)
        self._controls.respell_file(spec)
        # Padding and truncation would change prompts in silence; dropout would make their ids random.
        spec["padding"] = spec["truncation"] = spec["model"]["dropout"] = None
        self._library = _guarded(f"refuses {name}", Tokenizer.from_str, json.dumps(spec))
        for token in added:  # respelled by now; the library numbers added tokens by its own rule
            if self._library.token_to_id(token["content"]) != token["id"]:
                raise TokenizerError(
                    f"{name}: the library does not give added token {token['id']} that id", hint="download it again"
                )
            # A normaliser that prepends "▁" makes "word" the token of " word", which is what it then shows.
            normalized = self._library.id_to_token(token["id"])
            if normalized != token["content"] and not token["special"]:
                self._bytes[token["id"]] = decode(normalized)

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        if parse_special:
            text = self._controls.respell(_encodable(text))
        return self._encode(text, add_special_tokens=True)

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        checked = checked_messages(messages)
        if self._template is None:
            raise TokenizerError(
                "the model's directory has no chat template",
                hint="add a chat_template.jinja, set tokenizer.chat_template, or use generate with a plain prompt",
            )
        for message in checked:
            _encodable(message["content"])
        return self._encode(self._controls.respell_chat(checked, self._render), add_special_tokens=False)

    def _render(self, messages: list[dict[str, str]]) -> str:
        variables = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        return _encodable(self._template.render({**self._names, **variables}))

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        what = f"cannot encode a text with {self._name}"
        encode = self._library.encode
        return _guarded(what, encode, _encodable(text), add_special_tokens=add_special_tokens).ids


def _encodable(text: str) -> str:
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise RequestError("the text contains a lone surrogate, which no text encoding can carry")
    return text


def _guarded(what: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the library; whatever it raises becomes a TokenizerError. Its panics are no Exceptions."""
    try:
        return call(*args, **kwargs)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:
        raise TokenizerError(f"the tokenizers library {what}: {e}", hint="download the tokenizer again") from e


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: [[piece, score], ...], the index is the id
        return {piece: i for i, (piece, _) in enumerate(vocab)}
    return dict(vocab)


def _eos_id(text: str, id_of: Mapping[str, int], name: str) -> int:
    if text not in id_of:
        raise TokenizerError(
            f"the eos_token {text!r} is not in {name}", hint="correct eos_token in tokenizer_config.json"
        )
    return id_of[text]


def _token_bytes(
    id_of: Mapping[str, int], added: list[dict[str, Any]], decode: Callable[[str], bytes], size: int
) -> list[bytes]:
    table = [b""] * size  # ids that no token has stay b""
    for piece, i in id_of.items():
        table[i] = decode(piece)
    for token in added:
        table[token["id"]] = b"" if token["special"] else token["content"].encode()
    return table
