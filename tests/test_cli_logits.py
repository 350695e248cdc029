"""`logits`: the raw row after a prompt against references, and the expected token's place in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from nanovllm.builtin.mock import MockRunner, chain_logits, chain_states
from nanovllm.builtin.simple_bpe import SimpleBPETokenizer
from nanovllm.cli import cli
from support import DATA, needs_data

TOKENIZER = SimpleBPETokenizer()
PROMPT = "what is the word"
IDS = TOKENIZER.encode(PROMPT)


def run(*arguments: str) -> Result:
    runner = CliRunner(env={"MODEL_PATH": None, "TOKENIZER_PATH": None})
    return runner.invoke(cli, ["logits", "--prompt", PROMPT, "-r", "mock", *arguments])


def document(*arguments: str) -> dict[str, Any]:
    return json.loads(run("--json", *arguments).stdout)


def rows() -> np.ndarray:
    return chain_logits(chain_states(IDS), TOKENIZER.vocab_size).astype(np.float64)  # (tokens, vocab)


@pytest.mark.parametrize("position", [-1, 0, 2, -3])
def test_the_row_after_any_token(position: int) -> None:
    row, found = rows()[position], document("--position", str(position), "--top", "7")
    probabilities = np.exp(row) / np.exp(row).sum()
    assert found["prompt_ids"] == IDS
    assert found["position"] == range(len(IDS))[position]
    assert (found["vocab_size"], found["expected"]) == (125, None)
    assert [found["min"], found["mean"], found["max"]] == pytest.approx([row.min(), row.mean(), row.max()])
    assert [token["id"] for token in found["top"]] == np.argsort(-row)[:7].tolist()
    assert [token["rank"] for token in found["top"]] == list(range(1, 8))
    for token in found["top"]:
        assert token["logit"] == pytest.approx(row[token["id"]])
        assert token["logprob"] == pytest.approx(np.log(probabilities[token["id"]]))
        assert token["text"] == TOKENIZER.decode([token["id"]])


@pytest.mark.parametrize(
    "extra", [["scheduler.max_num_batched_tokens=32"], ["runner.layout=lanes"], ["cache.block_size=1"]]
)
def test_steps_blocks_and_lanes_change_nothing(extra: list[str]) -> None:
    long = " ".join(["what is the word"] * 30)
    plain = json.loads(run("--json", "--prompt", long).stdout)
    assert json.loads(run("--json", "--prompt", long, *(f"--set={x}" for x in extra)).stdout) == plain


def test_logits_may_be_of_any_array_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one on a GPU, which does not become a NumPy array by itself."""
    plain = document()

    class OnDevice:
        def __init__(self, array: np.ndarray) -> None:
            self.array = array

        def __getitem__(self, row: int) -> OnDevice:
            return OnDevice(self.array[row])

        def __array__(self, *_: object, **__: object) -> np.ndarray:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")

        def tolist(self) -> list[float]:
            return self.array.tolist()

    forward = MockRunner.forward
    monkeypatch.setattr(MockRunner, "forward", lambda self, packed: OnDevice(forward(self, packed)))
    assert document() == plain


def test_an_expected_token_decides_the_exit_status() -> None:
    best, second = np.argsort(-rows()[-1])[:2].tolist()
    for token, status in ((best, 0), (second, 1)):
        for arguments in (["--expect-id", str(token)], ["--expect-text", TOKENIZER.decode([token])]):
            assert run(*arguments).exit_code == status
            assert document(*arguments)["expected"]["id"] == token
            assert document(*arguments)["expected"]["rank"] == status + 1
    assert "\nExpected:\n     1 " in run("--expect-id", str(best)).stdout
    assert "\nExpected, but not the most likely:\n     2 " in run("--expect-id", str(second)).stdout


def test_what_people_read() -> None:
    lines = run("--top", "2").stdout.splitlines()
    row = rows()[-1]
    assert lines[0] == f"After token {len(IDS) - 1} ('word') of {len(IDS)}:"
    assert lines[1] == f"125 logits, mean {row.mean():.4f}, min {row.min():.4f}, max {row.max():.4f}"
    assert lines[3].split() == ["rank", "id", "logit", "logprob", "token"]
    assert len(lines) == 6


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--position", "99"], 2, f"error: the prompt has {len(IDS)} tokens, so it has no position 99"),
        (["--prompt", ""], 2, "error: the prompt has 0 tokens, so it has no position -1"),
        (["--expect-id", "125"], 2, "error: there is no token 125: the model's vocabulary has 125 entries"),
        (["--expect-text", "the word"], 2, "error: 'the word' is not one token; it is 3: 'the', ' ', 'word'"),
        (["--expect-text", ""], 2, "error: '' is not one token"),
        (["--expect-text", "a", "--expect-id", "1"], 2, "not both"),
        (["--top", "0"], 2, "Invalid value for '--top'"),
        (["--set", "max_model_len=4"], 2, f"error: the prompt has {len(IDS)} tokens, and the model takes 4"),
        (
            ["--set", "cache.num_blocks=1", "--set", "cache.block_size=4"],
            2,
            "and the model takes 4; shorten the prompt",
        ),
        (["--set", f"runner.script.nan_token={IDS[0]}"], 5, "error: 125 of the 125 logits are not finite numbers"),
    ],
)
def test_bad_calls(arguments: list[str], status: int, says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == status
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_a_runner_without_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanovllm.builtin.plugins import _Mock
    from nanovllm.hookspecs import Context, hookimpl
    from nanovllm.runner import ModelRunner

    class Tokens(ModelRunner):
        info = MockRunner().info
        execute = MockRunner.execute

    @hookimpl
    def create_runner(self: _Mock, ctx: Context) -> ModelRunner:
        return Tokens()

    monkeypatch.setattr(_Mock, "create_runner", create_runner)
    result = run()
    assert (result.exit_code, result.stderr) == (
        2, "error: runner 'mock' returns tokens, not logits; choose a local runner\n",
    )  # fmt: skip


@needs_data
@pytest.mark.parametrize("name", ["stories260k", "slm4096-gpt2"])
def test_logits_of_real_models_equal_the_reference(name: str) -> None:
    pytest.importorskip("nanovllm_runner_numpy")
    directory: Path = DATA / "checkpoints" / name
    case = json.loads((directory / "reference.json").read_text())["cases"][0]
    wanted = case["last_logits_top5"]
    arguments = ["-r", "numpy", "-m", str(directory), "--prompt", case["prompt"], "--expect-id", str(wanted["ids"][0])]
    result = run(*arguments, "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["prompt_ids"] == case["input_ids"]
    assert [token["id"] for token in found["top"]] == wanted["ids"]
    assert [token["logit"] for token in found["top"]] == pytest.approx(wanted["values"], abs=1e-4)
    assert found["top"][0]["logit"] - found["top"][0]["logprob"] == pytest.approx(case["last_logsumexp"], abs=1e-4)
