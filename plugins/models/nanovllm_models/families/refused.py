"""Architectures that people bring and that are not implemented, with the reason. Data only."""

from __future__ import annotations

_IMAGES = "it reads images, and its text decoder is not separated from them here"

REFUSED: dict[str, str] = {
    "bamba": "its Mamba-2 layers keep a recurrent state, which is not in the paged KV cache",
    "bloom": "its norm after the embedding is not implemented",
    "deepseek_v2": "multi-head latent attention is not implemented",
    "deepseek_v3": "multi-head latent attention is not implemented",
    "falcon_h1": "its Mamba-2 layers keep a recurrent state, which is not in the paged KV cache",
    "gemma3": f"{_IMAGES}; a text-only Gemma 3 says gemma3_text",
    "gpt_oss": "attention sinks are not implemented",
    "gptj": "rotary pairs that lie side by side are not implemented",
    "granitemoehybrid": "its Mamba-2 layers keep a recurrent state, which is not in the paged KV cache; "
    "Granite 3 (granite, granitemoe) is implemented",
    "jamba": "its Mamba layers keep a recurrent state, which is not in the paged KV cache",
    "llama4": _IMAGES,
    "mamba": "it has a recurrent state instead of a KV cache",
    "mamba2": "it has a recurrent state instead of a KV cache",
    "mllama": _IMAGES,
    "qwen2_vl": _IMAGES,
    "qwen3_next": "its linear-attention layers keep a recurrent state, which is not in the paged KV cache",
    "rwkv": "it has a recurrent state instead of a KV cache",
    "t5": "it is an encoder with a decoder; only decoders are implemented",
}
