"""load_checkpoint: names, prefixes, ties, shards and links; everything wrong is named."""

from __future__ import annotations

import json
import os
import shutil
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from models_support import GPT2, LLAMA, QWEN3, file_tensors, write_checkpoint
from nanovllm.errors import ModelError, PluginError, UnsupportedModelError
from nanovllm_models import load_checkpoint
from nanovllm_models.model_info import ModelInfo

TIED = LLAMA | {"tie_word_embeddings": True}


def shard(path, tensors: dict, *, index: dict | None = None) -> None:
    """Rewrite a checkpoint as two shards."""
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({n: tensors[n] for n in part}, path / file)
    weight_map = {n: file for file, part in halves.items() for n in part} | (index or {})
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def test_facts(tmp_path):
    path = write_checkpoint(tmp_path / "tiny-llama", LLAMA | {"eos_token_id": 7, "bos_token_id": 1})
    checkpoint = load_checkpoint(path)
    size = (path / "model.safetensors").stat().st_size
    assert checkpoint.name == "tiny-llama"
    assert checkpoint.dtype == "float32"
    assert (checkpoint.eos_ids, checkpoint.bos_id) == ((7,), 1)
    assert checkpoint.num_parameters == checkpoint.spec.num_parameters
    assert size - 8000 < checkpoint.weight_bytes == 4 * checkpoint.num_parameters < size
    assert list(checkpoint.weights) == list(checkpoint.spec.shapes())


@pytest.mark.parametrize(
    ("generation", "config", "wanted"),
    [
        ({"eos_token_id": [5, 6, 5]}, {"eos_token_id": 2}, (5, 6)),
        ({}, {"eos_token_id": [2, 3]}, (2, 3)),
        (None, {"eos_token_id": 2}, (2,)),
        (None, {}, ()),
    ],
)
def test_eos_ids_come_from_the_first_file_that_names_any(tmp_path, generation, config, wanted):
    path = write_checkpoint(tmp_path, LLAMA | config)
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    assert load_checkpoint(path).eos_ids == wanted


@pytest.mark.parametrize("value", ["2", 1.5, True, [2, None], -3])
def test_bad_eos_ids_are_named(tmp_path, value):
    path = write_checkpoint(tmp_path, LLAMA)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}), encoding="utf-8")
    with pytest.raises(ModelError, match=r"generation_config.json: eos_token_id"):
        load_checkpoint(path)


def test_gpt2_weights_are_split_and_transposed(tmp_path):
    tensors = file_tensors(GPT2)
    weights = load_checkpoint(write_checkpoint(tmp_path, GPT2, tensors)).weights
    fused = tensors["transformer.h.1.attn.c_attn.weight"]  # (in, q | k | v)
    for i, part in enumerate("qkv"):
        np.testing.assert_array_equal(
            weights[f"layers.1.attn.{part}.weight"].to_float32(), fused[:, 24 * i : 24 * (i + 1)].T
        )
        np.testing.assert_array_equal(
            weights[f"layers.1.attn.{part}.bias"].to_float32(),
            tensors["transformer.h.1.attn.c_attn.bias"][24 * i : 24 * (i + 1)],
        )


@pytest.mark.parametrize(("config", "prefix"), [(GPT2, "transformer."), (TIED, "model."), (QWEN3, "model.")])
def test_base_model_prefix_may_be_missing(tmp_path, config, prefix):
    tensors = file_tensors(config)
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    with_prefix = load_checkpoint(write_checkpoint(tmp_path / "a", config, tensors)).weights
    without = load_checkpoint(write_checkpoint(tmp_path / "b", config, bare)).weights
    for name, tensor in with_prefix.items():
        np.testing.assert_array_equal(tensor.array, without[name].array)


@pytest.mark.parametrize("config", [TIED, GPT2])
def test_tied_embeddings_may_be_stored_under_either_name_or_both(tmp_path, config):
    tensors = file_tensors(config)
    name = "transformer.wte.weight" if config is GPT2 else "model.embed_tokens.weight"
    embedding = tensors[name]
    only_head = {k: v for k, v in tensors.items() if k != name} | {"lm_head.weight": embedding}
    both = tensors | {"lm_head.weight": embedding.copy()}
    for i, stored in enumerate((tensors, only_head, both)):
        weights = load_checkpoint(write_checkpoint(tmp_path / str(i), config, stored)).weights
        np.testing.assert_array_equal(weights["embed.tokens.weight"].array, embedding)
        assert "lm_head.weight" not in weights
    with pytest.raises(ModelError, match="tie_word_embeddings"):
        load_checkpoint(write_checkpoint(tmp_path / "x", config, both | {"lm_head.weight": embedding + 1}))


def test_buffers_of_old_files_are_ignored(tmp_path):
    mask = np.ones((1, 1, 128, 128), np.uint8)
    extra = {"transformer.h.0.attn.bias": mask, "transformer.h.1.attn.masked_bias": np.zeros(1, np.float32)}
    assert load_checkpoint(write_checkpoint(tmp_path / "g", GPT2, file_tensors(GPT2) | extra))
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    assert load_checkpoint(write_checkpoint(tmp_path / "l", LLAMA, file_tensors(LLAMA) | extra))


def test_missing_and_unexpected_tensors_are_named(tmp_path):
    tensors = file_tensors(LLAMA)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.1.mlp.up_proj.qweight"] = np.zeros(3, np.int32)
    with pytest.raises(ModelError) as error:
        load_checkpoint(write_checkpoint(tmp_path, LLAMA, tensors))
    assert "lack model.layers.1.mlp.up_proj.weight" in str(error.value)
    assert "hold model.layers.1.mlp.up_proj.qweight" in str(error.value)


def test_wrong_shape_and_integer_weights_are_named(tmp_path):
    tensors = file_tensors(LLAMA)
    with pytest.raises(ModelError, match=r"model.norm.weight has shape \[23\].*asks for \[24\]"):
        load_checkpoint(
            write_checkpoint(tmp_path / "a", LLAMA, tensors | {"model.norm.weight": np.ones(23, np.float32)})
        )
    with pytest.raises(UnsupportedModelError, match=r"model.norm.weight is stored as I8"):
        load_checkpoint(write_checkpoint(tmp_path / "b", LLAMA, tensors | {"model.norm.weight": np.ones(24, np.int8)}))


def test_shards(tmp_path):
    tensors = file_tensors(LLAMA)
    whole = load_checkpoint(write_checkpoint(tmp_path / "whole", LLAMA, tensors)).weights
    shard(write_checkpoint(tmp_path / "sharded", LLAMA, tensors), tensors)
    parts = load_checkpoint(tmp_path / "sharded").weights
    for name, tensor in whole.items():
        np.testing.assert_array_equal(tensor.array, parts[name].array)


@pytest.mark.parametrize(
    ("index", "cause"),
    [
        ({"x": "c.safetensors"}, "'c.safetensors', which does not exist"),
        ({"x": "a.safetensors"}, "names x, which the shards lack"),
        ({"x": "../outside.safetensors"}, "leads outside"),
        ({"x": "nul\0"}, "does not exist"),
        ({"x": "lone\ud800"}, "does not exist"),
        ({"x": "l" * 5000}, "cannot be opened"),
        ({"x": "."}, "is not a regular file"),
        ({"x": 3}, "weight_map"),
        ({"model.norm.weight": "a.safetensors", "lm_head.weight": "b.safetensors"}, "places in"),
    ],
)
def test_bad_index_is_named(tmp_path, index, cause):
    tensors = file_tensors(LLAMA)
    path = write_checkpoint(tmp_path / "model", LLAMA, tensors)
    save_file(tensors, tmp_path / "outside.safetensors")
    shard(path, tensors, index=index)
    with pytest.raises(ModelError) as error:
        load_checkpoint(path)
    assert cause in str(error.value)
    assert error.value.hint


@pytest.mark.skipif(sys.platform == "win32", reason="makes symbolic links")
def test_links_are_followed_only_inside_the_directory_or_its_hub_cache_repository(tmp_path):
    real = write_checkpoint(tmp_path / "elsewhere", LLAMA)
    repo = tmp_path / "models--org--tiny"
    snapshot, blobs = repo / "snapshots" / "abc", repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(real / name, blobs / f"hash-{name}")
        (snapshot / name).symlink_to(f"../../blobs/hash-{name}")
    assert load_checkpoint(snapshot).name == "org/tiny"
    (tmp_path / "link").symlink_to(snapshot)  # the directory itself may be reached by any path
    assert load_checkpoint(tmp_path / "link").name == "org/tiny"

    for target in (real / "model.safetensors", "../../../elsewhere/model.safetensors"):
        (snapshot / "model.safetensors").unlink()
        (snapshot / "model.safetensors").symlink_to(target)
        with pytest.raises(ModelError, match="leads outside"):
            load_checkpoint(snapshot)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(ModelError, match="cannot be opened"):
        load_checkpoint(snapshot)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("gone")
    with pytest.raises(ModelError, match="cannot be opened"):
        load_checkpoint(snapshot)
    (snapshot / "model.safetensors").unlink()
    os.mkfifo(snapshot / "model.safetensors")  # opening one would wait for ever
    with pytest.raises(ModelError, match="not a regular file"):
        load_checkpoint(snapshot)


def test_missing_directory_says_what_is_expected(tmp_path):
    with pytest.raises(ModelError) as error:
        load_checkpoint(tmp_path / "none")
    assert str(error.value).startswith(f"Model directory not found: {tmp_path / 'none'}")
    assert "config.json" in str(error.value)
    assert "model.safetensors" in str(error.value)


def test_incomplete_directories_say_what_is_missing(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        load_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UnsupportedModelError, match=r"pytorch_model\.bin.*nothing is ever unpickled"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "cause"),
    [("", "not usable JSON"), ("[]", "object is expected"), ("{", "not usable JSON"), ("{}", "model_type"),
     ('{"model_type": 3}', "model_type"), ('{"model_type": "llama", "model_type": "gpt2"}', "twice"),
     ('{"model_type": "llama", "hidden_size": NaN}', "NaN")],
)  # fmt: skip
def test_bad_config_file_is_named(tmp_path, text, cause):
    write_checkpoint(tmp_path, LLAMA)
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError) as error:
        load_checkpoint(tmp_path)
    assert cause in str(error.value)
    assert "config.json" in str(error.value)


def test_quantised_checkpoints_and_custom_code_are_refused(tmp_path):
    for key, value in (("quantization_config", {"bits": 4}), ("auto_map", {"AutoModelForCausalLM": "code.Model"})):
        write_checkpoint(tmp_path, LLAMA | {key: value})
        (tmp_path / "code.py").write_text("raise SystemExit('imported')", encoding="utf-8")
        with pytest.raises(UnsupportedModelError, match=key):
            load_checkpoint(tmp_path)


def test_a_third_party_family_is_found_through_its_entry_point(tmp_path, monkeypatch):
    dist = tmp_path / "site" / "acme_models-1.0.dist-info"
    dist.mkdir(parents=True)
    (dist / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-models\nVersion: 1.0\n", encoding="utf-8")
    (dist / "entry_points.txt").write_text(
        "[nanovllm.models]\nacme = acme_family\nbroken = acme_broken\nllama = acme_family\n", encoding="utf-8"
    )
    (tmp_path / "site" / "acme_family.py").write_text(
        "from nanovllm_models.families.llama import *\n", encoding="utf-8"
    )
    (tmp_path / "site" / "acme_broken.py").write_text("import nothing_of_this_name\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "site")
    tensors = file_tensors(LLAMA | {"model_type": "acme"})
    assert (
        load_checkpoint(write_checkpoint(tmp_path / "m", LLAMA | {"model_type": "acme"}, tensors)).spec.num_layers == 2
    )
    with pytest.raises(PluginError, match=r"'broken'.*acme-models.*nothing_of_this_name"):
        load_checkpoint(write_checkpoint(tmp_path / "b", LLAMA | {"model_type": "broken"}, tensors))
    with pytest.raises(PluginError, match=r"'llama'.*acme-models, nanovllm-models"):
        load_checkpoint(write_checkpoint(tmp_path / "l", LLAMA, tensors))


def test_model_info_contradicting_config_is_refused(tmp_path):
    path = write_checkpoint(tmp_path, LLAMA)
    info = ModelInfo.read(path)
    info.write(path)
    assert load_checkpoint(path).info == info
    values = json.loads((path / "model_info.json").read_text(encoding="utf-8"))
    (path / "model_info.json").write_text(json.dumps(values | {"num_layers": 3}), encoding="utf-8")
    with pytest.raises(ModelError, match=r"model_info.json: num_layers is 3 but config.json says 2"):
        load_checkpoint(path)
