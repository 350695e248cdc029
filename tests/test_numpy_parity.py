"""The NumPy runner against transformers: every family, every rotary rule, on tiny random models made here."""

from __future__ import annotations

import json

import numpy as np
import pytest

from model_cases import FACTORS, LLAMA, MODELS, VOCAB
from numpy_support import Driver, make_runner

torch = pytest.importorskip("torch", reason="the oracle: pip install torch transformers")
transformers = pytest.importorskip("transformers", reason="the oracle: pip install torch transformers")

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


EXACT = {"rtol": 0, "atol": 1e-4}


def build(family: str, path, **config):
    torch.manual_seed(0)
    kind = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    config_class = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    # eager knows soft caps, sdpa does not; but for Falcon, eager adds the ALiBi bias twice
    implementation = "eager" if family == "Gemma2" else "sdpa"
    model = getattr(transformers, f"{family}{kind}")(config_class(**config, attn_implementation=implementation))
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
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


@pytest.mark.parametrize("name", MODELS)
def test_family(name, tmp_path):
    """Alone, chunked, in company, and on a prefix that another sequence computed: the logits of transformers."""
    model_type, family, config = MODELS[name]
    assert name.split("-")[0] == model_type
    model = build(family, tmp_path, **config)
    runner = make_runner(tmp_path)
    long, short = prompt(37), prompt(5, seed=1)
    wanted, wanted_short = reference(model, long), reference(model, short)
    assert 0.1 < wanted.std() < 1e3  # the tolerance means something
    np.testing.assert_allclose(Driver(runner).logits(long), wanted, **EXACT)
    np.testing.assert_allclose(Driver(runner).logits(long, chunk=7), wanted, **EXACT)

    driver = Driver(runner, list(range(64))[::-1])
    driver.step((0, long, 0, 20, 0), (1, short, 0, 4, 0))
    together = driver.step((0, long, 20, 37, 17), (1, short, 4, 5, 1))  # a chunk beside a decode
    np.testing.assert_allclose(together, [*wanted[20:], wanted_short[4]], **EXACT)
    driver.tables[2], branch = driver.tables[0][:5], long[:20] + short  # 5 whole blocks of 4 tokens, shared
    rest = driver.step((2, branch, 20, 24, 4))
    decoded = driver.step((2, branch, 24, 25, 1), (0, long, 36, 37, 1), (1, short, 4, 5, 1))  # a group of decodes
    wanted_branch = reference(model, branch)
    np.testing.assert_allclose(rest, wanted_branch[20:24], **EXACT)
    np.testing.assert_allclose(decoded, [wanted_branch[24], wanted[36], wanted_short[4]], **EXACT)


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
