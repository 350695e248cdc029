"""`generate --input IN --output OUT`: JSONL to JSONL, resumable, errors as lines."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nanovllm.builtin.mock import expected
from nanovllm.builtin.simple_bpe import SimpleBPETokenizer
from nanovllm.cli import cli
from pseudo_terminal import Terminal, needs_terminal

MOCK = ["-r", "mock", "--set", "runner.seed=5", "--temperature", "0", "--ignore-eos", "--max-tokens", "6"]
TOKENIZER = SimpleBPETokenizer()


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> Result:
    runner = CliRunner(env={"MODEL_PATH": None, "TOKENIZER_PATH": None})
    return runner.invoke(cli, ["generate", *MOCK, "--input", "in.jsonl", "--output", "out.jsonl", *arguments])


def write(*rows: Any) -> None:
    Path("in.jsonl").write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))


def read() -> list[dict[str, Any]]:
    lines = Path("out.jsonl").read_text().splitlines()
    return sorted((json.loads(line) for line in lines), key=lambda row: row["index"])


def text(prompt: str | list[dict[str, str]], num_tokens: int = 6) -> str:
    ids = TOKENIZER.encode(prompt) if isinstance(prompt, str) else TOKENIZER.chat(prompt)
    return TOKENIZER.decode(expected(ids, num_tokens, seed=5))


def test_prompts_messages_and_ids_with_parameters_of_their_own() -> None:
    messages = [{"role": "user", "content": "who"}]
    write({"prompt": "the word"}, {"messages": messages, "id": "b", "max_tokens": 3}, {"prompt": [30, 31], "id": 7})
    result = run()
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "out.jsonl: 3 answered, 0 failed\n"
    rows = read()
    assert [row.get("id") for row in rows] == [None, "b", 7]
    wanted = [text("the word"), text(messages, 3), TOKENIZER.decode(expected([30, 31], 6, seed=5))]
    assert [row["text"] for row in rows] == wanted
    assert [row["num_tokens"] for row in rows] == [6, 3, 6]
    assert [row["num_prompt_tokens"] for row in rows] == [
        len(TOKENIZER.encode("the word")), len(TOKENIZER.chat(messages)), 2,
    ]  # fmt: skip
    assert {row["finish"] for row in rows} == {"length"}


def test_log_probabilities_come_where_a_line_asks() -> None:
    write({"prompt": "who", "logprobs": 2, "prompt_logprobs": 0}, {"prompt": "who"})
    run()
    asked, plain = read()
    assert [score["id"] for score in asked["logprobs"]] == expected(TOKENIZER.encode("who"), 6, seed=5)
    assert all(score["rank"] == 1 and len(score["top"]) == 2 for score in asked["logprobs"])
    assert asked["prompt_logprobs"][0] is None
    assert "logprobs" not in plain


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "who"', "not usable JSON: "),
        ("[" * 100_000, "not usable JSON: "),
        ('{"prompt": ' + "[" * 900 + "]" * 900 + "}", "prompt[0] is a list"),
        ('{"prompt": "\xff"}', "not usable JSON: "),
        ("[1]", "a request is a JSON object, not [1]"),
        ({"prompt": "who", "tmperature": 1}, "unknown field 'tmperature'; did you mean 'temperature'?"),
        ({"prompt": "who", "messages": [{"role": "user", "content": "x"}]}, "either 'prompt' or 'messages'"),
        ({"id": 3}, "either 'prompt' or 'messages'"),
        ({"messages": "who"}, "messages must be a list of messages, not 'who'"),
        ({"messages": [{"role": "user"}]}, "messages[0] needs a text under 'content'"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": 5}, "a prompt is text, token ids or chat messages, not int"),
        ({"prompt": "who", "temperature": "hot"}, "temperature must be a finite number, not 'hot'"),
        ({"prompt": "who", "logit_bias": {"x": 1}}, "logit_bias must map token ids to numbers"),
        ({"prompt": "who", "id": [1]}, "id must be a text or a whole number, not [1]"),
        ({"prompt": [10**6]}, "the prompt holds the token id 1000000"),
        ({"prompt": "word " * 5000}, "the model's length is 4096"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_line_is_a_line(line: Any, says: str) -> None:
    write({"prompt": "who", "id": "good"}, line if isinstance(line, str) else {"id": "bad", **line}, {"prompt": "word"})
    if "\xff" in str(line):
        Path("in.jsonl").write_bytes(Path("in.jsonl").read_text().encode("latin-1"))
    result = run()
    assert result.exit_code == 5
    assert result.stderr == 'error: out.jsonl: 2 answered, 1 failed; its lines with "error" say why\n'
    good, bad, other = read()
    assert (good["text"], other["text"]) == (text("who"), text("word"))
    assert says in bad["error"]
    assert "text" not in bad


def test_an_id_belongs_to_one_line() -> None:
    write(
        {"prompt": "who", "id": "a"},
        {"prompt": "word", "id": "a"},
        {"prompt": "x", "id": "1"},
        {"prompt": "y", "id": 1},
    )
    for _ in range(2):  # and again, with the answers there
        assert run().exit_code == 5
        rows = read()
        assert [row.get("error") for row in rows] == [None, "id 'a' is that of an earlier line", None, None]


def test_a_request_that_fails_is_a_line_and_is_tried_again() -> None:
    write(*({"prompt": "who", "id": str(i)} for i in range(4)))
    result = run("--set", "runner.script.fail_steps=[1]", "--set", "scheduler.max_num_seqs=2")
    assert result.exit_code == 5
    assert ["error" in row for row in read()] == [True, True, False, False]
    result = run()
    assert (result.exit_code, result.stderr) == (0, "out.jsonl: 2 answered, 2 kept, 0 failed\n")
    assert [row["text"] for row in read()] == [text("who")] * 4


def test_a_dead_runner_ends_the_command_and_a_later_run_does_the_rest() -> None:
    write(*({"prompt": "who", "id": str(i)} for i in range(9)))
    result = run("--set", "runner.script.dead_step=8", "--set", "scheduler.max_num_seqs=2")
    assert result.exit_code == 5
    assert "the engine is dead" in result.stderr
    assert run().exit_code == 0
    assert [row["text"] for row in read()] == [text("who")] * 9


def test_what_is_answered_is_not_done_again() -> None:
    write({"prompt": "who"}, {"prompt": "word", "id": "w"})
    run()
    before = Path("out.jsonl").read_bytes()
    assert run("--set", "runner.script.dead_step=1").stderr == "out.jsonl: 0 answered, 2 kept, 0 failed\n"
    assert Path("out.jsonl").read_bytes() == before
    write({"prompt": "who"}, "", {"prompt": "new"}, {"prompt": "word", "id": "w"})  # an id is found where it moved to
    assert run().stderr == "out.jsonl: 1 answered, 2 kept, 0 failed\n"


@pytest.mark.parametrize(
    ("row", "arguments"),
    [({"prompt": "other"}, []), ({"prompt": "who", "seed": 1}, []), ({"prompt": "who"}, ["--max-tokens", "7"]),
     ({"prompt": "who"}, ["--model", "another"])],
)  # fmt: skip
def test_an_answer_to_another_request_is_not_taken(row: dict[str, Any], arguments: list[str]) -> None:
    write({"prompt": "who"}, {"broken": 1})
    run()
    before = Path("out.jsonl").read_bytes()
    write(row)
    result = run(*arguments)
    assert result.exit_code == 2
    assert "out.jsonl answers another request than line 1 of in.jsonl" in result.stderr
    assert Path("out.jsonl").read_bytes() == before


@pytest.mark.parametrize("cut", [1, 5, 30, -1])
def test_a_half_written_last_line_is_repaired(cut: int) -> None:
    write({"prompt": "who"}, {"prompt": "word"})
    run()
    first, second = Path("out.jsonl").read_text().splitlines(keepends=True)
    Path("out.jsonl").write_text(first + second[:cut])
    assert run().stderr == "out.jsonl: 1 answered, 1 kept, 0 failed\n"
    assert Path("out.jsonl").read_text() == first + second
    assert sorted(p.name for p in Path().iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize("content", ["my notes\n", "my notes", '{"index": "x"}\n', '{"some": "json"}\n'])
def test_a_file_that_is_not_ours_is_left_alone(content: str) -> None:
    write({"prompt": "who"})
    Path("out.jsonl").write_text(content)
    result = run()
    assert result.exit_code == 2
    assert "out.jsonl, line 1, was not written by this command" in result.stderr
    assert Path("out.jsonl").read_text() == content


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--input", "in.jsonl"], "--input and --output go together"),
        (["--input", "in.jsonl", "--output", "o", "a prompt"], "--input and --output go together"),
        (["--input", "in.jsonl", "--output", "o", "--json"], "--input and --output go together"),
        (["--input", "absent.jsonl", "--output", "o"], "error: absent.jsonl: No such file or directory"),
        (["--input", "in.jsonl", "--output", "no/such/o"], "error: no/such/o: No such file or directory"),
        (["--input", "in.jsonl", "--output", "in.jsonl"], "error: in.jsonl cannot be both input and output"),
    ],
)
def test_bad_calls(arguments: list[str], says: str) -> None:
    write({"prompt": "who"})
    result = CliRunner().invoke(cli, ["generate", *MOCK, *arguments])
    assert result.exit_code == 2
    assert says in result.stderr


def test_a_lone_surrogate_in_an_id_comes_back() -> None:
    write('{"prompt": "who", "id": "\\ud800"}')
    run()
    assert read()[0]["id"] == "\ud800"
    assert run().stderr == "out.jsonl: 0 answered, 1 kept, 0 failed\n"


def test_requests_in_flight_are_a_window_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanovllm.engine import Engine

    most = 0
    step = Engine.step

    def counted(self: Engine) -> Any:
        nonlocal most
        most = max(most, len(self.scheduler.running) + len(self.scheduler.waiting))
        return step(self)

    monkeypatch.setattr(Engine, "step", counted)
    write(*({"prompt": "who"} for _ in range(50)))
    assert run("--set", "scheduler.max_num_seqs=3").exit_code == 0
    assert 3 <= most <= 6
    assert len(read()) == 50


@needs_terminal
def test_a_terminal_shows_a_bar_that_counts_lines() -> None:
    write(*({"prompt": "who"} for _ in range(5)), "broken")
    with Terminal("generate", *MOCK, "--input", "in.jsonl", "--output", "out.jsonl") as terminal:
        assert terminal.status() == 5
        assert "100% [" in terminal.screen
        assert "(6/6, " in terminal.screen


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_and_run_again_everything_is_there_once() -> None:
    prompts = [f"word {i}" for i in range(40)]
    write(*({"prompt": prompt, "id": f"r{i}"} for i, prompt in enumerate(prompts)))
    slow = ["--set", "runner.script.delay=0.01", "--set", "scheduler.max_num_seqs=3"]
    program = "from nanovllm.cli import main; main()"
    arguments = ["generate", *MOCK, "--input", "in.jsonl", "--output", "out.jsonl", *slow]
    for _ in range(2):
        before = Path("out.jsonl").stat().st_size if Path("out.jsonl").exists() else 0
        with subprocess.Popen([sys.executable, "-c", program, *arguments], stderr=subprocess.DEVNULL) as process:
            while not Path("out.jsonl").exists() or Path("out.jsonl").stat().st_size < before + 600:
                assert process.poll() is None, "it was to be killed at work"
                time.sleep(0.002)
            process.kill()
        assert process.returncode == -signal.SIGKILL
    num_kept = Path("out.jsonl").read_bytes().count(b"\n")
    assert 0 < num_kept < 40
    result = run()
    assert result.stderr == f"out.jsonl: {40 - num_kept} answered, {num_kept} kept, 0 failed\n"
    assert [(row["id"], row["text"]) for row in read()] == [(f"r{i}", text(p)) for i, p in enumerate(prompts)]
