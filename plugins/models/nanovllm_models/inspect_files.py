"""Which files of a model directory are present, missing or unexpected, by their names alone. Opens none of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from nanovllm.doctor.finding import Finding, Level

from . import model_info
from .checkpoint import INDEX, SINGLE
from .torch_files import PICKLED, PROGRAMS

# Names of files -> what they are good for.
KNOWN = {
    "config.json": "architecture",
    SINGLE: "weights",
    "model-*-of-*.safetensors": "weights",
    INDEX: "index of the weights",
    "genai_config.json": "facts of an ONNX graph",
    "model.pt2": "program of torch.export",
    "model.pt": "what torch saved, perhaps a TorchScript program",
    "*.onnx": "ONNX graph",
    "*.onnx_data*": "data of an ONNX graph",
    "*.onnx.data": "data of an ONNX graph",
    "tokenizer.json": "tokenizer",
    "tokenizer.model": "tokenizer (SentencePiece)",
    "*.tiktoken": "tokenizer (tiktoken)",
    "vocab.json": "tokenizer, with merges.txt",
    "merges.txt": "tokenizer, with vocab.json",
    "tokenizer_config.json": "special tokens, chat template",
    "special_tokens_map.json": "special tokens",
    "added_tokens.json": "special tokens",
    "chat_template.jinja": "chat template",
    "chat_template.json": "chat template",
    "generation_config.json": "sampling defaults, end tokens",
    model_info.FILE_NAME: "facts for runners without config.json",
    "README*": "for people",
    "MODEL_CARD*": "for people",
    "LICENSE*": "for people",
    "NOTICE*": "for people",
    ".gitattributes": "git",
    "__init__.py": "nothing: it is never run",
}
# One of each line must be there, or what is said holds.
NEEDED: tuple[tuple[tuple[str, ...], Level, str], ...] = (
    (
        ("config.json", "*.onnx", *PROGRAMS),
        "error",
        "the architecture is not known without it; download the model again",
    ),
    ((SINGLE, INDEX, "*.onnx", *PROGRAMS), "error", "there is nothing to run; download the model again"),
    (
        ("tokenizer.json", "tokenizer.model", "vocab.json", "*.tiktoken"),
        "error",
        "text cannot become tokens; copy it from the original, or set tokenizer.path",
    ),
    (("tokenizer_config.json",), "note", "special tokens and the chat template are what the tokenizer's file says"),
)
# The same, where there is no genai_config.json to say what they say.
NEEDED_WITHOUT_GENAI: tuple[tuple[tuple[str, ...], Level, str], ...] = (
    (("generation_config.json",), "note", "end tokens are what other files say"),
    ((model_info.FILE_NAME,), "note", "its facts are taken from other files"),
)


@dataclass(frozen=True, slots=True)
class FoundFile:
    name: str
    size: int  # bytes
    use: str | None  # None: unexpected


def files_of(directory: Path) -> list[FoundFile]:
    """The files of the directory and of those in it, without caches, sorted by name."""
    found = []
    for path in sorted((*directory.glob("*"), *directory.glob("*/*"))):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and not name.startswith((".cache/", ".git/", "__pycache__/")):
            use = next((KNOWN[pattern] for pattern in KNOWN if fnmatchcase(name, pattern)), None)
            found.append(FoundFile(name, path.stat().st_size, use))
    return found


def look_for_missing(files: Sequence[FoundFile]) -> tuple[list[str], list[Finding]]:
    """The names that should be there, and what follows from their absence."""
    missing, findings = [], []
    has_genai = any(file.name == "genai_config.json" for file in files)
    for patterns, level, consequence in NEEDED if has_genai else (*NEEDED, *NEEDED_WITHOUT_GENAI):
        if not any(fnmatchcase(file.name, pattern) for file in files for pattern in patterns):
            missing.append(patterns[0])
            remark, _, fix = consequence.partition("; ")
            more = f" (nor {', '.join(patterns[1:])})" if patterns[1:] else ""
            findings.append(Finding(level, f"there is no {patterns[0]}{more}: {remark}", fix or None))
    return missing, findings


def look_for_unexpected(files: Sequence[FoundFile]) -> list[Finding]:
    return [_unexpected(file.name) for file in files if file.use is None]


def _unexpected(name: str) -> Finding:
    if name.endswith(".part"):
        return Finding("note", f"{name} is an unfinished download", "run the `nanovllm pull` that began it again")
    if name.endswith(PICKLED):
        return Finding("note", f"{name} may hold pickled data, which is never read", "delete it to save space")
    if name.endswith(".py"):
        return Finding("note", f"{name} is a program, and nothing in a model directory is ever run")
    return Finding("note", f"{name} is not read")
