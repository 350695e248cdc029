"""Servers of one small model that fail as they are told: each dialect's wire words, good and bad.

    python faulty_server.py --dialect llamacpp    serves until it is killed; prints its address

The model is the core's mock: an answer is a function of its prompt, so a test knows every token of it without a
server. One request, the victim, meets the fault; all others are answered well, at a pace that the test sets.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from http_support import Asked, ScriptedServer, Wire, nothing_left
from nanovllm.batch import ALL_PARAMETERS
from nanovllm.builtin.mock import expected
from nanovllm.builtin.simple_bpe import SimpleBPETokenizer
from nanovllm.engine import Engine
from nanovllm.hookspecs import CacheOptions, Context
from nanovllm_runner_http.create import create_runner
from nanovllm_runner_http.options import HttpOptions

VICTIM = 99  # the first token of a prompt that meets the fault
NUM_TOKENS = 6  # of every answer
TOKENIZER = SimpleBPETokenizer()


def context_of(*urls: str, tokenizer: Any = TOKENIZER, **options: Any) -> Context:
    """For `create_runner`: these servers, no retries unless asked for."""
    given = HttpOptions.model_validate({"servers": urls, "retries": 0, **options})
    return Context(
        options=given, model="", path=None, cache=CacheOptions(), max_num_seqs=64, max_num_batched_tokens=2048,
        max_model_len=None, threads=None, tokenizer=tokenizer,
    )  # fmt: skip


@contextmanager
def engine_on(*urls: str, **options: Any) -> Iterator[Engine]:
    """An engine in front of these servers; at its end none of its threads is left."""
    context = context_of(*urls, **options)
    with nothing_left():
        engine = Engine(create_runner(context), TOKENIZER, max_num_seqs=64)
        try:
            yield engine
        finally:
            engine.close()


Fault = Callable[["Answer"], None]


class Words(Protocol):
    """How a dialect says things."""

    name: str
    path: str  # where a stream is asked for

    def facts(self, asked: Asked, wire: Wire) -> None:
        """Answer a question of a probe."""

    def event(self, tokens: Sequence[int], num_before: int) -> dict[str, Any]:
        """The event that brings these tokens after so many others."""

    def last(self) -> dict[str, Any]:
        """The event that ends an answer at its length."""


class LlamaWords:
    name = "llamacpp"
    path = "/completion"

    def facts(self, asked: Asked, wire: Wire) -> None:
        match asked.path:
            case "/health":
                wire.json({"status": "ok"})
            case "/props":
                wire.json({"default_generation_settings": {"n_ctx": 4096}, "total_slots": 8, "eos_token": "</s>"})
            case "/v1/models":
                wire.json({"data": [{"id": "tiny", "owned_by": "llamacpp", "meta": {"n_vocab": TOKENIZER.vocab_size}}]})
            case "/tokenize":
                wire.json({"tokens": [2]})
            case "/detokenize":
                wire.json({"content": TOKENIZER.decode(asked.json["tokens"])})
            case self.path:
                wire.json({"content": "", "tokens": [5], "stop": True, "stop_type": "limit"})
            case _:
                wire.json({"error": {"code": 404, "message": "File Not Found"}}, 404)

    def event(self, tokens: Sequence[int], num_before: int) -> dict[str, Any]:
        text, num = TOKENIZER.decode(tokens), num_before + len(tokens)
        return {"index": 0, "content": text, "tokens": list(tokens), "stop": False, "tokens_predicted": num}

    def last(self) -> dict[str, Any]:
        return {"index": 0, "content": "", "tokens": [], "stop": True, "stop_type": "limit", "stopping_word": ""}


class OpenAIWords:
    """vLLM's: the ones with token ids."""

    name = "openai"
    path = "/v1/completions"

    def facts(self, asked: Asked, wire: Wire) -> None:
        match asked.path:
            case "/v1/models":
                wire.json({"data": [{"id": "tiny", "owned_by": "vllm", "max_model_len": 4096}]})
            case "/detokenize":
                wire.json({"prompt": TOKENIZER.decode(asked.json["tokens"])})
            case self.path:
                wire.json({"choices": [{"index": 0, "text": "", "token_ids": [5], "finish_reason": "length"}]})
            case _:
                wire.json({"detail": "Not Found"}, 404)

    def event(self, tokens: Sequence[int], num_before: int) -> dict[str, Any]:
        choice = {"index": 0, "text": TOKENIZER.decode(tokens), "token_ids": list(tokens), "finish_reason": None}
        return {"object": "text_completion", "choices": [choice]}

    def last(self) -> dict[str, Any]:
        choice = {"index": 0, "text": "", "token_ids": [], "finish_reason": "length"}
        return {"object": "text_completion", "choices": [choice]}


class Answer:
    """One stream, as a fault sees it: what a good one would send, and the wire to send something else on."""

    def __init__(self, words: Words, prompt: list[int], num_tokens: int, wire: Wire, pause: float = 0.0) -> None:
        self.prompt = prompt
        self.pause = pause
        self.wire = wire
        tokens = expected(prompt, num_tokens)
        self.events = [words.event([token], i) for i, token in enumerate(tokens)] + [words.last()]

    def begin(self, num_events: int = 2) -> None:
        """The first events, well."""
        self.wire.start_events()
        for event in self.events[:num_events]:
            time.sleep(self.pause)
            self.wire.event(event)

    def end(self, num_events: int = 2) -> None:
        """The others, well, and the end."""
        for event in self.events[num_events:]:
            time.sleep(self.pause)
            self.wire.event(event)
        self.wire.end_events()

    @property
    def bytes(self) -> bytes:
        """All that a good one sends, as it goes over the wire."""
        tape = Tape()
        self.wire, wire = tape, self.wire
        self.begin()
        self.end()
        self.wire = wire
        return b"".join(tape.sent)


class Tape(Wire):
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send(self, *parts: bytes) -> None:
        self.sent += parts


class FaultyModel:
    """A handler for a ScriptedServer. `fault` is what a victim meets; None: it is answered well, too."""

    def __init__(self, words: Words, fault: Fault | None = None, pause: float = 0.0) -> None:
        self.words = words
        self.pause = pause  # seconds before each event of a good answer
        self.fault = fault
        self.num_victims = 0  # streams that met the fault
        self.go_on = threading.Event()  # others stop in the middle of their answer until this is set
        self.go_on.set()

    def __call__(self, asked: Asked, wire: Wire) -> None:
        if asked.path != self.words.path or not asked.json.get("stream"):
            self.words.facts(asked, wire)
            return
        num_tokens = asked.json.get("n_predict") or asked.json["max_tokens"]
        answer = Answer(self.words, asked.json["prompt"], num_tokens, wire, self.pause)
        if self.fault is not None and answer.prompt[0] == VICTIM:
            self.num_victims += 1
            self.fault(answer)
            return
        answer.begin()
        assert self.go_on.wait(10.0), "the test never let the others go on"
        answer.end()

    def serve(self, **options: Any) -> ScriptedServer:
        return ScriptedServer(self, **options)


# ------------------------------------------------------------------------------------------- step mode


class StepModel:
    """The `nanovllm` dialect, version 1. `fault` is what the next step with the victim meets; None: none does."""

    def __init__(self, pause: float = 0.0) -> None:
        self.pause = pause  # seconds that a step takes
        self.fault: StepFault | None = None
        self.num_faults = 0
        self.contexts: dict[int, list[int]] = {}  # by the client's id
        self._lock = threading.Lock()

    def __call__(self, asked: Asked, wire: Wire) -> None:
        match asked.path:
            case "/health":
                wire.json({"status": "ok"})
            case "/info":
                wire.json({
                    "protocol": "nanovllm", "versions": [1], "model": "tiny", "vocab_size": TOKENIZER.vocab_size,
                    "max_model_len": 4096, "max_num_seqs": 32, "eos_token_ids": [2], "supports": sorted(ALL_PARAMETERS),
                    "tokenizer_vocab_size": TOKENIZER.vocab_size,
                })  # fmt: skip
            case "/v1/detokenize":
                wire.json({"text": TOKENIZER.decode(asked.json["token_ids"])})
            case "/v1/inference":
                with self._lock:
                    self._step(asked, wire)
            case _:
                wire.json({"error": "not found"}, 404)

    def _step(self, asked: Asked, wire: Wire) -> None:
        time.sleep(self.pause)
        if "version" not in asked.json:
            wire.json({"error": "only version 1 is spoken here"}, 400)
            return
        answer: dict[str, Any] = {"version": 1, "call": asked.json["call"], "ids": [], "token_ids": []}
        for seq_id in asked.json.get("release", []):
            self.contexts.pop(seq_id, None)
        for item in asked.json["sequences"]:
            new, at = item["token_ids"], item["at"]
            known = self.contexts.get(item["id"], [])
            context = self.contexts[item["id"]] = (known[: at - len(new)] + new) if len(new) < at else new
            assert len(context) == at, "the client counts wrong"
            answer["ids"].append(item["id"])
            answer["token_ids"] += expected(context, 1)
        victims = [i for i in answer["ids"] if self.contexts[i][0] == VICTIM]
        if self.fault is None or not victims:
            wire.json(answer)
            return
        fault, self.fault = self.fault, None
        self.num_faults += 1
        fault(StepAnswer(answer, victims[0], wire))

    def serve(self, **options: Any) -> ScriptedServer:
        return ScriptedServer(self, **options)


class StepAnswer(NamedTuple):
    """One step, as a fault sees it."""

    good: dict[str, Any]  # what a good server would say
    victim: int  # the id of the sequence
    wire: Wire

    def with_token(self, token: Any) -> dict[str, Any]:
        """The good answer, but for the victim's token."""
        pairs = zip(self.good["ids"], self.good["token_ids"], strict=True)
        return self.good | {"token_ids": [token if i == self.victim else t for i, t in pairs]}


StepFault = Callable[[StepAnswer], None]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dialect", choices=["llamacpp", "openai", "nanovllm"], required=True)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--host")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--pids", help="append our pid to this file")
    options = parser.parse_args()
    if options.pids:
        with open(options.pids, "a") as file:
            file.write(f"{os.getpid()}\n")
    if options.dialect == "nanovllm":
        server = StepModel(options.pause).serve(port=options.port)
    else:
        words = LlamaWords() if options.dialect == "llamacpp" else OpenAIWords()
        server = FaultyModel(words, pause=options.pause).serve(port=options.port)
    print(server.url, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
