"""Tiny checkpoints with random weights, made without torch: config.json plus a safetensors file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from nanovllm_models.config import Config
from nanovllm_models.layout import stored_weights
from nanovllm_models.registry import find_family

LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 61, "n_positions": 128, "n_embd": 24, "n_layer": 2, "n_head": 4}
QWEN2_WINDOW = LLAMA | {
    "model_type": "qwen2",
    "use_sliding_window": True,
    "sliding_window": 7,
    "max_window_layers": 1,
    "tie_word_embeddings": True,
}
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 8}


def file_tensors(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under the names, shapes and orientation of the family's files."""
    family = find_family(config["model_type"])
    spec = family.spec(Config(config, "config.json"))
    rng = np.random.default_rng(seed)
    tensors, written = {}, set()
    for stored in stored_weights(family, spec):
        if stored.names in written:  # under another name already
            continue
        written.add(stored.names)
        values = rng.standard_normal(stored.shape, dtype=np.float32) * np.float32(0.3)
        if "norm" in stored.names[0] and stored.file_name.endswith("weight"):
            values += 1
        tensors[stored.file_name] = values
    return tensors


def write_checkpoint(path: Path, config: dict, tensors: dict[str, np.ndarray] | None = None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(file_tensors(config) if tensors is None else tensors, path / "model.safetensors")
    return path
