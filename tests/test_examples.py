"""Every example runs as it is written, and says what it is there to say. So does every benchmark, in small."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.components import choose
from nanovllm.config import load
from support import REPO

# What each prints, whatever is sampled.
SAYS = {
    "quickstart": ["France: The capital of France is Paris.", "Japan: The capital of Japan is Tokyo."],
    "stream": ["tokens, the first after"],
    "async_chat": [
        "Who are you? ->",
        "What is the capital of Japan? -> The capital of Japan is Tokyo.",
        "enough of this",
    ],
    "client_requests": [
        "The capital of France is Paris.\nLatency: ",
        "Tokens/sec: ",
        "The capital of France is Paris.\nTime to first token: ",
    ],
    "export_onnx": ["model.onnx, model.onnx.data, model_info.json, tokenizer.json", "loaded in", "Lisbon"],
    "from_components": ["'hello world' -> ", "2 prompt tokens came from the prefix cache"],
    "http_backend": ["Prompt: Hello, world!\nOutput: ", "Prompt: Explain quantum computing.\nOutput: "],
    "nano_vllm_example": ["Prompt: 'introduce yourself'\nCompletion: "],
}
BENCHMARKS = {
    "engine_overhead.py --steps 2 --seqs 4 --contexts 20": ["greedy", "sampled"],
    "http_step.py --steps 5 --rounds 1 --seqs 2": ["1.00 calls per step, 1 connection(s), same tokens: True"],
    "prefix_cache.py --rounds 1": ["992 of them found in the cache"],
    "soak.py --requests 100": ["100 requests", "slope"],
    "trace_cost.py --rounds 1 --full 64": ["us more", "trace.json.gz: ", "64 steps and 16 sequences kept"],
}


def run(script: str) -> str:
    """Its stdout; fails with its stderr. Warnings are errors there too."""
    environment = {**os.environ, "PYTHONWARNINGS": "error", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, *script.split()]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_no_example_is_forgotten() -> None:
    assert {p.stem for p in (REPO / "examples").glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_an_example_runs(name: str) -> None:
    out = run(f"examples/{name}.py")
    for text in SAYS[name]:
        assert text in out


@pytest.mark.parametrize("command", BENCHMARKS, ids=lambda c: c.split(".")[0])
def test_a_benchmark_runs(command: str) -> None:
    out = run(f"benchmarks/{command}")
    for text in BENCHMARKS[command]:
        assert text in out


def test_the_profiles_are_configurations_of_today_and_the_first_answers() -> None:
    path = REPO / "examples" / "profiles.yaml"
    chosen = [load(path, environ={}, overrides={"profile": name}) for name in ("dev", "cpu-prod", "gpu-prod")]
    for loaded in chosen:
        choose(loaded, None)
    assert chosen[0].profiles == ("dev", "cpu-prod", "gpu-prod")
    with LLM.from_config(path) as llm:
        assert llm.info.description["dtype"].endswith("float32 in memory")
        assert llm.generate("What is the capital of Peru?", SamplingParams(max_tokens=1))
