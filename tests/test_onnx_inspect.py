"""`nanovllm inspect` of ONNX models: what is said of a graph and of each file beside it, and who is asked."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner

from genai_configs import PHI2, QWEN25, write
from models_support import LLAMA, write_checkpoint
from nanovllm.cli import cli
from nanovllm.errors import PluginError
from nanovllm_models import inspect_graph
from onnx_files import DATA as WEIGHTS
from onnx_files import external, graph_model, save, tensor
from support import DATA, needs_data

pytest.importorskip("onnxruntime", reason="the runtime: pip install 'nanovllm[onnx]'")

OPTIMUM, GPT2 = DATA / "onnx" / "stories260k-optimum", DATA / "onnx" / "tiny-random-gpt2-fp32"


def inspect(path: Path, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["inspect", str(path), *arguments])
    return result.exit_code, result.stdout


def document(path: Path) -> dict[str, Any]:
    status, text = inspect(path, "--json")
    found = json.loads(text)
    assert status == (0 if found["is_usable"] else 4)
    return found


def told(path: Path, level: str) -> list[str]:
    return [f["text"] for f in document(path)["findings"] if f["level"] == level]


# ---------------------------------------------------------------------------------------- what it says


@needs_data
def test_a_graph_is_described_and_tried():
    found = document(OPTIMUM)
    graph = found["graph"]
    assert found["is_usable"] is True
    assert (graph["path"], graph["opsets"], graph["context_length"]) == (
        str(OPTIMUM.resolve() / "model.onnx"),
        {"ai.onnx": 17},
        512,
    )
    assert graph["inputs"][3] == {
        "name": "past_key_values.0.key",
        "dtype": "float32",
        "shape": ["batch_size", 4, "past_sequence_length", 8],
    }
    assert graph["runs"]["chunked_prefill"] is True
    assert found["tokenizer_vocab_size"] == 512
    assert found["generation"]["eos_token_id"] == {"value": [2], "origin": "config.json"}
    assert found["architecture"] is None


@needs_data
def test_for_people_a_layer_is_said_once():
    status, text = inspect(OPTIMUM / "model.onnx")
    assert status == 0
    assert "past_key_values.N.key    float32 (batch_size, 4, past_sequence_length, 8), 5 of them" in text
    assert "Operators" in text
    assert "ai.onnx 17" in text
    assert "Chunked prefill  yes" in text
    assert text.count("past_key_values") == 2


@needs_data
def test_a_genai_directory_says_what_it_leaves_to_the_configuration():
    found = document(GPT2)
    genai = found["graph"]["genai"]
    assert (genai["model_type"], genai["unknown"]) == ("gpt2", [])
    assert "model.decoder.run_options.memory.enable_memory_arena_shrinkage" in genai["ignored"]
    assert found["generation"]["eos_token_id"] == {"value": [98], "origin": "genai_config.json"}
    # Its tokenizer is another model's: 50,295 entries for a vocabulary of 1,000.
    assert told(GPT2, "error") == [
        "the tokenizer has 50295 entries but the model only 1000: they do not belong together"
    ]


def test_unknown_keys_and_other_graphs_are_notes(tmp_path):
    write(tmp_path, QWEN25)
    save(tmp_path, graph_model(), b"1234", name="other.onnx")
    notes = told(tmp_path, "note")
    assert "genai_config.json: model.prompt_templates.user is not known here and not used" in notes
    assert "other.onnx is another graph" in notes
    assert f"{WEIGHTS} holds no data of model_q4.onnx" in notes


def test_names_of_strangers_do_not_steer_the_terminal(tmp_path):
    model = graph_model(opsets={"": 21})
    model.producer_name = "\x1b[2Jnice"
    save(tmp_path, model)
    (tmp_path / "\x1b]0;title\x07.txt").write_text("")
    _, text = inspect(tmp_path)
    assert "\\x1b[2Jnice" in text
    assert "\\x1b]0;title\\x07.txt is not read" in text
    assert all(c.isprintable() or c == "\n" for c in text)


# ---------------------------------------------------------------------------------- a validator per file


@pytest.fixture
def model(tmp_path) -> Path:
    """The files of S2-14, all in order; the graph only passes through."""
    write(tmp_path, PHI2)
    proto = onnx.load(tmp_path / "model.onnx")
    proto.graph.initializer.append(external())
    save(tmp_path, proto, bytes(16))
    vocab = {f"t{i}": i for i in range(51200)}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocab, "merges": []}}))
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "t1"}, "bos_token": "t0"}')
    return tmp_path


def damage(path: Path) -> list[str]:
    """Errors of the files; that the graph computes nothing is not what is tested."""
    return [what for what in told(path, "error") if "Node" not in what and "refuses" not in what]


def test_files_in_order_have_no_finding_of_their_own(model):
    found = document(model)
    assert found["missing"] == []
    assert damage(model) == []
    assert {f["name"]: f["use"] for f in found["files"]} == {
        "genai_config.json": "facts of an ONNX graph",
        "model.onnx": "ONNX graph",
        "model.onnx.data": "data of an ONNX graph",
        "special_tokens_map.json": "special tokens",
        "tokenizer.json": "tokenizer",
        "tokenizer_config.json": "special tokens, chat template",
    }


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("genai_config.json", b"{", "genai_config.json is not usable JSON"),
        ("genai_config.json", b'{"model": {"type": "phi"}}', "decoder is missing"),
        ("model.onnx", b"", "model.onnx is not an ONNX model"),
        ("model.onnx.data", b"123", "ends at byte 16 of 'model.onnx.data', which has 3"),
        ("tokenizer.json", b"[]", "tokenizer.json holds a JSON list"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": "b"}}}', "an id is not a whole number"),
        ("tokenizer_config.json", b"\xff", "tokenizer_config.json is not usable JSON"),
        ("model_info.json", b'{"model_name": 3}', "model_info.json: model_name is 3; it must be a text"),
        ("special_tokens_map.json", b"1", "special_tokens_map.json holds a JSON int"),
        ("special_tokens_map.json", b'{"eos_token": ["a", 5]}', "special_tokens_map.json: eos_token is 5"),
        ("special_tokens_map.json", b'{"eos_token": {"id": 5}}', "eos_token is {'id': 5}"),
    ],
)
def test_each_damaged_file_is_named(model, name, content, reason):
    (model / name).write_bytes(content)
    [error] = damage(model)
    assert reason in error


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("model.onnx", "error", "model.decoder.filename is 'model.onnx', which is not there (have: none)"),
        ("model.onnx.data", "error", "lies in 'model.onnx.data', which is not there"),
        ("tokenizer.json", "error", "there is no tokenizer.json (nor"),
        ("tokenizer_config.json", "note", "there is no tokenizer_config.json"),
        ("genai_config.json", "note", "there is no generation_config.json"),
    ],
)
def test_each_missing_file_is_named(model, name, kind, reason):
    (model / name).unlink()
    assert any(reason in what for what in told(model, kind)), told(model, kind)


def test_an_architecture_that_nobody_knows_is_no_error_of_a_graph(model):
    (model / "config.json").write_text('{"model_type": "unheard-of", "vocab_size": 51200}')
    assert damage(model) == []


# -------------------------------------------------------------------------------------------- who is asked


def test_a_checkpoint_is_described_as_one_although_a_graph_lies_beside_it(tmp_path):
    write_checkpoint(tmp_path, LLAMA)
    save(tmp_path / "onnx", graph_model([tensor()]))
    found = document(tmp_path)
    assert found["graph"] is None
    assert found["architecture"]["architecture"] == "llama"


def test_without_the_runner_the_pip_line_is_said(tmp_path, monkeypatch):
    save(tmp_path, graph_model([tensor()]))
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: [])
    with pytest.raises(
        Exception, match=r"no inspector named 'onnx' is installed \(have: none\); try: pip install 'nano"
    ):
        inspect_graph.inspect_graph(tmp_path)


def test_without_the_package_onnx_the_pip_line_is_said(tmp_path, monkeypatch):
    save(tmp_path, graph_model([tensor()]))
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(PluginError, match=r"needs the package onnx.*pip install 'nanovllm\[onnx\]'"):
        inspect_graph.inspect_graph(tmp_path)


def test_a_graph_that_this_machine_cannot_run_is_described_all_the_same(tmp_path):
    save(tmp_path, graph_model(dtype=onnx.TensorProto.FLOAT16))
    found = document(tmp_path)
    assert (found["graph"]["inputs"][0]["dtype"], found["graph"]["runs"]) == ("float16", {})
    assert any("16-bit floats" in what for what in told(tmp_path, "note"))


@needs_data
def test_nothing_that_was_found_depends_on_the_current_directory(tmp_path, monkeypatch):
    shutil.copytree(OPTIMUM, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert document(Path("model"))["graph"]["inputs"] == document(OPTIMUM)["graph"]["inputs"]
