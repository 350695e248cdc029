"""The built-in 125-entry tokenizer (rows C9, S3-04, S3-06)."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.builtin.simple_bpe import NewSimpleBPETokenizer, SimpleBPETokenizer
from nanovllm.errors import RequestError

tokenizer = NewSimpleBPETokenizer(2)
spellings = [tokenizer.decode([i]) for i in range(4, 125)]


def test_there_are_exactly_125_entries_each_with_one_id():
    assert tokenizer.vocab_size == 125
    assert tokenizer.eos_ids == (2,)
    assert [tokenizer.token_bytes(i) for i in range(4)] == [b""] * 4
    assert len(set(spellings)) == 121
    assert all(spellings)
    assert [tokenizer.encode(s) for s in spellings] == [[i] for i in range(4, 125)]
    assert tokenizer.token_bytes(125) == tokenizer.token_bytes(32000) == tokenizer.token_bytes(-1) == b""


@given(st.lists(st.sampled_from(spellings), max_size=40).map("".join))
def test_decode_undoes_encode_on_the_alphabet(text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(4 <= i < 125 for i in ids)


@given(st.text(max_size=40))
def test_a_character_outside_the_alphabet_is_one_unknown(text):
    known = set("".join(spellings))
    ids = tokenizer.encode(text)
    assert ids.count(3) == sum(c not in known for c in text)
    assert tokenizer.decode(ids) == "".join(c for c in text if c in known)


@given(st.lists(st.integers(0, 40_000), max_size=30))
def test_any_ids_decode_to_the_concatenation_of_their_bytes(ids):
    assert tokenizer.decode(ids) == b"".join(map(tokenizer.token_bytes, ids)).decode()


def test_special_tokens_only_where_asked():
    assert 2 not in tokenizer.encode("the <eos>")
    assert tokenizer.encode("the<eos>", parse_special=True) == [*tokenizer.encode("the"), 2]


def test_longest_match_wins():
    assert len(tokenizer.encode("there")) == 1
    assert tokenizer.encode("then") == [*tokenizer.encode("the"), *tokenizer.encode("n")]


def test_chat_is_plain_lines():
    ids = tokenizer.chat([{"role": "user", "content": "hello <eos>"}, {"role": "assistant", "content": "you"}])
    assert tokenizer.decode(ids) == "User: hello eos\nAssistant: you\nAssistant:"
    assert 2 not in ids
    with pytest.raises(RequestError, match=r"messages\[0\]"):
        tokenizer.chat([{"role": "user"}])


@pytest.mark.parametrize("eos_id", [-1, 125, True, "2", None])
def test_an_impossible_eos_id_is_refused(eos_id):
    with pytest.raises(RequestError, match="eos_id"):
        SimpleBPETokenizer(eos_id)


def test_it_needs_no_third_party_package():
    code = (
        "import nanovllm.builtin.simple_bpe, sys; print({'numpy', 'tokenizers', 'jinja2', 'pydantic'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
