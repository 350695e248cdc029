"""The model maker: files that transformers reads, outliers that change nothing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from nanovllm.llm import LLM
from nanovllm.request import SamplingParams
from support import REPO

BENCHMARKS = REPO / "benchmarks"


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, BENCHMARKS / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


models = script("models.py")
PROMPTS = [[(3 + 11 * i * k) % 256 for i in range(12)] for k in (1, 2, 3)]


def tokens(directory: Path, num_tokens: int = 16) -> list[list[int]]:
    with LLM(directory, runner="numpy") as llm:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        return [output.token_ids for output in llm.generate(PROMPTS, params, show_progress=False)]


def test_the_shapes_have_the_published_sizes() -> None:
    assert models.num_parameters("gpt2") == 124_439_808  # OpenAI's GPT-2 small
    assert models.num_parameters("qwen2-0.5b") == 494_032_768  # Qwen/Qwen2-0.5B


@pytest.mark.parametrize("shape", ["gpt2-tiny", "qwen2-tiny"])
def test_equal_arguments_give_equal_files_and_another_seed_another_model(shape: str, tmp_path: Path) -> None:
    first, again, other = (models.make(shape, tmp_path / str(i), seed=s) for i, s in enumerate((0, 0, 1)))
    for file in sorted(first.iterdir()):
        assert file.read_bytes() == (again / file.name).read_bytes()
    assert tokens(first) != tokens(other)
    assert len({t for row in tokens(first) for t in row}) > 5, "a model that repeats itself would hide differences"


@pytest.mark.parametrize("shape", ["gpt2-tiny", "qwen2-tiny"])
def test_outliers_are_large_and_leave_the_function_alone(shape: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    plain, planted = (models.make(shape, tmp_path / str(n), outliers=n) for n in (0, 6))
    assert tokens(plain) == tokens(planted)
    before, after = (load_file(d / "model.safetensors") for d in (plain, planted))
    norm = "transformer.h.0.ln_1.weight" if shape.startswith("gpt2") else "model.layers.0.input_layernorm.weight"
    gains = after[norm] / before[norm]
    assert sorted(gains) == [1.0] * (len(gains) - 6) + [16.0] * 6
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert len(changed) == 2 * (6 if shape.startswith("gpt2") else 7)  # per layer: norms and what reads them


def test_bf16_is_rounded_to_the_nearest(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).standard_normal(10_000, dtype=np.float32)
    rounded = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(models.to_bf16(values), rounded)
    directory = models.make("gpt2-tiny", tmp_path / "m", dtype="bf16")
    assert json.loads((directory / "config.json").read_text())["dtype"] == "bfloat16"
    assert len(tokens(directory)[0]) == 16


def test_the_tokenizer_turns_every_id_into_text(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    directory = models.make("gpt2-tiny", tmp_path / "m")
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 512
    assert tokenizer.decode(tokenizer.encode("Grüße, 你好!\n").ids) == "Grüße, 你好!\n"
    assert tokenizer.decode([300], skip_special_tokens=False) == "<unused300>"


def test_the_script_lists_and_writes(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(BENCHMARKS / "models.py"), *arguments], capture_output=True, text=True, check=False
        )

    assert "124,439,808 parameters" in run().stdout
    assert run("gpt2-tiny", str(tmp_path / "m")).returncode == 0
    assert (tmp_path / "m" / "model.safetensors").is_file()
    assert "--outliers must be between 0 and the model's width, 64" in run("gpt2-tiny", "x", "--outliers", "65").stderr
