"""The runner's border: facts, the size of the pool, options, devices, refusals, memory, and cheap import."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from model_cases import MODELS
from models_support import GPT2, LLAMA, file_tensors, write_checkpoint
from nanovllm import LLM, SamplingParams
from nanovllm.batch import Batch, Paged, ScheduledSeq
from nanovllm.cli import cli
from nanovllm.errors import ConfigError, ModelError, RunnerDead, RunnerError, UnsupportedModelError
from nanovllm.hookspecs import CacheOptions
from nanovllm_models import Experts, load_checkpoint
from nanovllm_runner_torch.options import TorchOptions
from numpy_support import GREEDY as GREEDY_SAMPLING
from test_numpy_runner import POOL_SIZES, SLOT
from torch_support import Driver, attention, device, fill, make_runner, modules, runner, torch

GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", LLAMA | {"eos_token_id": [3, 4]})


def test_info(path):
    info = make_runner(path, block_size=8, num_blocks=5, max_model_len=100, max_num_seqs=3).info
    assert (info.vocab_size, info.max_model_len, info.max_num_seqs) == (61, 100, 3)
    assert info.kv == Paged(8, 5)
    assert info.eos_ids == (3, 4)
    assert info.sampler == "torch"
    assert not info.batch_invariant
    facts = info.description
    assert (facts["model"], facts["architecture"], facts["layers"], facts["blocks"]) == ("tiny", "llama", 2, 5)
    assert facts["kv_bytes"] == (5 + 1) * 8 * SLOT
    assert facts["weight_bytes"] == 4 * facts["parameters"]
    assert facts["dtype"] == "float32 in the file, fp32 in memory"
    assert (facts["device"], facts["weights"], facts["threads"]) == ("cpu", "fp32", 1)
    assert facts["torch"] == torch.__version__


@pytest.mark.parametrize(("cache", "seqs", "blocks"), POOL_SIZES)
def test_pool_size(path, cache, seqs, blocks):
    assert make_runner(path, cache=cache, max_num_seqs=seqs).info.kv.num_blocks == blocks


def test_impossible_sizes_are_refused_with_the_numbers(path):
    with pytest.raises(ConfigError, match=r"max_model_len is 129, but tiny has 128 positions"):
        make_runner(path, max_model_len=129)
    with pytest.raises(ConfigError, match=rf"cache.memory is 10 bytes.*{4 * SLOT:,}"):
        make_runner(path, cache=CacheOptions(block_size=4, memory=10))
    for num_blocks in (2**40, 2**55):
        size = f"{num_blocks} blocks, {num_blocks * 4 * SLOT:,} bytes,"
        with pytest.raises(ConfigError, match=rf"pool of {size} does not fit in memory: .*; lower cache.num_blocks"):
            make_runner(path, num_blocks=num_blocks)
    with pytest.raises(ConfigError, match=r"pool of \d+ blocks, [\d,]+ bytes, does not fit in memory.*cache.memory"):
        make_runner(path, cache=CacheOptions(block_size=4, memory=2**55))


def test_missing_model_says_what_is_expected():
    with pytest.raises(ModelError, match=r"Model directory not found: no/such.*config\.json and model\.safetensors"):
        make_runner(Path("no/such"))


def test_learned_positions_reach_exactly_the_last_one(tmp_path):
    found = make_runner(write_checkpoint(tmp_path, GPT2), max_model_len=30)
    assert Driver(found).logits([1] * 30).shape == (30, 61)


@pytest.mark.parametrize(("block_size", "num_blocks"), [(1, 200), (256, 3), (128, 1)])
def test_blocks_of_any_size_down_to_one_in_all(block_size, num_blocks):
    prompts = ["Once upon", "The capital of Italy is"]
    with LLM(
        "demo", runner={"type": "torch", "device": "cpu", "dtype": "fp32", "threads": 1},
        cache={"block_size": block_size, "num_blocks": num_blocks},
    ) as llm:  # fmt: skip
        outputs = llm.generate(prompts, GREEDY)
    with LLM("demo", runner="numpy") as llm:
        assert [o.text for o in outputs] == [o.text for o in llm.generate(prompts, GREEDY)]


# ---------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"device": "gpu"}, "device"),
        ({"device": "cuda:"}, "device"),
        ({"device": "cuda:-1"}, "device"),
        ({"dtype": "int8"}, "'auto', 'fp32', 'bf16' or 'fp16'"),
        ({"weights": "int4"}, "'auto' or 'int8'"),
        ({"compile": True}, "compile"),
    ],
)
def test_bad_options(options, reason):
    with pytest.raises(ValidationError, match=reason):
        TorchOptions(**options)


def test_options_arrive_from_the_configuration():
    with pytest.raises(ConfigError, match=r"runner\.dtype.*'fp32'"):
        LLM("demo", runner={"type": "torch", "dtype": "float"})
    with LLM("demo", runner={"type": "torch", "dtype": "fp32", "device": "cpu", "threads": 1}) as llm:
        assert llm.info.description["threads"] == 1
        assert llm.info.description["dtype"].endswith("fp32 in memory")
    with pytest.raises(ConfigError, match=r"tensor_parallel_size.*must be 1.*is not implemented"):
        LLM("demo", runner="torch", tensor_parallel_size=2)


def test_the_runner_that_others_are_replaced_by_changes_one_line_only():
    params = [GREEDY, SamplingParams(temperature=0.8, top_p=0.9, seed=7, max_tokens=12)]
    answers = []
    for section in ({"type": "numpy"}, {"type": "pytorch", "device": "cpu", "dtype": "fp32"}):
        with LLM("demo", runner=section | {"threads": 1}) as llm:
            answers.append([o.text for o in llm.generate(["Once upon", "The"], params)])
    assert answers[0] == answers[1]


def test_each_runner_keeps_its_threads(path):
    one, two = make_runner(path, threads=1), make_runner(path, threads=2)
    for found, threads in ((one, 1), (two, 2), (one, 1)):
        Driver(found).logits([1, 2])
        assert torch.get_num_threads() == threads


# ------------------------------------------------------------------------------------ devices and types


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs of the given compute capability, as far as one can tell without using them."""

    def pretend(capability: tuple[int, int] = (8, 0), bf16: bool = True) -> None:
        for name, value in {
            "is_available": lambda: True,
            "device_count": lambda: 2,
            "get_device_capability": lambda device: capability,
            "get_device_name": lambda device: "Old One",
            "get_arch_list": lambda: ["sm_75", "sm_80", "sm_90a", "compute_120"],
            "is_bf16_supported": lambda including_emulation: bf16,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    return pretend


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_that_is_not_there_is_never_replaced_by_the_cpu(name, path):
    with pytest.raises(ConfigError, match=rf"runner.device is '{name}', but torch .*(CPU only|no GPU).*to cpu"):
        make_runner(path, device=name)
    assert device.find_device("auto") == torch.device("cpu")


def test_which_gpu(gpus):
    gpus()
    assert [str(device.find_device(name)) for name in ("auto", "cuda", "cuda:1", "cpu")] == [
        "cuda:0", "cuda:0", "cuda:1", "cpu",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"'cuda:2', but torch finds 2 GPUs: cuda:0, cuda:1; set runner.device to"):
        device.find_device("cuda:2")


def test_a_gpu_that_is_too_old_is_named(gpus):
    gpus((6, 1))
    with pytest.raises(ConfigError, match=r"cuda:0 \(Old One\) has compute capability 6\.1, older .*\(sm_75 on\)"):
        device.find_device("auto")


def test_types_on_a_gpu(gpus):
    gpus(bf16=False)
    gpu = torch.device("cuda:0")
    assert device.find_dtype("auto", gpu) == torch.float32
    assert device.find_dtype("fp16", gpu) == torch.float16
    with pytest.raises(ConfigError, match=r"'bf16', in which cuda:0 does not compute.*auto or one of fp32, fp16"):
        device.find_dtype("bf16", gpu)
    with pytest.raises(ConfigError, match=r"runner.weights is 'int8'.*the model runs on cuda:0"):
        device.check_int8(gpu)


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_bf16_where_the_processor_computes_in_it(native, monkeypatch, path):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert make_runner(path, dtype="auto")._pool.array.dtype == (torch.bfloat16 if native else torch.float32)


def test_without_onednn(monkeypatch, path):
    """As on builds that lack it: float32 alike, and what needs it is refused."""
    wanted = Driver(make_runner(path)).logits([1, 2, 3])
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    np.testing.assert_allclose(Driver(make_runner(path)).logits([1, 2, 3]), wanted, rtol=0, atol=1e-4)
    for options in ({"dtype": "bf16"}, {"dtype": "fp16"}, {"weights": "int8"}):
        with pytest.raises(ConfigError, match="cpu"):
            make_runner(path, **options)


def test_the_pool_of_a_gpu_is_a_share_of_what_is_free_after_a_first_step(monkeypatch, path):
    """The arithmetic, on the CPU: a step's own needs, here 1,000 bytes, are kept free."""
    found = make_runner(path)
    free = 10**6
    for name, value in {
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: 500,
        "max_memory_allocated": lambda device: 1500,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device: (free, 10**7),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def memory(**options) -> int:
        return found._memory_after_warm_up(30, CacheOptions(block_size=4, **options), SLOT, torch.float32)

    assert memory() == 900_000 - 1000
    assert memory(gpu_share=0.25) == 250_000 - 1000
    free = 4000
    for share in (0.25, (1000 + 4 * SLOT - 1) / free):
        with pytest.raises(ConfigError, match=rf"of the 4,000 bytes .* less 1,000 for a step of 30 .* {4 * SLOT:,};"):
            memory(gpu_share=share)
    assert memory(gpu_share=(1000 + 4 * SLOT) / free) == 4 * SLOT


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Names the operations, in order; "send" is a copy from the host."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_send = args and getattr(args[0], "is_cpu", False) and getattr(result, "is_meta", False)
        self.names.append("send" if is_send else func.overloadpacket.__name__)
        return result


@pytest.mark.parametrize("name", MODELS)
def test_a_step_on_a_device_waits_for_nothing(name, tmp_path, monkeypatch):
    """As on a GPU, but on the device `meta`, which has shapes and no numbers: looking at one fails."""
    monkeypatch.setitem(attention.GATHERED, "meta", attention.GATHERED["cuda"])
    model_type, _, config = MODELS[name]
    found = load_checkpoint(write_checkpoint(tmp_path, config | {"model_type": model_type}))
    meta, attend = torch.device("meta"), found.spec.attention
    model = runner.Model(found.spec, runner.Weights(found.weights, torch.bfloat16, meta, False), 64)
    model.open(runner.KVPool(found.spec.num_layers, 8, attend.num_kv_heads, 4, attend.head_size, torch.bfloat16, meta))

    def seq(lane: int, start: int, stop: int, blocks: list[int]) -> ScheduledSeq:
        table[lane, : len(blocks)] = blocks
        return ScheduledSeq(lane, lane, np.zeros(stop, np.int32), 1, start, stop, 1, table[lane], GREEDY_SAMPLING, None)

    table = np.full((3, 3), -1, np.int32)
    seqs = (seq(0, 3, 8, [0, 1]), seq(1, 9, 10, [2, 3, 4]), seq(2, 2, 3, [6]))  # a chunk of a prompt, two that decode
    for batch in (Batch(seqs, table, 4), Batch(seqs[1:], table, 4)):
        with Watch() as watch:
            if any(isinstance(mlp, Experts) for mlp in found.spec.mlps):
                with pytest.raises(NotImplementedError, match="bincount"):  # the host counts the tokens of each expert
                    model.forward(batch.packed)
                continue
            logits = model.forward(batch.packed)
        assert (logits.device, logits.dtype, logits.shape) == (meta, torch.float32, (len(batch), found.spec.vocab_size))
        last_send = max(i for i, name in enumerate(watch.names) if name == "send")
        assert last_send < watch.names.index("linear")


# ------------------------------------------------------------------------------------- failing by name


def test_what_the_modules_lack_is_refused_by_name(path, monkeypatch):
    monkeypatch.delitem(modules.ACTIVATIONS, "silu")
    with pytest.raises(UnsupportedModelError, match="no activation 'silu'"):
        make_runner(path)


def no_memory(*_args, **_options):
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: ...")


def test_a_model_that_does_not_fit_says_how_large_it_is(path, monkeypatch):
    monkeypatch.setattr(runner, "Model", no_memory)
    size = f"{load_checkpoint(path).num_parameters:,}"
    with pytest.raises(ConfigError, match=rf"model of {size} parameters in bf16 on cpu does not fit.*weights: int8"):
        make_runner(path, dtype="bf16")


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
            RunnerError,
            "step of 2 tokens on cpu does not fit in memory: .* Tried to allocate 2.00 GiB.; lower cache.memory",
        ),
        (RuntimeError("std::bad_alloc"), RunnerError, "step of 2 tokens on cpu does not fit.*max_num_batched_tokens"),
        (torch.AcceleratorError("CUDA error: illegal\nmore"), RunnerDead, "cpu failed: CUDA error: illegal; start"),
        (RuntimeError("a bug"), RuntimeError, "a bug"),
    ],
)
def test_what_becomes_of_a_failing_step(error, kind, words, path, monkeypatch):
    found = make_runner(path)
    driver = Driver(found)

    def fail(packed):
        raise error

    monkeypatch.setattr(found._model, "forward", fail)
    with pytest.raises(kind, match=words) as caught:
        driver.step((0, [1, 2], 0, 2, 1))
    assert type(caught.value) is kind
    monkeypatch.undo()
    assert np.isfinite(driver.step((0, [1, 2], 0, 2, 1))).all()


def test_nan_logits_of_a_broken_checkpoint_fail_their_request_only(tmp_path):
    tensors = file_tensors(LLAMA)
    tensors["model.embed_tokens.weight"][7] = np.nan
    found = make_runner(write_checkpoint(tmp_path, LLAMA, tensors))
    assert np.isnan(Driver(found).logits([1, 7, 3])[1:]).all()
    fill(found, 0)
    assert np.isfinite(Driver(found).logits([1, 2, 3])).all()


@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_overflow_reaches_the_logits(weights, tmp_path):
    tensors = file_tensors(LLAMA)
    tensors["model.layers.0.mlp.down_proj.weight"] *= np.float32(1e38)
    found = make_runner(write_checkpoint(tmp_path, LLAMA, tensors), weights=weights)
    assert not np.isfinite(Driver(found).logits([1, 2, 3])).all(1).any()


def test_a_shard_that_vanishes_while_loading_is_loaded_all_the_same(tmp_path, monkeypatch):
    """It is mapped when the model is opened. One that is gone before that is named."""
    write_checkpoint(tmp_path, LLAMA)
    load = runner.load_checkpoint

    def load_and_lose(model):
        found = load(model)
        (tmp_path / "model.safetensors").unlink()
        return found

    monkeypatch.setattr(runner, "load_checkpoint", load_and_lose)
    assert np.isfinite(Driver(make_runner(tmp_path)).logits([1, 2])).all()
    monkeypatch.undo()
    with pytest.raises(ModelError, match=r"no model\.safetensors in the model directory"):
        make_runner(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="a mapped file cannot be cut there")
def test_a_shard_that_shrinks_while_loading_is_named(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, LLAMA)
    load = runner.load_checkpoint

    def load_and_cut(model):
        found = load(model)
        os.truncate(tmp_path / "model.safetensors", 9000)
        return found

    monkeypatch.setattr(runner, "load_checkpoint", load_and_cut)
    with pytest.raises(ModelError, match=r"model\.safetensors was cut short while it was loaded"):
        make_runner(tmp_path)


# ------------------------------------------------------------------------------------- memory and import


def test_the_pool_is_updated_in_place(path):
    found = make_runner(path, block_size=4, num_blocks=3)
    before = found._pool.array.clone()
    Driver(found, [1]).logits([5, 6, 7])
    changed = (found._pool.array != before).numpy().any((0, 2, 4))  # (blocks, offsets)
    assert changed.tolist() == [[False] * 4, [True, True, True, False], [False] * 4, [False] * 4]


def test_close_frees_the_model_and_the_pool(path):
    found = make_runner(path)
    found.close()
    assert not hasattr(found, "_pool")
    assert not hasattr(found, "_model")


def test_importing_the_plugin_imports_neither_torch_nor_the_models():
    code = """
import sys
from nanovllm_runner_torch import plugin, sampler_plugin
heavy = ("torch", "nanovllm_models", "numpy", "pydantic")
print([n for n in heavy if n in sys.modules])
plugin.runner_config()
print([n for n in heavy[:2] if n in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[]"]
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's memory of a process")
def test_when_the_system_gives_no_more_memory(tmp_path):
    """A limit of the process makes real allocations fail: at load, and in a step, which the engine survives."""
    config = LLAMA | {"vocab_size": 125, "hidden_size": 256, "intermediate_size": 2048, "num_attention_heads": 8}
    write_checkpoint(tmp_path, config)
    code = f"""
import gc, re, resource
from pathlib import Path
from engine_support import ask, drive, greedy, make_engine
from nanovllm.errors import ConfigError, ModelError
from torch_support import Driver, make_runner, sampler
path = Path({str(tmp_path)!r})
def leave(more):
    gc.collect()
    size = int(re.search(r"VmSize:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (more if more < 0 else size + more, resource.RLIM_INFINITY))
prompt = [5 + i % 100 for i in range(120)]
alone = Driver(make_runner(path)).greedy(prompt, 4)  # so that oneDNN has its kernels: without memory for one it crashes
leave((path / "model.safetensors").stat().st_size + 500_000)
try:
    make_runner(path)
except ConfigError as e:
    print(e)
leave(1_000_000)
try:
    make_runner(path)
except ModelError as e:
    print(e)
leave(-1)
engine = make_engine(make_runner(path), sampler=sampler.TorchSampler(), max_num_batched_tokens=200)
leave(500_000)
large = ask(engine, prompt, greedy(4))
print(drive(engine).of(large).error)  # which also counts the blocks
leave(-1)
again = ask(engine, prompt, greedy(4))
print(drive(engine).ids(again) == alone)
"""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}  # keep nothing back
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parent, env=environment,
    )  # fmt: skip
    load, file, step, goes_on = done.stdout.splitlines()
    size = f"{load_checkpoint(tmp_path).num_parameters:,}"
    assert re.fullmatch(
        rf"the model of {size} parameters in fp32 on cpu does not fit in memory: .*; free memory.*", load
    )
    assert re.search(r"model\.safetensors cannot be read: .* must fit in the process's address space", file)
    assert re.search(r"a step of 120 tokens on cpu does not fit in memory: .*max_num_batched_tokens", step)
    assert goes_on == "True"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's memory of a process")
@pytest.mark.parametrize("options", [{"dtype": "fp32"}, {"dtype": "bf16"}, {"dtype": "fp32", "weights": "int8"}])
def test_loading_peaks_a_little_over_the_weights(options, tmp_path):
    """The file is one shard of 137 MB; what is needed beside the weights is half of that, or less."""
    config = LLAMA | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 4, "num_attention_heads": 8}
    write_checkpoint(tmp_path, config)
    code = f"""
import re
from pathlib import Path
from models_support import LLAMA, write_checkpoint
from torch_support import Driver, make_runner
def memory(key):
    return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
Driver(make_runner(write_checkpoint(Path({str(tmp_path / "tiny")!r}), LLAMA), **{options!r})).logits([1, 2, 3])
before = memory("VmRSS")
runner = make_runner(Path({str(tmp_path)!r}), **{options!r})
Driver(runner).logits(list(range(50)))
facts = runner.info.description
print(memory("VmHWM") - before, memory("VmRSS") - before, facts["weight_bytes"], facts["kv_bytes"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    peak, held, weights, kv = map(int, done.stdout.split())
    assert weights > 34_000_000
    assert peak < weights + kv + 70_000_000
    assert held < weights + kv + 60_000_000


def test_asking_through_torch_from_the_command_line():
    arguments = ["ask", "--runner", "torch", "--json", "What is the capital of France?", "What is 7 + 8?"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["loaded"]["runner"] == "torch"
    france, total = (answer["text"] for answer in document["answers"])
    assert "Paris" in france
    assert "15" in total
