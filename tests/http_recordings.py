"""Exchanges with real servers: recorded once by a proxy in between, replayed by a server that knows nothing else.

    python tests/http_recordings.py URL NAME      # record the scenario NAME with the server at URL

A scenario drives the plugin as a user would and returns what came out. `tests/recordings/NAME.json` holds each
request as it went out, each answer as its bytes came in, and what came out in the end. In a replay every request must
be one of the recorded ones, to the last field; so what the plugin sends is golden, too.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests

from http_support import Asked, ScriptedServer, Wire
from nanovllm import LLM, SamplingParams
from nanovllm.errors import NanoVLLMError, RequestFailed
from nanovllm.request import Completion
from support import DATA

RECORDINGS = Path(__file__).parent / "recordings"
KEPT = ("Content-Type", "Retry-After")  # of an answer's headers

Scenario = Callable[[str], Any]


# -------------------------------------------------------------------------------------------- scenarios


def greedy(max_tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **more)


def shown(completion: Completion) -> dict[str, Any]:
    """What came out, as JSON."""
    return {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish": str(completion.finish),
        "stop_reason": completion.stop_reason,
        "logprobs": None if completion.logprobs is None else [list(one) for one in completion.logprobs],
        "error": completion.error,
    }


def ask(llm: LLM, prompt: Any, params: SamplingParams) -> Any:
    """One completion; the sentence of a refusal."""
    try:
        call = llm.chat if isinstance(prompt, list) and isinstance(prompt[0], dict) else llm.generate
        output: Any = call(prompt, params)
        return shown((output[0] if isinstance(output, list) else output).completions[0])
    except RequestFailed as e:
        return shown(e.outputs[0].completions[0])
    except NanoVLLMError as e:
        return str(e)


CHAT = [{"role": "user", "content": "Once upon a time"}]
# The model never writes these by itself. In its vocabulary each is as many tokens as it has bytes in UTF-8.
SMILEYS = {"grammar": 'root ::= "😀é"'}
PARAMS: dict[str, SamplingParams] = {
    "greedy": greedy(12),
    "logprobs": greedy(4, logprobs=2),
    "stop": greedy(40, stop=["little"]),
    "drawn": SamplingParams(
        seed=2**40 + 7, max_tokens=6, temperature=0.7, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.1,
        logit_bias={403: -5.0}, ignore_eos=True,
    ),
    "eos": greedy(4, logit_bias={2: 100.0}),
}  # fmt: skip


def _with_ids(url: str, **runner: Any) -> LLM:
    tokenizer = {"type": "http", "url": url, "dialect": "llamacpp"}
    return LLM("model", runner={"type": "http", "url": url, "dialect": "llamacpp", **runner}, tokenizer=tokenizer)


def llama_server_ids(url: str) -> Any:
    """Token ids both ways, with the server's own tokenizer."""
    came: dict[str, Any] = {}
    with _with_ids(url) as llm:
        for name, params in PARAMS.items():
            came[name] = ask(llm, "Once upon a", params)
        came["ids"] = ask(llm, [1, 403, 407, 261], greedy(4))
        came["chat"] = ask(llm, CHAT, greedy(4))
    with _with_ids(url, extra=SMILEYS) as llm:
        came["characters of several tokens"] = ask(llm, "Once", greedy(12))
    return came


def llama_server_text(url: str) -> Any:
    """Text both ways."""
    came: dict[str, Any] = {}
    with LLM("model", runner={"type": "http", "url": url, "dialect": "llamacpp"}) as llm:
        for name, params in PARAMS.items():
            came[name] = ask(llm, "Once upon a", params)
        came["chat"] = ask(llm, CHAT, greedy(4))
        came["chat with logprobs"] = ask(llm, CHAT, PARAMS["logprobs"])
        came["too long"] = ask(llm, "a b " * 600, greedy(4))
    with LLM("model", runner={"type": "http", "url": url, "dialect": "llamacpp", "extra": SMILEYS}) as llm:
        came["characters of several tokens"] = ask(llm, "Once", greedy(12))
    return came


def openai_text(url: str) -> Any:
    """The OpenAI dialect of a server that takes and gives text."""
    came: dict[str, Any] = {}
    with LLM("model", runner={"type": "http", "url": url, "dialect": "openai"}) as llm:
        for name in ("greedy", "logprobs", "stop"):
            came[name] = ask(llm, "Once upon a", PARAMS[name])
        came["drawn"] = ask(llm, "Once upon a", SamplingParams(seed=3, max_tokens=6, temperature=0.7, top_p=0.9))
        came["chat"] = ask(llm, CHAT, greedy(4))
        came["ids"] = ask(llm, [1, 403], greedy(4))
    return came


def vllm_ids(url: str) -> Any:
    """vLLM's token ids both ways, with the files of its model for a tokenizer."""
    came: dict[str, Any] = {}
    model = str(DATA / "checkpoints" / "stories260k")
    with LLM(model, runner={"type": "http", "url": url, "dialect": "openai"}) as llm:
        for name, params in PARAMS.items():
            came[name] = ask(llm, "Once upon a", params)
        came["min_tokens"] = ask(llm, "Once upon a", greedy(4, min_tokens=3, logit_bias={2: 100.0}))
        came["penalties"] = ask(llm, "Once upon a", greedy(8, presence_penalty=0.5, frequency_penalty=0.5))
        came["too long"] = ask(llm, [1] * 511, greedy(None))
    return came


def vllm_text(url: str) -> Any:
    """The same server without a tokenizer."""
    came: dict[str, Any] = {}
    with LLM("model", runner={"type": "http", "url": url, "dialect": "openai"}) as llm:
        for name in ("greedy", "logprobs", "stop"):
            came[name] = ask(llm, "Once upon a", PARAMS[name])
        came["ids"] = ask(llm, [1, 403, 407, 261], greedy(4, logprobs=1))
        came["chat"] = ask(llm, CHAT, greedy(4))
    return came


SCENARIOS: dict[str, Scenario] = {
    "llama-server-ids": llama_server_ids,
    "llama-server-text": llama_server_text,
    "llama-server-openai": openai_text,
    "llama-cpp-python": openai_text,
    "vllm-ids": vllm_ids,
    "vllm-text": vllm_text,
}


# ---------------------------------------------------------------------------------- record and replay


def key(asked: Asked) -> str:
    body = json.loads(asked.body) if asked.body else None
    return json.dumps([asked.method, asked.path, body], sort_keys=True)


def record(url: str, name: str) -> None:
    exchanges: dict[str, dict[str, Any]] = {}
    lock = threading.Lock()

    def forward(asked: Asked, wire: Wire) -> None:
        kind = {"Content-Type": "application/json"} if asked.body else {}
        answer = requests.request(asked.method, url + asked.path, data=asked.body or None, headers=kind, timeout=60)
        headers = {name: answer.headers[name] for name in KEPT if name in answer.headers}
        with lock:
            exchanges[key(asked)] = {
                "method": asked.method,
                "path": asked.path,
                "body": asked.json if asked.body else None,
                "status": answer.status_code,
                "headers": headers,
                "answer": answer.content.decode(),
            }
        wire.raw(answer.content, answer.status_code, headers)

    with ScriptedServer(forward) as proxy:
        came = SCENARIOS[name](proxy.url)
    file = RECORDINGS / f"{name}.json"
    content = {"came": came, "exchanges": list(exchanges.values())}
    text = json.dumps(content, indent=1, ensure_ascii=False).replace(proxy.url, "URL")
    file.write_text(text + "\n", encoding="utf-8")
    print(f"{file}: {len(exchanges)} exchanges, {file.stat().st_size} bytes")


def replay(name: str) -> tuple[Any, Any]:
    """What comes out of the recorded answers, and what came out then."""
    content = json.loads((RECORDINGS / f"{name}.json").read_text(encoding="utf-8"))
    exchanges = {json.dumps([e["method"], e["path"], e["body"]], sort_keys=True): e for e in content["exchanges"]}

    def answer(asked: Asked, wire: Wire) -> None:
        exchange = exchanges[key(asked)]  # a KeyError fails the test: this was never sent to the real one
        wire.raw(exchange["answer"].encode(), exchange["status"], exchange["headers"])

    with ScriptedServer(answer) as server:
        came = json.loads(json.dumps(SCENARIOS[name](server.url)).replace(server.url, "URL"))
    return came, content["came"]


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[2] not in SCENARIOS:
        sys.exit(f"{__doc__}\nscenarios: {', '.join(SCENARIOS)}")
    RECORDINGS.mkdir(exist_ok=True)
    record(*sys.argv[1:])
