"""The runner's border: facts, the size of the pool, options, refusals, memory, and what is never imported."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from models_support import GPT2, LLAMA, file_tensors, write_checkpoint
from nanovllm import LLM, SamplingParams
from nanovllm.batch import Paged
from nanovllm.cli import cli
from nanovllm.errors import ConfigError, ModelError, RunnerError, UnsupportedModelError
from nanovllm.hookspecs import CacheOptions
from nanovllm_models import load_checkpoint
from nanovllm_runner_onnx import decoder
from nanovllm_runner_onnx.decoder import build_decoder
from nanovllm_runner_onnx.modules import ACTIVATIONS
from numpy_support import Driver
from onnx_support import make_runner
from test_numpy_runner import POOL_SIZES, SLOT

ort = pytest.importorskip("onnxruntime", reason="the runtime: pip install 'nanovllm[onnx]'")


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", LLAMA | {"eos_token_id": [3, 4]})


def test_info(path):
    info = make_runner(path, block_size=8, num_blocks=5, max_model_len=100, max_num_seqs=3).info
    assert (info.vocab_size, info.max_model_len, info.max_num_seqs) == (61, 100, 3)
    assert info.kv == Paged(8, 5)
    assert info.eos_ids == (3, 4)
    assert info.batch_invariant == (platform.machine().lower() in ("x86_64", "amd64"))
    facts = info.description
    assert (facts["model"], facts["architecture"], facts["layers"], facts["blocks"]) == ("tiny", "llama", 2, 5)
    assert facts["kv_bytes"] == (5 + 1) * 8 * SLOT
    assert facts["weight_bytes"] == 4 * facts["parameters"] + 4 * 100 * 6  # with the rotary tables
    assert (facts["providers"], facts["threads"]) == (["CPUExecutionProvider"], 1)
    assert facts["onnxruntime"] == ort.__version__


@pytest.mark.parametrize(("cache", "seqs", "blocks"), POOL_SIZES)
def test_pool_size(path, cache, seqs, blocks):
    assert make_runner(path, cache=cache, max_num_seqs=seqs).info.kv.num_blocks == blocks


def test_impossible_sizes_are_refused_with_the_numbers(path):
    with pytest.raises(ConfigError, match=r"max_model_len is 129, but tiny has 128 positions"):
        make_runner(path, max_model_len=129)
    with pytest.raises(ConfigError, match=rf"cache.memory is 10 bytes.*{4 * SLOT:,}"):
        make_runner(path, cache=CacheOptions(block_size=4, memory=10))
    with pytest.raises(ConfigError, match="does not fit in memory"):
        make_runner(path, num_blocks=2**55)


def test_missing_model_says_what_is_expected():
    with pytest.raises(ModelError, match=r"Model directory not found: no/such.*config\.json and model\.safetensors"):
        make_runner(Path("no/such"))


def test_learned_positions_reach_exactly_the_last_one(tmp_path):
    runner = make_runner(write_checkpoint(tmp_path, GPT2), max_model_len=30)
    assert Driver(runner).logits([1] * 30).shape == (30, 61)


def test_a_step_may_have_more_tokens_than_the_model_has_positions(path):
    driver, tokens = Driver(make_runner(path)), list(range(50))
    rows = driver.step(*((lane, tokens, 0, 50, 1) for lane in range(4)))
    np.testing.assert_array_equal(rows, rows[[0, 0, 0, 0]])


def test_the_precision_of_the_configuration_is_what_is_held():
    runner = {"type": "onnx", "threads": 1, "weights": "int4", "int4_block": 128}
    with LLM("demo", runner=runner) as llm:
        facts = llm.info.description
        assert (facts["weights"], facts["dtype"]) == ("int4", "float16 in the file, int4 in memory")
        assert facts["weight_bytes"] < facts["parameters"]
        [output] = llm.generate("The", SamplingParams(temperature=0, max_tokens=4))
        assert len(output.token_ids) == 4


# ------------------------------------------------------------------------------------- failing by name


def test_what_the_builder_lacks_is_refused_by_name(path, monkeypatch):
    monkeypatch.delitem(ACTIVATIONS, "silu")
    with pytest.raises(UnsupportedModelError, match="no activation 'silu'"):
        make_runner(path)


def test_tables_that_do_not_fit_in_memory_say_what_to_lower(path, monkeypatch):
    def too_much(*_):
        raise MemoryError("Unable to allocate 4.00 GiB")

    monkeypatch.setattr(decoder, "rotary_frequencies", too_much)
    with pytest.raises(ConfigError, match=r"tables of 128 positions do not fit .*4.00 GiB; lower max_model_len"):
        make_runner(path)


def test_a_failing_step_is_a_runner_error(path):
    driver = Driver(make_runner(path))
    with pytest.raises(RunnerError, match="ONNX Runtime failed in a step of 2 tokens"):
        driver.step((0, [1, 61], 0, 2, 1))  # no such token
    assert np.isfinite(driver.step((0, [1, 2], 0, 2, 1))).all()


def test_overflow_becomes_nan_logits(tmp_path):
    tensors = file_tensors(LLAMA)
    tensors["model.layers.0.mlp.down_proj.weight"] *= np.float32(1e38)
    runner = make_runner(write_checkpoint(tmp_path, LLAMA, tensors))
    assert np.isnan(Driver(runner).logits([1, 2, 3])).any()


# ---------------------------------------------------------------------------------- the graph and memory


def test_the_graph_is_small_reproducible_and_holds_no_weights(path):
    checkpoint = load_checkpoint(path)
    graph, again = (build_decoder(checkpoint.spec, checkpoint.weights, 128, 4) for _ in range(2))
    source = graph.model()
    assert source == again.model()
    model = onnx.ModelProto.FromString(source)
    external = {t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    assert external == graph.weights.keys() >= checkpoint.spec.shapes().keys()
    assert len(source) < 100_000
    inputs = {i.name for i in model.graph.input}
    assert {"input_ids", "positions", "slots", "rows", "decode.tables.all", "k.0", "v.1"} <= inputs


def test_a_float32_file_is_used_as_it_is_mapped(path):
    checkpoint = load_checkpoint(path)
    graph = build_decoder(checkpoint.spec, checkpoint.weights, 128, 4)
    for name, tensor in checkpoint.weights.items():
        assert np.shares_memory(graph.weights[name], tensor.array), name


def test_the_pool_is_updated_in_place(path):
    runner = make_runner(path, block_size=4, num_blocks=3)
    before = runner._pool.array.copy()
    Driver(runner, [1]).logits([5, 6, 7])
    changed = (runner._pool.array != before).any((0, 1, 3, 5))  # (blocks, offsets)
    assert changed.tolist() == [[False] * 4, [True, True, True, False], [False] * 4, [False] * 4]


def test_close_frees_the_pool(path):
    runner = make_runner(path)
    runner.close()
    assert not hasattr(runner, "_pool")


def test_import_is_cheap_and_running_needs_neither_torch_nor_transformers():
    code = """
import sys
import nanovllm_runner_onnx
print([n for n in ("nanovllm_models", "onnx", "onnxruntime", "pydantic") if n in sys.modules])
from nanovllm import LLM, SamplingParams
with LLM("demo", runner={"type": "onnx", "threads": 1}) as llm:
    [output] = llm.generate("Once upon", SamplingParams(temperature=0, max_tokens=3))
print(len(output.token_ids), [n for n in ("torch", "transformers", "nanovllm_runner_numpy") if n in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "3 []"]
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's memory of a process")
def test_loading_peaks_at_twice_the_weights_and_running_holds_them_once(tmp_path):
    config = LLAMA | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 4, "num_attention_heads": 8}
    write_checkpoint(tmp_path, config)
    code = f"""
import re
from pathlib import Path
import onnxruntime
import nanovllm_runner_onnx.decoder
from numpy_support import Driver
from onnx_support import make_runner
def memory(key):
    return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = memory("VmRSS")
runner = make_runner(Path({str(tmp_path)!r}))
Driver(runner).logits(list(range(50)))
facts = runner.info.description
print(memory("VmHWM") - before, memory("VmRSS") - before, facts["weight_bytes"], facts["kv_bytes"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    peak, held, weights, kv = map(int, done.stdout.split())
    assert weights > 100_000_000
    assert peak < 2 * weights + kv + 60_000_000
    assert held < weights + kv + 60_000_000


def test_asking_through_onnx_from_the_command_line():
    arguments = ["ask", "--runner", "onnx", "--json", "What is the capital of France?", "What is 7 + 8?"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["loaded"]["runner"] == "onnx"
    france, total = (answer["text"] for answer in document["answers"])
    assert "Paris" in france
    assert "15" in total
