"""genai_config.json of five kinds of published models, shortened, and graphs with the inputs and outputs they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onnx import TensorProto, helper

INPUTS = {
    "input_ids": "input_ids",
    "attention_mask": "attention_mask",
    "past_key_names": "past_key_values.%d.key",
    "past_value_names": "past_key_values.%d.value",
}
OUTPUTS = {
    "logits": "logits",
    "present_key_names": "present.%d.key",
    "present_value_names": "present.%d.value",
}
SEARCH = {
    "diversity_penalty": 0.0, "do_sample": False, "early_stopping": True, "length_penalty": 1.0, "max_length": 4096,
    "min_length": 0, "no_repeat_ngram_size": 0, "num_beams": 1, "num_return_sequences": 1,
    "past_present_share_buffer": True, "repetition_penalty": 1.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0,
}  # fmt: skip


def _decoder(filename: str, heads: int, kv_heads: int, size: int, layers: int, *providers: dict, **more: Any) -> dict:
    return {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": list(providers)},
        "filename": filename,
        "head_size": size,
        "hidden_size": heads * size,
        "inputs": INPUTS | more.pop("inputs", {}),
        "outputs": OUTPUTS,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
    } | more


PHI3 = {
    "model": {
        "bos_token_id": 1, "context_length": 131072, "eos_token_id": [32000, 32001, 32007], "pad_token_id": 32000,
        "type": "phi3", "vocab_size": 32064,
        "decoder": _decoder("phi3-mini-128k-instruct-cpu-int4-rtn-block-32-acc-level-4.onnx", 32, 32, 96, 32),
    },
    "search": SEARCH | {"max_length": 131072, "top_k": 1},
}  # fmt: skip
PHI2 = {
    "model": {
        "bos_token_id": 50256, "context_length": 2048, "eos_token_id": 50256, "pad_token_id": 50256,
        "type": "phi", "vocab_size": 51200,
        "decoder": _decoder("model.onnx", 32, 32, 80, 32, {"cuda": {}}, inputs={"position_ids": "position_ids"}),
    },
    "search": SEARCH | {"max_length": 20},
}  # fmt: skip
LLAMA32 = {
    "model": {
        "bos_token_id": 128000, "context_length": 131072, "eos_token_id": [128001, 128008, 128009],
        "pad_token_id": 128001, "type": "llama", "vocab_size": 128256,
        "decoder": _decoder(
            "model.onnx", 32, 8, 64, 16,
            {"RyzenAI": {"external_data_file": "model_jit.pb.bin", "hybrid_opt_max_seq_length": "4096"}},
            sliding_window={"window_size": 4096, "slide_key_value_cache": False},
        ),
    },
    "search": SEARCH | {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
    "engine": {"dynamic_batching": {"block_size": 256, "num_blocks": 64, "max_batch_size": 16}},
}  # fmt: skip
QWEN25 = {
    "model": {
        "bos_token_id": None, "context_length": 32768, "eos_token_id": [151645, 151643], "pad_token_id": 151643,
        "type": "qwen2", "vocab_size": 151936,
        "decoder": _decoder(
            "onnx/model_q4.onnx", 14, 2, 64, 24,
            run_options={"memory.enable_memory_arena_shrinkage": "cpu:0"}, graph_optimization_level="ORT_ENABLE_ALL",
        ),
        "prompt_templates": {"user": "<|im_start|>user\n{Content}<|im_end|>"},
    },
    "search": SEARCH | {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
}  # fmt: skip
GPT2 = {
    "model": {
        "type": "gpt2", "pad_token_id": -1, "bos_token_id": 50256, "eos_token_id": 50256, "vocab_size": 50257,
        "context_length": 1024,
        "decoder": {
            "filename": "past.onnx", "num_key_value_heads": 12, "head_size": 64, "num_hidden_layers": 12,
            "inputs": {"past_names": "past_%d"}, "outputs": {"present_names": "present_%d"},
        },
    },
}  # fmt: skip
PUBLISHED = {"phi3": PHI3, "phi2": PHI2, "llama32": LLAMA32, "qwen25": QWEN25, "gpt2": GPT2}


def write(directory: Path, config: dict, graph: dict | None = None) -> Path:
    """A model directory with `config`, and a graph with the inputs and outputs that `graph` (None: `config`) names."""
    described = (config if graph is None else graph)["model"]
    decoder = described["decoder"]
    inputs, outputs = INPUTS | decoder.get("inputs", {}), OUTPUTS | decoder.get("outputs", {})
    heads, size = decoder["num_key_value_heads"], decoder["head_size"]
    combined = "past_names" in inputs
    shape = [2, "batch", heads, "past", size] if combined else ["batch", heads, "past", size]
    past, present = (("past_names",), ("present_names",)) if combined else (
        ("past_key_names", "past_value_names"), ("present_key_names", "present_value_names")
    )  # fmt: skip

    def values(names: dict[str, str], first: list[str], kinds: tuple[str, ...]) -> list[Any]:
        layers = [names[k].replace("%d", str(i)) for i in range(decoder["num_hidden_layers"]) for k in kinds]
        vocab = ["batch", "sequence", described["vocab_size"]]
        ids = TensorProto.INT64, ["batch", "sequence"]
        whole = [helper.make_tensor_value_info(names[k], *(ids if k != "logits" else (1, vocab))) for k in first]
        return whole + [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in layers]

    model = helper.make_model(
        helper.make_graph(
            [],
            "described",
            values(inputs, [k for k in inputs if not k.startswith("past")], past),
            values(outputs, ["logits"], present),
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    path = directory / decoder["filename"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    (directory / "genai_config.json").write_text(json.dumps(config))
    return path
