"""`chat`: driven in a pseudo-terminal, where Ctrl-C is a key, and with piped questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nanovllm.builtin.mock import expected
from nanovllm.builtin.simple_bpe import SimpleBPETokenizer
from nanovllm.cli import cli
from pseudo_terminal import Terminal, needs_terminal

MOCK = ["-r", "mock", "--set", "runner.seed=5", "--ignore-eos"]
TOKENIZER = SimpleBPETokenizer()


def run(*arguments: str, lines: Sequence[str]) -> Result:
    runner = CliRunner(env={"MODEL_PATH": None, "TOKENIZER_PATH": None})
    return runner.invoke(cli, ["chat", *arguments], input="".join(f"{line}\n" for line in lines))


def answers(questions: Sequence[str], num_tokens: int, system: str | None = None) -> list[str]:
    """What the mock says, each question after the whole conversation before it."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    texts = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        texts.append(TOKENIZER.decode(expected(TOKENIZER.chat(messages), num_tokens, seed=5)))
        messages.append({"role": "assistant", "content": texts[-1]})
    return texts


# ------------------------------------------------------------------------------- in a terminal


@needs_terminal
def test_a_conversation_in_a_terminal() -> None:
    pytest.importorskip("nanovllm_runner_numpy")
    with Terminal("chat") as terminal:
        assert "demo on numpy" in terminal.wait_for("> ")
        terminal.type("What is the capital of France?\n")
        assert "Paris" in terminal.wait_for("\n> ")
        terminal.type("/nothing\n")
        assert "error: unknown command /nothing; /help lists them\n" in terminal.wait_for("\n> ")
        terminal.type("What is the capital of Spaim\x7fn?\n")  # \x7f is the backspace key
        assert "Madrid" in terminal.wait_for("\n> ")
        terminal.type("/exit\n")
        assert terminal.status() == 0


@needs_terminal
def test_ctrl_c_stops_the_answer_and_what_was_said_stays(tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    with Terminal(
        "chat", *MOCK, "--max-tokens", "4000", "--set", "runner.script.delay=0.02", "--set", "runner.script.tokens=[40]"
    ) as terminal:
        terminal.wait_for("> ")
        terminal.type("who\n")
        terminal.wait_for("who\n")
        terminal.wait_for_more(12)
        terminal.type("\x03")
        seen = terminal.wait_for("\n> ")
        said, _, stopped = seen.partition("^C")
        assert "(stopped after " in stopped
        terminal.type(f"/save {saved}\n")
        terminal.wait_for("\n> ")
        question, answer = json.loads(saved.read_text())["messages"]
        assert question == {"role": "user", "content": "who"}
        assert (
            answer["content"]
            == TOKENIZER.decode([40, *expected([*TOKENIZER.chat([question]), 40], 4000, seed=5)])[
                : len(answer["content"])
            ]
        )
        assert answer["content"].startswith(said)
        assert 0 < len(answer["content"]) < 2000
        assert terminal.leave_with("\x03") == 0


@needs_terminal
@pytest.mark.parametrize("key", ["\x03", "\x04"], ids=["Ctrl-C", "Ctrl-D"])
def test_at_the_prompt_both_keys_leave_with_status_0(key: str) -> None:
    with Terminal("chat", *MOCK) as terminal:
        terminal.wait_for("> ")
        assert terminal.leave_with(key) == 0
        assert "Traceback" not in terminal.screen


# -------------------------------------------------------------------------------- piped questions


def test_piped_questions_are_answered_line_by_line_with_their_history() -> None:
    questions = ["who", "what is this", "where"]
    result = run(*MOCK, "--max-tokens", "6", lines=[*questions[:2], "", questions[2]])
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "".join(f"{text}\n" for text in answers(questions, 6))


def test_the_system_message_and_reset() -> None:
    lines = ["who", "/reset", "who", "/system be there", "/reset", "who", "/system", "/reset", "who", "/exit", "never"]
    result = run(*MOCK, "--max-tokens", "6", "--system", "the world", lines=lines)
    systems = ["the world", "the world", "be there", None]
    assert result.exit_code == 0
    assert result.stdout == "".join(f"{answers(['who'], 6, system)[0]}\n" for system in systems)


def test_a_space_before_the_slash_sends_the_line_and_help_helps() -> None:
    result = run(*MOCK, "--max-tokens", "6", lines=["/help", " /reset"])
    assert "/save FILE" in result.stdout
    assert result.stdout.endswith(f"{answers(['/reset'], 6)[0]}\n")


def test_what_is_saved_is_a_line_for_generate(tmp_path: Path) -> None:
    file = tmp_path / "saved.jsonl"
    run(*MOCK, "--max-tokens", "6", "--system", "the world", lines=["who", f"/save {file}"])
    (answer,) = answers(["who"], 6, "the world")
    assert json.loads(file.read_text()) == {
        "messages": [
            {"role": "system", "content": "the world"},
            {"role": "user", "content": "who"},
            {"role": "assistant", "content": answer},
        ]
    }


def test_stats_go_to_stderr() -> None:
    result = run(*MOCK, "--max-tokens", "6", "--stats", lines=["who"])
    num_prompt = len(TOKENIZER.chat([{"role": "user", "content": "who"}]))
    assert result.stdout == f"{answers(['who'], 6)[0]}\n"
    assert result.stderr.startswith(f"({num_prompt} tokens in, 0 of them cached; 6 out, first after ")
    assert result.stderr.endswith(f" tok/s; context {num_prompt + 6} of 4096)\n")


def test_bytes_that_are_no_text_do_not_end_the_conversation() -> None:
    runner = CliRunner(env={"MODEL_PATH": None})
    result = runner.invoke(cli, ["chat", *MOCK, "--max-tokens", "6"], input=b"who \xff\n")
    assert (result.exit_code, result.stdout.splitlines()) == (0, answers(["who \ufffd"], 6))


# ------------------------------------------------------------------------------- the context's end

LONG = "what is the word there"


def small(limit: int) -> list[str]:
    return [*MOCK, "--set", f"max_model_len={limit}"]


def test_a_conversation_that_no_longer_fits_is_refused_with_the_way_out() -> None:
    result = run(*small(64), "--max-tokens", "8", lines=[LONG] * 5)
    assert result.exit_code == 2
    assert "error: the conversation has " in result.stderr
    assert (
        "and the context of 64 must also hold the answer; /reset starts a new one; with --drop-oldest" in result.stderr
    )
    assert "Traceback" not in result.stderr
    assert 1 <= len(result.stdout.splitlines()) < 5


def test_the_oldest_exchanges_go_if_the_user_said_so() -> None:
    result = run(*small(96), "--max-tokens", "8", "--drop-oldest", "--stats", lines=[LONG] * 5)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert len(lines) == 5
    assert all(int(line.rpartition("context ")[2].split()[0]) <= 96 for line in result.stderr.splitlines())
    # The last answer is that of a conversation of the newest exchanges that leave room for 8 tokens.
    for kept in range(4, -1, -1):
        messages = [{"role": "user", "content": LONG}]
        for said in reversed(lines[4 - kept : 4]):
            messages = [{"role": "user", "content": LONG}, {"role": "assistant", "content": said}, *messages]
        if len(TOKENIZER.chat(messages)) + 8 <= 96:
            break
    assert 0 < kept < 4
    assert lines[4] == TOKENIZER.decode(expected(TOKENIZER.chat(messages), 8, seed=5))


def test_a_question_that_never_fits_and_an_answer_that_is_cut_short() -> None:
    result = run(*small(24), "--drop-oldest", lines=["what is the word there and there and there"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.endswith("must also hold the answer; shorten the question\n")
    num_prompt = len(TOKENIZER.chat([{"role": "user", "content": "who"}]))
    result = run(*small(24), "--max-tokens", "100", lines=["who"])
    assert result.stdout == f"{answers(['who'], 24 - num_prompt)[0]}\n"
    assert result.stderr == "(cut short: the context of 24 tokens is full)\n"


# --------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("arguments", "lines", "status", "says"),
    [
        ([], ["/nothing"], 2, "error: unknown command /nothing; /help lists them"),
        ([], ["/save"], 2, "error: /save needs a file name"),
        ([], ["/save no/such/directory/file"], 2, "error: no/such/directory/file cannot be written: "),
        (["--set", "runner.script.fail_steps=[2]"], ["who"], 5, "error: request 1: the runner failed"),
        (["-r", "absent"], [], 3, "error: no runner named 'absent' is installed"),
    ],
)
def test_with_piped_questions_the_first_mistake_ends(
    arguments: list[str], lines: list[str], status: int, says: str
) -> None:
    result = run(*MOCK, *arguments, lines=lines)
    assert result.exit_code == status
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_a_model_without_a_chat_template_says_so_before_the_first_question(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanovllm.errors import TokenizerError

    def chat(self: object, messages: object) -> list[int]:
        raise TokenizerError("no chat template")

    monkeypatch.setattr(SimpleBPETokenizer, "chat", chat)
    result = run(*MOCK, lines=[])
    assert (result.exit_code, result.stderr) == (4, "error: no chat template\n")


@needs_terminal
def test_in_a_terminal_a_failure_is_shown_and_the_conversation_goes_on() -> None:
    with Terminal("chat", *MOCK, "--max-tokens", "3", "--set", "runner.script.fail_steps=[2]") as terminal:
        terminal.wait_for("> ")
        terminal.type("who\n")
        assert "error: request 1: the runner failed" in terminal.wait_for("\n> ")
        terminal.type("what\n")
        assert "error" not in terminal.wait_for("\n> ")
        terminal.type("/exit\n")
        assert terminal.status() == 0
