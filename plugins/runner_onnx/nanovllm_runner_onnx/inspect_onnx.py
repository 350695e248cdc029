"""`inspect`: an ONNX model described for `nanovllm inspect`, which finds it as `nanovllm.inspectors: onnx`.

The files are judged as the runner would judge them, and a graph that this machine can run is loaded and tried as
the runner would. This file decides nothing itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanovllm.doctor.finding import Finding
from nanovllm.errors import ModelError, UnsupportedModelError
from nanovllm_models.inspect_graph import Inspection

from .exported import is_exported, read_facts
from .install import require_onnx
from .model_files import OnnxModel, find_onnx_model, onnx_files
from .onnx_file import Value, check_runnable
from .options import OnnxOptions
from .session import settings_of


def inspect(path: Path) -> Inspection:
    """Raises ModelError for a model that cannot be used, PluginError without ONNX Runtime or the package onnx."""
    require_onnx()
    model = find_onnx_model(path)
    if model is None:
        raise ModelError(f"{path} holds no ONNX graph", hint="give the graph's file")
    header, genai = model.header, model.genai
    findings = list(_findings(model))
    runs: dict[str, Any] = {}
    try:
        check_runnable(header, "cpu")
    except UnsupportedModelError as e:
        findings.append(Finding("note", e.message, e.hint))
    else:
        try:
            runs = _try_out(model)
        except ModelError as e:
            findings.append(Finding("error", e.message, e.hint))
    graph = {
        "Made by": header.producer or "unknown",
        "Operators": ", ".join(f"{name or 'ai.onnx'} {version}" for name, version in header.opsets.items()),
        "Weights": f"{header.weight_bytes:,} bytes, in {', '.join([model.path.name, *header.data_files])}",
    }
    context = {} if model.context_length is None else {"Context": f"{model.context_length} tokens"}
    tables = {
        f"Graph {model.path}": graph | context | {_label(key): _text(value) for key, value in runs.items()},
        "Inputs": _signature(header.inputs),
        "Outputs": _signature(header.outputs),
    }
    if genai is not None:
        tables["genai_config.json"] = {
            "Model type": genai.model_type,
            "Left to the configuration": ", ".join(genai.ignored) or "nothing",
        }
    return Inspection(
        tables=tables,
        data={
            "path": str(model.path),
            "producer": header.producer,
            "opsets": {name or "ai.onnx": version for name, version in header.opsets.items()},
            "weight_bytes": header.weight_bytes,
            "data_files": dict(header.data_files),
            "inputs": [asdict(value) for value in header.inputs],
            "outputs": [asdict(value) for value in header.outputs],
            "context_length": model.context_length,
            "runs": runs,
            "genai": None
            if genai is None
            else {"model_type": genai.model_type, "ignored": genai.ignored, "unknown": genai.unknown},
        },
        vocab_size=model.vocab_size,
        sources=() if genai is None else ((genai.path, {**genai.search, **genai.tokens}),),
        findings=tuple(findings),
    )


def _try_out(model: OnnxModel) -> dict[str, Any]:
    """What the runner declares of the graph, on the CPU."""
    if is_exported(model):
        return {"kind": "exported by nanovllm", **read_facts(model).model_dump()}
    from .foreign.runner import probe_model

    return probe_model(model, settings_of(OnnxOptions(), None))


def _findings(model: OnnxModel) -> Iterator[Finding]:
    if model.genai is not None:
        for key in model.genai.unknown:
            yield Finding("note", f"genai_config.json: {key} is not known here and not used")
    used = {model.path.relative_to(model.directory).as_posix(), *model.header.data_files}
    for name in onnx_files(model.directory):
        if name not in used:
            yield Finding("note", f"{name} is another graph", f"`model: {model.directory / name}` runs it")
    for pattern in ("*.onnx.data", "*.onnx_data*", "onnx/*.onnx_data*", "onnx/*.onnx.data"):
        for path in sorted(model.directory.glob(pattern)):
            if (name := path.relative_to(model.directory).as_posix()) not in used:
                yield Finding("note", f"{name} holds no data of {model.path.name}")


def _signature(values: Sequence[Value]) -> dict[str, str]:
    """Names, types and shapes; what repeats for every layer stands once, with N for the layer."""
    table: dict[str, list[str]] = {}
    for value in values:
        shape = ", ".join("?" if size is None else str(size) for size in value.shape)
        table.setdefault(re.sub(r"\d+", "N", value.name), []).append(f"{value.dtype} ({shape})")
    return {name: f"{texts[0]}, {len(texts)} of them" if len(texts) > 1 else texts[0] for name, texts in table.items()}


def _label(key: str) -> str:
    return key.replace("_", " ").capitalize()


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
