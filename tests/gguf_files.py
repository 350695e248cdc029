"""A llama or qwen2 checkpoint directory as a GGUF file, for tests against llama.cpp; needs the `gguf` package.

    python tests/gguf_files.py MODEL_DIRECTORY FILE.gguf [f32|q8_0|q4_0]

Weights keep their values (f32), or those that are stored as matrices are quantised. The tokenizer is the directory's
`tokenizer.model`, a SentencePiece model; without one, the vocabulary of `tokenizer.json` in its byte-level spelling,
with one merge that never applies, because llama.cpp takes no BPE vocabulary without any.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from nanovllm_models.weights_file import open_weights


def write_gguf(model: Path, file: Path, kind: str = "f32") -> Path:
    import gguf

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    arch = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}[config["model_type"]]
    num_layers, num_heads = config["num_hidden_layers"], config["num_attention_heads"]
    num_kv_heads = config["num_key_value_heads"]

    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(num_layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(num_kv_heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // num_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if (model / "tokenizer.model").is_file():
        _sentencepiece(writer, model / "tokenizer.model")
    else:
        _byte_level(writer, model / "tokenizer.json")
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])

    names = gguf.get_tensor_name_map(arch, num_layers)
    quantised = gguf.GGMLQuantizationType[kind.upper()]
    for name, tensor in open_weights(model / "model.safetensors").items():
        values = tensor.to_float32()
        if arch is gguf.MODEL_ARCH.LLAMA and name.endswith(("q_proj.weight", "k_proj.weight")):
            values = _interleaved(values, num_heads if "q_proj" in name else num_kv_heads)
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if values.ndim == 2 and kind != "f32":
            writer.add_tensor(stored, gguf.quants.quantize(values, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(stored, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _interleaved(values: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp rotates neighbours (2i, 2i + 1) of a llama head where the checkpoint has halves (i, i + size/2)."""
    rows, columns = values.shape
    halves = values.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def _sentencepiece(writer: Any, file: Path) -> None:
    import gguf
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(file))
    ids = range(model.vocab_size())
    kinds = {"is_byte": gguf.TokenType.BYTE, "is_control": gguf.TokenType.CONTROL, "is_unknown": gguf.TokenType.UNKNOWN}
    writer.add_tokenizer_model("llama")
    writer.add_token_list([model.id_to_piece(i).encode() for i in ids])
    writer.add_token_scores([model.get_score(i) for i in ids])
    writer.add_token_types(
        [next((kind for name, kind in kinds.items() if getattr(model, name)(i)), gguf.TokenType.NORMAL) for i in ids]
    )


def _byte_level(writer: Any, file: Path) -> None:
    import gguf

    content = json.loads(file.read_text(encoding="utf-8"))
    special = {token["content"] for token in content["added_tokens"]}
    vocabulary = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in vocabulary])
    writer.add_token_merges(["a b"])
    writer.add_add_bos_token(False)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
