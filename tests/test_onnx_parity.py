"""The ONNX runner against transformers: what each kind of block is made of, and every rotary rule.

All variants of all families are in test_onnx_families.py, against the NumPy runner.
"""

from __future__ import annotations

import numpy as np
import pytest

from model_cases import LLAMA, MODELS, ONE_OF_EACH_KIND
from numpy_support import Driver
from onnx_support import make_runner
from test_numpy_parity import EXACT, ROPES, build, prompt, reference, torch, transformers

pytest.importorskip("onnxruntime", reason="the runtime: pip install 'nanovllm[onnx]'")


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_family(name, tmp_path):
    _, family, config = MODELS[name]
    model = build(family, tmp_path, **config)
    tokens = prompt(37)
    driver = Driver(make_runner(tmp_path))
    np.testing.assert_allclose(driver.logits(tokens, chunk=20), reference(model, tokens), **EXACT)


@pytest.mark.parametrize("name", ROPES)
def test_rotary_rule(name, tmp_path):
    rope, max_model_len = ROPES[name]
    rope = dict(rope)
    config = LLAMA | {k: rope.pop(k) for k in ("max_position_embeddings",) if k in rope}
    model = build("Llama", tmp_path, **config, rope_parameters={"rope_theta": 10_000.0} | rope)
    tokens = prompt(60)
    got = Driver(make_runner(tmp_path, max_model_len=max_model_len)).logits(tokens)
    np.testing.assert_allclose(got, reference(model, tokens), **EXACT)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_weights_of_any_dtype_are_computed_in_float32(dtype, tmp_path):
    build("Qwen2", tmp_path, **LLAMA).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    model = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = prompt(20)
    runner = make_runner(tmp_path)
    np.testing.assert_allclose(Driver(runner).logits(tokens), reference(model, tokens), **EXACT)
    assert runner.info.description["dtype"].startswith(dtype)
