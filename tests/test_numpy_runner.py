"""The runner's border: facts, the size of the pool, refusals, threads, memory, cheap import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from models_support import GPT2, LLAMA, QWEN2_WINDOW, file_tensors, write_checkpoint
from nanovllm.batch import Paged
from nanovllm.errors import ConfigError, ModelError
from nanovllm.hookspecs import CacheOptions
from numpy_support import Driver, make_runner

SLOT = 2 * 2 * 2 * 6 * 4  # bytes of one position of LLAMA: K and V, layers, kv heads, head size, float32


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", LLAMA | {"eos_token_id": [3, 4]})


def test_info(path):
    runner = make_runner(path, block_size=8, num_blocks=5, max_model_len=100, max_num_seqs=3)
    info = runner.info
    assert (info.vocab_size, info.max_model_len, info.max_num_seqs) == (61, 100, 3)
    assert info.kv == Paged(8, 5)
    assert info.eos_ids == (3, 4)
    assert not info.batch_invariant
    facts = info.description
    assert (facts["model"], facts["architecture"], facts["layers"], facts["blocks"]) == ("tiny", "llama", 2, 5)
    assert facts["kv_bytes"] == 5 * 8 * SLOT
    assert facts["weight_bytes"] == 4 * facts["parameters"]


# (cache, max_num_seqs, blocks): one rule for every runner, for a model of 128 positions and SLOT bytes each.
POOL_SIZES = [
    (CacheOptions(block_size=16, num_blocks=7, memory=10**9), 8, 7),
    (CacheOptions(block_size=16, memory=16 * SLOT * 9 + 5), 8, 9),
    (CacheOptions(block_size=16), 8, 8 * 8),  # max_num_seqs sequences of 128 positions
    (CacheOptions(block_size=100), 3, 3 * 2),
    (CacheOptions(block_size=16), 10**6, 2**30 // (16 * SLOT)),  # no more than 1 GiB
]


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


def test_threads_are_limited_inside_a_step_only(path, monkeypatch):
    seen = []
    runner = make_runner(path, threads=1)

    def blas_threads() -> list[int]:
        return [lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"]

    before, forward = blas_threads(), runner._model.forward
    monkeypatch.setattr(runner._model, "forward", lambda *a: (seen.append(blas_threads()), forward(*a))[1])
    Driver(runner).logits([1, 2, 3])
    assert set(seen[0]) <= {1}
    assert blas_threads() == before
    assert runner.info.description["threads"] == 1


def test_overflow_becomes_nan_logits_and_no_warning(tmp_path):
    tensors = file_tensors(LLAMA)
    tensors["model.layers.0.mlp.down_proj.weight"] *= np.float32(1e38)
    runner = make_runner(write_checkpoint(tmp_path, LLAMA, tensors))
    assert np.isnan(Driver(runner).logits([1, 2, 3])).any()


def test_close_frees_the_pool(path):
    runner = make_runner(path)
    runner.close()
    assert runner._pools == []


def test_import_is_cheap():
    code = (
        "import sys, nanovllm_runner_numpy as m; assert m.plugin.api_version == 1;"
        "print([n for n in ('nanovllm_models', 'nanovllm_runner_numpy.model', 'threadpoolctl') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's peak memory of a process")
def test_loading_costs_the_weights_the_pool_and_little_more(tmp_path):
    """The file is mapped: were its pages kept, the peak would be the weights twice."""
    config = QWEN2_WINDOW | {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 100_000}
    write_checkpoint(tmp_path, config)
    code = f"""
import re
from pathlib import Path
from numpy_support import make_runner
import nanovllm_runner_numpy.runner
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
facts = make_runner(Path({str(tmp_path)!r})).info.description
print(peak() - before, facts["weight_bytes"], facts["kv_bytes"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    grown, weights, kv = map(int, done.stdout.split())
    assert weights > 150_000_000
    assert grown < weights + kv + 60_000_000
