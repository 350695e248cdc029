"""`HFTokenizer`: a tokenizer.json through the tokenizers library.

Text never becomes a control token by accident. Before the file is given to the library, every control
token in it is respelled as a name nobody can guess, so plain text cannot spell one: not as an added
token, not as a piece of a Unigram vocabulary, not through a merge. Where a control token IS wanted
(`parse_special`, chat templates) its text is found and replaced by that name, and the library then
treats it by its own flags (lstrip, rstrip, normalized). One immutable instance serves both ways.

A control token is one flagged `special`, or an added token spelled like a tag: <tool_call>,
<|fim_prefix|>, [INST]. Other added tokens (runs of spaces, whole words) are ordinary text to the model.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanovllm.errors import RequestError, TokenizerError
from nanovllm.tokenizer import checked_messages

from .chat import ChatTemplate, find_template
from .files import read_object, read_text
from .pieces import piece_decoder

MAX_VOCAB = 1 << 24
_TAG = re.compile(r"[<\[{].*[>\]}]", re.DOTALL)
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
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as e:
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
        added = spec.get("added_tokens") or []
        id_of = _vocabulary(spec["model"]) | {token["content"]: token["id"] for token in added}
        if not id_of or not all(type(i) is int and 0 <= i < MAX_VOCAB for i in id_of.values()):
            raise TokenizerError(f"{name}: token ids must be at least 0 and below {MAX_VOCAB}, and there must be some")
        self.vocab_size = max(id_of.values()) + 1
        self.eos_ids = (_eos_id(names["eos_token"], id_of, name),) if "eos_token" in names else ()
        self._names = names
        self._template = template
        self._bytes = _token_bytes(id_of, added, piece_decoder(spec.get("decoder"), name), self.vocab_size)

        # Fixed width, so that no name is the beginning of another one.
        secret = secrets.token_hex(16)
        controls = {
            token["content"]: f"{secret}{token['id']:08x}"
            for token in added
            if token["special"] or _TAG.fullmatch(token["content"])
        }
        self._finder, self._name_of = _finder(added, controls)
        _respell(spec, controls)
        self._library = _build(spec, name)
        for token in added:  # respelled by now; the library numbers added tokens by its own rule
            if self._library.token_to_id(token["content"]) != token["id"]:
                raise TokenizerError(f"{name}: added token {token['id']} does not follow the vocabulary's ids")

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        if parse_special:
            text = self._respelled(text, "", "")
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
        # Control tokens that a content spells are put between two characters that occur nowhere else.
        # The template still sees the token's text, so its own tests and splits on it work.
        taken = set().union(*(message["content"] for message in checked), self._template.source)
        unused = (char for char in map(chr, range(0xF0000, 0x10FFFE)) if char not in taken)
        try:
            start, end = next(unused), next(unused)
        except StopIteration:
            raise RequestError("the messages use every private-use character there is") from None
        for message in checked:
            content = message["content"]
            for i, j, _ in reversed(self._find(content)):
                content = content[:i] + start + content[i:j] + end + content[j:]
            message["content"] = content
        text = self._template.render(
            {"messages": checked, "tools": None, "documents": None, "add_generation_prompt": True, **self._names}
        )
        text = self._respelled(text, start, end).replace(start, "").replace(end, "")
        return self._encode(text, add_special_tokens=False)

    def _find(self, text: str) -> list[tuple[int, int, str]]:
        """(start, stop, name) of each control token in the text, by the library's own matching."""
        try:
            found = self._finder.encode(text, add_special_tokens=False)
        except UnicodeEncodeError:
            raise _lone_surrogate() from None
        return [
            (*span, self._name_of[i]) for span, i in zip(found.offsets, found.ids, strict=True) if i in self._name_of
        ]

    def _respelled(self, text: str, start: str, end: str) -> str:
        """The text with each control token under its secret name, but those after `start` or before `end`."""
        parts, done = [], 0
        for i, j, name in self._find(text):
            if start and (text[i - 1 : i] == start or text[j : j + 1] == end):
                continue
            parts += [text[done:i], name]
            done = j
        return "".join([*parts, text[done:]])

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            return self._library.encode(text, add_special_tokens=add_special_tokens).ids
        except UnicodeEncodeError:
            raise _lone_surrogate() from None


def _lone_surrogate() -> RequestError:
    return RequestError("the text contains a lone surrogate, which no text encoding can carry")


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


def _finder(added: list[dict[str, Any]], controls: Mapping[str, str]) -> tuple[Any, dict[int, str]]:
    """A library tokenizer that knows only the added tokens, and {its id: secret name} of the control tokens."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel

    finder = Tokenizer(WordLevel({"": 0}, unk_token=""))  # everything between two added tokens is id 0
    finder.add_tokens(
        [AddedToken(t["content"], single_word=t["single_word"], normalized=False) for t in added if t["content"]]
    )
    return finder, {finder.token_to_id(content): name for content, name in controls.items() if content}


def _respell(spec: dict[str, Any], controls: Mapping[str, str]) -> None:
    """Put the secret names in place of the control tokens, and switch off what belongs to training."""
    # Padding and truncation would change prompts in silence; dropout would make their ids random.
    spec["padding"] = spec["truncation"] = None
    for token in spec.get("added_tokens") or []:
        if token["content"] in controls:
            token["content"] = controls[token["content"]]
            token["single_word"] = False  # decided where the text is found
    model = spec["model"]
    model.pop("dropout", None)
    vocab = model["vocab"]
    if isinstance(vocab, list):
        model["vocab"] = [[controls.get(piece, piece), score] for piece, score in vocab]
        return
    if not controls.keys().isdisjoint(vocab):
        model["vocab"] = {controls.get(piece, piece): i for piece, i in vocab.items()}
        if "merges" in model:
            model["merges"] = [merge for merge in model["merges"] if not _touches(merge, controls)]
    if model.get("unk_token") in controls:
        model["unk_token"] = controls[model["unk_token"]]


def _touches(merge: str | list[str], controls: Mapping[str, str]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in controls or right in controls or left + right in controls


def _build(spec: dict[str, Any], name: str) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(json.dumps(spec))
    except BaseException as e:  # the library's panics are not Exceptions
        if isinstance(e, (KeyboardInterrupt, SystemExit)):
            raise
        raise TokenizerError(f"the tokenizers library refuses {name}: {e}", hint="download it again") from e
