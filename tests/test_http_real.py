"""Real servers: llama-server with stories260k, and llama-cpp-python's OpenAI API. Slow; a skip says what is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gguf_files import write_gguf
from http_recordings import SCENARIOS, replay
from llama_servers import Missing, find_llama_server, serving
from nanovllm import LLM, SamplingParams
from support import DATA, needs_data

pytestmark = [pytest.mark.slow, needs_data]

STORIES = DATA / "checkpoints" / "stories260k"
PROMPTS = [
    "Once upon a time",
    "The little dog",
    "Lily and Tom",
    "One day a bird",
    "Mom said",
    "He was sad",
    "A big",
    "é",
]
PYTHON = "LLAMA_CPP_PYTHON"  # a Python that has llama-cpp-python[server], if not this one


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    return write_gguf(STORIES, tmp_path_factory.mktemp("gguf") / "stories.gguf")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    try:
        return find_llama_server(tmp_path_factory.mktemp("llama.cpp"))
    except Missing as e:
        pytest.skip(str(e))


@pytest.fixture(scope="module")
def url(program: str, gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("llama-server") / "server.log"
    with serving([program, "-m", str(gguf), "-np", "4", "-c", "2048", "-t", "1"], log) as url:
        yield url


def direct(url: str, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url + path, data), timeout=60) as answer:
        return json.load(answer)


def own_answer(url: str, ids: list[int], num_tokens: int) -> list[int]:
    """The server's, asked by nobody but itself."""
    body = {"prompt": ids, "n_predict": num_tokens, "temperature": 0, "return_tokens": True, "cache_prompt": False}
    tokens: list[int] = direct(url, "/completion", body)["tokens"]
    return tokens


def in_front_of(url: str, **more: Any) -> LLM:
    return LLM(str(STORIES), runner={"type": "http", "url": url}, **more)


def test_greedy_tokens_are_the_servers_own(url: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=100)
    with in_front_of(url) as llm:
        for output in [llm.generate([prompt], params)[0] for prompt in PROMPTS]:
            assert output.token_ids == own_answer(url, list(output.prompt_token_ids), 100)


def test_they_are_also_the_numpy_runners(url: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=60)
    with in_front_of(url) as llm, LLM(str(STORIES), runner={"type": "numpy"}) as local:
        for there, here in zip(llm.generate(PROMPTS, params), local.generate(PROMPTS, params), strict=True):
            assert there.text == here.text
            assert there.token_ids == here.token_ids


def test_many_at_once_get_what_each_gets_alone(url: str) -> None:
    """32 requests over 4 slots; log-probabilities within what another batch does to a half-precision cache."""
    params = SamplingParams(temperature=0, max_tokens=40, logprobs=1)
    with in_front_of(url) as llm:
        alone = [llm.generate([prompt], params)[0] for prompt in PROMPTS]
        for output, wanted in zip(llm.generate(PROMPTS * 4, params), alone * 4, strict=True):
            assert output.token_ids == wanted.token_ids
            assert output.logprobs is not None
            assert wanted.logprobs is not None
            for one, other in zip(output.logprobs, wanted.logprobs, strict=True):
                assert one.logprob == pytest.approx(other.logprob, abs=0.02)


def test_the_servers_tokenizer_is_the_models(url: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=20)
    with in_front_of(url) as llm, LLM("stories", runner={"type": "http", "url": url},
                                      tokenizer={"type": "http", "url": url}) as remote:  # fmt: skip
        local, http = llm.tokenizer, remote.tokenizer
        assert local is not None
        assert http is not None
        assert http.vocab_size == local.vocab_size
        assert [http.token_bytes(i) for i in range(600)] == [local.token_bytes(i) for i in range(600)]
        for text in [*PROMPTS, "</s> <s>", "a  b\n\tc", "你好 😀"]:
            for parse_special in (False, True):
                assert http.encode(text, parse_special) == local.encode(text, parse_special)
        assert remote.generate(PROMPTS, params)[0].token_ids == llm.generate(PROMPTS, params)[0].token_ids


def test_characters_of_several_tokens_come_whole(url: str) -> None:
    """The server leaves ids out of its stream; what a direct request names at the end is what we have."""
    grammar = 'root ::= "😀é你🙂" [a-z]'
    body = {"prompt": [1, 403], "n_predict": 32, "temperature": 0, "return_tokens": True, "grammar": grammar}
    wanted = direct(url, "/completion", body)
    with LLM(str(STORIES), runner={"type": "http", "url": url, "extra": {"grammar": grammar}}) as llm:
        output = llm.generate([1, 403], SamplingParams(temperature=0, max_tokens=32))
        output = output[0] if isinstance(output, list) else output
    assert output.text == wanted["content"]
    assert output.text.startswith("😀é你🙂")
    assert output.token_ids == wanted["tokens"]


def test_text_in_a_conversation_stays_text(url: str) -> None:
    with LLM("stories", runner={"type": "http", "url": url}, tokenizer={"type": "http", "url": url}) as llm:
        assert llm.tokenizer is not None
        ids = llm.tokenizer.chat([{"role": "user", "content": "</s>"}])
        assert 2 not in ids
        assert llm.tokenizer.decode(ids).count("</s>") == 1


def test_a_seed_gives_the_same_again_and_another_one_something_else(url: str) -> None:
    def drawn(seed: int) -> list[int]:
        with in_front_of(url) as llm:
            return llm.generate(["Once"], SamplingParams(seed=seed, max_tokens=30))[0].token_ids

    assert drawn(1) == drawn(1) != drawn(2)


def test_an_abort_frees_the_slot(url: str) -> None:
    """Four answers that would fill the context end early; the server's slots are idle soon after."""
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    with in_front_of(url) as llm:
        streams = [llm.stream([prompt], params) for prompt in PROMPTS[:4]]
        for stream in streams:
            next(stream)
        for stream in streams:
            stream.close()
        end = time.monotonic() + 20
        while any(slot["is_processing"] for slot in direct(url, "/slots")):
            assert time.monotonic() < end, "a slot still works"
            time.sleep(0.05)
        assert llm.generate([PROMPTS[0]], SamplingParams(temperature=0, max_tokens=5))[0].token_ids


def test_a_server_with_another_vocabulary_is_refused(url: str) -> None:
    from nanovllm.errors import ConfigError

    with pytest.raises(ConfigError, match="vocabulary"):
        LLM(str(DATA / "checkpoints" / "slm4096-gpt2"), runner={"type": "http", "url": url})


@pytest.mark.parametrize("name", ["llama-server-ids", "llama-server-text", "llama-server-openai"])
def test_it_still_answers_as_it_was_recorded(url: str, name: str) -> None:
    """Texts and ids; numbers of a real server differ in their last digits."""
    came = json.loads(json.dumps(SCENARIOS[name](url)))
    for what, recorded in replay(name)[1].items():
        if isinstance(recorded, dict) and recorded["error"] is None:
            for field in ("text", "token_ids", "finish", "stop_reason"):
                assert came[what][field] == recorded[field], what


@pytest.fixture(scope="module")
def openai_url(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """llama-cpp-python's server takes one request at a time; without the option it breaks one off for the next."""
    python = os.environ.get(PYTHON)
    if python is None:
        if importlib.util.find_spec("llama_cpp") is None or importlib.util.find_spec("uvicorn") is None:
            pytest.skip(f"llama-cpp-python[server] is not installed here, and {PYTHON} names no Python that has it")
        import sys

        python = sys.executable
    command = [
        python,
        "-m",
        "llama_cpp.server",
        "--model",
        str(gguf),
        "--n_ctx",
        "512",
        "--interrupt_requests",
        "false",
    ]
    with serving(command, tmp_path_factory.mktemp("llama-cpp-python") / "server.log") as url:
        yield url


def test_llama_cpp_python_over_openais_api(openai_url: str) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0, "repeat_penalty": 1.0}
    request = urllib.request.Request(
        openai_url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        wanted = json.load(answer)["choices"][0]["text"]
    with LLM("stories", runner={"type": "http", "url": openai_url}) as llm:
        output = llm.generate(["Once upon a time"], SamplingParams(temperature=0, max_tokens=40))[0]
    assert output.text == wanted
    assert str(output.finish) == "length"


def test_its_requests_wait_for_each_other_and_all_are_answered(openai_url: str) -> None:
    came: list[str] = []
    with LLM("stories", runner={"type": "http", "url": openai_url}) as llm:

        def ask() -> None:
            came.append(llm.generate(["Once upon a time"], SamplingParams(temperature=0, max_tokens=20))[0].text)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(came) == 4
    assert len(set(came)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc for the server")
def test_one_that_nanovllm_starts_is_started_again_and_gone_in_the_end(program: str, gguf: Path) -> None:
    def pids() -> list[int]:
        begins = os.fsencode(program) + b"\0-m\0" + os.fsencode(gguf)
        return [int(p.name) for p in Path("/proc").glob("[0-9]*") if (p / "cmdline").read_bytes().startswith(begins)]

    before = set(pids())
    command = [program, "-m", str(gguf), "-np", "4", "-c", "2048", "-t", "1"]
    params = SamplingParams(temperature=0, max_tokens=40)
    with LLM(str(STORIES), runner={"type": "http", "command": command}) as llm:
        answers = [output.token_ids for output in llm.generate(PROMPTS, params)]
        (server,) = set(pids()) - before
        os.kill(server, signal.SIGKILL)
        assert [output.token_ids for output in llm.generate(PROMPTS, params)] == answers
        assert set(pids()) - before - {server}, "another one runs"
    assert set(pids()) == before
