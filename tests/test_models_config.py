"""config.json: published files load with the published sizes; what would change the maths is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import published_configs
from nanovllm.errors import ModelError, UnsupportedModelError
from nanovllm_models import Block, DynamicNTK, Llama3, LongRope, Rotary, Yarn, refused_architectures, rotary_frequencies
from nanovllm_models.config import Config
from nanovllm_models.registry import find_family, known_architectures
from published_configs import GPT2, LLAMA2_7B, LLAMA31_8B, QWEN25_05B, QWEN25_7B
from published_configs import MODELS as PUBLISHED


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
    old_keys = ("torch_dtype", "rope_theta", "rope_scaling", "rotary_pct", "rotary_emb_base", "rope_local_base_freq")
    new = {k: v for k, v in old.items() if k not in (*old_keys, "partial_rotary_factor")} | {"dtype": "bfloat16"}
    if not (old["model_type"] == "gpt2" or old.get("alibi")):
        rope = dict(old.get("rope_scaling") or {})
        rope["rope_type"] = rope.pop("type", rope.get("rope_type", "default"))
        rope["rope_theta"] = old.get("rope_theta", old.get("rotary_emb_base", 10000.0))
        for key in ("rotary_pct", "partial_rotary_factor"):
            if key in old:
                rope["partial_rotary_factor"] = old[key]
        if "rope_local_base_freq" in old:
            local = {"rope_type": "default", "rope_theta": old["rope_local_base_freq"]}
            rope = {"full_attention": rope, "sliding_attention": local}
        new["rope_parameters"] = rope
    assert read(new) == read(old)


def test_what_the_published_configs_mean():
    """Facts of the models' papers and cards that no parameter count shows."""

    def spec(name: str):
        return read(PUBLISHED[name][0])

    assert spec("Mistral-7B-v0.1").attention.windows == (4096,) * 32
    assert spec("Mistral-7B-v0.3").attention.windows == (None,) * 32
    mixtral = spec("Mixtral-8x7B-v0.1").mlps[31]
    assert (mixtral.num_experts, mixtral.top_k, mixtral.normalised, mixtral.shared) == (8, 2, True, None)
    phi = spec("phi-2")
    assert (phi.attention.head_size, phi.attention.rotary[0].dim) == (80, 32)
    assert (phi.block, phi.lm_head_bias) == (Block(parallel=True, shared_norm=True), True)
    assert spec("Phi-3-mini-4k").attention.windows == (2047,) * 32
    long = spec("Phi-3-mini-128k")
    assert long.attention.rotary[0].scaling.original_len == 4096
    assert long.attention.rotary[0].scaling.attention_factor == pytest.approx(1.1902380714)  # sqrt(1 + ln 32 / ln 4096)
    gemma = spec("gemma-2b")
    assert (gemma.mlps[0].activation, gemma.embedding_scale) == ("gelu_tanh", 2048**0.5)
    assert gemma.norm.unit_offset
    gemma2 = spec("gemma-2-2b")
    assert gemma2.attention.windows == (4096, None) * 13
    assert (gemma2.attention.soft_cap, gemma2.logits_soft_cap, gemma2.attention.scale) == (50, 30, 1 / 16)
    gemma3 = spec("gemma-3-1b")
    assert gemma3.attention.windows == ((512,) * 5 + (None,)) * 4 + (512, 512)
    assert [r.theta for r in gemma3.attention.rotary[4:7]] == [1e4, 1e6, 1e4]
    falcon, rw = spec("falcon-7b"), spec("falcon-rw-1b")
    assert (falcon.attention.num_kv_heads, falcon.block.shared_norm, falcon.attention.alibi) == (1, True, None)
    assert (rw.attention.num_kv_heads, rw.block, rw.attention.rotary[0]) == (32, Block(), None)
    assert rw.attention.alibi.slopes[3::4] == tuple(2.0**-i for i in range(1, 9))
    assert spec("falcon-40b").block == Block(parallel=True)
    granite = spec("granite-3.0-1b-a400m")
    assert (granite.embedding_scale, granite.residual_scale, granite.logits_scale) == (12, 0.22, 1 / 6)
    assert (granite.mlps[0].num_experts, granite.mlps[0].top_k) == (32, 8)
    moe = spec("Qwen1.5-MoE-A2.7B").mlps[0]
    assert (moe.num_experts, moe.top_k, moe.normalised, moe.expert.size, moe.shared.size) == (60, 4, False, 1408, 5632)
    moe = spec("Qwen3-30B-A3B").mlps[47]
    assert (moe.num_experts, moe.top_k, moe.normalised, moe.expert.size, moe.shared) == (128, 8, True, 768, None)
    assert spec("pythia-160m").attention.rotary[0].dim == 16
    assert spec("starcoder2-3b").attention.windows == (4096,) * 30
    olmo = spec("OLMo-2-7B")
    assert olmo.block == Block(pre_norms=False, post_norms=True)
    assert olmo.attention.qk_norm_whole
    assert [r is None for r in spec("SmolLM3-3B").attention.rotary[:8]] == [False, False, False, True] * 2


def test_rotary_rules_are_read_with_their_lengths():
    assert read(LLAMA31_8B).attention.rotary[0] == Rotary(128, 500000.0, Llama3(8.0, 1.0, 4.0, 8192))
    yarn = read(
        QWEN25_7B | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}
    )
    assert isinstance(yarn.attention.rotary[0].scaling, Yarn)
    assert yarn.attention.rotary[0].scaling.attention_factor == pytest.approx(1.138629436)  # 0.1 ln 4 + 1
    assert yarn.max_positions == 131072
    dynamic = read(LLAMA2_7B | {"rope_scaling": {"type": "dynamic", "factor": 2.0}})
    assert dynamic.attention.rotary[0].scaling == DynamicNTK(2.0, 4096)
    assert dynamic.max_positions == 8192
    lists = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
    long = read(LLAMA2_7B | {"rope_scaling": dict(type="longrope", **lists), "original_max_position_embeddings": 1024})
    assert isinstance(long.attention.rotary[0].scaling, LongRope)
    assert long.attention.rotary[0].scaling.original_len == 1024
    assert long.attention.rotary[0].scaling.attention_factor == pytest.approx(1.0954451)  # sqrt(1 + ln 4 / ln 1024)


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
        (published_configs.MISTRAL_7B_V01, {"layer_types": ["sliding_attention"] * 32}),
        (published_configs.MIXTRAL_8X7B, {"shared_intermediate_size": 64}),
        (published_configs.PHI_2, {"rope_scaling": {"type": "su", "factor": 2.0}}),
        (published_configs.PHI_2, {"partial_rotary_factor": 0.01}),
        (published_configs.PHI_2, {"partial_rotary_factor": 1.5}),
        (published_configs.PHI_3_MINI_4K, {"rope_scaling": {"type": "mrope"}}),
        (published_configs.GEMMA_2B, {"use_bidirectional_attention": True}),
        (published_configs.GEMMA_2B, {"hidden_activation": "quick_gelu"}),
        (published_configs.GEMMA_2_2B, {"layer_types": ["chunked_attention"] * 26}),
        (published_configs.GEMMA_3_1B, {"attn_logit_softcapping": 50.0}),
        (published_configs.GEMMA_3_1B, {"rope_parameters": {"chunked_attention": {"rope_type": "default"}}}),
        (published_configs.FALCON_7B, {"num_ln_in_parallel_attn": 2}),
        (published_configs.FALCON_40B, {"parallel_attn": False}),
        (published_configs.FALCON_7B, {"apply_residual_connection_post_layernorm": True}),
        (published_configs.GRANITE_3_2B, {"shared_intermediate_size": 64}),
        (published_configs.GRANITE_3_1B_A400M, {"layer_types": ["mamba"] * 24}),
        (published_configs.QWEN15_MOE_A27B, {"use_sliding_window": True}),
        (published_configs.QWEN15_MOE_A27B, {"layer_types": ["sliding_attention"] * 24}),
        (published_configs.PYTHIA_160M, {"hidden_act": "swiglu"}),
        (published_configs.STARCODER2_3B, {"mlp_type": "gated"}),
        (published_configs.STARCODER2_3B, {"norm_type": "rms_norm"}),
        (published_configs.STARCODER2_3B, {"scale_attn_weights": False}),
        (published_configs.OLMO_2_7B, {"clip_qkv": 8.0}),
        (published_configs.SMOLLM3_3B, {"layer_types": ["sliding_attention"] * 36}),
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


@pytest.mark.parametrize(
    ("base", "change", "says"),
    [
        (published_configs.MIXTRAL_8X7B, {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, but num_local_experts"),
        (published_configs.MIXTRAL_8X7B, {"num_local_experts": 0}, "num_local_experts"),
        (published_configs.QWEN3_30B_A3B, {"num_experts_per_tok": 129}, "num_experts_per_tok is 129, but num_experts"),
        (published_configs.QWEN3_30B_A3B, {"mlp_only_layers": [48]}, "mlp_only_layers"),
        (published_configs.QWEN3_30B_A3B, {"mlp_only_layers": "all"}, "mlp_only_layers"),
        (published_configs.QWEN15_MOE_A27B, {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        (published_configs.MISTRAL_7B_V01, {"num_key_value_heads": 7}, "32 attention heads cannot share 7"),
        (published_configs.MISTRAL_7B_V01, {"sliding_window": 0}, "sliding_window"),
        (published_configs.GEMMA_2_2B, {"sliding_window": -1}, "sliding_window"),
        (published_configs.GEMMA_2_2B, {"layer_types": ["full_attention"]}, "layer_types"),
        (published_configs.GEMMA_2_2B, {"attn_logit_softcapping": 0}, "attn_logit_softcapping"),
        (published_configs.GEMMA_3_1B, {"sliding_window_pattern": 0}, "sliding_window_pattern"),
        (published_configs.FALCON_7B, {"num_attention_heads": 70}, "not divisible by 70 attention heads"),
        (published_configs.FALCON_40B, {"num_kv_heads": 7}, "128 attention heads cannot share 7"),
        (published_configs.FALCON_7B, {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn"),
        (published_configs.GRANITE_3_2B, {"logits_scaling": 0}, "logits_scaling"),
        (published_configs.SMOLLM3_3B, {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        (published_configs.SMOLLM3_3B, {"no_rope_layers": [2] * 36}, "no_rope_layers"),
    ],
)
def test_contradictory_heads_experts_and_windows_are_named(base, change, says):
    with pytest.raises(ModelError, match=says) as error:
        read(base | change)
    assert "config.json" in str(error.value)


def test_known_architectures_that_are_refused_say_why():
    assert not set(refused_architectures()) & set(known_architectures())
    with pytest.raises(UnsupportedModelError, match=r"'granitemoehybrid' is not implemented: its Mamba-2 layers"):
        find_family("granitemoehybrid")


def test_every_family_can_be_imported_and_says_what_it_is():
    for name in known_architectures():
        family = find_family(name)
        assert family.__doc__, name
        fused = {template for template, modules in family.LAYOUT.items() if not isinstance(modules, str)}
        assert set(family.LAYOUT) >= family.TRANSPOSED, name
        assert fused >= family.GROUPED, name


def test_unknown_architecture_lists_the_known_ones():
    assert set(known_architectures()) >= {"gpt2", "llama", "qwen2", "qwen3"}
    with pytest.raises(UnsupportedModelError, match=r"'hyena'.*gpt2, .*llama, .*qwen2"):
        find_family("hyena")


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
    base = dict(data.draw(st.sampled_from([config for config, _ in PUBLISHED.values()])))
    small = {"num_hidden_layers": 3, "n_layer": 3, "num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2}
    base |= {key: value for key, value in small.items() if key in base}
    for key in ("layer_types", "no_rope_layers"):
        base.pop(key, None)
    assert read(base).num_layers == 3
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
    if isinstance(spec.attention.rotary[0], Rotary):
        freqs, factor = rotary_frequencies(spec.attention.rotary[0], spec.max_positions)
        assert np.isfinite(freqs).all()
        assert factor > 0
