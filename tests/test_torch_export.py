"""`nanovllm export pt2`, `torchscript` and `safetensors`: what they write computes what the checkpoint does.

The numpy runner is the oracle of programs, the safetensors library that of conversions.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from click.testing import CliRunner

from model_cases import MODELS, ONE_OF_EACH_KIND
from models_support import GPT2, LLAMA, file_tensors, write_checkpoint
from nanovllm import LLM, SamplingParams
from nanovllm.cli import cli
from nanovllm.errors import ConfigError, ModelError, UnsupportedModelError
from nanovllm_models import ModelInfo, load_checkpoint
from nanovllm_models.inspect_model import inspect_model
from numpy_support import Driver
from numpy_support import make_runner as make_numpy_runner

torch = pytest.importorskip("torch", reason="the runtime: pip install 'nanovllm[torch]'")

from nanovllm_runner_torch import exporter  # noqa: E402
from nanovllm_runner_torch.archive import find_archive, open_archive  # noqa: E402
from nanovllm_runner_torch.conversion import convert  # noqa: E402
from nanovllm_runner_torch.exporter import export_program  # noqa: E402

CPU = torch.device("cpu")
QUICK = ("gemma2", "falcon-rw-alibi", "qwen2_moe-window")  # of torch.export, which takes seconds


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["export", *map(str, arguments)])
    return result.exit_code, result.output


def contents(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


# ------------------------------------------------------------------------------ what programs compute


def logits_of(program, prompts: list[list[int]], cuts: list[int], num_layers: int, kv_shape: tuple[int, int]) -> list:
    """Of each prompt (its length, vocab), all in one batch, padded on the left, cut into steps at columns `cuts`."""
    longest = max(map(len, prompts))
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    past = [torch.zeros((len(prompts), kv_shape[0], 0, kv_shape[1])) for _ in range(2 * num_layers)]
    rows = []
    for start, stop in zip([0, *cuts], [*cuts, longest], strict=True):
        with torch.no_grad():
            logits, *past = program(ids[:, start:stop], mask[:, :stop], positions[:, start:stop], *past)
        rows.append(logits)
    whole = torch.cat(rows, 1).numpy()
    return [whole[i, longest - len(p) :] for i, p in enumerate(prompts)]


@pytest.mark.parametrize(
    ("kind", "name"),
    [("torchscript", name) for name in ONE_OF_EACH_KIND]
    + [
        pytest.param("pt2", name, marks=() if name in QUICK else pytest.mark.slow, id=f"pt2-{name}")
        for name in ONE_OF_EACH_KIND
    ],
)
def test_a_program_computes_what_the_checkpoint_does(kind, name, tmp_path):
    model_type, _, config = MODELS[name]
    checkpoint = write_checkpoint(tmp_path / "model", config | {"model_type": model_type})
    made = export_program(checkpoint, tmp_path / "exported", kind=kind)
    assert made.difference <= 1e-4
    assert made.largest > 0.1
    spec = load_checkpoint(checkpoint).spec
    opened = open_archive(find_archive(made.directory), [tmp_path], CPU)
    program = opened.module() if kind == "pt2" else opened
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, spec.vocab_size, n).tolist() for n in (21, 4, 13)]
    kv_shape = spec.attention.num_kv_heads, spec.attention.head_size
    for rows, cuts in ((prompts, [9, 20]), (prompts[:1], [1, 2]), (prompts[1:2], [])):
        for prompt, found in zip(rows, logits_of(program, rows, cuts, spec.num_layers, kv_shape), strict=True):
            wanted = Driver(make_numpy_runner(checkpoint)).logits(prompt)
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_bf16_programs_hold_half_the_bytes_and_are_verified(tmp_path):
    sizes = {}
    for dtype in ("fp32", "bf16"):
        made = export_program("demo", tmp_path / dtype, kind="torchscript", dtype=dtype)
        sizes[dtype] = find_archive(made.directory).path.stat().st_size
        assert made.difference <= exporter.TOLERANCES[dtype] * made.largest
    assert sizes["bf16"] < 0.55 * sizes["fp32"]
    made = export_program(write_checkpoint(tmp_path / "tiny", LLAMA), tmp_path / "pt2", dtype="bf16")
    assert 0 < made.difference <= exporter.TOLERANCES["bf16"] * made.largest


def test_a_router_that_hesitates_in_bf16_is_no_other_program(tmp_path):
    """Of this mixture one token of those compared goes to another expert when its products are rounded differently."""
    model_type, _, config = MODELS["qwen2_moe-window"]
    checkpoint = write_checkpoint(tmp_path / "model", config | {"model_type": model_type, "vocab_size": 130})
    made = export_program(checkpoint, tmp_path / "exported", kind="torchscript", dtype="bf16")
    assert made.difference > exporter.TOLERANCES["bf16"] * made.largest


def test_the_engine_answers_the_same_from_an_export(tmp_path):
    asked = ["What is the capital of France?", "The", "Once upon a time there was a"]
    params = SamplingParams(temperature=0, max_tokens=10)
    with LLM("demo", runner="numpy") as llm:
        wanted = [o.token_ids for o in llm.generate(asked, params)]
    for kind in ("pt2", "torchscript"):
        path = export_program("demo", tmp_path / kind, kind=kind, max_length=96).directory
        runner = {"type": "torch", "device": "cpu", "threads": 1, "allow_code_in": [str(path)]}
        with LLM(str(path), runner=runner) as llm:
            assert [o.token_ids for o in llm.generate(asked, params)] == wanted
            assert llm.info.max_model_len == 96
        assert inspect_model(path).is_usable


def test_a_script_that_insists_on_its_type_is_not_blamed_for_its_signature(tmp_path):
    path = export_program("demo", tmp_path / "script", kind="torchscript", max_length=64).directory
    runner = {"type": "torch", "device": "cpu", "dtype": "bf16", "allow_code_in": [str(path)]}
    with pytest.raises(ConfigError, match=r"is in float32, and does not run in bfloat16: .*; leave runner.dtype"):
        LLM(str(path), runner=runner)


def test_a_length_dependent_rotation_is_that_of_the_length(tmp_path):
    """LongRoPE has two lists of factors; which of them counts is decided by the length."""
    model_type, _, config = MODELS["phi3-longrope"]
    config = config | {"model_type": model_type, "max_position_embeddings": 128}
    checkpoint, tokens = write_checkpoint(tmp_path / "model", config), list(range(1, 12))
    spec = load_checkpoint(checkpoint).spec
    kv_shape = spec.attention.num_kv_heads, spec.attention.head_size
    found = {}
    for length in (64, 128):
        made = export_program(checkpoint, tmp_path / str(length), kind="torchscript", max_length=length)
        program = open_archive(find_archive(made.directory), [tmp_path], CPU)
        [found[length]] = logits_of(program, [tokens], [], spec.num_layers, kv_shape)
        wanted = Driver(make_numpy_runner(checkpoint, max_model_len=length)).logits(tokens)
        np.testing.assert_allclose(found[length], wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(found[64] - found[128]).max() > 1e-3


# --------------------------------------------------------------------------- what programs come with


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", LLAMA | {"eos_token_id": [3, 4]})


def test_everything_of_the_tokenizer_comes_along_and_nothing_else(checkpoint, tmp_path):
    source = shutil.copytree(checkpoint, tmp_path / "model")
    wanted = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE"}
    for name in wanted | {"modeling_tiny.py", "pytorch_model.bin", "model.pt"}:
        (source / name).write_text("{}")
    made = export_program(source, tmp_path / "exported", kind="torchscript", max_length=50)
    assert contents(made.directory) == wanted | {"config.json", "model_info.json", "model.pt"}
    assert ModelInfo.read(made.directory) == ModelInfo.read(source)
    assert find_archive(made.directory).max_len == 50
    assert (made.directory / "model.pt").read_bytes()[:2] == b"PK"


def test_a_program_that_computes_something_else_is_not_delivered(checkpoint, tmp_path, monkeypatch):
    class Wrong(exporter.ExportedDecoder):
        def forward(self, *args):
            logits, *present = super().forward(*args)
            return (logits + 0.01 * (args[2] > 6)[..., None], *present)  # only after a few tokens

    monkeypatch.setattr(exporter, "ExportedDecoder", Wrong)
    with pytest.raises(ModelError, match=r"gives other logits than the runner: they differ by up to 0\.01 where"):
        export_program(checkpoint, tmp_path / "exported", kind="torchscript")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_no_numbers_are_not_verified_as_equal(tmp_path):
    tensors = file_tensors(LLAMA)
    tensors["model.norm.weight"][:] = np.nan
    with pytest.raises(ModelError, match="differ by up to nan"):
        export_program(write_checkpoint(tmp_path / "model", LLAMA, tensors), tmp_path / "out", kind="torchscript")


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_shortest_lengths_are_verified_too(checkpoint, length, tmp_path):
    made = export_program(checkpoint, tmp_path / "out", kind="torchscript", max_length=length)
    assert made.difference <= 1e-4
    assert find_archive(made.directory).max_len == length


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["pt2", "--model", "no/such"], 4, "error: Model directory not found: no/such;"),
        (["pt2", "--model", "demo", "--max-length", "4096"], 2, "error: max_length is 4096, but "),
        (["pt2", "--model", "demo", "--dtype", "fp64"], 2, "'fp64' is not one of"),
        (["torchscript"], 2, "Missing option '-m' / '--model'"),
        (
            ["safetensors", "--model", "no/such", "--allow-code-in", "no"],
            4,
            "error: Model directory not found: no/such;",
        ),
        (["safetensors", "--model", "."], 4, "has no pickled weights (no *.bin or *.pt"),
    ],
)
def test_a_mistake_is_one_sentence_with_a_status(arguments, status, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, output = run(*arguments, "--output", tmp_path / "out")
    assert (code, says in output, "Traceback" in output) == (status, True, False), output
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_replaced(checkpoint, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for place, says in (("full", "is not empty"), ("file", "is not a directory")):
        with pytest.raises(ConfigError, match=says):
            export_program(checkpoint, tmp_path / place)
    assert [(tmp_path / p).read_text() for p in ("full/a", "file")] == ["mine", "mine"]


def test_the_command_says_how_to_ask_what_it_wrote(tmp_path):
    code, output = run("torchscript", "-m", "demo", "-o", tmp_path / "an export")
    assert code == 0, output
    assert re.search(r"Its logits differ from the runner's by at most [\d.e-]+; the largest is \d+", output)
    line = output.partition("Ask it: nanovllm ")[2].strip()
    arguments = [*shlex.split(line)[:-1], "What is the capital of Italy?"]
    answer = CliRunner().invoke(cli, arguments)
    assert answer.exit_code == 0, answer.output
    assert "Rome" in answer.output


# ------------------------------------------------------------------------------------- conversion


def pickled(directory: Path, tensors: dict, name: str = "pytorch_model.bin", **options) -> Path:
    directory.mkdir(exist_ok=True)
    torch.save(tensors, directory / name, **options)
    return directory


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before torch 1.6"])
def test_tensors_are_converted_to_the_bit(is_zip, tmp_path):
    shared = torch.randn(6, 4)
    tensors = {
        **{str(dtype): torch.randn(3, 5).to(dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16)},
        **{str(dtype): torch.randint(0, 2, (7,)).to(dtype) for dtype in (torch.int64, torch.uint8, torch.bool)},
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros((0, 3)),
        "embed": shared,
        "head": shared,
        "part": shared[2:4],
        "transposed": shared.T,
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
        "näme": torch.ones(1),
    }
    source = pickled(tmp_path / "model", tensors, _use_new_zipfile_serialization=is_zip)
    path = convert(source, tmp_path / "out", [source])
    found = safetensors.torch.load_file(path / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor.detach(), rtol=0, atol=0, equal_nan=True)
    with safetensors.safe_open(path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers asks for it


@pytest.mark.parametrize("config", [LLAMA, GPT2, LLAMA | {"tie_word_embeddings": True}], ids=["llama", "gpt2", "tied"])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_the_command_that_the_refusal_names_makes_a_model_that_runs(config, num_shards, tmp_path):
    original = write_checkpoint(tmp_path / "original", config)
    tensors = {name: torch.from_numpy(array) for name, array in file_tensors(config).items()}
    if config.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    source = tmp_path / "a model"
    source.mkdir()
    shutil.copy(original / "config.json", source)
    names = list(tensors)
    shards = [f"pytorch_model-{i}.bin" for i in range(num_shards)] if num_shards > 1 else ["pytorch_model.bin"]
    for i, shard in enumerate(shards):
        pickled(source, {name: tensors[name] for name in names[i::num_shards]}, shard)
    if num_shards > 1:
        weight_map = {name: shards[i % num_shards] for i, name in enumerate(names)}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))

    with pytest.raises(UnsupportedModelError, match=r"nothing is ever unpickled") as caught:
        load_checkpoint(source)
    command = re.search(r"nanovllm export (.*) \(needs", caught.value.hint)[1]
    code, output = run(*shlex.split(command))
    assert code == 0, output
    made = tmp_path / "a model-safetensors"
    assert ("model.safetensors.index.json" in contents(made)) == (num_shards > 1)
    tokens = list(range(1, 20))
    wanted = Driver(make_numpy_runner(original)).logits(tokens)
    np.testing.assert_array_equal(Driver(make_numpy_runner(made)).logits(tokens), wanted)


def test_nothing_is_read_without_the_allowance(tmp_path):
    source = pickled(tmp_path / "model", {"a": torch.ones(2)})
    (tmp_path / "elsewhere").mkdir()
    for allowed in ([], ["--allow-code-in", tmp_path / "elsewhere"], ["--allow-code-in", source / "other"]):
        code, output = run("safetensors", "--model", source, "--output", tmp_path / "out", *allowed)
        assert code == 2
        assert "pytorch_model.bin is a pickle" in output
        assert "got round before" in output
        assert f"add `--allow-code-in {source}`" in output
    assert contents(tmp_path) == {"model", "elsewhere"}


class Touching:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return (Path.touch, (self.place,))


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_with_a_program_does_not_run_even_where_it_is_allowed(is_zip, tmp_path):
    held = {"a": torch.ones(2), "b": Touching(tmp_path / "canary")}
    source = pickled(tmp_path / "model", held, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UnsupportedModelError, match=r"holds more than tensors: to read it would call getattr"):
        convert(source, tmp_path / "out", [tmp_path])
    assert contents(tmp_path) == {"model"}


@pytest.mark.parametrize(
    ("held", "says"),
    [
        ([torch.ones(2)], "holds a list, not tensors by name"),
        ({}, "holds no tensors"),
        ({"state_dict": {"a": torch.ones(2)}}, "holds 'state_dict', a dict, beside tensors by name"),
        ({"a": torch.ones(2), "step": 7}, "holds 'step', a int, beside tensors by name"),
        ({3: torch.ones(2)}, "holds 3, a Tensor"),
        ({"__metadata__": torch.ones(2)}, "holds '__metadata__'"),
        ({"a": torch.ones(2).to_sparse()}, "'a' is a tensor of torch.float32, torch.sparse_coo"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "'a' is a tensor of torch.complex64"),
        ({"a": torch.zeros(1).expand(10**6, 10**6)}, "'a' claims 4,000,000,000,000 bytes and holds 4; do not trust it"),
        ({"a": torch._neg_view(torch.ones(2))}, "'a' is a tensor of torch.float32"),
        ({"a": argparse.Namespace(x=1)}, "to read it would call argparse.Namespace"),
    ],
)
def test_what_is_no_table_of_tensors_is_refused_by_name(held, says, tmp_path):
    source = pickled(tmp_path / "model", held)
    with pytest.raises(ModelError, match=re.escape(says)):
        convert(source, tmp_path / "out", [source])
    assert contents(tmp_path) == {"model"}


def test_torchs_advice_to_read_without_care_is_not_repeated(tmp_path):
    (tmp_path / "model.bin").write_bytes(pickle.dumps({"a": 1}, protocol=4))
    with pytest.raises(ModelError, match=r"cannot read .*/model.bin: Unsupported operand 149") as caught:
        convert(tmp_path / "model.bin", tmp_path / "out", [tmp_path])
    assert "weights_only" not in str(caught.value)


def test_which_files_are_read(tmp_path):
    source = pickled(tmp_path / "model", {"a": torch.ones(2)}, "one.pth")
    for name in ("config.json", "model_info.json"):
        (source / name).write_text("{}")
    made = convert(source, tmp_path / "out", [source])
    assert contents(made) == {"config.json", "model_info.json", "model.safetensors"}
    pickled(source, {"b": torch.ones(2)}, "two.pt")
    with pytest.raises(ModelError, match=r"has 2 files of weights: one.pth, two.pt; give one of them"):
        convert(source, tmp_path / "other", [source])
    path = convert(source / "two.pt", tmp_path / "other", [source])
    assert set(safetensors.torch.load_file(path / "model.safetensors")) == {"b"}


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({"weight_map": {"a": "../elsewhere.bin"}}, "leads outside"),
        ({"weight_map": {"a": "absent.bin"}}, "lacks 'absent.bin', which its index names"),
        ({"weight_map": ["a"]}, "weight_map does not map tensors to files"),
        ({"weight_map": {"a": "x.bin", "b": "y.bin"}}, "holds 'a', as another file does"),
    ],
)
def test_an_index_that_does_not_hold_is_refused(index, says, tmp_path):
    pickled(tmp_path, {"a": torch.ones(2)}, "elsewhere.bin")
    for name in ("x.bin", "y.bin"):
        pickled(tmp_path / "model", {"a": torch.ones(2)}, name)
    (tmp_path / "model" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=re.escape(says)):
        convert(tmp_path / "model", tmp_path / "out", [tmp_path])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("length", [0, 3, 100, 500, -1])
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_that_was_cut_short_is_one_sentence(length, is_zip, tmp_path):
    source = pickled(tmp_path / "model", {"a": torch.ones(200)}, _use_new_zipfile_serialization=is_zip)
    file = source / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ModelError, match=re.escape(str(file))):
        convert(source, tmp_path / "out", [source])
    assert contents(tmp_path) == {"model"}


def test_a_program_is_not_weights(checkpoint, tmp_path):
    made = export_program(checkpoint, tmp_path / "made", kind="torchscript")
    with pytest.raises(UnsupportedModelError, match=r"is a TorchScript archive, not pickled weights"):
        convert(made.directory, tmp_path / "out", [tmp_path])
