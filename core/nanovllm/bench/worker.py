"""The child's end of a comparison: something that generates, behind two pipes of JSON lines.

    parent -> child   the settings, once
    child -> parent   {"ready": {facts}}
    parent -> child   {"jobs": [[[17, 4, ...], 72], ...]}             prompt ids, tokens to generate
    child -> parent   {"seconds": 1.5, "tokens": [[...], ...], "peak_memory": 104857600}

Any answer may be {"error": "one sentence"} instead. The end of the child's stdin ends it. Whatever libraries
print goes to stderr, so it cannot break the protocol. Run as a module it serves our own engine;
the scripts in benchmarks/peers/ call `serve` with other people's.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import NanoVLLMError
from . import memory
from .child import Contestant
from .workload import Job

if TYPE_CHECKING:
    from ..config import Config


class Subject(Protocol):
    """What a worker measures."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """vocab_size | None, max_len, and whatever else is worth reporting.

        With `pid`, that process holds the model, and its memory is what is told.
        """
        ...

    def generate(self, jobs: Sequence[Job]) -> list[list[int]]:
        """The greedy tokens of every job, in order; exactly `num_tokens` each, past any end-of-text id."""
        ...


def serve(open_subject: Callable[[Mapping[str, Any]], Subject]) -> None:
    """Answer until stdin ends. `open_subject` gets the settings and loads the model."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as out:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

        def answer(work: Callable[[], dict[str, Any]]) -> bool:
            try:
                document = work()
            except Exception as e:
                document = {"error": _sentence(e)}
            print(json.dumps(document), file=out, flush=True)
            return "error" not in document

        subjects: list[Subject] = []

        def ready() -> dict[str, Any]:
            subjects.append(open_subject(json.loads(sys.stdin.readline())))
            return {"ready": dict(subjects[0].facts)}

        def timed(line: str) -> dict[str, Any]:
            jobs = [Job(tuple(prompt), num_tokens) for prompt, num_tokens in json.loads(line)["jobs"]]
            started = time.perf_counter()
            tokens = subjects[0].generate(jobs)
            seconds = time.perf_counter() - started
            return {"seconds": seconds, "tokens": tokens, "peak_memory": memory.peak(subjects[0].facts.get("pid"))}

        if answer(ready):
            for line in sys.stdin:
                answer(lambda line=line: timed(line))  # type: ignore[misc]


def _sentence(e: Exception) -> str:
    if isinstance(e, NanoVLLMError):
        return str(e)
    lines = str(e).strip().splitlines() or ["(no text)"]
    return f"{type(e).__name__}: {lines[0]}"


def own_engine(name: str, config: Config) -> Contestant:
    """Our engine with this configuration, in a child."""
    from ..child import RUN
    from ..config import leaves

    return Contestant(
        name=name,
        command=(sys.executable, "-c", RUN, "nanovllm.bench.worker", "", *sys.path),
        settings={"overrides": dict(leaves(config))},
    )


class OwnEngine:
    """Our engine. Settings: {"overrides": {dotted key: value}}, a whole configuration as `config.leaves` gives it."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from ..config import load
        from ..face import engine_from_config
        from .engine import EngineBench

        engine, _ = engine_from_config(load(overrides=settings["overrides"], environ={}), {})
        self._bench = EngineBench(engine)
        self.facts = {
            **engine.info.description,
            "vocab_size": engine.info.vocab_size,
            "max_len": engine.max_len,
        }

    def generate(self, jobs: Sequence[Job]) -> list[list[int]]:
        return self._bench.run(jobs).tokens


if __name__ == "__main__":
    serve(OwnEngine)
