"""`ControlTokens`: keeps text from becoming a control token by accident.

Before a tokenizer.json is given to the library, every control token in it is respelled as a name nobody
can guess, so plain text cannot spell one: not as an added token, not as a piece of a Unigram vocabulary,
not through a merge. Where a control token IS wanted, its text is found and replaced by that name, and
the library then treats it by its own flags (lstrip, rstrip). Nothing is ever switched, so one tokenizer
serves both ways, from several threads. A control token is taken as it is written: its flag `normalized`,
by which "＜s＞" could spell "<s>" too, is not honoured.

A control token is one flagged `special`, or an added token spelled like a tag: <tool_call>,
<|fim_prefix|>, [INST]. Other added tokens (runs of spaces, whole words) are ordinary text to the model,
and so is a single character of the vocabulary ("!" is flagged as padding in some files).
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Collection, Mapping
from itertools import islice
from typing import Any

from nanovllm.errors import RequestError

_TAG = re.compile(r"[<\[{].*[>\]}]", re.DOTALL)

Span = tuple[int, int, str]  # text[i:j] and what is, or comes, in its place


class ControlTokens:
    """The control tokens of one tokenizer and their secret names."""

    def __init__(self, added: list[dict[str, Any]], vocabulary: Collection[str]) -> None:
        """`added`: tokens as in a tokenizer.json's added_tokens; `vocabulary`: the pieces of its model."""
        from tokenizers import AddedToken, Tokenizer
        from tokenizers.models import WordLevel

        secret = secrets.token_hex(16)
        self._split = re.compile(f"({secret}[0-9a-f]{{8}})")
        self._names = {  # of fixed width, so that no name is the beginning of another one
            token["content"]: f"{secret}{token['id']:08x}" for token in added if is_control(token, vocabulary)
        }
        # The library's own matching (leftmost, longest, single_word), over added tokens and nothing else.
        self._finder = Tokenizer(WordLevel({"": 0}, unk_token=""))  # what lies between two tokens is id 0
        self._finder.add_tokens(
            [AddedToken(t["content"], single_word=t["single_word"], normalized=False) for t in added if t["content"]]
        )
        self._name_of_id = {self._finder.token_to_id(text): name for text, name in self._names.items() if text}
        # The other added tokens are found in every text; only `split` needs to know them.
        self._words = {
            self._finder.token_to_id(t["content"]): f"{secret}{t['id']:08x}"
            for t in added
            if t["content"] and t["content"] not in self._names
        }
        self._flags = {t["id"]: t for t in added if t["lstrip"] or t["rstrip"]}

    def respell_file(self, spec: dict[str, Any]) -> None:
        """Put the secret names in place of the control tokens everywhere in a parsed tokenizer.json."""
        names = self._names
        for token in spec.get("added_tokens") or []:
            if token["content"] in names:
                token["content"] = names[token["content"]]
                token["single_word"] = token["normalized"] = False  # decided where the text is found
        model = spec["model"]
        vocab = model["vocab"]
        if isinstance(vocab, list):
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
            return
        if not names.keys().isdisjoint(vocab):
            model["vocab"] = {names.get(piece, piece): i for piece, i in vocab.items()}
            if "merges" in model:
                pairs = ((m, m.split(" ") if isinstance(m, str) else m) for m in model["merges"])
                model["merges"] = [m for m, (a, b) in pairs if names.keys().isdisjoint((a, b, a + b))]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]

    def respell(self, text: str) -> str:
        """The text with every control token in it under its secret name."""
        return _replaced(text, self._find(text))

    def split(self, text: str) -> list[str | int]:
        """A text, respelled where wanted, as its plain stretches and the ids of the added tokens between them.

        For libraries that know no added tokens. `lstrip` and `rstrip` are honoured; no stretch is empty.
        """
        odd = self._split.split(text)  # plain, name, plain, name, ..., plain
        if self._words:
            odd[::2] = [_replaced(plain, self._found(plain, self._words)) for plain in odd[::2]]
            odd = self._split.split("".join(odd))
        ids = [int(name[-8:], 16) for name in odd[1::2]]
        parts: list[str | int] = []
        for i, plain in enumerate(odd[::2]):
            if i and self._flags.get(ids[i - 1], {}).get("rstrip"):
                plain = plain.lstrip()
            if i < len(ids) and self._flags.get(ids[i], {}).get("lstrip"):
                plain = plain.rstrip()
            parts += [plain] if plain else []
            parts += ids[i : i + 1]
        return parts

    def respell_chat(self, messages: list[dict[str, str]], render: Callable[[list[dict[str, str]]], str]) -> str:
        """`render(messages)`, with the control tokens under their secret names that no content brought in."""
        text = render(messages)
        spans = self._find(text)
        in_contents = [self._find(message["content"]) for message in messages]
        if not any(in_contents):
            return _replaced(text, spans)

        # Which of the tokens in the text are the contents'? Render once more, with each of theirs between
        # two marks: characters that occur nowhere else, another pair for each token. The template still
        # sees the tokens, so its own tests and splits on them work. Marks are repeated, so that a
        # template that cuts a few characters off leaves some.
        names = sorted({name for found in in_contents for *_, name in found})
        taken = set(text).union(*(message["content"] for message in messages))
        private_use = map(chr, range(0xF0000, 0x10FFFE))
        unused = list(islice((char for char in private_use if char not in taken), 2 * len(names)))
        if len(unused) < 2 * len(names):
            raise RequestError("the messages use nearly every private-use character there is")
        marks = dict(zip(names, zip(unused[::2], unused[1::2], strict=True), strict=True))
        marked_messages = []
        for message, found in zip(messages, in_contents, strict=True):
            content = message["content"]
            marked = [(i, j, marks[name][0] * 8 + content[i:j] + marks[name][1] * 8) for i, j, name in found]
            marked_messages.append({**message, "content": _replaced(content, marked)})
        marked_text = render(marked_messages)
        marked_spans = self._find(marked_text)

        def is_typed(i: int, j: int, name: str) -> bool:
            # One mark is enough, because a cut may take the other. What a split on a token leaves is a
            # mark of THAT token, and so does not claim the template's token that follows.
            before, after = marks.get(name, (None, None))
            return marked_text[i - 1 : i] == before or marked_text[j : j + 1] == after

        typed = [is_typed(*span) for span in marked_spans]
        if [name for *_, name in marked_spans] != [name for *_, name in spans]:
            text, spans = marked_text, marked_spans  # the marks changed what the template writes: stay with them
        wanted = [span for span, skip in zip(spans, typed, strict=True) if not skip]
        return _replaced(text, wanted).translate(dict.fromkeys(map(ord, unused)))

    def _find(self, text: str) -> list[Span]:
        """(i, j, secret name) of each control token text[i:j], in order."""
        return self._found(text, self._name_of_id)

    def _found(self, text: str, name_of_id: Mapping[int, str]) -> list[Span]:
        found = self._finder.encode(text, add_special_tokens=False)
        names = map(name_of_id.get, found.ids)
        return [(i, j, name) for (i, j), name in zip(found.offsets, names, strict=True) if name is not None]


def is_control(token: dict[str, Any], vocabulary: Collection[str]) -> bool:
    """Whether an added token is one that a user's text may not become."""
    text = token["content"]
    return (token["special"] or is_tag(text)) and not (len(text) == 1 and text in vocabulary)


def is_tag(text: str) -> bool:
    return _TAG.fullmatch(text) is not None


def _replaced(text: str, spans: list[Span]) -> str:
    """The text with `new` in place of text[i:j], for each (i, j, new)."""
    parts, done = [], 0
    for i, j, new in spans:
        parts += [text[done:i], new]
        done = j
    return "".join([*parts, text[done:]])
