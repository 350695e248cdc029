"""`inspect_model`: what a model directory holds, what it will take to run, and what is wrong with it.

Reads headers and configuration files, no weights. An ONNX graph is described by its runner (`inspect_graph.py`), which
also tries it; a program for torch is known by the names inside its file, and never opened. Whatever is wrong becomes a
finding with its remedy, and what can still be said is said. Knows no command line and no runner: memory is weights and
KV cache, without a runner's buffers.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from nanovllm.doctor.finding import Finding
from nanovllm.errors import ConfigError, ModelError, NanoVLLMError
from nanovllm.plugins import model_directory

from . import generation, model_info
from .checkpoint import is_checkpoint, load_checkpoint
from .config import Config
from .facts import read_facts
from .files import find_file, read_json
from .generation import Default, sampling_defaults, special_ids
from .inspect_files import FoundFile, files_of, look_for_missing, look_for_unexpected
from .inspect_graph import Inspection, inspect_graph, is_graph
from .registry import find_family
from .spec import DecoderSpec, Experts, FeedForward
from .torch_files import KINDS, find_program, judge
from .weights_file import open_weights

# Bytes per weight. What quantised formats add for their scales depends on the format and is left out.
WIDTHS = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}
KV_WIDTHS = {"fp32": 4, "fp16": 2}


@dataclass(frozen=True, slots=True)
class Architecture:
    """The five facts that tell models apart, and the sizes."""

    architecture: str
    positions: str
    attention: str  # "GQA", ...; with its windows
    num_heads: int
    num_kv_heads: int
    head_size: int
    block: str
    feed_forward: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    num_parameters: int
    num_active_parameters: int  # those that one token passes


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes."""

    weights: dict[str, int]  # by type
    kv_per_token: dict[str, int]
    context: int  # tokens per sequence
    batch: int  # sequences
    total: int  # weights and a full KV cache in fp32, as the numpy runner holds them


@dataclass(frozen=True, slots=True)
class Stored:
    """The weights as they are on disk."""

    dtype: str
    num_tensors: int
    num_bytes: int


@dataclass(slots=True)
class Report:
    directory: str
    files: list[FoundFile]
    missing: list[str] = field(default_factory=list)
    architecture: Architecture | None = None
    memory: Memory | None = None
    stored: Stored | None = None
    graph: Inspection | None = None  # of an ONNX model
    program: str | None = None  # what kind of program for torch it is; of torch_files.KINDS
    tokenizer_vocab_size: int | None = None
    chat_template: str | None = None  # the file that has it
    generation: dict[str, Default] = field(default_factory=dict)  # by key
    findings: list[Finding] = field(default_factory=list)

    @property
    def is_usable(self) -> bool:
        return not any(finding.level == "error" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        generation = {key: default._asdict() for key, default in self.generation.items()}
        graph = None if self.graph is None else self.graph.data
        whole = asdict(replace(self, graph=None))
        return whole | {"generation": generation, "graph": graph, "is_usable": self.is_usable}


def inspect_model(path: Path, context: int | None = None, batch: int = 1) -> Report:
    """The report of a model directory or an ONNX graph's file.

    Memory is for `batch` sequences of `context` tokens (None: the longest). Raises ModelError if there is no such
    directory, ConfigError for a context longer than the model's.
    """
    if not path.is_dir() and not (path.is_file() and path.suffix == ".onnx"):
        raise ModelError(
            f"{path} is {'a file' if path.exists() else 'not there'}",
            hint="give a model's directory, or a graph's .onnx file",
        )
    directory = model_directory(path)
    files = files_of(directory)
    missing, findings = look_for_missing(files)
    report = Report(str(directory), files, missing, findings=findings)
    vocab_size = None
    if is_graph(path, files):
        if (graph := _try(report, partial(inspect_graph, path))) is not None:
            report.graph, vocab_size = graph, graph.vocab_size
            findings += graph.findings
    elif not is_checkpoint(directory) and (program := _try(report, partial(find_program, directory))) is not None:
        vocab_size = _describe_program(report, directory, program)
    elif (spec := _describe_checkpoint(report, directory, context, batch)) is not None:
        vocab_size = spec.vocab_size
    _compare_tokenizer(report, directory, vocab_size)
    _try(report, partial(_check_special_tokens, directory))
    _try(report, partial(_read_defaults, report, directory))
    report.findings += look_for_unexpected(files)
    return report


def _describe_program(report: Report, directory: Path, program: Path) -> int | None:
    """From the names inside it; it is never opened. Returns the vocabulary that the files beside it tell of, if any."""
    if (judged := _try(report, partial(judge, program))) is None:
        return None
    kind, _ = judged
    report.program = KINDS[kind]
    report.findings.append(
        Finding(
            "note",
            f"{program.name} is {report.program}, which may run code when it is opened: only runner: torch does that, "
            "where you allow it",
            f"if you trust who made it, set runner.allow_code_in: [{json.dumps(str(directory.resolve()))}]",
        )
    )
    with suppress(ModelError):  # a program needs no architecture that is known here
        if (spec := _spec(directory)) is not None:
            report.architecture = describe(spec)
    facts = _try(report, partial(read_facts, directory, program, None))
    return None if facts is None else facts.vocab_size


def _describe_checkpoint(report: Report, directory: Path, context: int | None, batch: int) -> DecoderSpec | None:
    spec = _try(report, partial(_spec, directory))
    if spec is not None:
        report.architecture = describe(spec)
        report.memory = _memory(spec, context, batch)
    weights = [file.name for file in report.files if file.name.endswith(".safetensors")]
    if spec is None:  # what can be said of them without knowing what belongs into them
        for name in weights:
            _try(report, partial(open_weights, directory / name))
    elif weights and (checkpoint := _try(report, partial(load_checkpoint, directory))) is not None:
        report.stored = Stored(checkpoint.dtype, len(checkpoint.weights), checkpoint.weight_bytes)
    return spec


def describe(spec: DecoderSpec) -> Architecture:
    attention = spec.attention
    kind = {attention.num_heads: "MHA", 1: "MQA"}.get(attention.num_kv_heads, "GQA")
    for window, count in _counted(attention.windows):
        kind += f", window {window}{_in_layers(count, spec)}"
    return Architecture(
        architecture=spec.architecture,
        positions=_positions(spec),
        attention=kind,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_size=attention.head_size,
        block=_block(spec),
        feed_forward=" and ".join(_mlp(mlp) + _in_layers(count, spec) for mlp, count in _counted(spec.mlps)),
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
        max_positions=spec.max_positions,
        num_parameters=spec.num_parameters,
        num_active_parameters=sum(prod(shape) for name, shape in spec.shapes().items() if _is_active(name, spec)),
    )


def _counted(layers: Sequence[Any]) -> list[tuple[Any, int]]:
    """(what a layer has, in how many layers), without those that have none."""
    return list(Counter(layer for layer in layers if layer is not None).items())


def _in_layers(count: int, spec: DecoderSpec) -> str:
    return "" if count == spec.num_layers else f" in {count} of {spec.num_layers} layers"


def _positions(spec: DecoderSpec) -> str:
    parts = ["learned"] if spec.learned_positions else []
    if spec.attention.alibi is not None:
        parts.append("ALiBi")
    for rotary, count in _counted(spec.attention.rotary):
        size = spec.attention.head_size
        width = "" if rotary.dim == size else f", {rotary.dim} of {size} dimensions"
        scaling = "" if rotary.scaling is None else f", {type(rotary.scaling).__name__} scaling"
        parts.append(f"rotary (theta {rotary.theta:g}{width}{scaling}){_in_layers(count, spec)}")
    return " and ".join(parts) or "none"


def _block(spec: DecoderSpec) -> str:
    block, norm = spec.block, {"rms": "RMSNorm", "layer": "LayerNorm"}[spec.norm.kind]
    if block.parallel:
        return f"parallel, {'one' if block.shared_norm else 'two'} {norm}"
    where = {(True, False): "before", (False, True): "after", (True, True): "before and after"}
    return f"sequential, {norm} {where[block.pre_norms, block.post_norms]}"


def _mlp(mlp: FeedForward | Experts) -> str:
    if isinstance(mlp, Experts):
        shared = "" if mlp.shared is None else f", and one for all, {_mlp(mlp.shared)}"
        return f"{mlp.num_experts} experts, {mlp.top_k} per token, {_mlp(mlp.expert)}{shared}"
    return f"{'gated ' if mlp.gated else ''}{mlp.activation}, {mlp.size} wide"


def _is_active(name: str, spec: DecoderSpec) -> bool:
    """Is the weight used for a token? Of experts, as many as one token passes."""
    expert = re.match(r"layers\.(\d+)\.mlp\.experts\.(\d+)\.", name)
    return expert is None or int(expert[2]) < spec.mlps[int(expert[1])].top_k


def _memory(spec: DecoderSpec, context: int | None, batch: int) -> Memory:
    context = spec.max_positions if context is None else context
    if context > spec.max_positions:
        raise ConfigError(
            f"--context {context} is more than the model's {spec.max_positions} positions", hint="lower it"
        )
    weights = {name: int(spec.num_parameters * width) for name, width in WIDTHS.items()}
    kv = {name: spec.kv_size * width for name, width in KV_WIDTHS.items()}
    return Memory(weights, kv, context, batch, weights["fp32"] + kv["fp32"] * context * batch)


def _spec(directory: Path) -> DecoderSpec | None:
    path = find_file(directory, "config.json")
    if path is None:
        return None  # its absence is a finding already
    config = Config(read_json(path), str(path))
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f"{path}: model_type does not name an architecture", hint="restore the file")
    return find_family(model_type).spec(config)


def _compare_tokenizer(report: Report, directory: Path, vocab_size: int | None) -> None:
    """The tokenizer must not have more entries than the model; fewer is padding."""
    size = report.tokenizer_vocab_size = _try(report, partial(_vocab_size, directory))
    if size is None or vocab_size is None or size == vocab_size:
        return
    if size > vocab_size:
        report.findings.append(
            Finding(
                "error",
                f"the tokenizer has {size} entries but the model only {vocab_size}: they do not belong together",
                "copy the tokenizer files that came with the model",
            )
        )
    else:
        report.findings.append(
            Finding("note", f"the model's vocabulary is padded: {vocab_size} for {size} entries of the tokenizer")
        )


def _check_special_tokens(directory: Path) -> None:
    """special_tokens_map.json: {"eos_token": "</s>", "bos_token": {"content": "<s>"}, ...: ["<a>", "<b>"]}."""
    if (path := find_file(directory, "special_tokens_map.json")) is None:
        return
    for key, value in read_json(path).items():
        for token in value if isinstance(value, list) else [value]:
            if not isinstance(token.get("content") if isinstance(token, dict) else token, str):
                raise ModelError(f"{path}: {key} is {token!r:.60}, not a token's text", hint="restore the file")


def _vocab_size(directory: Path) -> int | None:
    """One more than the tokenizer's highest id; None where its file is no JSON."""
    if path := find_file(directory, "tokenizer.json"):
        tokenizer = read_json(path)
        model, added = tokenizer.get("model"), tokenizer.get("added_tokens") or []
        vocab = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocab, list) and isinstance(added, list):  # Unigram: the place is the id
            ids: list[Any] = [len(vocab) - 1]
        elif isinstance(vocab, dict) and isinstance(added, list):
            ids = list(vocab.values())
        else:
            raise ModelError(f"{path}: model.vocab is no vocabulary", hint="restore the file")
        ids += [token.get("id") if isinstance(token, dict) else None for token in added]
    elif path := find_file(directory, "vocab.json"):
        ids = list(read_json(path).values())
    else:
        return None
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ModelError(f"{path}: an id is not a whole number from 0", hint="restore the file")
    return max(ids, default=-1) + 1


def _read_defaults(report: Report, directory: Path) -> None:
    """Chat template and generation defaults, each with the file that has it."""
    found = {
        name: (path, read_json(path))
        for name in ("tokenizer_config.json", generation.FILE_NAME, "config.json", model_info.FILE_NAME)
        if (path := find_file(directory, name))
    }
    if report.graph is not None:
        found = {source[0].name: source for source in report.graph.sources} | found
    template = next((t for t in ("chat_template.jinja", "chat_template.json") if find_file(directory, t)), None)
    tokenizer_config = found.pop("tokenizer_config.json", None)
    if template is None and tokenizer_config is not None and tokenizer_config[1].get("chat_template"):
        template = "tokenizer_config.json"
    if template is None:
        report.findings.append(Finding("note", "there is no chat template of its own"))
    report.chat_template = template

    for key in ("eos_token_id", "bos_token_id"):
        for name, source in found.items():
            if key not in report.generation and (ids := special_ids([source], key)):
                report.generation[key] = Default(ids, name)
    if "eos_token_id" not in report.generation:
        report.findings.append(
            Finding("note", "no file names an end token: answers end at max_tokens", "set `eos: [ID]` if you know it")
        )
    found.pop(model_info.FILE_NAME, None)
    report.generation |= sampling_defaults(list(found.values()))


T = TypeVar("T")


def _try(report: Report, read: Callable[[], T]) -> T | None:
    """The result; None and a finding if a file is not as it should be."""
    try:
        return read()
    except NanoVLLMError as e:
        report.findings.append(Finding("error", e.message, e.hint))
        return None
