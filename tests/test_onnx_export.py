"""`nanovllm export onnx`: what it writes computes what the checkpoint does, and every way in which it can fail."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from model_cases import MODELS
from models_support import GPT2, LLAMA, file_tensors, write_checkpoint
from nanovllm import LLM, SamplingParams
from nanovllm.batch import Batch, ScheduledSeq
from nanovllm.cli import cli
from nanovllm.errors import ConfigError, ModelError, PluginError, UnsupportedModelError
from nanovllm_models import ModelInfo
from nanovllm_runner_onnx import export
from nanovllm_runner_onnx.exported import PROPERTY
from nanovllm_runner_onnx.graph import ALIGNMENT
from nanovllm_runner_onnx.options import OnnxOptions
from nanovllm_runner_onnx.step import step_inputs
from numpy_support import GREEDY, Driver
from onnx_support import make_runner
from pseudo_terminal import Terminal, needs_terminal

ort = pytest.importorskip("onnxruntime", reason="the runtime: pip install 'nanovllm[onnx]'")

BLOCK = 4  # of the runners that tests make
PRECISIONS = [
    {"weights": "fp32"},
    {"weights": "int8"},
    {"weights": "int4"},
    {"weights": "int4", "int4_block": 128},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", LLAMA | {"eos_token_id": [3, 4]})


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory) -> Path:
    return export(checkpoint, tmp_path_factory.mktemp("exported") / "tiny", block_size=BLOCK)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def facts_in(exported: Path) -> dict[str, object]:
    model = onnx.load(exported / "model.onnx", load_external_data=False)
    return json.loads({p.key: p.value for p in model.metadata_props}[PROPERTY])


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["export", "onnx", *map(str, arguments)])
    return result.exit_code, result.output


# --------------------------------------------------------------------------------------- what it computes


def logits_of(path: Path, **options) -> np.ndarray:
    """A prompt in two chunks, decodes in a batch: everything that a graph has."""
    driver = Driver(make_runner(path, options=OnnxOptions(**options)))
    long, short = list(range(1, 30)), [7, 8, 9]
    return np.concatenate(
        [
            driver.step((0, long, 0, 20, 2), (1, short, 0, 3, 1)),
            driver.step((0, long, 20, 29, 9)),
            driver.step((0, [*long, 5], 29, 30, 1), (1, [*short, 6], 3, 4, 1)),
        ]
    )


ONE_OF_EACH_KIND = [
    "falcon-rw-alibi", "falcon-7b", "gemma2", "gemma3_text", "gpt2", "gpt_neox-sequential-half-rotary", "granitemoe",
    "olmo2", "qwen2-window", "qwen2_moe", "qwen3", "smollm3",
]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in MODELS if name in ONE_OF_EACH_KIND])
def test_an_export_computes_what_the_checkpoint_does_to_the_bit(name, tmp_path):
    model_type, _, config = MODELS[name]
    checkpoint = write_checkpoint(tmp_path / "model", config | {"model_type": model_type})
    path = export(checkpoint, tmp_path / "exported", block_size=BLOCK)
    np.testing.assert_array_equal(logits_of(path), logits_of(checkpoint))


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("config", [LLAMA | {"hidden_size": 64, "intermediate_size": 128}, GPT2 | {"n_embd": 64}])
def test_every_precision_computes_what_the_runner_does_at_that_precision(precision, config, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "model", config)
    path = export(checkpoint, tmp_path / "exported", block_size=BLOCK, **precision)
    np.testing.assert_array_equal(logits_of(path), logits_of(checkpoint, **precision))
    assert make_runner(path).info.description["weights"] == precision["weights"]


@pytest.mark.parametrize("precision", PRECISIONS[:3], ids=str)
def test_any_onnxruntime_opens_it(precision, checkpoint, tmp_path):
    """By its path alone, without anything of ours around it."""
    exported = export(checkpoint, tmp_path / "exported", block_size=BLOCK, **precision)
    session = ort.InferenceSession(exported / "model.onnx", providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    table = np.array([[2, 0, 1]], np.int32)
    tokens = rng.integers(0, 61, 9).astype(np.int32)
    batch = Batch((ScheduledSeq(0, 0, tokens, 9, 0, 9, 2, table[0], GREEDY, None),), table, BLOCK)
    inputs = step_inputs(batch.packed, [None], BLOCK, 3)
    pools = {i.name: np.zeros((4 * 2 * BLOCK, 6), np.float32) for i in session.get_inputs() if i.name not in inputs}
    [logits] = session.run(["logits"], inputs | pools)
    wanted = Driver(make_runner(exported), [2, 0, 1]).step((0, tokens, 0, 9, 2))
    np.testing.assert_array_equal(logits, wanted)


def test_the_engine_answers_the_same_from_an_export(tmp_path):
    path = export("demo", tmp_path / "exported")
    asked, params = ["Once upon", "The"], SamplingParams(max_tokens=12, seed=1)
    answers = []
    for model in ("demo", path, path / "model.onnx"):
        with LLM(str(model), runner={"type": "onnx", "threads": 1}) as llm:
            answers.append([o.token_ids for o in llm.generate(asked, params)])
    assert answers[0] == answers[1] == answers[2]


def test_the_demo_gives_the_same_answers_on_either_runner():
    outputs = [CliRunner().invoke(cli, ["demo", "capitals", "--runner", runner]).output for runner in ("numpy", "onnx")]
    assert outputs[0] == outputs[1]
    assert outputs[0].count("Q: ") == 8


# --------------------------------------------------------------------------------------- what it writes


def test_the_files(exported, checkpoint):
    assert set(contents(exported)) == {"model.onnx", "model.onnx.data", "model_info.json", "config.json"}
    assert ModelInfo.read(exported) == ModelInfo.read(checkpoint)
    model, facts = onnx.load(exported / "model.onnx", load_external_data=False), facts_in(exported)
    assert (facts["num_layers"], facts["num_kv_heads"], facts["head_size"]) == (2, 2, 6)
    assert (facts["weights"], facts["block_size"], facts["max_len"], facts["device"]) == ("fp32", BLOCK, 128, "cpu")
    places = [{e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data]
    assert {place["location"] for place in places} == {"model.onnx.data"}
    assert all(int(place["offset"]) % ALIGNMENT == 0 for place in places)
    assert (exported / "model.onnx").stat().st_size < 100_000


def test_everything_of_the_tokenizer_comes_along_and_nothing_else(checkpoint, tmp_path):
    source = shutil.copytree(checkpoint, tmp_path / "model")
    wanted = {
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "tokenizer.model",
        "vocab.json", "merges.txt", "generation_config.json", "LICENSE",
    }  # fmt: skip
    for name in wanted | {"modeling_tiny.py", "pytorch_model.bin"}:
        (source / name).write_text("{}")
    path = export(source, tmp_path / "exported")
    assert set(contents(path)) == wanted | {"config.json", "model_info.json", "model.onnx", "model.onnx.data"}


def test_equal_checkpoints_give_equal_files_wherever_they_are(checkpoint, tmp_path):
    for place in ("a", "b"):
        shutil.copytree(checkpoint, tmp_path / place / "tiny")
        export(tmp_path / place / "tiny", tmp_path / place / "out" / f"exported-{place}")
    first, second = (contents(tmp_path / place / "out" / f"exported-{place}") for place in "ab")
    assert first == second
    assert not any(str(tmp_path).encode() in content for content in first.values())


def test_a_weight_is_converted_and_written_alone(tmp_path):
    """The largest of many equal tensors bounds the memory, whatever the model's size."""
    config = LLAMA | {"vocab_size": 256, "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 8}
    tensors = {name: array.astype(np.float16) for name, array in file_tensors(config).items()}
    write_checkpoint(tmp_path / "model", config, tensors)
    del tensors
    peaks = []

    def tell(name: str) -> None:
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.reset_peak()

    tracemalloc.start()
    try:
        export(tmp_path / "model", tmp_path / "exported", tell=tell)
        peaks.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    one = 4 * 512 * 512
    assert (tmp_path / "exported" / "model.onnx.data").stat().st_size > 30 * one
    assert len(peaks) > 60
    assert max(peaks[1:]) < 2 * one


def test_max_length(checkpoint, tmp_path):
    path = export(checkpoint, tmp_path / "short", max_length=50, block_size=BLOCK)
    assert make_runner(path).info.max_model_len == 50
    assert make_runner(path, max_model_len=20).info.max_model_len == 20
    with pytest.raises(ConfigError, match=r"max_model_len is 51.*for 50 positions.*50 or less.*--max-length 51"):
        make_runner(path, max_model_len=51)


SIZES = {"fp32": (32, 0), "int8": (8, 0), "int4": (4, 32 / 32), "int4/128": (4, 32 / 128)}  # bits, and of scales


@pytest.mark.parametrize("name", SIZES)
def test_the_size_of_a_precision(name, tmp_path):
    """S2-21: what the bits of the numbers come to, within 15 %, and the scales of their blocks."""
    weights, _, block = name.partition("/")
    config = LLAMA | {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    checkpoint = write_checkpoint(tmp_path / "model", config)
    path = export(checkpoint, tmp_path / "exported", weights=weights, int4_block=int(block) if block else None)
    facts = make_runner(path, block_size=16).info.description
    assert facts["weight_bytes"] == pytest.approx(facts["parameters"] * sum(SIZES[name]) / 8, rel=0.15)


# --------------------------------------------------------------------------------- running it as it is not


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"weights": "int8"},
            r"weights is int8, but .*model.onnx was exported with fp32; set .* to fp32, or .*ts int8",
        ),
        ({"weights": "int4", "int4_block": 128}, "runner.weights is int4"),
    ],
)
def test_a_wish_that_contradicts_the_export(options, says, exported):
    with pytest.raises(ConfigError, match=says):
        make_runner(exported, options=OnnxOptions(**options))


def test_another_block_size_than_the_exports(exported):
    with pytest.raises(ConfigError, match=r"cache.block_size is 16, but .* exported with 4; set cache.block_size to 4"):
        make_runner(exported, block_size=16)


def test_wishes_that_agree_with_the_export(exported):
    info = make_runner(exported, options=OnnxOptions(weights="fp32"), max_model_len=64, num_blocks=9).info
    assert (info.max_model_len, info.kv.num_blocks, info.eos_ids) == (64, 9, (3, 4))
    facts = info.description
    assert (facts["model"], facts["architecture"], facts["layers"], facts["parameters"]) == ("tiny", "llama", 2, 12264)
    assert (facts["weights"], facts["device"], facts["providers"]) == ("fp32", "cpu", ["CPUExecutionProvider"])
    assert 0 <= facts["weight_bytes"] - 4 * (12264 + 128 * 6) < 1000  # and the constants


def damage(exported: Path, directory: Path, **changes: object) -> Path:
    shutil.copytree(exported, directory)
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    [property] = [p for p in model.metadata_props if p.key == PROPERTY]
    property.value = json.dumps(json.loads(property.value) | changes)
    onnx.save(model, directory / "model.onnx")
    return directory


@pytest.mark.parametrize("device", ["cuda", "directml"])
def test_an_export_for_another_device(device, tmp_path):
    path = export("demo", tmp_path / "exported", device=device)
    facts = facts_in(path)
    assert facts["weights"] == "fp16"  # the default there
    assert (path / "model.onnx.data").stat().st_size == pytest.approx(2 * facts["num_parameters"], rel=0.15)
    again = export("demo", tmp_path / "again", device={"directml": "dml"}.get(device, device), weights="fp16")
    assert contents(path) == contents(again)
    with pytest.raises(ConfigError, match=rf"device is cpu, but .* exported with {device}; set .*device to {device}"):
        make_runner(path, block_size=16)
    if not {"CUDAExecutionProvider", "DmlExecutionProvider"} & set(ort.get_available_providers()):
        says = rf"for {device} and cannot fall back: .*; export .* with --device cpu|is too old for device: {device}"
        with pytest.raises((ConfigError, PluginError), match=says):
            make_runner(path, block_size=16, options=OnnxOptions(device=device, fallback=["cpu"]))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 2}, r"exported by a newer nanovllm \(format 2; this one reads 1\); try: pip install --upgrade"),
        ({"format": 0}, "damaged: format"),
        ({"num_layers": "2"}, "damaged: num_layers: .*integer"),
        ({"num_layers": 2**40}, "damaged: num_layers"),
        ({"num_layers": 2**31 - 1}, "says num_layers = 2147483647 of itself, but its graph is another"),
        ({"num_layers": 1}, "says num_layers = 1"),
        ({"head_size": 8}, "says head_size = 8"),
        ({"vocab_size": 60}, "says vocab_size = 60"),
        ({"device": "cuda"}, "says device = cuda of itself"),
        ({"device": "directml", "weights": "fp16"}, "says device = directml of itself"),
        ({"windows": []}, "damaged: windows"),
        ({"windows": [5]}, r"says windows = \(5,\)"),
        ({"wings": 2}, "damaged: wings"),
    ],
)
def test_facts_that_are_damaged(changes, says, exported, tmp_path):
    with pytest.raises(ModelError, match=says):
        make_runner(damage(exported, tmp_path / "damaged", **changes))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 1, "format": 1}'])
def test_facts_that_are_no_facts(text, exported, tmp_path):
    shutil.copytree(exported, tmp_path / "damaged")
    model = onnx.load(exported / "model.onnx", load_external_data=False)
    model.metadata_props[0].value = text
    onnx.save(model, tmp_path / "damaged" / "model.onnx")
    with pytest.raises(ModelError, match=r"the property nanovllm.paged of .*model.onnx (is|holds)"):
        make_runner(tmp_path / "damaged")


def test_data_that_are_cut_short(exported, tmp_path):
    path = shutil.copytree(exported, tmp_path / "cut")
    os.truncate(path / "model.onnx.data", 5000)
    with pytest.raises(ModelError, match="truncated"):
        make_runner(path)


# --------------------------------------------------------------------------------------- refused, or undone


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weights": "fp64"}, "weights: .*'fp32', 'fp16', 'int8' or 'int4', not 'fp64'"),
        ({"weights": "int4", "int4_block": 64}, "int4_block"),
        ({"int4_block": 32}, "^int4_block means something only with weights: int4"),
        ({"weights": "fp16"}, "weights: fp16 is not for the cpu.*choose weights: int8 or fp32"),
        ({"device": "npu"}, "device: .*'cpu', 'cuda' or 'directml', not 'npu'"),
        ({"max_length": 129}, "max_length is 129, but tiny has 128 positions; give 1 to 128"),
        ({"max_length": 0}, "max_length is 0"),
        ({"block_size": 0}, "block_size is 0"),
    ],
)
def test_wishes_that_cannot_be_met(options, says, checkpoint, tmp_path):
    with pytest.raises(ConfigError, match=says):
        export(checkpoint, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be_exported(tmp_path):
    with pytest.raises(ModelError, match=r"Model directory not found: .*absent.*nanovllm pull"):
        export(tmp_path / "absent", tmp_path / "out")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text('{"model_type": "brand_new"}')
    with pytest.raises(UnsupportedModelError, match="'brand_new' is not implemented"):
        export(tmp_path / "new", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_there_already_is_only_replaced_on_request(checkpoint, exported, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    export(checkpoint, out, max_length=50)  # an empty one is no loss
    with pytest.raises(ConfigError, match="is not empty; choose another --output, or replace it with --force"):
        export(checkpoint, out, block_size=BLOCK)
    (out / "left.txt").write_text("over")
    export(checkpoint, out, block_size=BLOCK, force=True)
    assert contents(out) == contents(exported)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_force_replaces_nothing_but_exports(checkpoint, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("...")
    (tmp_path / "file").write_text("...")
    with pytest.raises(ConfigError, match="holds no export that --force could replace"):
        export(checkpoint, tmp_path / "thesis", force=True)
    with pytest.raises(ConfigError, match="is not a directory"):
        export(checkpoint, tmp_path / "file", force=True)
    both = export(checkpoint, tmp_path / "both")
    shutil.copytree(checkpoint, both / "model")
    with pytest.raises(ConfigError, match="holds no export that --force could replace"):
        export(both / "model", both, force=True)
    assert (both / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("whose", ["damaged", "somebody's"])
def test_force_leaves_the_graphs_of_others_alone(whose, checkpoint, exported, tmp_path):
    out = shutil.copytree(exported, tmp_path / "out")
    model = onnx.load(out / "model.onnx", load_external_data=False)
    del model.metadata_props[:]
    (out / "model.onnx").write_bytes(b"" if whose == "damaged" else model.SerializeToString())
    with pytest.raises(ConfigError, match="holds no export that --force could replace"):
        export(checkpoint, out, force=True)
    assert (out / "model.onnx.data").exists()


@pytest.mark.parametrize("number", range(1, 8))
def test_a_write_that_fails_leaves_nothing_behind(number, checkpoint, exported, tmp_path, monkeypatch):
    """A full disk at every kind of write; an earlier export survives."""
    shutil.copytree(exported, tmp_path / "out")
    calls = iter(range(1, 10**6))

    def failing(function):
        def call(*args, **kwargs):
            if next(calls) == number:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*args, **kwargs)

        return call

    for owner, name in ((Path, "write_bytes"), (Path, "mkdir"), (Path, "rename"), (Path, "write_text")):
        monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    monkeypatch.setattr(shutil, "copyfile", failing(shutil.copyfile))
    with pytest.raises(ConfigError, match=r"out cannot be written: .*No space left on device; make room"):
        export(checkpoint, tmp_path / "out", force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert contents(tmp_path / "out") == contents(exported)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full: Linux")
def test_weights_that_do_not_fit_on_the_disk(checkpoint, tmp_path, monkeypatch):
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: real(Path("/dev/full") if a == ("wb",) else self, *a, **k))
    with pytest.raises(ConfigError, match=r"cannot be written: .*No space left on device"):
        export(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_no_place(checkpoint, tmp_path):
    (tmp_path / "file").write_text("...")
    status, output = run("-m", checkpoint, "-o", tmp_path / "file" / "out")
    assert (status, output.count("\n")) == (2, 1)
    assert "out cannot be written: " in output


def test_an_interrupted_export_leaves_nothing_behind(checkpoint, tmp_path):
    def interrupt(name: str) -> None:
        if name == "final_norm.weight":
            assert [p.suffix for p in tmp_path.iterdir()] == [".part"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(checkpoint, tmp_path / "out", tell=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_link_out_of_the_model_directory_is_not_followed(checkpoint, tmp_path):
    source = shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "secret").write_text("secret")
    (source / "merges.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match=r"'merges.txt' .* leads outside"):
        export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------- the command


def test_the_command_with_the_words_of_the_founding_documents(checkpoint, tmp_path):
    spellings = [
        ("--model", checkpoint, "--output", tmp_path / "a", "--max-length", "64"),
        ("-m", checkpoint, "-o", tmp_path / "b", "-p", "fp32", "-e", "cpu", "--max-length", "64"),
        ("--model", checkpoint, "--output", tmp_path / "c", "--dtype", "fp32", "--device", "cpu", "--max-length", "64"),
        ("-m", checkpoint, "-o", tmp_path / "d", "--weights", "fp32", "--max-length", "64", "--block-size", "16"),
    ]
    for arguments in spellings:
        status, output = run(*arguments)
        assert (status, "4 files" in output, "nanovllm ask --runner onnx" in output) == (0, True, True), output
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c") == contents(tmp_path / "d")


def test_the_command_says_how_to_ask_what_it_wrote(checkpoint, tmp_path):
    _, output = run("-m", checkpoint, "-o", tmp_path / "an export", "--block-size", "32", "-e", "dml")
    assert output.endswith('/an export\' --set cache.block_size=32 --set runner.device=dml "..."\n')


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--model", "no/such"], 4, "error: Model directory not found: no/such;"),
        (["--model", "demo", "--max-length", "4096"], 2, "error: max_length is 4096, but "),
        (["--model", "demo", "-p", "fp64"], 2, "'fp64' is not one of"),
        ([], 2, "Missing option '-m' / '--model'"),
    ],
)
def test_a_mistake_is_one_sentence_with_a_status(arguments, status, says, tmp_path):
    code, output = run(*arguments, "--output", tmp_path / "out")
    assert (code, says in output) == (status, True), output
    assert "Traceback" not in output
    assert list(tmp_path.iterdir()) == []


def test_a_missing_dependency_is_one_sentence(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(PluginError, match=r"needs the package onnx"):
        export(checkpoint, tmp_path / "out")
    code, output = run("-m", checkpoint, "-o", tmp_path / "out")
    assert code == 3
    assert output.startswith("error: the onnx runner needs the package onnx, which cannot be imported")
    assert output.endswith("try: pip install 'nanovllm[onnx]'\n")
    assert output.count("\n") == 1


@needs_terminal
def test_a_terminal_sees_the_progress_and_nobody_else(checkpoint, tmp_path):
    with Terminal("export", "onnx", "-m", str(checkpoint), "-o", str(tmp_path / "seen")) as terminal:
        terminal.wait_for("layers.1.mlp.down.weight")
        terminal.wait_for("4 files")
        assert terminal.status() == 0
    program = "from nanovllm.cli import main; main()"
    command = [sys.executable, "-c", program, "export", "onnx", "-m", str(checkpoint), "-o", str(tmp_path / "unseen")]
    assert subprocess.run(command, capture_output=True, check=True).stderr == b""


def test_formats_are_listed_without_importing_them():
    code = """
import sys
from click.testing import CliRunner
from nanovllm.cli import cli
result = CliRunner().invoke(cli, ["export", "--help"])
print("onnx" in result.output.split("Formats:")[1], "nanovllm_runner_onnx" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"
    assert CliRunner().invoke(cli, ["export", "pt3"]).exit_code == 2


WITHOUT_THE_RUNNER = """
import sys
from importlib import metadata
find = metadata.MetadataPathFinder.find_distributions
metadata.MetadataPathFinder.find_distributions = staticmethod(
    lambda *a: (d for d in find(*a) if d.metadata["Name"] != "nanovllm-runner-onnx")
)
sys.modules["nanovllm_runner_onnx"] = None
sys.argv[0] = "nanovllm"
from nanovllm.cli import main
main()
"""


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["ask", "--runner", "mock", "--max-tokens", "4", "hello"], 0, "Answer:"),
        (["ask", "--runner", "numpy", "What is the capital of France?"], 0, "Paris"),
        (
            ["ask", "--runner", "onnx", "hello"],
            3,
            "http, mock, numpy, torch); try: pip install 'nanovllm[onnx]'\n",
        ),
        (
            ["export", "onnx", "--model", "demo", "--output", "out"],
            3,
            "(have: pt2, safetensors, torchscript); try: pip install 'nanovllm[onnx]'\n",
        ),
    ],
)
def test_without_the_runners_distribution_the_core_works_and_says_what_to_install(arguments, status, says, tmp_path):
    command = [sys.executable, "-c", WITHOUT_THE_RUNNER, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert says in (done.stdout if status == 0 else done.stderr)
    assert "Traceback" not in done.stderr
