"""What examples/runner_jax must keep beyond the conformance suite; tests/test_example_runner.py runs it in a child.

Named so that pytest does not collect it by itself: JAX warns whenever a process that has loaded it forks.
"""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from nanovllm_example_jax import Options, plugin
from nanovllm_example_jax.model import layer
from nanovllm_example_jax.runner import ExampleJaxRunner

import model_cases
from models_support import GPT2, LLAMA, write_checkpoint
from nanovllm.errors import ConfigError, UnsupportedModelError
from nanovllm.hookspecs import CacheOptions, Context
from numpy_support import Driver
from numpy_support import make_runner as make_numpy_runner

ROUNDING = {"rtol": 0, "atol": 5e-5}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
COMPUTED = {
    "gpt2": GPT2 | {"activation_function": "gelu"},
    "llama": LLAMA | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}},
    "qwen2": LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True},
    "starcoder2": LLAMA | {"model_type": "starcoder2"},
}


def case(name: str) -> dict:
    model_type, _, config = model_cases.MODELS[name]
    return config | {"model_type": model_type, "vocab_size": 61, "max_position_embeddings": 128}


REFUSED = {
    "qk_norm": case("qwen3"),
    "windows": case("mistral-window"),
    "alibi": case("falcon-rw-alibi"),
    "block": case("gpt_neox"),
    "soft_cap": case("gemma2"),
    "embedding_scale": case("granite"),
    "mlps": case("mixtral"),
}


def make_runner(path: Path, **overrides: object) -> ExampleJaxRunner:
    ctx = {
        "options": Options(),
        "model": str(path),
        "path": path,
        "cache": CacheOptions(block_size=4, num_blocks=64),
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "max_model_len": None,
        "threads": None,
    }
    return plugin.create_runner(Context(**(ctx | overrides)))


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 61, length).tolist()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"), LLAMA)


@pytest.mark.parametrize("name", COMPUTED)
def test_a_family_gives_the_logits_of_the_numpy_runner(name: str, tmp_path: Path) -> None:
    path, tokens = write_checkpoint(tmp_path, COMPUTED[name]), prompt(32)
    wanted = Driver(make_numpy_runner(path)).logits(tokens)
    free = np.random.default_rng(1).permutation(64).tolist()
    np.testing.assert_allclose(Driver(make_runner(path), free).logits(tokens, chunk=8), wanted, **ROUNDING)


@pytest.mark.parametrize("field", REFUSED)
def test_what_it_does_not_compute_is_refused_by_the_name_of_the_field(field: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, REFUSED[field])
    with pytest.raises(UnsupportedModelError, match=rf"^runner 'example-jax' does not compute {field} of architecture"):
        make_runner(path)


def test_nan_of_former_owners_reaches_nobody(llama: Path) -> None:
    runner, texts = make_runner(llama), [prompt(n, seed=n) for n in (3, 9, 14)]
    clean = [Driver(runner).logits(t)[-1] for t in texts]
    for bad in (np.nan, np.inf):
        runner._pool = [[jnp.full_like(part, bad) for part in parts] for parts in runner._pool]
        driver = Driver(runner, np.random.default_rng(0).permutation(64).tolist())
        driver.step(*((i, t, 0, len(t) - 1, 0) for i, t in enumerate(texts)))
        decoded = driver.step(*((i, t, len(t) - 1, len(t), 1) for i, t in enumerate(texts)))
        np.testing.assert_allclose(decoded, clean, **ROUNDING)


def test_lengths_of_one_bucket_are_compiled_once(llama: Path) -> None:
    runner = make_runner(llama)
    Driver(runner).step((0, prompt(17), 0, 17, 1))
    before = layer._cache_size()
    for length in (18, 25, 31, 32):
        Driver(runner).step((0, prompt(length), 0, length, 1))
    assert layer._cache_size() == before
    Driver(runner).step((0, prompt(33), 0, 33, 1))
    assert layer._cache_size() == before + 1


def test_a_device_that_is_not_there_is_an_error_and_no_fallback(llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"finds no gpu here: .*set runner\.device: cpu"):
        make_runner(llama, options=Options(device="gpu"))
    assert make_runner(llama).info.description["device"] == "cpu:0"


def test_threads_that_cannot_be_limited_are_refused(llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot limit JAX's threads; remove runner\.threads"):
        make_runner(llama, threads=1)
