"""model_info.json: the seeds' eight keys, read, written, and taken from config.json where it is absent."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models_support import GPT2, LLAMA
from nanovllm.errors import ModelError, UnsupportedModelError
from nanovllm_models import ModelInfo, load_checkpoint

GOOD = {
    "model_name": "gpt2", "vocab_size": 50257, "eos_token_id": 50256, "bos_token_id": 50256, "pad_token_id": None,
    "hidden_size": 768,
    "num_layers": 12, "num_heads": 12,
}  # fmt: skip
sizes, tokens = st.integers(1, 2**31), st.none() | st.integers(0, 2**31)


def put(path, name, values) -> None:
    (path / name).write_text(json.dumps(values), encoding="utf-8")


@given(
    info=st.builds(
        ModelInfo, model_name=st.text(st.characters(codec="utf-8")), vocab_size=sizes, hidden_size=sizes,
        num_layers=sizes, num_heads=sizes,
        eos_token_id=tokens, bos_token_id=tokens, pad_token_id=tokens,
    )
)  # fmt: skip
def test_round_trip(tmp_path_factory, info):
    path = tmp_path_factory.mktemp("info")
    assert info.write(path) == path / "model_info.json"
    assert ModelInfo.read(path) == info


def test_a_seed_file_is_read(tmp_path):
    put(tmp_path, "model_info.json", GOOD | {"pad_token_id": -1})  # exporters write -1 for none
    assert ModelInfo.read(tmp_path) == ModelInfo(**GOOD)


@pytest.mark.parametrize(
    ("key", "value"),
    [("model_name", 3), ("vocab_size", "50257"), ("vocab_size", True), ("hidden_size", 0), ("num_layers", 1.0),
     ("num_heads", None), ("eos_token_id", "x"), ("bos_token_id", [1]), ("pad_token_id", -2)],
)  # fmt: skip
def test_wrong_types_name_the_file_and_the_key(tmp_path, key, value):
    put(tmp_path, "model_info.json", GOOD | {key: value})
    with pytest.raises(ModelError, match=rf"model_info\.json: {key} "):
        ModelInfo.read(tmp_path)


@pytest.mark.parametrize(("config", "layers", "heads"), [(GPT2, 2, 4), (LLAMA, 2, 4)])
def test_falls_back_to_config_json(tmp_path, config, layers, heads):
    put(tmp_path, "config.json", config | {"eos_token_id": [9, 8]})
    info = ModelInfo.read(tmp_path)
    assert info == ModelInfo(
        model_name=tmp_path.name, vocab_size=61, eos_token_id=9, bos_token_id=None, pad_token_id=None, hidden_size=24,
        num_layers=layers, num_heads=heads,
    )  # fmt: skip


def test_neither_file(tmp_path):
    with pytest.raises(ModelError, match=r"neither model_info\.json nor config\.json"):
        ModelInfo.read(tmp_path)


def test_model_info_alone_does_not_say_the_architecture(tmp_path):
    put(tmp_path, "model_info.json", GOOD)
    with pytest.raises(UnsupportedModelError, match=r"no config\.json"):
        load_checkpoint(tmp_path)
