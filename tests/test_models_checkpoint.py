"""load_checkpoint: names, prefixes, ties, shards and links; everything wrong is named."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import save_file

from model_cases import MODELS
from models_support import GPT2, LLAMA, QWEN3, file_tensors, write_checkpoint
from nanovllm.errors import ModelError, PluginError, UnsupportedModelError
from nanovllm_models import load_checkpoint
from nanovllm_models.files import read_json
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


def test_reading_a_file_reserves_no_more_than_it_has(tmp_path):
    (tmp_path / "config.json").write_text('{"a": "' + "x" * 1000 + '"}')
    tracemalloc.start()
    try:
        assert len(read_json(tmp_path / "config.json")["a"]) == 1000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


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


def test_grouped_qkv_is_taken_apart_head_by_head(tmp_path):
    """Falcon 40B's order: for every kv head its query heads, its key, its value."""
    config = {
        "model_type": "falcon", "vocab_size": 11, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 6,
        "num_kv_heads": 2, "new_decoder_architecture": True, "bias": True,
    }  # fmt: skip
    tensors = file_tensors(config)
    weights = load_checkpoint(write_checkpoint(tmp_path, config, tensors)).weights
    for kind in ("weight", "bias"):
        fused = tensors[f"transformer.h.0.self_attention.query_key_value.{kind}"]
        heads = fused.reshape(2, 5, 4, *fused.shape[1:])  # (kv head, q q q k v, head_size, ...)
        for part, rows in (("q", heads[:, :3]), ("k", heads[:, 3]), ("v", heads[:, 4])):
            tensor = weights[f"layers.0.attn.{part}.{kind}"]
            wanted = rows.reshape(-1, *fused.shape[1:])
            assert tensor.shape == wanted.shape
            np.testing.assert_array_equal(tensor.to_float32(), wanted)
            out = np.zeros(wanted.shape[::-1], np.float32).T
            np.testing.assert_array_equal(tensor.to_float32(out), wanted)


def test_experts_of_one_tensor_are_taken_apart(tmp_path):
    config = LLAMA | {"model_type": "granitemoe", "num_local_experts": 3, "num_experts_per_tok": 2}
    tensors = file_tensors(config)
    weights = load_checkpoint(write_checkpoint(tmp_path / "a", config, tensors)).weights
    for e in range(3):
        name = "model.layers.1.block_sparse_moe"
        gate, up = np.split(tensors[f"{name}.input_linear.weight"][e], 2)
        for part, wanted in (("gate", gate), ("up", up), ("down", tensors[f"{name}.output_linear.weight"][e])):
            np.testing.assert_array_equal(weights[f"layers.1.mlp.experts.{e}.{part}.weight"].to_float32(), wanted)
    flat = tensors[f"{name}.input_linear.weight"].reshape(-1, 24)
    with pytest.raises(ModelError, match=r"input_linear.weight has shape \[240, 24\].*asks for \[3, 80, 24\]"):
        load_checkpoint(
            write_checkpoint(tmp_path / "b", config, tensors | {f"{name}.input_linear.weight": flat.copy()})
        )


def test_a_norm_may_have_either_of_its_names_but_not_both(tmp_path):
    """Falcon calls the norm before attention input_layernorm or ln_attn, by generation."""
    config = {
        "model_type": "falcon", "vocab_size": 11, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 6
    }  # fmt: skip
    tensors = file_tensors(config)
    other = {name.replace("input_layernorm", "ln_attn"): tensor for name, tensor in tensors.items()}
    first, second = (
        load_checkpoint(write_checkpoint(tmp_path / d, config, t)).weights for d, t in (("a", tensors), ("b", other))
    )
    name = "layers.0.attn_norm.weight"
    np.testing.assert_array_equal(first[name].array, second[name].array)
    with pytest.raises(ModelError, match=r"hold transformer.h.0.ln_attn.bias, transformer.h.0.ln_attn.weight"):
        load_checkpoint(write_checkpoint(tmp_path / "c", config, tensors | other))
    lacking = {n: t for n, t in tensors.items() if "input_layernorm" not in n}
    with pytest.raises(ModelError, match=r"lack transformer.h.0.input_layernorm.bias"):
        load_checkpoint(write_checkpoint(tmp_path / "d", config, lacking))


def test_a_tied_head_of_another_name_is_the_embedding_too(tmp_path):
    config = LLAMA | {"model_type": "gpt_neox", "tie_word_embeddings": True, "rotary_pct": 1.0}
    del config["num_key_value_heads"]
    tensors = file_tensors(config)
    tensors["embed_out.weight"] = tensors.pop("gpt_neox.embed_in.weight")
    weights = load_checkpoint(write_checkpoint(tmp_path, config, tensors)).weights
    np.testing.assert_array_equal(weights["embed.tokens.weight"].array, tensors["embed_out.weight"])


@pytest.mark.parametrize("name", MODELS)
def test_every_family_names_what_is_missing_extra_or_of_the_wrong_shape(tmp_path, name):
    model_type, _, config = MODELS[name]
    config = config | {"model_type": model_type}
    tensors = file_tensors(config)
    checkpoint = load_checkpoint(write_checkpoint(tmp_path / "ok", config, tensors))
    assert checkpoint.num_parameters == checkpoint.spec.num_parameters
    assert [t.shape for t in checkpoint.weights.values()] == list(checkpoint.spec.shapes().values())
    victim = sorted(tensors)[-1]
    cut = {n: (t[:-1] if n == victim else t) for n, t in tensors.items()}
    gone = {n: t for n, t in tensors.items() if n != victim}
    extra = tensors | {f"{victim}.more": np.zeros(1, np.float32)}
    for broken, says in ((cut, "has shape"), (gone, f"lack {victim}"), (extra, f"hold {victim}.more")):
        with pytest.raises(ModelError, match=re.escape(says)):
            load_checkpoint(write_checkpoint(tmp_path / says.split()[0], config, broken))


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
    assert f"nanovllm pull REPO --output {tmp_path / 'none'}" in str(error.value)
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
