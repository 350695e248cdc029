"""Rotary frequencies of every rule, and the biases of ALiBi, equal transformers' own."""

from __future__ import annotations

import numpy as np
import pytest

from nanovllm_models import Alibi, DynamicNTK, LongRope, Rotary, alibi_bias, rotary_frequencies
from nanovllm_models.alibi import alibi_slopes
from nanovllm_models.config import Config
from nanovllm_models.registry import find_family

BASE = {
    "vocab_size": 100, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}  # fmt: skip
RULES = [
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 1024, "mscale": 0.707,
    "mscale_all_dim": 1.0},
    {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 4096},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "truncate": False, "beta_fast": 8.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 512},
    {"rope_type": "longrope", "factor": 8.0, "original_max_position_embeddings": 512,
         "short_factor": np.linspace(1, 2, 32).tolist(), "long_factor": np.linspace(1, 30, 32).tolist()},
    {"rope_type": "dynamic", "factor": 2.0},
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["rope_type"])
@pytest.mark.parametrize("length", [100, 512, 513, 4096, 5000])
def test_equal_to_transformers(rule, length):
    pytest.importorskip("torch", reason="the oracle: pip install torch transformers")
    transformers = pytest.importorskip("transformers", reason="the oracle: pip install torch transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rule = dict(rule) | {"rope_theta": 10_000.0}
    oracle = transformers.LlamaConfig(**BASE, rope_parameters=dict(rule))
    wanted, wanted_factor = ROPE_INIT_FUNCTIONS[rule["rope_type"]](oracle, "cpu", seq_len=length)
    spec = find_family("llama").spec(Config(BASE | {"rope_parameters": rule}, "config.json"))
    freqs, factor = rotary_frequencies(spec.attention.rotary[0], length)
    np.testing.assert_allclose(freqs, wanted.numpy(), rtol=2e-6)
    assert factor == pytest.approx(wanted_factor)


def test_length_dependent_rules_change_exactly_at_the_original_length():
    plain, _ = rotary_frequencies(Rotary(8, 10_000.0), 64)
    dynamic = Rotary(8, 10_000.0, DynamicNTK(2.0, 64))
    np.testing.assert_array_equal(rotary_frequencies(dynamic, 64)[0], plain)
    assert (rotary_frequencies(dynamic, 65)[0][1:] < plain[1:]).all()
    long = Rotary(8, 10_000.0, LongRope((1.0,) * 4, (2.0,) * 4, 64, 1.0))
    np.testing.assert_array_equal(rotary_frequencies(long, 64)[0], plain)
    np.testing.assert_allclose(rotary_frequencies(long, 65)[0], plain / 2)


@pytest.mark.parametrize("num_heads", [1, 2, 5, 6, 8, 32, 71, 128])
def test_alibi_equals_transformers_to_the_bit(num_heads):
    torch = pytest.importorskip("torch", reason="the oracle: pip install torch transformers")
    falcon = pytest.importorskip("transformers.models.falcon.modeling_falcon", reason="the oracle: pip install torch")
    wanted = falcon.build_alibi_tensor(torch.ones(1, 1000, dtype=torch.long), num_heads, torch.float32)
    bias = alibi_bias(Alibi(alibi_slopes(num_heads)), 1000)
    np.testing.assert_array_equal(bias, wanted[:, 0].numpy())
