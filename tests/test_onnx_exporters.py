"""Directories as the exporters of today write them, from tiny checkpoints, under continuous batching.

Each exporter runs in an environment of its own, made with pip where EXPORTER_ENVIRONMENTS says (a directory to keep
them in) or in a temporary one. Without a network the tests skip, with pip's reason.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from models_support import GPT2, LLAMA, QWEN3, write_checkpoint
from nanovllm import LLM, SamplingParams
from nanovllm.request import Output
from nanovllm_runner_onnx.model_files import find_onnx_model
from support import REPO

ort = pytest.importorskip("onnxruntime", reason="the runtime: pip install 'nanovllm[onnx]'")
pytestmark = pytest.mark.slow

PACKAGES = {
    "torch": ["torch==2.13.0", "onnxscript>=0.7", "transformers>=5.0"],
    "optimum": ["torch==2.13.0", "optimum-onnx==0.1.0", "transformers<4.58", "onnxruntime"],
    "genai": ["torch==2.13.0", "onnxruntime-genai==0.18.0", "onnxruntime", "onnx-ir", "onnx", "transformers>=5.0"],
}
IDS = {"vocab_size": 288, "bos_token_id": 0, "eos_token_id": 1, "dtype": "float32"}
# Sizes that the builder can quantise in blocks of 32.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "hidden_act": "silu", "rms_norm_eps": 1e-6}
CHECKPOINTS = {
    "llama": LLAMA | IDS | SIZES | {"architectures": ["LlamaForCausalLM"]},
    "qwen2": LLAMA | IDS | SIZES | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen3": QWEN3 | IDS | SIZES | {"head_dim": 32, "architectures": ["Qwen3ForCausalLM"]},
    "gpt2": GPT2 | IDS | {"n_embd": 64, "architectures": ["GPT2LMHeadModel"]},
}
OPTIMUM = "-m optimum.exporters.onnx --model {source} --task {task} {output}"
GENAI = "-m onnxruntime_genai.models.builder -i {source} -o {output} -e cpu -p {precision}"
# Exporter -> (environment, what its python is to run).
EXPORTERS = {
    "torch": ("torch", "{script} {source} {output}/model.onnx"),
    "optimum": ("optimum", OPTIMUM.replace("{task}", "text-generation-with-past")),
    "optimum-no-past": ("optimum", OPTIMUM.replace("{task}", "text-generation")),
    "genai-fp32": ("genai", GENAI.replace("{precision}", "fp32")),
    "genai-int4": ("genai", GENAI.replace("{precision}", "int4")),
}
CASES = [
    *((exporter, "llama") for exporter in EXPORTERS),
    *((exporter, "gpt2") for exporter in ("torch", "optimum")),
    *((exporter, "qwen2") for exporter in ("optimum", "genai-fp32", "genai-int4")),
    ("genai-fp32", "qwen3"),
]
LENGTHS = (1, 2, 29, 7, 16, 40, 3, 11)  # of the prompts
NEW = (12, 30, 5, 20, 9, 25, 40, 16)  # tokens, so that places are left and taken all the time


@pytest.fixture(scope="session")
def environments(tmp_path_factory):
    """`python_of(name)`: the interpreter of an environment, made when it is first asked for."""
    kept = os.environ.get("EXPORTER_ENVIRONMENTS")
    base = Path(kept).expanduser() if kept else tmp_path_factory.mktemp("environments")

    def python_of(name: str) -> Path:
        packages = PACKAGES[name]
        where = base / f"{name}-{hashlib.sha256(repr((packages, sys.version)).encode()).hexdigest()[:12]}"
        python = where / ("Scripts" if os.name == "nt" else "bin") / "python"
        if not (where / "complete").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", where], check=True)
            install = [python, "-m", "pip", "install", "-q", "-c", REPO / "constraints.txt", *packages]
            done = subprocess.run(install, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"the environment for {name} cannot be made: {done.stderr.strip().splitlines()[-1]}")
            (where / "complete").touch()
        return python

    return python_of


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """`checkpoint(name)`: a directory with random weights and a tokenizer of bytes."""

    def make(name: str) -> Path:
        path = tmp_path_factory.getbasetemp() / "checkpoints" / name
        if not path.exists():
            write_checkpoint(path, CHECKPOINTS[name])
            tokenizer = Tokenizer(models.BPE())
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            trainer = trainers.BpeTrainer(
                vocab_size=288, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
            )
            tokenizer.train_from_iterator(["the cat sat on the mat and the rat sat on the cat"], trainer)
            tokenizer.save(str(path / "tokenizer.json"))
            facts = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
            (path / "tokenizer_config.json").write_text(json.dumps(facts | {"model_max_length": 128}))
        return path

    return make


@pytest.fixture(scope="session", params=CASES, ids="-".join)
def exported(request, environments, checkpoint, tmp_path_factory) -> tuple[str, Path, Path]:
    """(exporter, the checkpoint, the directory that the exporter made of it)."""
    exporter, name = request.param
    environment, line = EXPORTERS[exporter]
    python, source, output = environments(environment), checkpoint(name), tmp_path_factory.mktemp(exporter)
    places = {"source": source, "output": output, "script": REPO / "tests" / "export_with_torch.py"}
    arguments = [part.format(**places) for part in line.split()]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(output.parent / "hub")}
    done = subprocess.run([python, *arguments], capture_output=True, text=True, env=os.environ | offline)
    assert done.returncode == 0, done.stderr[-3000:]
    if exporter == "torch":  # writes the graph alone
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(source / file, output)
    return exporter, source, output


def generate(model: Path, runner: str, **options) -> list[Output]:
    rng = np.random.default_rng(7)
    prompts = [rng.integers(2, 259, n).tolist() for n in LENGTHS]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, logprobs=1) for n in NEW]
    with LLM(str(model), runner={"type": runner, "threads": 1}, tokenizer="simple", **options) as llm:
        return llm.generate(prompts, params)


def alone(directory: Path, prompt: list[int], num_tokens: int) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities from ONNX Runtime, one sequence, everything again for every token."""
    model = find_onnx_model(directory)
    session = ort.InferenceSession(model.path, providers=["CPUExecutionProvider"])
    size = model.genai.head_size if model.genai else None
    tokens, logprobs = list(prompt), []
    for _ in range(num_tokens):
        feeds = {}
        for value in session.get_inputs():
            if value.name.startswith("past"):
                heads, last = value.shape[1], value.shape[3]
                feeds[value.name] = np.zeros((1, heads, 0, last if isinstance(last, int) else size), np.float32)
            else:
                feeds[value.name] = {
                    "input_ids": np.array([tokens]),
                    "attention_mask": np.ones((1, len(tokens)), np.int64),
                    "position_ids": np.arange(len(tokens))[None],
                }[value.name]
        row = session.run(["logits"], feeds)[0][0, -1].astype(np.float64)
        tokens.append(int(row.argmax()))
        logprobs.append(-float(np.log(np.exp(row - row.max()).sum())))
    return tokens[len(prompt) :], logprobs


def logprobs_of(output: Output) -> list[float]:
    return [entry.logprob for entry in output.logprobs]


def test_in_mixed_company_it_is_what_it_is_alone(exported):
    exporter, source, directory = exported
    # Four places for eight requests, and prompts of more tokens than a step may have.
    found = generate(directory, "onnx", max_num_seqs=4, max_num_batched_tokens=16)
    assert [len(output.token_ids) for output in found] == list(NEW)
    if exporter != "genai-int4":  # another function than the checkpoint's
        wanted = generate(source, "numpy")
        for ours, theirs in zip(found, wanted, strict=True):
            assert list(ours.token_ids) == list(theirs.token_ids)
            np.testing.assert_allclose(logprobs_of(ours), logprobs_of(theirs), atol=1e-4)
    for output in found[:3]:
        tokens, logprobs = alone(directory, list(output.prompt_token_ids), 5)
        assert list(output.token_ids[:5]) == tokens
        np.testing.assert_allclose(logprobs_of(output)[:5], logprobs, atol=1e-4)


def test_the_directory_answers_with_its_own_files(exported):
    _, _, directory = exported
    with LLM(str(directory), runner={"type": "onnx", "threads": 1}) as llm:
        assert (llm.info.eos_ids, llm.info.vocab_size, llm.info.max_model_len) == ((1,), 288, 128)
        [output] = llm.generate(["the cat"], SamplingParams(temperature=0, max_tokens=5))
        assert list(output.prompt_token_ids) == llm.tokenizer.encode("the cat")
        assert len(output.token_ids) in range(1, 6)
