"""`ask`, `generate` and `demo` on the mock runner (and the numpy runner, where the data is at hand)."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner, Result

from nanovllm.builtin.mock import expected
from nanovllm.builtin.simple_bpe import SimpleBPETokenizer
from nanovllm.cli import cli
from nanovllm.llm import LLM
from nanovllm.request import SamplingParams
from support import DATA, needs_data

QUESTIONS = ["what is this", "who", "where is the word"]
MOCK = ["-r", "mock", "--set", "runner.seed=5"]


def run(*arguments: str, charset: str = "utf-8", stdin: str | None = None) -> Result:
    runner = CliRunner(env={"MODEL_PATH": None, "TOKENIZER_PATH": None}, charset=charset)
    return runner.invoke(cli, list(arguments), input=stdin)


def chat_ids(question: str) -> list[int]:
    return SimpleBPETokenizer().chat([{"role": "user", "content": question}])


# ---------------------------------------------------------------------------------------------- ask


def test_ask_prints_what_was_loaded_each_answer_and_a_summary() -> None:
    result = run("ask", *QUESTIONS, *MOCK, "--ignore-eos", "--max-tokens", "7")
    assert result.exit_code == 0
    assert result.stderr == ""
    for line in ("✓ Model: demo", "  Vocab size: 125", "  EOS token: 2", "✓ Runner: mock", "Questions: 3"):
        assert re.search(f"^{line}", result.stdout, re.MULTILINE)
    assert re.search(r"^✓ Tokenizer: SimpleBPETokenizer \(vocab: 125\)$", result.stdout, re.MULTILINE)
    assert re.search(r"^Stats: Prefill \d+ tok/s, Decode \d+ tok/s$", result.stdout, re.MULTILINE)
    assert "✓ 3 answered, 21 tokens" in result.stdout
    at = 0
    for number, question in enumerate(QUESTIONS, 1):  # in the order of the questions (D1)
        answer = SimpleBPETokenizer().decode(expected(chat_ids(question), 7, seed=5)).strip()
        block = f"\nQuestion {number}: {question}\nAnswer: {answer}\nTokens: 7\n"
        assert block in result.stdout[at:]
        at = result.stdout.index(block) + 1


def test_the_json_twin_says_the_same() -> None:
    document = json.loads(run("ask", *QUESTIONS, *MOCK, "--max-tokens", "7", "--json").stdout)
    assert [a["question"] for a in document["answers"]] == QUESTIONS
    for answer in document["answers"]:
        ids = expected(chat_ids(answer["question"]), 7, seed=5)
        ids = ids[: ids.index(2) + 1] if 2 in ids else ids
        assert answer["token_ids"] == ids
        assert answer["num_tokens"] == len(ids)
        assert (answer["finish"], answer["error"]) == ("stop" if 2 in ids else "length", None)
    assert document["loaded"]["runner"] == "mock"
    assert document["loaded"]["eos_ids"] == [2]
    assert document["stats"]["prefill_tokens"] == sum(len(chat_ids(q)) for q in QUESTIONS)


def test_plain_ascii_where_stdout_is_not_utf8() -> None:
    result = run("ask", "caf\u00e9 \u4f60", *MOCK, "--max-tokens", "3", charset="ascii")
    assert result.exit_code == 0
    assert result.stdout_bytes.isascii()
    assert "* Runner: mock" in result.stdout
    assert "=" * 40 in result.stdout
    assert "Question 1: caf? ?" in result.stdout


def test_the_default_length_is_a_quarter_of_the_context() -> None:
    document = json.loads(run("ask", "who", *MOCK, "--set", "max_model_len=64", "--ignore-eos", "--json").stdout)
    assert document["answers"][0]["num_tokens"] == 16


def test_the_flags_of_nano_vllm_go() -> None:
    old = run("ask", "-model", "some-name", "-temp", "0.7", "-max-tokens", "4", "--seed", "3", *MOCK, "--json", "who")
    new = run(
        "ask", "--model", "some-name", "--temp", "0.7", "--max-tokens", "4", "--seed", "3", *MOCK, "--json", "who"
    )
    assert json.loads(old.stdout)["answers"] == json.loads(new.stdout)["answers"]
    assert json.loads(old.stdout)["loaded"]["model"] == "some-name"


@pytest.mark.parametrize("command", ["ask", "generate"])
def test_every_sampling_flag_reaches_the_sampler(command: str) -> None:
    with LLM(runner="mock") as llm:
        params = SamplingParams(
            temperature=0.9, max_tokens=20, top_k=30, top_p=0.9, min_p=0.01, repetition_penalty=1.2, seed=11,
            stop=["q", "Z"], ignore_eos=True,
        )  # fmt: skip
        prompt = [{"role": "user", "content": "who"}] if command == "ask" else "who"
        output = llm.generate(prompt, params)[0]
    result = run(
        command, "who", "-r", "mock", "--json", "--temperature", "0.9", "--max-tokens", "20", "--top-k", "30",
        "--top-p", "0.9", "--min-p", "0.01", "--repetition-penalty", "1.2", "--seed", "11", "--stop", "q",
        "--stop", "Z", "--ignore-eos",
    )  # fmt: skip
    document = json.loads(result.stdout)
    answer = document["answers" if command == "ask" else "outputs"][0]
    assert (answer["text"], answer["token_ids"]) == (output.text, output.token_ids)


def test_without_a_chat_template_questions_are_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanovllm.errors import TokenizerError

    def chat(self: object, messages: object) -> list[int]:
        raise TokenizerError("no chat template")

    monkeypatch.setattr(SimpleBPETokenizer, "chat", chat)
    result = run("ask", "who", *MOCK, "--max-tokens", "4")
    assert "The model has no chat template: the questions were sent as plain text." in result.stdout
    document = json.loads(run("ask", "who", *MOCK, "--max-tokens", "4", "--ignore-eos", "--json").stdout)
    assert document["chat"] is False
    assert document["answers"][0]["token_ids"] == expected(SimpleBPETokenizer().encode("who"), 4, seed=5)


def test_a_failed_answer_is_shown_beside_the_good_ones_and_ends_with_status_5() -> None:
    (bad,) = set(SimpleBPETokenizer().encode("Z")) - set(SimpleBPETokenizer().encode("who"))
    arguments = [
        "ask",
        "who",
        "Z",
        *MOCK,
        "--set",
        f"runner.script.nan_token={bad}",
        "--set",
        "runner.script.tokens=[10]",
    ]
    result = run(*arguments, "--max-tokens", "1")
    assert result.exit_code == 5
    assert re.search(r"Question 1: who\nAnswer: .+\nTokens: 1\n", result.stdout)
    assert re.search(r"Question 2: Z\nAnswer: \nError: .+\nTokens: 0\n", result.stdout)
    assert result.stderr.startswith("error: ")
    document = json.loads(run(*arguments, "--max-tokens", "1", "--json").stdout)
    assert [a["error"] is None for a in document["answers"]] == [True, False]


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["ask"], 2, "Missing argument"),
        (["ask", "who", "-r", "absent"], 3, "error: no runner named 'absent' is installed"),
        (["ask", "who", *MOCK, "--temperature", "nan"], 2, "error: temperature must be a finite number"),
        (["ask", "who", *MOCK, "--temperature", "hot"], 2, "is not a valid float"),
        (["ask", "who", *MOCK, "--max-tokens", "0"], 2, "error: max_tokens must be "),
        (["ask", "who", *MOCK, "--set", "max_model_len=8"], 2, "error: "),
        (["generate", "", *MOCK], 2, "error: "),
        (["generate", "a", "", *MOCK], 2, "error: prompt 1 of 2: "),
        (["ask", "who", "-c", "no-such.yaml"], 2, "error: configuration file no-such.yaml cannot be read"),
    ],
)
def test_bad_calls(arguments: list[str], status: int, says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == status
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_an_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "chat", interrupted)
    result = run("ask", "who", *MOCK)
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


# ----------------------------------------------------------------------------------------- generate


def test_generate_prints_the_prompt_and_its_continuation() -> None:
    ids = SimpleBPETokenizer().encode("the word")
    new = expected(ids, 9, seed=5)
    arguments = ["generate", *MOCK, "--temperature", "0", "--max-tokens", "9", "--ignore-eos"]
    text = SimpleBPETokenizer().decode(ids + new)
    assert run(*arguments, "the word").stdout == text + "\n"
    assert run(*arguments, stdin="the word\n").stdout == text + "\n"
    document = json.loads(run(*arguments, "the word", "--json").stdout)
    (output,) = document["outputs"]
    assert (output["prompt"] + output["text"], output["token_ids"], output["prompt_token_ids"]) == (text, new, ids)
    both = run(*arguments, "the word", "a").stdout
    assert (
        both == f"{text}\n---\na{SimpleBPETokenizer().decode(expected(SimpleBPETokenizer().encode('a'), 9, seed=5))}\n"
    )


def test_a_refused_prompt_prints_nothing_on_stdout() -> None:
    result = run("generate", *MOCK, "--set", "max_model_len=4", "the the the the the the")
    assert (result.exit_code, result.stdout) == (2, "")


def test_a_reader_that_goes_away_leaves_no_traceback() -> None:
    program = "from nanovllm.cli import main; main()"
    arguments = ["generate", *MOCK, "--ignore-eos", "--max-tokens", "3000", "a"]
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(5)
        process.stdout.close()
        assert process.stderr.read() == b""


@needs_data
@pytest.mark.parametrize("name", ["stories260k", "slm4096-gpt2"])
def test_generate_continues_as_the_reference_says(name: str) -> None:
    directory = DATA / "checkpoints" / name
    case = json.loads((directory / "reference.json").read_text())["cases"][0]
    arguments = ["generate", "-m", str(directory), "--temperature", "0", "--ignore-eos", "--json", case["prompt"]]
    (output,) = json.loads(run(*arguments, "--max-tokens", str(len(case["greedy_new_ids"]))).stdout)["outputs"]
    assert output["token_ids"] == case["greedy_new_ids"]
    assert output["prompt"] + output["text"] == case["greedy_text"]


# --------------------------------------------------------------------------------------------- demo


def test_demo_capitals_prints_eight_lines() -> None:
    pytest.importorskip("nanovllm_models")
    tokenizer = SimpleBPETokenizer()
    scripted = [*tokenizer.encode("it is"), *tokenizer.eos_ids]
    result = run("demo", "capitals", "-r", "mock", "--set", f"runner.script.tokens={scripted}")
    assert result.exit_code == 0
    countries = ("France", "Italy", "Germany", "Japan", "Spain", "England", "Russia", "China")  # S4-09
    lines = [f"Q: What is the capital of {country}? A: {tokenizer.decode(scripted).strip()}" for country in countries]
    assert result.stdout.splitlines() == lines
    assert "capitals" in run("demo").output
