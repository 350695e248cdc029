"""generation_config.json: what a model recommends is read with its origin, shown, and not applied."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from models_support import LLAMA, write_checkpoint
from nanovllm.errors import ModelError
from nanovllm_models import Default, load_checkpoint
from numpy_support import Driver, make_runner

LLAMA3 = {  # of Llama-3.1-8B-Instruct
    "bos_token_id": 1, "do_sample": True, "eos_token_id": [5, 6, 7], "temperature": 0.6, "top_p": 0.9,
    "transformers_version": "4.42.3",
}  # fmt: skip
QWEN = {  # of Qwen2.5-0.5B-Instruct
    "do_sample": True, "pad_token_id": 3, "eos_token_id": [4, 3], "repetition_penalty": 1.1, "temperature": 0.7,
    "top_k": 20, "top_p": 0.8,
}  # fmt: skip


def checkpoint(path: Path, generation: dict | None, config: dict | None = None) -> Path:
    write_checkpoint(path, LLAMA | (config or {}))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return path


def test_published_files(tmp_path):
    llama = load_checkpoint(checkpoint(tmp_path / "a", LLAMA3))
    assert llama.eos_ids == (5, 6, 7)
    origin = "generation_config.json"
    assert llama.sampling_defaults == {
        "do_sample": Default(True, origin),
        "temperature": Default(0.6, origin),
        "top_p": Default(0.9, origin),
    }
    qwen = load_checkpoint(checkpoint(tmp_path / "b", QWEN)).sampling_defaults
    assert {name: d.value for name, d in qwen.items()} == {
        "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1
    }  # fmt: skip


def test_each_value_says_which_file_it_is_from(tmp_path):
    """Old files of transformers wrote generation defaults into config.json."""
    path = checkpoint(tmp_path, {"top_k": 40}, {"top_k": 50, "temperature": 1.0})
    found = load_checkpoint(path).sampling_defaults
    assert found == {"top_k": Default(40, "generation_config.json"), "temperature": Default(1.0, "config.json")}
    (path / "generation_config.json").unlink()
    assert load_checkpoint(path).sampling_defaults["top_k"] == Default(50, "config.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", "0.6"), ("temperature", -1), ("temperature", True), ("top_k", 1.5), ("top_p", [0.9]),
        ("repetition_penalty", {}), ("do_sample", 1), ("max_new_tokens", 0), ("temperature", 1e400),
    ],
)  # fmt: skip
def test_a_bad_value_names_file_and_key(tmp_path, key, value):
    path = checkpoint(tmp_path, {})
    text = f'{{"{key}": 1e400}}' if value == 1e400 else json.dumps({key: value})
    (path / "generation_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=rf"generation_config.json: {key}"):
        load_checkpoint(path)


def test_the_runner_shows_them_and_its_logits_do_not_know_them(tmp_path):
    plain, advised = (make_runner(checkpoint(tmp_path / name, g)) for name, g in (("a", None), ("b", QWEN)))
    assert plain.info.description["generation_defaults"] == {}
    shown = advised.info.description["generation_defaults"]
    assert shown["temperature"] == {"value": 0.7, "origin": "generation_config.json"}
    json.dumps(shown)
    np.testing.assert_array_equal(Driver(plain).logits([1, 2, 3]), Driver(advised).logits([1, 2, 3]))
