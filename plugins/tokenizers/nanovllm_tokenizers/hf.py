"""`HFTokenizer`: a tokenizer.json through the tokenizers library, and the files beside it.

This file knows where things are in a tokenizer.json. What a token shows is pieces.py, which text may
become a control token is controls.py, and what is in the files beside it is beside.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nanovllm.errors import TokenizerError

from .base import MAX_VOCAB, BaseTokenizer, eos_id, guarded
from .beside import read_beside
from .byte_bpe import PAIRS, as_tokenizer_json, find_pair
from .chat import ChatTemplate, choose_template
from .controls import ControlTokens
from .files import read_object
from .pieces import piece_decoder


def load(path: Path, chat_template: str | None = None) -> HFTokenizer:
    """The tokenizer of a tokenizer.json or its directory, which may hold vocab.json and merges.txt instead.

    `chat_template`: a built-in one's name, or the jinja file that replaces the directory's own.
    Raises TokenizerError that names the file: missing, not JSON, of a wrong shape, or with a decoder
    that cannot be applied token by token.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    directory = file.parent
    has_spec = file.is_file() and not any(file.name in pair for pair in PAIRS)
    pair = None if has_spec else find_pair(directory)
    if pair is None and not has_spec:
        raise TokenizerError(
            f"there is no {file}, nor vocab.json and merges.txt",
            hint="set tokenizer.path to a tokenizer.json or to its directory",
        )
    beside = read_beside(directory)
    try:
        if pair is None:
            spec, names = read_object(file), beside.names
        else:
            file = pair[0]
            spec, names = as_tokenizer_json(*pair, beside)
        added = {token["content"] for token in spec.get("added_tokens") or []}
        template = choose_template(chat_template, directory, beside.config, added)
        return HFTokenizer(spec, names, template, str(file))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as e:
        raise TokenizerError(
            f"{file} does not have the shape of a {file.name} ({type(e).__name__}: {e})", hint="download it again"
        ) from e


class HFTokenizer(BaseTokenizer):
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
        decode = piece_decoder(spec.get("decoder"), name)
        super().__init__(
            token_bytes=_token_bytes(id_of, added, decode),
            eos_ids=(eos_id(names["eos_token"], id_of, name),) if "eos_token" in names else (),
            controls=ControlTokens(added, vocabulary),
            names=names,
            template=template,
        )
        self._name = name
        self._controls.respell_file(spec)
        # Padding and truncation would change prompts in silence; dropout would make their ids random.
        spec["padding"] = spec["truncation"] = spec["model"]["dropout"] = None
        self._library = guarded("tokenizers", f"refuses {name}", Tokenizer.from_str, json.dumps(spec))
        for token in added:  # respelled by now; the library numbers added tokens by its own rule
            if self._library.token_to_id(token["content"]) != token["id"]:
                raise TokenizerError(
                    f"{name}: the library does not give added token {token['id']} that id", hint="download it again"
                )
            # A normaliser that prepends "▁" makes "word" the token of " word", which is what it then shows.
            normalized = self._library.id_to_token(token["id"])
            if normalized != token["content"] and not token["special"]:
                self._bytes[token["id"]] = decode(normalized)

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        what = f"cannot encode a text with {self._name}"
        return guarded("tokenizers", what, self._library.encode, text, add_special_tokens=add_special_tokens).ids


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: [[piece, score], ...], the index is the id
        return {piece: i for i, (piece, _) in enumerate(vocab)}
    return dict(vocab)


def _token_bytes(id_of: Mapping[str, int], added: list[dict[str, Any]], decode: Callable[[str], bytes]) -> list[bytes]:
    table = [b""] * (max(id_of.values()) + 1)  # ids that no token has stay b""
    for piece, i in id_of.items():
        table[i] = decode(piece)
    for token in added:
        table[token["id"]] = b"" if token["special"] else token["content"].encode()
    return table
