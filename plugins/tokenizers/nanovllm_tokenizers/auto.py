"""`tokenizer: auto`: the tokenizer that fits the files of a directory.

This file knows what the files are called, and loads nothing itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from nanovllm.errors import TokenizerError

from .byte_bpe import PAIRS, find_pair
from .ranks import is_rank_file
from .sentencepiece import find_model

Kind = Literal["hf", "sentencepiece", "tiktoken"]


def kind_of(path: Path) -> Kind:
    """Which tokenizer reads this file or directory: the first of tokenizer.json, vocab.json with merges.txt,
    a *.tiktoken rank file, tokenizer.model as a rank file (Llama 3), any other *.model (SentencePiece).

    Raises TokenizerError that names the files looked for.
    """
    if path.is_file():
        return (
            "hf" if path.suffix in (".json", ".txt", ".bpe") else "tiktoken" if is_rank_file(path) else "sentencepiece"
        )
    if (path / "tokenizer.json").is_file() or find_pair(path):
        return "hf"
    if any(path.glob("*.tiktoken")) or is_rank_file(path / "tokenizer.model"):
        return "tiktoken"
    if find_model(path):
        return "sentencepiece"
    pairs = ", ".join(" with ".join(pair) for pair in PAIRS)
    raise TokenizerError(
        f"there is no tokenizer in {path}: no tokenizer.json, {pairs}, *.tiktoken, tokenizer.model or other *.model",
        hint="set tokenizer.path to where it is",
    )
