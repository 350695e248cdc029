"""`nanovllm compare` on the embedded checkpoint: in what its backends differ, and that switching is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result

from nanovllm import LLM, SamplingParams
from nanovllm.aio import AsyncLLM
from nanovllm.cli import cli
from nanovllm.compare import show
from nanovllm.compare.comparison import compare_answers
from nanovllm.compare.prompts import BUILT_IN
from nanovllm.config import load
from server_support import serving

pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")

TEXT = "The capital of France is Paris. Once upon a time there was a little dog who lived near the sea. " * 20


def compare(*words: str) -> Result:
    return CliRunner(env={"MODEL_PATH": None, "TOKENIZER_PATH": None}).invoke(cli, ["compare", *words])


def write(name: str, runner: Any, **more: Any) -> str:
    Path(name).write_text(yaml.safe_dump({"model": "demo", "runner": runner, **more}))
    return name


def test_one_checkpoint_on_every_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with serving(llm=AsyncLLM("demo", runner="numpy")) as served:
        files = [
            write("numpy.yaml", "numpy"),
            write("fp32.yaml", "onnx"),
            write("int4.yaml", {"type": "onnx", "weights": "int4"}),
            write("torch.yaml", {"type": "torch", "dtype": "fp32"}),
            write("http.yaml", {"type": "http", "url": served.url}),
        ]
        comparison = compare_answers(
            [(file, load(file, environ={})) for file in files],
            BUILT_IN,
            SamplingParams(temperature=0, max_tokens=32, seed=0),
            text=TEXT,
        )
    assert comparison.failures == {}
    assert comparison.differs()
    document = show.document(comparison, is_strict=False)
    verdicts = {c["name"]: c for c in document["comparisons"]}
    for name in ("fp32.yaml", "torch.yaml", "http.yaml"):
        assert [d for d in verdicts[name]["differences"] if not d["is_tie"]] == []
        assert verdicts[name]["largest_difference"] < 1e-3
        assert abs(verdicts[name]["perplexity_increase"]["ratio"]) < 1e-4
    assert [v["unit"] for v in verdicts.values()] == ["logits", "logits", "logits", "log-probabilities"]

    rounded = verdicts["int4.yaml"]
    assert {d["stage"] for d in rounded["differences"]} == {"logits"}
    for difference in rounded["differences"]:
        logits = difference["logits"]
        (a, b), (c, d) = logits["reference"], logits["other"]
        assert a > b
        assert d > c
        assert 1e-3 < ((a - b) + (d - c)) / 2 <= logits["largest_difference"] + 1e-6  # else no flip
    told = {name: c["perplexity"]["value"] for name, c in document["configurations"].items()}
    assert rounded["perplexity_increase"]["ratio"] == pytest.approx(told["int4.yaml"] / told["numpy.yaml"] - 1)

    answers, _ = show.tables(comparison)
    assert [(*row[:3], row[4]) for row in answers.rows] == [
        ("numpy.yaml", "numpy", "demo", "reference"),
        ("fp32.yaml", "onnx", "demo", "equal"),
        ("int4.yaml", "onnx", "demo", "logits"),
        ("torch.yaml", "torch", "demo", "equal"),
        ("http.yaml", "http", "demo", "equal"),
    ]
    (sentence,) = show.sentences(comparison)
    assert sentence.startswith(
        "int4.yaml, prompt 2 ('Once upon a time'), token 3: logits (and in 1 more): numpy.yaml drew"
    )


@pytest.mark.slow
def test_perplexity_is_that_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    from nanovllm.plugins import resolve_model

    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    write("a.yaml", "numpy")
    document = json.loads(compare("a.yaml", "a.yaml", "--text", "text.txt", "--prompt", "A", "--json").stdout)
    told = document["configurations"]["a.yaml (1)"]["perplexity"]

    path = resolve_model("demo")[1]
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = transformers.AutoTokenizer.from_pretrained(path)(TEXT)["input_ids"]
    losses: list[float] = []
    for start in range(0, len(ids), 256):
        window = torch.tensor([ids[start : start + 256]])
        if window.shape[1] > 1:
            with torch.inference_mode():
                logits = model(window).logits[0, :-1]
            losses += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none").tolist()
    assert len(ids) > 256
    assert told["scored_tokens"] == len(losses)
    assert told["value"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)


def test_switching_the_runner_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy to ONNX to PyTorch and back: the application does not change, nor do its greedy tokens."""
    monkeypatch.chdir(tmp_path)

    def application() -> list[list[int]]:
        questions = [f"What is the capital of {country}?" for country in ("France", "Japan", "Peru")]
        with LLM.from_config("app.yaml") as llm:
            outputs = llm.chat([[{"role": "user", "content": q}] for q in questions], SamplingParams(temperature=0))
            return [output.token_ids for output in outputs]

    answers, files = [], []
    for i, runner in enumerate(("numpy", "onnx", "torch", "onnx")):
        write("app.yaml", runner)
        answers.append(application())
        files.append(f"{i}.yaml")
        Path(files[-1]).write_text(Path("app.yaml").read_text())
    assert answers[1:] == answers[:1] * 3
    assert all(answers[0])
    lines = [Path(file).read_text().splitlines() for file in files]
    assert [len(set(versions)) for versions in zip(*lines, strict=True)] == [1, 3]
    assert compare(*files).exit_code == 0
