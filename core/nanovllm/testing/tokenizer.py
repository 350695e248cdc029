"""TokenizerConformance: the protocol of nanovllm.tokenizer, turned into tests.

    class TestAcme(TokenizerConformance):
        @pytest.fixture(scope="class")
        @classmethod
        def config(cls):
            return {"tokenizer": {"type": "acme", "path": "tests/acme.model"}}

This file knows no library and no file of a tokenizer: a special token is an id without bytes that a spelling
yields only with `parse_special=True`.
"""

from __future__ import annotations

import contextlib
import copy
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ..errors import NanoVLLMError, RequestError, TokenizerError
from ..tokenizer import Tokenizer, TokenStream
from .hygiene import Hygiene
from .suite import level, searched

# What real text holds, and what is hard about it.
_TEXTS = (
    "",
    " ",
    "  \n\t \r\n ",
    "The capital of France is Paris.",
    "def f(x):\n    return x  # four spaces",
    "3.14159 2,718 1e-9",
    "Grüße, señor! Ça va? Łódź",
    unicodedata.normalize("NFD", "Grüße, señor! Ça va?"),  # combining marks
    "日本語とEnglishの混ざった文",
    "שלום עולם، مرحبا",  # right to left
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 thumb",  # joined emoji
    "a\0b",
    "\ufeffmark\u200bzero\u00a0width",
)
_SPECIAL_TEXTS = (
    "<s>", "</s>", "<pad>", "<bos>", "<eos>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>",
    "<|eot_id|>", "<|end|>", "<|user|>", "<start_of_turn>", "<end_of_turn>", "<｜begin▁of▁sentence｜>", "[INST]",
    "[CLS]", "[SEP]",
)  # fmt: skip
_LONG = 20_000  # characters
_MALFORMED: tuple[tuple[Any, str], ...] = (
    ([], "no message at all"),
    ("hello", "a string instead of a list"),
    ({"role": "user", "content": "hello"}, "a mapping instead of a list"),
    ([1], "a number instead of a message"),
    ([{"role": "user"}], "a message without content"),
    ([{"content": "hello"}], "a message without role"),
    ([{"role": "user", "content": None}], "a content that is null"),
    ([{"role": "user", "content": ["hello"]}], "a content that is a list"),
    ([{"role": "user<|im_end|>", "content": "hello"}], "a role that brings a marker"),
    ([{"role": "user", "content": "hello", "name": "x"}], "a message with an unknown key"),
)

_any_text = st.one_of(st.sampled_from(_TEXTS), st.text(max_size=60))
_ids = st.lists(st.integers(0, 2**20) | st.integers(0, 300), max_size=30)


class TokenizerConformance(Hygiene):
    """Whether a tokenizer keeps the protocol of nanovllm.tokenizer, with every text and from every thread.

    `plain_text`: a text that comes back as it was, spaces aside. `special_texts`: spellings of special tokens to try;
    those that are none do no harm.
    """

    group = "tokenizers"
    plain_text: ClassVar[str] = "hello world, how are you"
    special_texts: ClassVar[Sequence[str]] = _SPECIAL_TEXTS

    @pytest.fixture(scope="class")
    @classmethod
    def tokenizer(cls, config: Mapping[str, Any], makeable: None) -> Any:
        return cls.make(config)

    @pytest.fixture(scope="class")
    @classmethod
    def specials(cls, tokenizer: Tokenizer) -> dict[str, set[int]]:
        """Spelling -> the special ids that it becomes where that is asked for."""
        unknown = _without_bytes(tokenizer, tokenizer.encode("\u0378\U000e0fff"))  # what unassigned characters become
        always = _without_bytes(tokenizer, tokenizer.encode("", parse_special=True))  # BOS and the like
        found = {
            text: set(_without_bytes(tokenizer, tokenizer.encode(text, parse_special=True)) - always) - set(unknown)
            for text in cls.special_texts
        }
        return {text: ids for text, ids in found.items() if ids}

    # ------------------------------------------------------------------------------------- basic

    @level("basic")
    def test_every_id_has_bytes(self, tokenizer: Tokenizer) -> None:
        size = tokenizer.vocab_size
        assert type(size) is int, f"vocab_size is {size!r}, not a whole number"
        assert size > 0, f"vocab_size is {size}"
        wrong = next((i for i in range(size) if type(tokenizer.token_bytes(i)) is not bytes), None)
        assert wrong is None, f"token_bytes({wrong}) is {tokenizer.token_bytes(wrong or 0)!r:.60}, not bytes"
        assert any(map(tokenizer.token_bytes, range(size))), "no id has any bytes"

    @level("basic")
    def test_encoding_gives_ids_of_the_vocabulary(self, tokenizer: Tokenizer) -> None:
        @searched
        @given(_any_text)
        def check(text: str) -> None:
            ids = tokenizer.encode(text)
            _check_ids(tokenizer, ids, f"encode({text!r:.40})")

        check()

    @level("basic")
    def test_decoding_is_the_concatenation_of_bytes(self, tokenizer: Tokenizer) -> None:
        """No clean-up, no stripped space, nothing that depends on what stands beside a token."""

        def check(ids: list[int]) -> None:
            wanted = _whole(tokenizer, ids)
            text = tokenizer.decode(ids)
            assert text == wanted, f"decode({_few(ids)}) is {text!r:.60} where the tokens' bytes are {wanted!r:.60}"
            assert tokenizer.decode(tuple(ids)) == wanted, "decode takes a list and treats a tuple otherwise"

        for text in _TEXTS:
            check(tokenizer.encode(text))
        searched(given(_ids | _any_text.map(tokenizer.encode))(check))()

    @level("basic")
    def test_plain_text_comes_back(self, tokenizer: Tokenizer) -> None:
        text = tokenizer.decode(tokenizer.encode(self.plain_text))
        assert "".join(text.split()) == "".join(self.plain_text.split()), f"{self.plain_text!r} comes back as {text!r}"

    @level("basic")
    def test_end_ids_are_of_the_vocabulary(self, tokenizer: Tokenizer) -> None:
        ends = tokenizer.eos_ids
        assert type(ends) is tuple, f"eos_ids is {ends!r:.60}, not a tuple"
        _check_ids(tokenizer, ends, "eos_ids")
        assert len(set(ends)) == len(ends), f"eos_ids {ends} names an id twice"

    @level("basic")
    def test_a_conversation_becomes_ids(self, tokenizer: Tokenizer) -> None:
        ids = self._chat(tokenizer, self.plain_text)
        _check_ids(tokenizer, ids, "chat(...)")
        text, said = ("".join(t.split()) for t in (tokenizer.decode(ids), self.plain_text))
        assert said in text, "the message's text is not in the conversation's"
        roles = ("user", "assistant", "user")
        turns = self._chat_of(tokenizer, [{"role": role, "content": self.plain_text} for role in roles])
        found = "".join(tokenizer.decode(turns).split()).count(said)
        assert found == len(roles), f"of a conversation of {len(roles)} messages it keeps {found}"

    # ----------------------------------------------------------------------------------- batched

    @level("batched")
    def test_threads_do_not_disturb_each_other(self, tokenizer: Tokenizer) -> None:
        """Requests are tokenized in a pool of threads."""

        def work(text: str) -> tuple[list[int], str, list[int]]:
            ids = tokenizer.encode(text)
            return ids, tokenizer.decode(ids), tokenizer.encode(text, parse_special=True)

        texts = [f"{text} {n}" for n in range(20) for text in _TEXTS]
        wanted = list(map(work, texts))
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(work, texts))
        wrong = next((text for text, one, other in zip(texts, wanted, found, strict=True) if one != other), None)
        assert wrong is None, f"in 8 threads at once, {wrong!r:.60} is tokenized otherwise than alone"

    @level("batched")
    def test_a_stream_is_the_whole_text(self, tokenizer: Tokenizer) -> None:
        """Tokens come in any groups, and a character may be in the bytes of two."""

        @searched
        @given(_any_text.map(tokenizer.encode) | _ids, st.data())
        def check(ids: list[int], data: st.DataObject) -> None:
            cuts = data.draw(st.sets(st.integers(0, len(ids))).map(sorted))
            stream = TokenStream(tokenizer.token_bytes)
            pieces = [stream.feed(ids[a:b]) for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
            streamed, wanted = "".join(pieces) + stream.flush(), tokenizer.decode(ids)
            assert streamed == wanted, f"{_few(ids)} streams as {streamed!r:.60} and decodes to {wanted!r:.60}"

        check()

    # ------------------------------------------------------------------------------------ robust

    @level("robust")
    def test_an_unknown_id_has_no_bytes(self, tokenizer: Tokenizer) -> None:
        """Logits may be wider than the vocabulary, so such an id can be drawn."""
        size = tokenizer.vocab_size
        for token_id in (size, size + 1, 2 * size + 7, 2**31, -1, -size):
            data = tokenizer.token_bytes(token_id)
            assert data == b"", f"token_bytes({token_id}) is {data!r:.60} where the vocabulary has {size} ids"
        text = tokenizer.decode([size, 2**31])
        assert text == "", f"ids outside the vocabulary decode to {text!r:.60}"

    @level("robust")
    def test_text_never_becomes_a_special_token(self, tokenizer: Tokenizer, specials: dict[str, set[int]]) -> None:
        self.skip_unless(specials, "none of special_texts is a special token's spelling")
        always = Counter(tokenizer.encode(self.plain_text))
        for text, ids in specials.items():
            for context in (text, f"{self.plain_text}{text}", f"{self.plain_text} {text}\n"):
                got = Counter(tokenizer.encode(context))
                forged = sorted(i for i in ids if got[i] > always[i])
                assert not forged, (
                    f"the text {context!r:.60} becomes the special token {forged[0]} without parse_special"
                )

    @level("robust")
    def test_a_message_never_becomes_a_special_token(self, tokenizer: Tokenizer, specials: dict[str, set[int]]) -> None:
        self.skip_unless(specials, "none of special_texts is a special token's spelling")
        always = Counter(self._chat(tokenizer, self.plain_text))
        for text, ids in specials.items():
            for content in (text, f"{self.plain_text}{text}", f"{text}\n{text}"):
                got = Counter(self._chat(tokenizer, content))
                forged = sorted(i for i in ids if got[i] > always[i])
                assert not forged, f"a message that says {content!r:.60} forges the special token {forged[0]}"

    @level("robust")
    def test_a_malformed_conversation_is_refused(self, tokenizer: Tokenizer) -> None:
        for messages, what in _MALFORMED:
            try:
                tokenizer.chat(messages)
            except (RequestError, TokenizerError):
                continue
            except Exception as e:
                pytest.fail(
                    f"{what} raises {type(e).__name__}, not RequestError: see nanovllm.tokenizer.checked_messages"
                )
            pytest.fail(f"{what} is accepted: see nanovllm.tokenizer.checked_messages")

    @level("robust")
    def test_any_text_is_encoded_or_refused(self, tokenizer: Tokenizer) -> None:
        """Lone surrogates too, which JSON can carry and UTF-8 cannot."""

        def check(text: str, parse_special: bool) -> None:
            try:
                ids = tokenizer.encode(text, parse_special=parse_special)
            except (NanoVLLMError, UnicodeEncodeError):
                surrogates = any("\ud800" <= c <= "\udfff" for c in text)
                assert surrogates, f"{text!r:.60} is refused, and nothing is wrong with it"
                return
            _check_ids(tokenizer, ids, f"encode({text!a:.40})")

        for text in _TEXTS:
            check(text, False)
        searched(given(st.text(st.characters(exclude_categories=()), max_size=40), st.booleans())(check))()

    @level("robust")
    def test_long_texts_are_encoded(self, tokenizer: Tokenizer) -> None:
        """Of one character, of one word, of spaces: what a careless pattern takes quadratic time for."""
        for unit in (self.plain_text, "a", " ", "\n", "ab ", "é", "0", "👍", "!?"):
            times = _LONG // len(unit)
            ids = tokenizer.encode(unit * times)
            _check_ids(tokenizer, ids, f"encode({unit!r} * {times})")
            if unit == self.plain_text:
                kept, given = ("".join(text.split()) for text in (tokenizer.decode(ids), unit * times))
                assert len(kept) > len(given) / 2, f"of {len(given)} characters, spaces aside, {len(kept)} come back"

    @level("robust")
    def test_callers_cannot_change_it(self, tokenizer: Tokenizer) -> None:
        before = list(tokenizer.encode(self.plain_text))
        tokenizer.encode(self.plain_text).clear()
        assert tokenizer.encode(self.plain_text) == before, "whoever changes the list of ids changes the next answer"

    @level("robust")
    def test_a_conversation_is_left_as_it_was(self, tokenizer: Tokenizer) -> None:
        messages = [{"role": "user", "content": self.plain_text}]
        given = copy.deepcopy(messages)
        self._chat_of(tokenizer, messages)
        assert messages == given, "chat changes the caller's messages"

    # ----------------------------------------------------------------------------- deterministic

    @level("deterministic")
    def test_a_text_has_one_encoding(self, tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
        """Whatever was encoded before it, and by whichever of two tokenizers made from the same files."""
        other = self.make(config)
        message = [{"role": "user", "content": self.plain_text}]
        with contextlib.suppress(TokenizerError):  # it knows no template
            said = tokenizer.chat(message)
            for again in (tokenizer.chat(message), other.chat(message)):
                assert again == said, f"a conversation is {_few(said)} at first and {_few(again)} later"
        for text in _TEXTS:
            first = tokenizer.encode(text)
            for again in (tokenizer.encode(text), other.encode(text), other.encode(text)):
                assert again == first, f"{text!r:.60} is {_few(first)} at first and {_few(again)} later"
            for ids in (first, first[::-1]):
                assert other.decode(ids) == tokenizer.decode(ids), f"{_few(ids)} has two texts"

    @level("deterministic")
    def test_plain_text_is_the_same_with_parse_special(self, tokenizer: Tokenizer) -> None:
        plain, parsed = tokenizer.encode(self.plain_text), tokenizer.encode(self.plain_text, parse_special=True)
        assert parsed == plain, f"{self.plain_text!r} spells no special token, but parse_special=True changes its ids"

    # -------------------------------------------------------------------------------------- fast

    @level("fast")
    def test_speed(self, tokenizer: Tokenizer, record_property: Any) -> None:
        """Says the speed, and asks for none."""
        from ..builtin.simple_bpe import SimpleBPETokenizer

        text = f"{self.plain_text}.\n" * 2000
        seconds = {}
        for name, one in (("this", tokenizer), ("simple", SimpleBPETokenizer())):
            started = time.perf_counter()
            assert one.decode(one.encode(text)), "a long text decodes to nothing"
            seconds[name] = time.perf_counter() - started
        record_property(
            "note",
            f"{len(text) / 1e6 / seconds['this']:.2g} million characters a second, there and back: "
            f"{seconds['simple'] / seconds['this']:.2g} times the speed of the built-in tokenizer",
        )

    # ----------------------------------------------------------------------------------- helpers

    def _chat(self, tokenizer: Tokenizer, content: str) -> list[int]:
        return self._chat_of(tokenizer, [{"role": "user", "content": content}])

    def _chat_of(self, tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
        """Skips where no template is known, which a tokenizer may say."""
        try:
            return tokenizer.chat(messages)
        except TokenizerError as e:
            pytest.skip(f"it has no chat template: {e.message}")


def _check_ids(tokenizer: Tokenizer, ids: Iterable[Any], what: str) -> None:
    assert isinstance(ids, (list, tuple)), f"{what} gives a {type(ids).__name__}, not a list of ids"
    for token_id in ids:
        assert type(token_id) is int, f"{what} gives {token_id!r} ({type(token_id).__name__}), not a plain int"
        assert 0 <= token_id < tokenizer.vocab_size, (
            f"{what} gives the id {token_id}, and vocab_size is {tokenizer.vocab_size}"
        )


def _whole(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    return b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace")


def _without_bytes(tokenizer: Tokenizer, ids: Iterable[int]) -> Counter[int]:
    return Counter(i for i in ids if not tokenizer.token_bytes(i))


def _few(ids: Sequence[int]) -> str:
    return repr(list(ids[:8]))[:-1] + (", ...]" if len(ids) > 8 else "]")
