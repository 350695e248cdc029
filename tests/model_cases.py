"""The tiny models that the parity tests build with transformers: every family, every variant of its config.

Data only, without torch: `scripts/model_matrix.py` reads it too, for the table of supported models.
"""

from __future__ import annotations

VOCAB = 97
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
GPT2 = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
QWEN3 = LLAMA | {"head_dim": 16}
LAYERS3 = {"num_hidden_layers": 3}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
FACTORS = {"short_factor": [1.0, 1.1, 1.5, 2.0], "long_factor": [1.0, 3.0, 6.0, 9.0]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10_000.0, **FACTORS}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}
PHI = LLAMA | {"num_key_value_heads": 6, "rope_parameters": {"rope_theta": 10_000.0, "partial_rotary_factor": 0.5}}
NEOX = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
FALCON = {k: v for k, v in NEOX.items() if k != "intermediate_size"} | {"ffn_hidden_size": 80}
GEMMA = QWEN3 | {"pad_token_id": 0}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.4,
    "logits_scaling": 2.5,
}
EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2}
QWEN_EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}

# Name -> (model_type, the prefix of transformers' classes, config). The name begins with the model_type.
MODELS = {
    "falcon-7b": ("falcon", "Falcon", FALCON),
    "falcon-7b-biases-untied": ("falcon", "Falcon", FALCON | {"bias": True, "tie_word_embeddings": False}),
    "falcon-40b": ("falcon", "Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b-one-norm": (
        "falcon",
        "Falcon",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-rw-alibi": (
        "falcon",
        "Falcon",
        FALCON | {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
    ),
    "falcon-alibi-8-heads-multi-query": ("falcon", "Falcon", FALCON | {"alibi": True, "num_attention_heads": 8}),
    "gemma": ("gemma", "Gemma", GEMMA),
    "gemma-untied-biases-mqa": (
        "gemma",
        "Gemma",
        GEMMA | {"tie_word_embeddings": False, "attention_bias": True, "num_key_value_heads": 1},
    ),
    "gemma2": (
        "gemma2",
        "Gemma2",
        GEMMA | {"sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma2-no-caps-scalar": (
        "gemma2",
        "Gemma2",
        GEMMA
        | LAYERS3
        | {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "query_pre_attn_scalar": 24,
            "sliding_window": 7,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        "Gemma3",
        GEMMA
        | ALTERNATING
        | {
            "sliding_window": 5,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "gemma3_text-pattern-final-cap": (
        "gemma3_text",
        "Gemma3",
        GEMMA
        | {"num_hidden_layers": 4, "sliding_window": 6, "sliding_window_pattern": 3, "final_logit_softcapping": 3.0},
    ),
    "gpt2": ("gpt2", "GPT2", GPT2),
    "gpt2-untied-exact-gelu": (
        "gpt2",
        "GPT2",
        GPT2 | {"tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 56},
    ),
    "gpt2-unscaled-relu": ("gpt2", "GPT2", GPT2 | {"scale_attn_weights": False, "activation_function": "relu"}),
    "gpt_neox": ("gpt_neox", "GPTNeoX", NEOX),
    "gpt_neox-sequential-half-rotary": (
        "gpt_neox",
        "GPTNeoX",
        NEOX
        | {
            "use_parallel_residual": False,
            "attention_bias": False,
            "hidden_act": "gelu_fast",
            "rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5},
        },
    ),
    "gpt_neox-tied": ("gpt_neox", "GPTNeoX", NEOX | {"tie_word_embeddings": True}),
    "granite": ("granite", "Granite", LLAMA | MULTIPLIERS),
    "granite-tied-biases": (
        "granite",
        "Granite",
        LLAMA | MULTIPLIERS | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "granitemoe": ("granitemoe", "GraniteMoe", LLAMA | MULTIPLIERS | EXPERTS | {"intermediate_size": 24}),
    "granitemoe-32-experts-top-8-tied": (
        "granitemoe",
        "GraniteMoe",
        LLAMA
        | MULTIPLIERS
        | {"num_local_experts": 32, "num_experts_per_tok": 8, "intermediate_size": 8, "tie_word_embeddings": True},
    ),
    "llama": ("llama", "Llama", LLAMA),
    "llama-tied-mha": ("llama", "Llama", LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 6}),
    "llama-biases-head-dim": ("llama", "Llama", LLAMA | {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "llama-mqa-gelu": ("llama", "Llama", LLAMA | {"num_key_value_heads": 1, "hidden_act": "gelu_pytorch_tanh"}),
    "mistral-window": ("mistral", "Mistral", LLAMA | {"sliding_window": 5}),
    "mistral-no-window-tied": (
        "mistral",
        "Mistral",
        LLAMA | {"sliding_window": None, "head_dim": 12, "tie_word_embeddings": True},
    ),
    "mixtral": ("mixtral", "Mixtral", LLAMA | EXPERTS | {"intermediate_size": 24}),
    "mixtral-window-top-1": (
        "mixtral",
        "Mixtral",
        LLAMA | EXPERTS | {"intermediate_size": 24, "sliding_window": 7, "num_experts_per_tok": 1},
    ),
    "olmo2": ("olmo2", "Olmo2", LLAMA),
    "olmo2-tied-biases-mha": (
        "olmo2",
        "Olmo2",
        LLAMA | {"num_key_value_heads": 6, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "phi": ("phi", "Phi", PHI),
    "phi-qk-norm-gqa-tied": (
        "phi",
        "Phi",
        PHI | {"qk_layernorm": True, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "phi3": ("phi3", "Phi3", LLAMA | {"pad_token_id": 0}),
    "phi3-window-tied": ("phi3", "Phi3", LLAMA | {"pad_token_id": 0, "sliding_window": 5, "tie_word_embeddings": True}),
    "phi3-longrope": (  # the long factors for all: with max_model_len above the original length
        "phi3",
        "Phi3",
        LLAMA | {"pad_token_id": 0, "original_max_position_embeddings": 64, "rope_parameters": dict(LONGROPE)},
    ),
    "phi3-longrope-partial": (
        "phi3",
        "Phi3",
        LLAMA
        | {
            "pad_token_id": 0,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "max_position_embeddings": 80,
            "original_max_position_embeddings": 80,
            "rope_parameters": LONGROPE | {"partial_rotary_factor": 0.5},
        },
    ),
    "qwen2": ("qwen2", "Qwen2", LLAMA),
    "qwen2-tied-window": ("qwen2", "Qwen2", LLAMA | WINDOW | {"tie_word_embeddings": True}),
    "qwen2_moe": ("qwen2_moe", "Qwen2Moe", LLAMA | QWEN_EXPERTS | {"shared_expert_intermediate_size": 40}),
    "qwen2_moe-dense-layers-no-bias": (
        "qwen2_moe",
        "Qwen2Moe",
        LLAMA
        | QWEN_EXPERTS
        | {
            "shared_expert_intermediate_size": 16,
            "norm_topk_prob": False,
            "qkv_bias": False,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [1],
        },
    ),
    "qwen2_moe-window": (
        "qwen2_moe",
        "Qwen2Moe",
        LLAMA
        | QWEN_EXPERTS
        | WINDOW
        | {"shared_expert_intermediate_size": 40, "layer_types": ALTERNATING["layer_types"]},
    ),
    "qwen3": ("qwen3", "Qwen3", QWEN3),
    "qwen3-tied-bias-window": (
        "qwen3",
        "Qwen3",
        QWEN3 | WINDOW | {"tie_word_embeddings": True, "attention_bias": True},
    ),
    "qwen3_moe": ("qwen3_moe", "Qwen3Moe", QWEN3 | QWEN_EXPERTS),
    "qwen3_moe-dense-layer-window-tied": (
        "qwen3_moe",
        "Qwen3Moe",
        QWEN3
        | QWEN_EXPERTS
        | {
            "norm_topk_prob": False,
            "mlp_only_layers": [0],
            "use_sliding_window": True,
            "sliding_window": 5,
            "tie_word_embeddings": True,
        },
    ),
    "smollm3": ("smollm3", "SmolLM3", LLAMA | LAYERS3 | {"pad_token_id": 0, "no_rope_layer_interval": 3}),
    "smollm3-list-window-untied": (
        "smollm3",
        "SmolLM3",
        LLAMA
        | {
            "pad_token_id": 0,
            "no_rope_layers": [0, 1],
            "use_sliding_window": True,
            "sliding_window": 5,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "starcoder2": ("starcoder2", "Starcoder2", LLAMA),
    "starcoder2-window-no-bias-untied": (
        "starcoder2",
        "Starcoder2",
        LLAMA | {"sliding_window": 5, "use_bias": False, "tie_word_embeddings": False},
    ),
}

# One of each kind of block: what a runner is compared with transformers on, all variants being compared with numpy's.
ONE_OF_EACH_KIND = [
    "falcon-rw-alibi", "gemma2", "gemma3_text", "gpt2", "granite", "llama", "mistral-window", "mixtral", "olmo2",
    "phi", "phi3", "qwen2", "qwen2_moe-window", "qwen3",
]  # fmt: skip
