"""The byte-level BPE encodings known by name: what their rank files do not say.

Patterns and special tokens are facts of the encodings, as tiktoken (openai_public.py) and Meta's Llama 3
(tokenizer.py, in the names of 3.1) publish them. This file opens no file.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import NamedTuple

from nanovllm.errors import TokenizerError


class Known(NamedTuple):
    pattern: str
    file: str  # the name under which the rank file is published
    num_ranks: int | None  # None: not known beforehand
    special: dict[str, int]
    eos: tuple[str, ...]
    bos: str | None = None  # what a prompt starts with


_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# Possessive (++, ?+), so that a million spaces do not exhaust the stack; Llama 3 has the same split, plainly written.
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END = "<|endoftext|>"
_FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")


def _numbered(first: int, *texts: str) -> dict[str, int]:
    return {text: first + i for i, text in enumerate(texts)}


def _reserved(ids: range, first: int) -> dict[str, int]:
    return {f"<|reserved_special_token_{first + i}|>": token_id for i, token_id in enumerate(ids)}


_LLAMA3 = {
    **_numbered(128000, "<|begin_of_text|>", "<|end_of_text|>"),
    **_reserved(range(128002, 128004), 0),
    "<|finetune_right_pad_id|>": 128004,
    **_reserved(range(128005, 128006), 2),
    **_numbered(128006, "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
    **_reserved(range(128011, 128256), 3),
}
_HARMONY = {
    **_numbered(199998, "<|startoftext|>", _END, "<|reserved_200000|>", "<|reserved_200001|>", "<|return|>"),
    **_numbered(200003, "<|constrain|>", "<|reserved_200004|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>"),
    **_numbered(200009, "<|reserved_200009|>", "<|reserved_200010|>", "<|reserved_200011|>", "<|call|>"),
    **{f"<|reserved_{i}|>": i for i in range(200013, 201088)},
    "<|endofprompt|>": 200018,
}
_R50K = Known(_GPT2, "r50k_base.tiktoken", 50256, {_END: 50256}, (_END,))

_CL100K_SPECIAL = {**_numbered(100257, _END, *_FIM), "<|endofprompt|>": 100276}

KNOWN = MappingProxyType(
    {
        "gpt2": _R50K,
        "r50k_base": _R50K,
        "p50k_base": Known(_GPT2, "p50k_base.tiktoken", 50280, {_END: 50256}, (_END,)),
        "p50k_edit": Known(_GPT2, "p50k_base.tiktoken", 50280, {_END: 50256, **_numbered(50281, *_FIM)}, (_END,)),
        "cl100k_base": Known(_CL100K, "cl100k_base.tiktoken", 100256, _CL100K_SPECIAL, (_END,)),
        "o200k_base": Known(_O200K, "o200k_base.tiktoken", 199998, {_END: 199999, "<|endofprompt|>": 200018}, (_END,)),
        "o200k_harmony": Known(_O200K, "o200k_base.tiktoken", 199998, _HARMONY, ("<|return|>", _END, "<|call|>")),
        "llama3": Known(
            _CL100K, "tokenizer.model", 128000, _LLAMA3, ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
            bos="<|begin_of_text|>",
        ),
    }
)  # fmt: skip


def known(name: str) -> Known:
    """The encoding of that name. Raises TokenizerError that lists those there are."""
    if name not in KNOWN:
        raise TokenizerError(
            f"no encoding named {name!r} is known (have: {', '.join(KNOWN)})",
            hint="set tokenizer.pattern and tokenizer.special_tokens to describe the rank file",
        )
    return KNOWN[name]
