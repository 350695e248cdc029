"""GPT-2's vocab.json and merges.txt (or encoder.json and vocab.bpe) as the tokenizer.json that says the same.

How such a tokenizer splits a text is in no file of the directory: it is a property of its class, which
tokenizer_config.json or config.json names. This file knows GPT-2's class, whose split CodeGen (Phi-2)
has too, and Qwen2's; it knows no library.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanovllm.errors import TokenizerError

from .beside import Beside, added_token
from .files import read_object, read_text

PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_GPT2 = ("GPT2", "CodeGen")
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def find_pair(directory: Path) -> tuple[Path, Path] | None:
    """The directory's vocabulary and merges, if it has both."""
    pairs = ((directory / vocabulary, directory / merges) for vocabulary, merges in PAIRS)
    return next(((v, m) for v, m in pairs if v.is_file() and m.is_file()), None)


def as_tokenizer_json(vocab_file: Path, merges_file: Path, beside: Beside) -> tuple[dict[str, Any], dict[str, str]]:
    """(a parsed tokenizer.json, bos_token and the like with the class's defaults).

    Raises TokenizerError that names the file, for merges the line too, and a class that is not known.
    """
    is_qwen2 = _is_qwen2(vocab_file.parent, beside)
    vocab = read_object(vocab_file)
    defaults = ("eos_token", "pad_token", "unk_token") if is_qwen2 else ("bos_token", "eos_token", "unk_token")
    added = {token["content"]: token for token in beside.added()}
    names = {
        name: "<|endoftext|>" for name in defaults if "<|endoftext|>" in vocab.keys() | added.keys()
    } | beside.names
    prefix = beside.switch("add_prefix_space", default=False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": not is_qwen2}
    split = {"type": "Split", "pattern": {"Regex": _QWEN2_PATTERN}, "behavior": "Isolated", "invert": False}
    spec = {
        "version": "1.0",
        "added_tokens": _named(vocab, added, names),
        "normalizer": {"type": "NFC"} if is_qwen2 else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]} if is_qwen2 else byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": _merges(merges_file, vocab),
        },
    }
    ends = {
        "bos_token": beside.switch("add_bos_token", default=False),
        "eos_token": beside.switch("add_eos_token", default=False),
    }
    wanted = [name for name, add in ends.items() if add and name in names]
    if wanted:
        spec["post_processor"] = _ends(wanted, names, spec)
    return spec, names


def _is_qwen2(directory: Path, beside: Beside) -> bool:
    name, file = beside.config.get("tokenizer_class"), "tokenizer_config.json"
    if name is None and (directory / "config.json").exists():
        model_type = read_object(directory / "config.json").get("model_type")
        return isinstance(model_type, str) and model_type.startswith(("qwen2", "qwen3"))
    bare = str(name).removesuffix("Fast").removesuffix("Tokenizer")
    if name is None or bare in _GPT2:
        return False
    if bare == "Qwen2":
        return True
    raise TokenizerError(
        f"{directory / file}: how a {name} splits a text is not known",
        hint="use a tokenizer.json (transformers' save_pretrained writes one)",
    )


def _named(vocab: dict[str, Any], added: dict[str, dict[str, Any]], names: dict[str, str]) -> list[dict[str, Any]]:
    """The added tokens, with those of the vocabulary that have a name, such as eos_token: they are special too."""
    named = {text: added_token(vocab[text], text, True) for text in names.values() if text in vocab}
    return sorted((named | added).values(), key=lambda token: token["id"])


def _merges(file: Path, vocab: dict[str, Any]) -> list[str]:
    merges = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if not all(token in vocab for token in (left, right, left + right)) or " " in right:
            raise TokenizerError(
                f"{file}, line {number}: {line[:80]!r} is not a pair of tokens whose union is one",
                hint="download it again: the vocabulary and the merges must be of one model",
            )
        merges.append(line)
    return merges


def _ends(wanted: list[str], names: dict[str, str], spec: dict[str, Any]) -> dict[str, Any]:
    """The post-processor that puts bos_token before a prompt, or eos_token after it."""
    id_of = {token["content"]: token["id"] for token in spec["added_tokens"]}
    tokens = [{"SpecialToken": {"id": names[name], "type_id": 0}} for name in wanted]
    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    single = [*tokens[: "bos_token" in wanted], *text, *tokens["bos_token" in wanted :]]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {names[n]: {"id": names[n], "ids": [id_of[names[n]]], "tokens": [names[n]]} for n in wanted},
    }
