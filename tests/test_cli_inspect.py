"""`inspect`: published facts of known models, what is wrong with a directory, and memory against a measurement."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

pytest.importorskip("nanovllm_models")

from models_support import LLAMA, write_checkpoint
from nanovllm.cli import cli

TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": [{"id": 60}]}
LLAMA_3_2_1B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 131072, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}  # fmt: skip
GPT2_XL = {
    "model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": 1600, "n_layer": 48, "n_head": 25,
}  # fmt: skip
FALCON_7B = {
    "model_type": "falcon", "vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32,
    "num_attention_heads": 71, "multi_query": True, "parallel_attn": True,
    "new_decoder_architecture": False, "bias": False, "alibi": False,
}  # fmt: skip
MIXTRAL_8X7B = {
    "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768,
    "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None, "rope_theta": 1e6,
}  # fmt: skip


def run(directory: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["inspect", str(directory), *arguments])


def document(directory: Path, *arguments: str) -> dict[str, Any]:
    return json.loads(run(directory, "--json", *arguments).stdout)


def told(directory: Path, level: str) -> list[str]:
    found = document(directory)["findings"]
    return [f"{f['text']}; {f['fix']}" if f["fix"] else f["text"] for f in found if f["level"] == level]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory that nothing is wrong with."""
    write_checkpoint(tmp_path, LLAMA | {"eos_token_id": 2})
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5], "temperature": 0.6, "do_sample": true}')
    info = {"vocab_size": 61, "hidden_size": 24, "num_layers": 2, "num_heads": 4, "model_name": "tiny"}
    (tmp_path / "model_info.json").write_text(json.dumps(info))
    return tmp_path


# ----------------------------------------------------------------------------------- what it says


@pytest.mark.parametrize(
    ("config", "parameters", "fp16_per_token", "facts"),
    [
        (LLAMA_3_2_1B, 1_235_814_400, 32_768,
         ("rotary (theta 500000, Llama3 scaling)", "GQA", 32, 8, "sequential, RMSNorm before")),
        (GPT2_XL, 1_557_611_200, 307_200, ("learned", "MHA", 25, 25, "sequential, LayerNorm before")),
        (FALCON_7B, 6_921_720_704, 8_192, ("rotary (theta 10000)", "MQA", 71, 1, "parallel, one LayerNorm")),
        (MIXTRAL_8X7B, 46_702_792_704, 131_072,
         ("rotary (theta 1e+06)", "GQA", 32, 8, "sequential, RMSNorm before")),
    ],
    ids=["Llama 3.2 1B", "GPT-2 XL", "Falcon 7B", "Mixtral 8x7B"],
)  # fmt: skip
def test_published_facts(
    tmp_path: Path, config: dict[str, Any], parameters: int, fp16_per_token: int, facts: tuple[Any, ...]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = document(tmp_path)
    about, memory = found["architecture"], found["memory"]
    names = ("positions", "attention", "num_heads", "num_kv_heads", "block")
    assert tuple(about[name] for name in names) == facts
    assert about["architecture"] == config["model_type"]
    assert about["num_parameters"] == parameters
    assert memory["weights"] == {
        "fp32": 4 * parameters, "fp16": 2 * parameters, "bf16": 2 * parameters, "int8": parameters,
        "int4": parameters // 2,
    }  # fmt: skip
    assert memory["kv_per_token"] == {"fp32": 2 * fp16_per_token, "fp16": fp16_per_token}


def test_of_experts_those_of_one_token_count_as_active(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL_8X7B))
    assert document(tmp_path)["architecture"]["num_active_parameters"] == 12_879_925_248
    assert "8 experts, 2 per token, gated silu, 14336 wide" in run(tmp_path).stdout
    assert "46,702,792,704, 12,879,925,248 per token" in run(tmp_path).stdout


def test_windows_and_layers_that_differ(tmp_path: Path) -> None:
    config = LLAMA | {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1,
    }  # fmt: skip
    write_checkpoint(tmp_path, config)
    assert document(tmp_path)["architecture"]["attention"] == "GQA, window 7 in 1 of 2 layers"


def test_a_good_directory(model: Path) -> None:
    result = run(model)
    assert result.exit_code == 0
    for line in (
        "  Architecture       llama",
        "  Heads              4 query, 2 key/value, of 6",
        "  Size               2 layers of 24, 61 tokens, 128 positions",
        "  Tokenizer      61 entries",
        "  Chat template  from tokenizer_config.json",
        "  eos_token_id   2, 5  (from generation_config.json)",
        "  temperature    0.6  (from generation_config.json)",
        "Nothing is wrong with it.",
    ):
        assert line in result.stdout.splitlines()
    found = document(model)
    assert found["is_usable"] is True
    assert found["findings"] == []
    assert found["stored"] == {
        "dtype": "float32", "num_tensors": 21, "num_bytes": 4 * found["architecture"]["num_parameters"],
    }  # fmt: skip
    assert {file["name"]: file["size"] for file in found["files"]} == {
        p.name: p.stat().st_size for p in model.iterdir()
    }
    assert all(file["use"] for file in found["files"])


def test_the_embedded_model_by_name() -> None:
    result = CliRunner().invoke(cli, ["inspect", "demo"])
    assert result.exit_code == 0
    assert "  Architecture       gpt2\n" in result.stdout


def test_memory_for_a_context_and_a_batch(model: Path) -> None:
    memory = document(model)["memory"]
    assert (memory["context"], memory["batch"]) == (128, 1)
    memory = document(model, "--context", "100", "--batch", "7")["memory"]
    assert memory["kv_per_token"]["fp32"] == 2 * 2 * 2 * 6 * 4  # K and V, layers, heads, their size, bytes
    assert memory["total"] == memory["weights"]["fp32"] + 100 * 7 * memory["kv_per_token"]["fp32"]
    result = run(model, "--context", "129")
    assert result.exit_code == 2
    assert "--context 129 is more than the model's 128 positions" in result.stderr


def test_no_weights_are_read(tmp_path: Path) -> None:
    """6 GB of weights in a file that has no blocks on the disk: reading it would take as much memory as time."""
    from nanovllm_models.config import Config
    from nanovllm_models.layout import stored_weights
    from nanovllm_models.registry import find_family

    family = find_family("gpt2")
    spec = family.spec(Config(GPT2_XL, "config.json"))
    header, at = {}, 0
    for stored in stored_weights(family, spec, bare=True):
        if stored.file_name != "lm_head.weight":
            size = 4
            for n in stored.shape:
                size *= n
            header[stored.file_name] = {"dtype": "F32", "shape": stored.shape, "data_offsets": [at, at + size]}
            at += size
    raw = json.dumps(header).encode()
    (tmp_path / "config.json").write_text(json.dumps(GPT2_XL))
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)
    if (tmp_path / "model.safetensors").stat().st_blocks * 512 > 10**8:
        pytest.skip("this file system has no sparse files")
    found = document(tmp_path)
    assert found["stored"]["num_bytes"] == 4 * 1_557_611_200


# ----------------------------------------------------------------------------------- what is wrong


def test_what_is_missing_has_its_consequence_and_its_remedy(model: Path) -> None:
    for name in ("tokenizer_config.json", "generation_config.json", "model_info.json"):
        (model / name).unlink()
    found = document(model)
    assert found["missing"] == ["tokenizer_config.json", "generation_config.json", "model_info.json"]
    assert found["is_usable"] is True
    assert "there is no generation_config.json: end tokens are what other files say" in told(model, "note")
    assert found["generation"] == {"eos_token_id": {"value": [2], "origin": "config.json"}}
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (model / name).unlink()
        assert any(line.startswith(f"there is no {name} (nor ") for line in told(model, "error"))
    assert run(model).exit_code == 4


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", "{", "config.json is not usable JSON"),
        ("config.json", "{}", "model_type does not name an architecture; restore the file"),
        ("config.json", '{"model_type": "nothing"}', "the architecture 'nothing' is not implemented"),
        ("config.json", json.dumps(LLAMA | {"num_attention_heads": 5}), "hidden_size 24 is not divisible by 5"),
        ("config.json", json.dumps(LLAMA | {"num_hidden_layers": 3}), "lack model.layers.2."),
        ("config.json", json.dumps(LLAMA | {"mystery": 1}), "mystery = 1 is not implemented"),
        ("model.safetensors", "12345678", "is not a valid safetensors file"),
        ("tokenizer.json", "[]", "tokenizer.json holds a JSON list"),
        ("tokenizer.json", '{"model": {}}', "tokenizer.json: model.vocab is no vocabulary; restore the file"),
        ("tokenizer.json", '{"model": {"vocab": {"a": "x"}}}', "an id is not a whole number from 0"),
        ("tokenizer.json", '{"model": {"vocab": {"a": 61}}}',
         "the tokenizer has 62 entries but the model only 61: they do not belong together; copy the tokenizer files"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id is 'x', not a token id"),
        ("generation_config.json", '{"temperature": "hot"}', "temperature is 'hot'"),
        ("model_info.json", "{}", "model_info.json: model_name is missing"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_a_finding(model: Path, name: str, content: str, says: str) -> None:
    if name == "config.json":
        (model / "model_info.json").unlink()  # it would contradict this one, too
    (model / name).write_text(content)
    result = run(model)
    assert result.exit_code == 4
    assert result.stderr == ""
    errors = told(model, "error")
    assert any(says in line for line in errors), errors
    assert document(model)["is_usable"] is False


def test_damaged_weights_are_found_though_the_architecture_is_not_known(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "nothing"}')
    (model / "model.safetensors").write_bytes(b"cut short")
    assert len(told(model, "error")) == 2


def test_what_does_not_belong_there_is_named(model: Path) -> None:
    for name in ("pytorch_model.bin", "modeling.py", "notes.txt", "model.safetensors.0123456789ab.part"):
        (model / name).write_text("x")
    assert document(model)["is_usable"] is True
    assert told(model, "note") == [
        "model.safetensors.0123456789ab.part is an unfinished download; run the `nanovllm pull` that began it again",
        "modeling.py is a program, and nothing in a model directory is ever run",
        "notes.txt is not read",
        "pytorch_model.bin may hold pickled data, which is never read; delete it to save space",
    ]


def test_a_padded_vocabulary_is_fine(model: Path) -> None:
    (model / "tokenizer.json").write_text('{"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}}')
    assert told(model, "note") == ["the model's vocabulary is padded: 61 for 2 entries of the tokenizer"]


@pytest.mark.parametrize("name", ["absent", "file"])
def test_something_that_is_no_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    result = run(tmp_path / name)
    assert (result.exit_code, result.stdout) == (4, "")
    assert result.stderr.endswith("; give a model's directory, or a graph's .onnx file\n")


# ------------------------------------------------------------------------------------------ memory

MEASURE = """
import json, resource, sys
from pathlib import Path
from nanovllm import LLM, SamplingParams

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

def load(model):
    return LLM(model, runner="numpy", tokenizer="simple", max_num_seqs=8, max_num_batched_tokens=32)

with load("demo") as small:  # what is imported, and the buffers of BLAS, are not the model's
    small.generate([[1] * 40] * 8, SamplingParams(max_tokens=8, temperature=0))
before = resident()
llm = load(sys.argv[1])
loaded = resident()
prompts = [[1 + i] * 500 for i in range(8)]
llm.generate(prompts, SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))
print(json.dumps([loaded - before, resident() - before]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc to measure resident memory")
def test_memory_is_within_a_tenth_of_what_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("nanovllm_runner_numpy")
    config = {
        "model_type": "llama", "vocab_size": 8000, "hidden_size": 448, "intermediate_size": 1024,
        "num_hidden_layers": 4, "num_attention_heads": 7, "num_key_value_heads": 7, "max_position_embeddings": 512,
    }  # fmt: skip
    write_checkpoint(tmp_path, config)
    memory = document(tmp_path, "--context", "512", "--batch", "8")["memory"]
    assert memory["weights"]["fp32"] > 50e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    )  # fmt: skip
    loaded, full = json.loads(done.stdout)
    assert loaded == pytest.approx(memory["weights"]["fp32"], rel=0.1)
    assert full == pytest.approx(memory["total"], rel=0.1)
