"""`find_onnx_model`: which graph a directory or a file means, its facts, and all the way to an answer."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from genai_configs import PHI2, write
from models_support import LLAMA, write_checkpoint
from nanovllm.cli import cli
from nanovllm.errors import ModelError, PluginError
from nanovllm.plugins import model_directory, resolve_model
from nanovllm_runner_onnx import install
from nanovllm_runner_onnx.model_files import OnnxModel, find_onnx_model
from onnx_files import external, graph_model, save
from support import DATA, needs_data

pytest.importorskip("onnxruntime", reason="the runtime: pip install 'nanovllm[onnx]'")

OPTIMUM = DATA / "onnx" / "stories260k-optimum"


def found(path: Path) -> OnnxModel:
    model = find_onnx_model(path)
    assert model is not None
    return model


def put(directory: Path, *names: str) -> Path:
    for name in names:
        save(directory / Path(name).parent, graph_model(), name=Path(name).name)
    return directory


# ------------------------------------------------------------------------------------------ which graph


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.onnx"], "model.onnx"),
        (["model.onnx", "model_q4.onnx", "onnx/model.onnx"], "model.onnx"),
        (["onnx/model.onnx", "onnx/model_fp16.onnx"], "onnx/model.onnx"),
        (["decoder.onnx"], "decoder.onnx"),
        (["onnx/decoder_model_merged.onnx"], "onnx/decoder_model_merged.onnx"),
    ],
)
def test_the_graph_of_a_directory(names, chosen, tmp_path):
    model = found(put(tmp_path, *names))
    assert (model.path, model.directory, model.genai) == (tmp_path / chosen, tmp_path, None)


def test_several_graphs_are_listed_with_the_remedy(tmp_path):
    put(tmp_path, "onnx/decoder_model.onnx", "onnx/decoder_with_past_model.onnx")
    names = "onnx/decoder_model.onnx, onnx/decoder_with_past_model.onnx"
    with pytest.raises(ModelError, match=f"has 2 ONNX graphs and no model.onnx: {names}") as caught:
        find_onnx_model(tmp_path)
    hint = caught.value.hint
    chosen = Path(hint.removeprefix("choose one, for example model: "))
    assert found(chosen).path == chosen


def test_genai_config_names_the_graph_among_others(tmp_path):
    path = write(tmp_path, PHI2)
    path.rename(tmp_path / "other.onnx")
    put(tmp_path, "model.onnx")
    (tmp_path / "genai_config.json").write_text(json.dumps(PHI2).replace("model.onnx", "other.onnx"))
    assert found(tmp_path).path == tmp_path / "other.onnx"
    assert found(tmp_path / "other.onnx").genai is not None
    assert found(tmp_path / "model.onnx").genai is None  # it says nothing about this one


def test_a_checkpoint_wins_unless_the_graph_is_named(tmp_path):
    write_checkpoint(put(tmp_path, "model.onnx"), LLAMA)
    assert find_onnx_model(tmp_path) is None
    assert find_onnx_model(write_checkpoint(tmp_path / "alone", LLAMA)) is None
    (tmp_path / "config.json").unlink()
    assert found(tmp_path).path == tmp_path / "model.onnx"


def test_what_a_checkpoint_lacks_is_for_its_loader_to_say(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert find_onnx_model(tmp_path) is None


@pytest.mark.parametrize("name", ["gone", "gone.onnx"])
def test_a_path_that_is_not_there_says_what_is_expected(name, tmp_path):
    expected = (
        "tokenizer.json, with genai_config.json and the .onnx file that it names, or with model.onnx, or with config"
    )
    with pytest.raises(
        ModelError, match=re.escape(f"Model directory not found: {tmp_path / name}; expected {expected}")
    ):
        find_onnx_model(tmp_path / name)
    result = CliRunner().invoke(cli, ["ask", "--runner", "onnx", "--set", f"model={tmp_path / name}", "hi"])
    assert result.exit_code == 4
    assert f"Model directory not found: {tmp_path / name}" in result.stderr


@pytest.mark.parametrize(("device", "extra"), [("cpu", "onnx"), ("cuda", "onnx-cuda"), ("directml", "onnx-directml")])
def test_without_the_runtime_the_pip_line_of_the_device_is_said(device, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(install, "installed_distributions", list)
    with pytest.raises(PluginError, match=rf"onnxruntime not installed.*; try: pip install 'nanovllm\[{extra}\]'"):
        install.import_onnxruntime(device)


def test_an_empty_directory_says_what_is_expected(tmp_path):
    with pytest.raises(ModelError, match=r"there is no model in the directory .*expected .*genai_config\.json"):
        find_onnx_model(tmp_path)


def test_a_link_to_a_graph_elsewhere_is_refused_but_a_named_one_is_meant(tmp_path):
    put(tmp_path / "elsewhere", "g.onnx")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.onnx").symlink_to(tmp_path / "elsewhere" / "g.onnx")
    with pytest.raises(ModelError, match="leads outside"):
        find_onnx_model(tmp_path / "model")
    assert found(tmp_path / "model" / "model.onnx").directory == tmp_path / "model"


def test_nothing_in_the_directory_is_imported(tmp_path):
    put(tmp_path, "model.onnx")
    for name in ("modeling.py", "__init__.py", "onnx.py", "tokenization.py"):
        (tmp_path / name).write_text("raise SystemExit('imported')")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert found(tmp_path).path.name == "model.onnx"


# -------------------------------------------------------------------------------------------- the facts


def test_facts_come_from_the_first_file_that_has_them(tmp_path):
    put(tmp_path, "model.onnx")
    model = found(tmp_path)
    assert (model.vocab_size, model.eos_ids, model.bos_id, model.context_length) == (None, (), None, None)
    (tmp_path / "model_info.json").write_text(
        json.dumps(
            {"model_name": "Acme", "vocab_size": 61, "hidden_size": 8, "num_layers": 1, "num_heads": 1,
             "eos_token_id": 5, "bos_token_id": 4, "pad_token_id": -1}
        )
    )  # fmt: skip
    model = found(tmp_path)
    assert (model.name, model.vocab_size, model.eos_ids, model.bos_id) == ("Acme", 61, (5,), 4)
    (tmp_path / "config.json").write_text(
        '{"vocab_size": 61, "n_positions": 77, "eos_token_id": 3, "bos_token_id": null}'
    )
    model = found(tmp_path)
    assert (model.eos_ids, model.bos_id, model.context_length) == ((3,), 4, 77)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2], "temperature": 0.5}')
    model = found(tmp_path)
    assert (model.eos_ids, model.sampling_defaults["temperature"].origin) == ((1, 2), "generation_config.json")
    (tmp_path / "config.json").write_text('{"vocab_size": 62}')
    with pytest.raises(ModelError, match=r"model_info\.json: vocab_size is 61; it must be 62"):
        find_onnx_model(tmp_path)


@pytest.mark.parametrize("length", [0, -1, 2**31, "77", 7.5, True])
def test_a_context_that_is_no_length_is_named(length, tmp_path):
    put(tmp_path, "model.onnx")
    (tmp_path / "config.json").write_text(json.dumps({"n_ctx": None, "n_positions": length}))
    with pytest.raises(ModelError, match=r"config\.json: n_positions is .*; it must be a whole number from 1"):
        find_onnx_model(tmp_path)


def test_the_name_of_a_hub_snapshot_is_the_repository(tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    assert found(put(snapshot, "model.onnx")).name == "org/name"


# ------------------------------------------------------------------------------------- what `model:` names


def test_a_file_in_a_hub_cache_keeps_its_name_and_neighbours(tmp_path):
    """Its files are links into blobs/, whose names say nothing."""
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repository / "blobs" / "aa").write_bytes(graph_model([external()]).SerializeToString())
    (repository / "blobs" / "bb").write_bytes(bytes(16))
    (snapshot / "model.onnx").symlink_to("../../blobs/aa")
    (snapshot / "model.onnx.data").symlink_to("../../blobs/bb")
    _, path = resolve_model(str(snapshot / "model.onnx"))
    assert path == snapshot / "model.onnx"
    assert found(path).header.data_files == {"model.onnx.data": 16}


@pytest.mark.parametrize(
    ("names", "given", "directory"),
    [
        (["tokenizer.json", "onnx/model.onnx"], "onnx/model.onnx", "."),
        (["tokenizer.json", "onnx/model.onnx", "onnx/tokenizer.json"], "onnx/model.onnx", "onnx"),
        (["tokenizer.json", "model.onnx"], "model.onnx", "."),
        (["tokenizer.json", "other/model.onnx"], "other/model.onnx", "other"),
        (["onnx/model.onnx"], "onnx", "onnx"),
    ],
)
def test_where_the_files_beside_a_graph_are(names, given, directory, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert model_directory(tmp_path / given) == tmp_path / directory


# ---------------------------------------------------------------------------------------- to an answer


def ask(model: Path, *arguments: str) -> dict:
    command = ["ask", "--runner", "onnx", "--set", f"model={model}", "--json", *arguments]
    result = CliRunner().invoke(cli, [*command, "--set", "runner.threads=1"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@needs_data
@pytest.mark.parametrize("kind", ["directory", "file", "in onnx/", "file in onnx/"])
def test_an_exported_model_answers_with_its_own_tokenizer_and_end_token(kind, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(OPTIMUM, path)
    path.chmod(0o755)
    if kind.endswith("onnx/"):
        (path / "onnx").mkdir()
        (path / "model.onnx").rename(path / "onnx" / "model.onnx")
    if kind.startswith("file"):
        path = next(path.glob("**/model.onnx"))
    [case, *_] = json.loads((OPTIMUM / "reference.json").read_text())["cases"]
    document = ask(path, "--max-tokens", "20", case["prompt"])
    loaded, [answer] = document["loaded"], document["answers"]
    assert (loaded["eos_ids"], loaded["vocab_size"], loaded["max_model_len"]) == ([2], 512, 512)
    assert answer["token_ids"] == case["greedy_new_ids"][:20]


@needs_data
@pytest.mark.parametrize("how", ["yaml", "MODEL_PATH"])
def test_the_model_may_be_named_in_a_file_or_the_environment(how, tmp_path):
    shutil.copytree(OPTIMUM, tmp_path / "model")
    environment, arguments = {}, ["--runner", "onnx"]
    if how == "yaml":
        (tmp_path / "app.yaml").write_text("model: ./model/model.onnx\nrunner: {type: onnx, threads: 1}\n")
        arguments = ["--config", str(tmp_path / "app.yaml")]
    else:
        environment = {"MODEL_PATH": str(tmp_path / "model" / "model.onnx")}
    command = ["ask", *arguments, "--json", "--max-tokens", "1", "Once upon a time"]
    result = CliRunner(env=environment).invoke(cli, command)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["loaded"]["path"] == str(tmp_path / "model" / "model.onnx")


@needs_data
def test_a_genai_directory_answers_in_its_template_and_ends_where_it_says(tmp_path):
    case = json.loads((OPTIMUM / "reference.json").read_text())["cases"][0]
    shutil.copy(OPTIMUM / "tokenizer.json", tmp_path)
    shutil.copy(OPTIMUM / "model.onnx", tmp_path / "decoder.onnx")
    tokenizer = json.loads((OPTIMUM / "tokenizer_config.json").read_text())
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"chat_template": template}))
    end = case["greedy_new_ids"][6]
    sizes = {"head_size": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 5}
    config = {
        "type": "llama",
        "context_length": 300,
        "eos_token_id": [2, end],
        "decoder": {"filename": "decoder.onnx"} | sizes,
    }
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": config, "search": {"max_length": 300}}))
    document = ask(tmp_path, case["prompt"])
    loaded, [answer] = document["loaded"], document["answers"]
    assert (loaded["eos_ids"], loaded["vocab_size"], loaded["max_model_len"]) == ([2, end], 512, 300)
    assert (document["chat"], answer["finish"]) == (True, "stop")
    assert answer["token_ids"] == case["greedy_new_ids"][:7]
