"""genai_config.json: what is taken from published files, what is left to the configuration, and contradictions."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from genai_configs import GPT2, LLAMA32, PHI2, PHI3, PUBLISHED, QWEN25, write
from nanovllm.errors import ModelError, UnsupportedModelError
from nanovllm_runner_onnx.genai_config import GenaiConfig
from nanovllm_runner_onnx.model_files import OnnxModel, find_onnx_model

pytest.importorskip("onnxruntime", reason="the runtime: pip install 'nanovllm[onnx]'")


def changed(config: dict, key: str, value: Any) -> dict:
    """A copy with the dotted key set; `...` deletes it."""
    config = copy.deepcopy(config)
    *path, last = key.split(".")
    section = config
    for part in path:
        section = section.setdefault(part, {})
    if value is ...:
        del section[last]
    else:
        section[last] = value
    return config


def found(directory) -> OnnxModel:
    model = find_onnx_model(directory)
    assert model is not None
    return model


@pytest.mark.parametrize(
    ("name", "vocab", "context", "eos", "bos", "sampling"),
    [
        ("phi3", 32064, 131072, (32000, 32001, 32007), 1, (False, 1.0, 1, 1.0)),
        ("phi2", 51200, 2048, (50256,), 50256, (False, 1.0, 50, 1.0)),
        ("llama32", 128256, 131072, (128001, 128008, 128009), 128000, (True, 0.6, 50, 0.9)),
        ("qwen25", 151936, 32768, (151645, 151643), None, (True, 0.7, 20, 0.8)),
        ("gpt2", 50257, 1024, (50256,), 50256, (None, None, None, None)),
    ],
)
def test_the_facts_of_published_files(name, vocab, context, eos, bos, sampling, tmp_path):
    path = write(tmp_path / name, PUBLISHED[name])
    model = found(tmp_path / name)
    assert (model.path, model.directory, model.name) == (path, tmp_path / name, name)
    assert (model.vocab_size, model.context_length, model.eos_ids, model.bos_id) == (vocab, context, eos, bos)
    keys = ("do_sample", "temperature", "top_k", "top_p")
    defaults = model.sampling_defaults
    assert tuple(defaults[k].value if k in defaults else None for k in keys) == sampling
    assert {d.origin for d in defaults.values()} <= {"genai_config.json"}


def test_a_layer_has_names_of_its_own(tmp_path):
    write(tmp_path / "llama", LLAMA32), write(tmp_path / "gpt2", GPT2)
    llama, gpt2 = (found(tmp_path / name).genai for name in ("llama", "gpt2"))
    assert llama.past(11) == ["past_key_values.11.key", "past_key_values.11.value"]
    assert llama.present(0) == ["present.0.key", "present.0.value"]
    assert (gpt2.past(3), gpt2.present(3)) == (["past_3"], ["present_3"])
    assert gpt2.names["logits"] == "logits"
    assert "past_key_names" not in gpt2.names


def test_what_concerns_the_machine_is_named_and_left_alone(tmp_path):
    write(tmp_path, LLAMA32)
    ignored = found(tmp_path).genai.ignored
    assert {
        "engine.dynamic_batching.block_size",
        "engine.dynamic_batching.max_batch_size",
        "model.decoder.session_options.provider_options",
        "model.decoder.sliding_window.window_size",
        "search.max_length",
        "search.past_present_share_buffer",
    } <= set(ignored)
    assert not [key for key in ignored if key.startswith(("model.decoder.inputs", "search.t"))]


@pytest.mark.parametrize(
    ("name", "unknown"),
    [
        ("phi3", []),
        ("phi2", []),
        ("llama32", []),
        ("qwen25", ["model.decoder.graph_optimization_level", "model.prompt_templates.user"]),
        ("gpt2", []),
    ],
)
def test_unknown_keys_are_kept_by_name(name, unknown, tmp_path):
    write(tmp_path, PUBLISHED[name])
    assert sorted(found(tmp_path).genai.unknown) == unknown


def test_a_surprise_deep_inside_is_unknown_too(tmp_path):
    config = changed(changed(PHI2, "model.decoder.inputs.rotary", "cos"), "search.future.thing", 1)
    write(tmp_path, config, PHI2)
    assert found(tmp_path).genai.unknown == ("model.decoder.inputs.rotary", "search.future.thing")


@pytest.mark.parametrize(
    ("config", "key", "value", "reason"),
    [
        (
            PHI3,
            "model.decoder.head_size",
            128,
            r"decoder.head_size is 128, but 'past_key_values.0.key' has shape \['b.*96",
        ),
        (
            QWEN25,
            "model.decoder.num_key_value_heads",
            14,
            "decoder.num_key_value_heads is 14, but 'past_key_values.0.key'",
        ),
        (GPT2, "model.decoder.head_size", 32, r"decoder.head_size is 32, but 'past_0' has shape \[2, 'batch', 12"),
        (LLAMA32, "model.decoder.num_hidden_layers", 17, "is 17, but the graph has no 'past_key_values.16.key'"),
        (LLAMA32, "model.decoder.num_hidden_layers", 15, "is 15, but the graph has 'past_key_values.15.key' too"),
        (PHI2, "model.decoder.num_attention_heads", 33, "is 33, no multiple of num_key_value_heads, 32"),
        (
            PHI2,
            "model.decoder.inputs.input_ids",
            "ids",
            "inputs.input_ids is 'ids', but the graph has input_ids, attent",
        ),
        (
            PHI2,
            "model.decoder.outputs.logits",
            "scores",
            "outputs.logits is 'scores', but the graph has logits, present",
        ),
        (PHI2, "model.decoder.outputs.present_key_names", "now.%d.k", "but the graph has no 'now.0.k'"),
        (
            PHI2,
            "model.vocab_size",
            50257,
            "vocab_size is 50257; it must be 51200",
        ),
        (PHI2, "model.eos_token_id", 51200, "eos_token_id 51200 is outside of the vocabulary of 51200"),
    ],
)
def test_a_file_that_contradicts_the_graph(config, key, value, reason, tmp_path):
    write(tmp_path, changed(config, key, value), config)
    with pytest.raises(ModelError, match=rf"genai_config\.json: .*?{reason}"):
        find_onnx_model(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("model", ..., "model is missing"),
        ("model", 3, "model is 3; it must be an object"),
        ("model.type", ..., "type is None; it must be a text"),
        ("model.decoder", {}, "decoder is missing"),
        ("model.decoder.filename", 3, "filename is 3; it must be a text"),
        ("model.decoder.head_size", "80", "head_size is '80'; it must be a whole number"),
        ("model.decoder.num_hidden_layers", 0, "num_hidden_layers is 0; it must be a whole number from 1"),
        ("model.decoder.num_hidden_layers", True, "num_hidden_layers is True"),
        ("model.decoder.num_hidden_layers", 10**9, "num_hidden_layers is 1000000000"),
        ("model.decoder.inputs", ["input_ids"], r"inputs is \['input_ids'\]; it must be an object"),
        ("model.decoder.inputs.past_key_names", "past.key", "it must be a name with one %d, for the layer"),
        ("model.decoder.inputs.past_key_names", "%d.%n.key", "it must be a name with one %d, for the layer"),
        ("model.decoder.inputs.input_ids", 1, r"inputs\.input_ids is 1; it must be a name"),
        ("model.context_length", -1, "context_length is -1; it must be a whole number"),
        ("model.eos_token_id", "</s>", "eos_token_id is '</s>', not a token id"),
        ("search", [], "search is \\[\\]; it must be an object"),
        ("search.temperature", -0.5, "temperature is -0.5; it must be a number from 0"),
        ("search.do_sample", 1, "do_sample is 1; it must be true or false"),
    ],
)
def test_values_of_a_wrong_kind_are_named(key, value, reason, tmp_path):
    write(tmp_path, changed(PHI2, key, value), PHI2)
    with pytest.raises(ModelError, match=rf"genai_config\.json.*{reason}"):
        find_onnx_model(tmp_path)


def test_an_endless_surprise_is_named_once(tmp_path):
    """Its own keys are neither walked, which Python's stack would not bear everywhere, nor joined."""
    deep: dict[str, Any] = {}
    for _ in range(500):
        deep = {"a": deep or 1}
    write(tmp_path, changed(PHI2, "model.deep", deep), PHI2)
    assert found(tmp_path).genai.unknown == ("model.deep.a.a.a.a.a",)


@pytest.mark.parametrize("raw", ["", "{", "[]", '{"model": {}, "model": {}}', '{"model": NaN}', "{" * 100_000])
def test_a_damaged_file(raw, tmp_path):
    write(tmp_path, PHI2)
    (tmp_path / "genai_config.json").write_text(raw)
    with pytest.raises(ModelError, match=r"genai_config\.json"):
        find_onnx_model(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.vision", {"filename": "vision.onnx"}),
        ("model.embedding", {"filename": "embedding.onnx"}),
        ("model.speech", {"filename": "speech.onnx"}),
        ("model.encoder", {"filename": "encoder.onnx", "head_size": 64}),
        ("model.decoder.pipeline", [{"embeds": {"filename": "embeds.onnx"}}]),
    ],
)
def test_a_model_of_several_graphs_is_refused_by_name(key, value, tmp_path):
    write(tmp_path, changed(PHI2, key, value), PHI2)
    with pytest.raises(UnsupportedModelError, match=rf"{key.split('.')[-1]} belongs to a model of several graphs"):
        find_onnx_model(tmp_path)


def test_an_empty_section_of_another_graph_is_none(tmp_path):
    write(tmp_path, changed(changed(PHI2, "model.vision", {}), "model.decoder.pipeline", []), PHI2)
    assert found(tmp_path).genai.unknown == ("model.decoder.pipeline", "model.vision")


@pytest.mark.parametrize(
    ("filename", "reason"),
    [
        ("gone.onnx", r"decoder.filename is 'gone.onnx', which is not there \(have: model.onnx\)"),
        ("../model.onnx", "leads outside"),
        (".", "not a regular file"),
    ],
)
def test_a_graph_that_is_not_there_or_not_inside(filename, reason, tmp_path):
    write(tmp_path / "model", PHI2)
    write(tmp_path, PHI2)
    config = changed(PHI2, "model.decoder.filename", filename)
    (tmp_path / "model" / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=reason):
        find_onnx_model(tmp_path / "model")


def test_the_number_of_layers_does_not_cost_time_or_memory_before_it_is_checked(tmp_path):
    """A file may claim billions: the first name that the graph lacks ends the check."""
    write(tmp_path, changed(PHI2, "model.decoder.num_hidden_layers", 2**31 - 1), PHI2)
    with pytest.raises(ModelError, match=r"has no 'past_key_values\.32\.key'"):
        find_onnx_model(tmp_path)
    assert GenaiConfig.read(tmp_path / "genai_config.json").num_layers == 2**31 - 1
