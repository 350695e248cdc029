"""config.json: published files load with the published sizes; what would change the maths is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.errors import ModelError, UnsupportedModelError
from nanovllm_models import DynamicNTK, Llama3, LongRope, Rotary, Yarn, rotary_frequencies
from nanovllm_models.config import Config
from nanovllm_models.registry import find_family, known_architectures

GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
    "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257,
}  # fmt: skip
LLAMA2_7B = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
    "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
TINYLLAMA = LLAMA2_7B | {
    "attention_bias": False, "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 2048,
    "num_hidden_layers": 22, "num_key_value_heads": 4, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
}  # fmt: skip
LLAMA31_8B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.42.3",
    "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
LLAMA32_1B = LLAMA31_8B | {
    "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "tie_word_embeddings": True,
    "rope_scaling": LLAMA31_8B["rope_scaling"] | {"factor": 32.0},
}  # fmt: skip
LLAMA32_3B = LLAMA32_1B | {
    "head_dim": 128,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 24,
    "num_hidden_layers": 28,
}
QWEN25_05B = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.43.1", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN25_7B = QWEN25_05B | {
    "hidden_size": 3584, "intermediate_size": 18944, "max_window_layers": 28, "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4, "sliding_window": 131072, "tie_word_embeddings": False, "vocab_size": 152064,
}  # fmt: skip
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3_8B = QWEN3_06B | {
    "hidden_size": 4096, "intermediate_size": 12288, "max_window_layers": 36, "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "tie_word_embeddings": False,
}  # fmt: skip

# Parameter counts as the model cards and transformers' num_parameters() give them.
PUBLISHED = {
    "gpt2": (GPT2, 124_439_808),
    "gpt2-medium": (GPT2 | {"n_embd": 1024, "n_head": 16, "n_layer": 24}, 354_823_168),
    "gpt2-xl": (GPT2 | {"n_embd": 1600, "n_head": 25, "n_layer": 48}, 1_557_611_200),
    "Llama-2-7b": (LLAMA2_7B, 6_738_415_616),
    "TinyLlama-1.1B": (TINYLLAMA, 1_100_048_384),
    "Llama-3.1-8B": (LLAMA31_8B, 8_030_261_248),
    "Llama-3.2-1B": (LLAMA32_1B, 1_235_814_400),
    "Llama-3.2-3B": (LLAMA32_3B, 3_212_749_824),
    "Qwen2.5-0.5B": (QWEN25_05B, 494_032_768),
    "Qwen2.5-7B": (QWEN25_7B, 7_615_616_512),
    "Qwen3-0.6B": (QWEN3_06B, 596_049_920),
    "Qwen3-8B": (QWEN3_8B, 8_190_735_360),
}


def read(values: dict):
    config = Config(values, "config.json of a test")
    spec = find_family(values["model_type"]).spec(config)
    config.finish()
    return spec


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_has_the_published_number_of_parameters(name):
    config, num_parameters = PUBLISHED[name]
    assert read(config).num_parameters == num_parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_spelling_of_transformers_5_gives_the_same_spec(name):
    old, _ = PUBLISHED[name]
    new = {k: v for k, v in old.items() if k not in ("torch_dtype", "rope_theta", "rope_scaling")}
    new["dtype"] = "bfloat16"
    if old["model_type"] != "gpt2":
        rope = {"rope_type": "default"} | (old.get("rope_scaling") or {})
        new["rope_parameters"] = rope | {"rope_theta": old.get("rope_theta", 10000.0)}
    assert read(new) == read(old)


def test_rotary_rules_are_read_with_their_lengths():
    assert read(LLAMA31_8B).positions == Rotary(128, 500000.0, Llama3(8.0, 1.0, 4.0, 8192))
    yarn = read(
        QWEN25_7B | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}
    )
    assert isinstance(yarn.positions.scaling, Yarn)
    assert yarn.positions.scaling.attention_factor == pytest.approx(1.138629436)  # 0.1 ln 4 + 1
    assert yarn.max_positions == 131072
    dynamic = read(LLAMA2_7B | {"rope_scaling": {"type": "dynamic", "factor": 2.0}})
    assert dynamic.positions.scaling == DynamicNTK(2.0, 4096)
    assert dynamic.max_positions == 8192
    lists = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
    long = read(LLAMA2_7B | {"rope_scaling": dict(type="longrope", **lists), "original_max_position_embeddings": 1024})
    assert isinstance(long.positions.scaling, LongRope)
    assert long.positions.scaling.original_len == 1024
    assert long.positions.scaling.attention_factor == pytest.approx(1.0954451)  # sqrt(1 + ln 4 / ln 1024)


def test_windows_by_max_window_layers_and_by_layer_types():
    on = QWEN25_05B | {
        "use_sliding_window": True,
        "sliding_window": 100,
        "num_hidden_layers": 4,
        "max_window_layers": 2,
    }
    assert read(on).attention.windows == (None, None, 100, 100)
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    assert read(on | {"layer_types": types}).attention.windows == (100, None, None, 100)
    assert read(QWEN25_05B).attention.windows == (None,) * 24


@pytest.mark.parametrize(
    ("base", "change"),
    [
        (GPT2, {"activation_function": "quick_gelu"}),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}),
        (GPT2, {"reorder_and_upcast_attn": True}),
        (GPT2, {"add_cross_attention": True}),
        (GPT2, {"head_dim": 32}),
        (LLAMA2_7B, {"hidden_act": "gelu_10"}),
        (LLAMA2_7B, {"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}),
        (LLAMA2_7B, {"rope_scaling": {"type": "su", "factor": 2.0}}),
        (LLAMA2_7B, {"partial_rotary_factor": 0.5}),
        (LLAMA2_7B, {"sliding_window": 4096}),
        (LLAMA2_7B, {"auto_map": {"AutoModel": "modeling.Model"}}),
        (LLAMA2_7B, {"attn_logit_softcapping": 50.0}),
        (LLAMA2_7B, {"num_local_experts": 8}),
        (QWEN25_05B, {"layer_types": ["chunked_attention"] * 24}),
        (QWEN25_05B, {"layer_types": ["sliding_attention"] * 24}),
        (QWEN25_05B, {"attention_bias": False, "use_mrope": True}),
    ],
)
def test_a_value_that_changes_the_maths_is_refused_by_name(base, change):
    with pytest.raises(UnsupportedModelError) as error:
        read(base | change)
    [key] = [k for k in change if k in str(error.value)] or [None]
    assert key is not None
    assert "config.json" in str(error.value)


def test_an_unknown_key_inside_the_rope_section_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"rope_scaling in config.json.*finesse"):
        read(LLAMA2_7B | {"rope_scaling": {"type": "linear", "factor": 2.0, "finesse": 3}})


def test_unknown_keys_that_ask_for_nothing_are_ignored():
    nothing = {"a": None, "b": False, "c": 0, "d": "", "e": [], "f": {}}
    assert read(LLAMA2_7B | nothing) == read(LLAMA2_7B)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "4096"), ("hidden_size", 0), ("hidden_size", -1), ("hidden_size", True), ("hidden_size", 1.5),
        ("hidden_size", 10**18), ("hidden_size", None), ("num_hidden_layers", 10**6), ("rms_norm_eps", 0),
        ("rms_norm_eps", "x"), ("rms_norm_eps", float("inf")), ("tie_word_embeddings", 1), ("vocab_size", []),
        ("num_key_value_heads", 5), ("num_attention_heads", 3), ("rope_scaling", "linear"), ("rope_theta", 1),
        ("rope_scaling", {"type": "linear"}), ("rope_scaling", {"type": "linear", "factor": 0.5}),
        ("rope_scaling", {"type": "longrope", "short_factor": [1], "long_factor": [1]}),
        ("rope_scaling", {"type": "longrope", "short_factor": ["1"] * 64, "long_factor": [1] * 64}),
        ("rope_scaling", {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}),
        ("head_dim", 127),
    ],
)  # fmt: skip
def test_a_bad_value_is_a_model_error_that_names_the_key(key, value):
    with pytest.raises(ModelError) as error:
        read(LLAMA2_7B | {key: value})
    names = [key, *list(value if isinstance(value, dict) else ()), "key-value heads", "attention heads"]
    assert any(name in str(error.value) for name in names)


def test_unknown_architecture_lists_the_known_ones():
    assert set(known_architectures()) >= {"gpt2", "llama", "qwen2", "qwen3"}
    with pytest.raises(UnsupportedModelError, match=r"'mamba'.*gpt2, llama, qwen2, qwen3"):
        find_family("mamba")


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 300), st.sampled_from([10**18, 1e308, 1e-320, -0.0, 1.0]),
    st.text(max_size=5), st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.sampled_from(["factor", "type"]), st.integers(0, 9)),
)  # fmt: skip
ROPE_KEYS = (
    "rope_type factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim "
    "truncate low_freq_factor high_freq_factor short_factor long_factor rope_theta"
).split()


@given(data=st.data())
def test_any_config_is_a_spec_or_a_model_error(data):
    """No value, however odd, gets out as another exception, or as a rotation that cannot be computed."""
    base = dict(data.draw(st.sampled_from([GPT2, LLAMA2_7B, QWEN25_05B, QWEN3_06B])))
    for key in data.draw(st.lists(st.sampled_from(sorted(base)), max_size=3)):
        if key != "model_type":
            base[key] = data.draw(VALUES)
    if data.draw(st.booleans()) and base["model_type"] != "gpt2":
        rope = {key: data.draw(VALUES) for key in data.draw(st.lists(st.sampled_from(ROPE_KEYS)))}
        rope["type"] = data.draw(st.sampled_from(["linear", "dynamic", "yarn", "longrope", "llama3"]))
        base["rope_scaling"] = {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | rope
    try:
        spec = read(base)
    except ModelError:
        return
    assert spec.num_parameters > 0
    if isinstance(spec.positions, Rotary):
        freqs, factor = rotary_frequencies(spec.positions, spec.max_positions)
        assert np.isfinite(freqs).all()
        assert factor > 0
