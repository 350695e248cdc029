"""The NumPy runner against transformers: every family, every rotary rule, on tiny random models made here."""

from __future__ import annotations

import json

import numpy as np
import pytest

from numpy_support import Driver, make_runner

torch = pytest.importorskip("torch", reason="the oracle: pip install torch transformers")
transformers = pytest.importorskip("transformers", reason="the oracle: pip install torch transformers")

LLAMA = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
GPT2 = {"vocab_size": 97, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
QWEN3 = LLAMA | {"head_dim": 16}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
FACTORS = {"short_factor": [1.0, 1.1, 1.5, 2.0], "long_factor": [1.0, 3.0, 6.0, 9.0]}

MODELS = {
    "gpt2": ("GPT2", GPT2),
    "gpt2-untied-exact-gelu": (
        "GPT2",
        GPT2 | {"tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 56},
    ),
    "gpt2-unscaled-relu": ("GPT2", GPT2 | {"scale_attn_weights": False, "activation_function": "relu"}),
    "llama": ("Llama", LLAMA),
    "llama-tied-mha": ("Llama", LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 6}),
    "llama-biases-head-dim": ("Llama", LLAMA | {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "llama-mqa-gelu": ("Llama", LLAMA | {"num_key_value_heads": 1, "hidden_act": "gelu_pytorch_tanh"}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen2-tied-window": ("Qwen2", LLAMA | WINDOW | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", QWEN3),
    "qwen3-tied-bias-window": ("Qwen3", QWEN3 | WINDOW | {"tie_word_embeddings": True, "attention_bias": True}),
}
# Each with the max_model_len under which our fixed rotation is the one that transformers uses for 60 tokens.
ROPES = {
    "default": ({"rope_type": "default"}, None),
    "theta": ({"rope_type": "default", "rope_theta": 500.0}, None),
    "linear": ({"rope_type": "linear", "factor": 4.0}, None),
    "dynamic-short": ({"rope_type": "dynamic", "factor": 4.0}, 64),
    "dynamic-long": ({"rope_type": "dynamic", "factor": 4.0, "max_position_embeddings": 32}, 60),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, None),
    "yarn-options": (
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 16.0,
        "beta_slow": 2.0,
             "mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False},
        None,
    ),
    "yarn-attention-factor": (
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "attention_factor": 1.3}, None
    ),
    "longrope-short": (dict(rope_type="longrope", factor=4.0, original_max_position_embeddings=60, **FACTORS), 60),
    "longrope-long": (dict(rope_type="longrope", factor=4.0, original_max_position_embeddings=16, **FACTORS), None),
    "llama3": (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 32},
        None,
    ),
}  # fmt: skip


def build(family: str, path, **config):
    torch.manual_seed(0)
    kind = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{family}{kind}")(getattr(transformers, f"{family}Config")(**config))
    with torch.no_grad():  # biases and norm weights start as 0 and 1, which would hide mistakes
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name or "ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.eval().save_pretrained(path)
    return model


def reference(model, tokens) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 97, length).tolist()


@pytest.mark.parametrize("name", MODELS)
def test_family(name, tmp_path):
    family, config = MODELS[name]
    model = build(family, tmp_path, **config)
    runner = make_runner(tmp_path)
    for length in (1, 2, 37):
        tokens = prompt(length)
        np.testing.assert_allclose(Driver(runner).logits(tokens), reference(model, tokens), rtol=0, atol=1e-4)
    tokens = prompt(9)
    generated = Driver(runner).greedy(tokens, 20)
    assert reference(model, tokens + generated)[8:-1].argmax(-1).tolist() == generated


@pytest.mark.parametrize("name", ROPES)
def test_rotary_rule(name, tmp_path):
    rope, max_model_len = ROPES[name]
    rope = dict(rope)
    config = LLAMA | {k: rope.pop(k) for k in ("max_position_embeddings",) if k in rope}
    model = build("Llama", tmp_path, **config, rope_parameters={"rope_theta": 10_000.0} | rope)
    runner = make_runner(tmp_path, max_model_len=max_model_len)
    for length in (60, 60 if "long" in name else 7):
        tokens = prompt(length)
        np.testing.assert_allclose(Driver(runner).logits(tokens), reference(model, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["linear", "yarn", "llama3", "longrope-long"])
def test_old_and_new_spelling_of_rotary_config_are_one(name, tmp_path):
    rope, max_model_len = ROPES[name]
    build("Llama", tmp_path, **LLAMA, rope_parameters={"rope_theta": 777.0} | rope)
    new = Driver(make_runner(tmp_path, max_model_len=max_model_len)).logits(prompt(30))
    path = tmp_path / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    old = config.pop("rope_parameters")
    config |= {"rope_theta": old.pop("rope_theta"), "torch_dtype": config.pop("dtype")}
    config["rope_scaling"] = old | {"type": old["rope_type"]}
    path.write_text(json.dumps(config), encoding="utf-8")
    np.testing.assert_array_equal(Driver(make_runner(tmp_path, max_model_len=max_model_len)).logits(prompt(30)), new)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_weights_of_any_dtype_are_computed_in_float32(dtype, tmp_path):
    build("Qwen2", tmp_path, **LLAMA).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    model = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = prompt(20)
    runner = make_runner(tmp_path)
    np.testing.assert_allclose(Driver(runner).logits(tokens), reference(model, tokens), rtol=0, atol=1e-4)
    assert runner.info.description["dtype"].startswith(dtype)


def test_sharded_checkpoint_is_the_same_model(tmp_path):
    model = build("Llama", tmp_path / "whole", **LLAMA)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    whole, sharded = (Driver(make_runner(tmp_path / d)).logits(prompt(20)) for d in ("whole", "sharded"))
    np.testing.assert_array_equal(whole, sharded)
