"""Two answers to one prompt, and the first stage at which they part. docs/compare.md is the definition.

    template    a conversation became another text, or got other control tokens, and its plain texts the same ids;
                or only one takes it, and both take its plain texts
    tokenizer   the same text became other ids or is refused by one, or the same id stands for other bytes
    logits      from the same ids the runners computed logits that call for other tokens, or for none
    sampler     a token was drawn that its logits do not call for, or none although they call for one
    stop        the same tokens, and one answer ended where the other did not, or for another reason
    error       one has no answer, or only the beginning of one
    unseen      a runner shows too little to tell which stage it is

This file names differences of prompts, pair.py those of answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest

from ..request import show
from .encode import Ids, Tokenized
from .prompts import Prompt
from .scores import Gap

STAGES = ("template", "tokenizer", "logits", "sampler", "stop", "error", "unseen")


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    prompt: int | None  # which one, from 0; None: of the vocabularies as a whole
    stage: str  # one of STAGES
    sentence: str
    position: int | None = None  # of the first token that differs: in the prompt, and from `logits` on in the answer
    is_tie: bool = False  # logits that agree within the tolerance chose differently
    gap: Gap | None = None


# --------------------------------------------------------------------------- template and tokenizer


def of_prompts(index: int, prompt: Prompt, a: Tokenized, b: Tokenized) -> Difference | None:
    """Do both tokenizers give the model the same ids, and do these stand for the same bytes?"""
    one, other = a.encoded[index], b.encoded[index]
    for text, ids, other_ids in zip(prompt.texts, one.plain, other.plain, strict=False):
        if ids != other_ids:
            return _other_ids(index, "tokenizer", f"the text {show(text)}", a, ids, b, other_ids)
    refusals = [f"{t.name} refuses it: {t.encoded[index].refusal}" for t in (a, b) if t.encoded[index].refusal]
    if refusals:
        takes_texts = one.plain and other.plain
        stage = "error" if len(refusals) == 2 else "template" if prompt.is_chat and takes_texts else "tokenizer"
        return Difference(prompt=index, stage=stage, sentence="; ".join(refusals))
    if one.ids is None or other.ids is None:  # tokenized where nobody can see it
        return None
    if one.ids != other.ids:
        # What the template wrote: the text, and the control tokens in it, which stand for no text.
        wrote = [
            (t.spelled(ids), [i for i in ids if not t.token_bytes[i]]) for t, ids in ((a, one.ids), (b, other.ids))
        ]
        stage = "tokenizer" if wrote[0] == wrote[1] else "template"
        return _other_ids(index, stage, "the conversation", a, one.ids, b, other.ids)
    return other_bytes(index, one.ids, a, b)


def of_vocabularies(a: Tokenized, b: Tokenized) -> Iterator[Difference]:
    """Whole vocabularies, and the ids that end an answer: what no prompt may happen to show."""
    if a.vocab_size != b.vocab_size:
        sentence = f"{a.name} has {a.vocab_size} entries, {b.name} {b.vocab_size}"
        yield Difference(prompt=None, stage="tokenizer", sentence=sentence)
    shared = sorted(a.token_bytes.keys() & b.token_bytes.keys())
    if others := [token for token in shared if a.token_bytes[token] != b.token_bytes[token]]:
        first = other_bytes(None, (others[0],), a, b)
        assert first is not None, "its bytes differ"
        yield replace(first, sentence=f"{first.sentence} (one of {len(others)} such ids)", position=None)
    if set(a.eos_ids) != set(b.eos_ids):
        sentence = f"answers end at {list(a.eos_ids)} for {a.name}, at {list(b.eos_ids)} for {b.name}"
        yield Difference(prompt=None, stage="stop", sentence=sentence)


def _other_ids(
    index: int, stage: str, what: str, a: Tokenized, ids: Ids, b: Tokenized, other_ids: Ids
) -> Difference:  # fmt: skip
    position = next(i for i, (x, y) in enumerate(zip_longest(ids, other_ids)) if x != y)
    excerpts = [
        f"{t.name} has {', '.join(map(t.piece, own[position : position + 3])) or 'nothing more'}"
        for t, own in ((a, ids), (b, other_ids))
    ]
    sentence = f"{what} becomes other ids from token {position} on: {'; '.join(excerpts)}"
    if a.vocab_size != b.vocab_size:
        sentence += f" (their vocabularies differ: {a.vocab_size} and {b.vocab_size} entries)"
    elif a.spelled(ids) == b.spelled(other_ids):
        sentence += " (both spell the same text" + (", so control tokens differ)" if stage == "template" else ")")
    return Difference(prompt=index, stage=stage, sentence=sentence, position=position)


def other_bytes(index: int | None, ids: Ids, a: Tokenized, b: Tokenized) -> Difference | None:
    """Do ids that both have, of a prompt or of answers, stand for the same?"""
    for position, token in enumerate(ids):
        own, others = a.token_bytes.get(token), b.token_bytes.get(token)
        if own is not None and others is not None and own != others:
            sentence = f"the same id stands for other bytes: {a.name} has {a.piece(token)}, {b.name} {b.piece(token)}"
            return Difference(prompt=index, stage="tokenizer", sentence=sentence, position=position)
    return None
