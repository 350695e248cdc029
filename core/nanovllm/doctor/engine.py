"""The configured engine: loaded, asked and measured, to tell what really runs. Knows no backend."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from itertools import count
from typing import TYPE_CHECKING, Any

from ..batch import Paged, Remote
from ..llm import LLM
from ..request import Request, SamplingParams
from ..threads import available_threads
from .busy import keep_busy, tell_threads
from .case import Case
from .finding import Finding
from .machine import free_memory

if TYPE_CHECKING:
    from ..config import Loaded
    from ..tokenizer import Tokenizer

FACTS = (  # of a runner's description, those that say what runs
    "device", "providers", "dtype", "weights", "threads", "blas", "onnxruntime", "torch", "dialect", "mode",
)  # fmt: skip
TEXT = "One, two - 3.14: naïve Übergrößen, 漢字, 🙂!"  # bytes of every length that UTF-8 has
PROMPT_TOKENS = 256  # of the prompt that is computed to see the threads at work; at most
ANSWER_TOKENS = 16  # to measure the speed of decoding
QUICK = 5.0  # seconds; an answer that takes longer is not asked for twice
SLOW = 10.0  # tokens per second; people read at about 5 (240 words a minute)
FASTER = (
    "what helps, the most first: a GPU, or a faster runner (onnx, torch); quantised weights (runner.weights: int8 or "
    "int4); a smaller model; fewer tokens (max_tokens)"
)


def examine(case: Case) -> Iterator[Finding]:
    """Raises whatever loading raises: the caller makes a finding of it."""
    assert case.loaded is not None, "there is no engine without a configuration"
    free, started = free_memory(), time.perf_counter()
    with LLM.from_config(case.loaded) as llm:
        seconds = time.perf_counter() - started
        yield from _what_runs(llm, case.loaded, seconds)
        yield from _pool(llm, free)
        if llm.tokenizer is not None:
            yield from _tokenizer(llm, llm.tokenizer)
        yield from _threads(llm, case.loaded)
        yield from _speed(llm)


def _what_runs(llm: LLM, loaded: Loaded, seconds: float) -> Iterator[Finding]:
    config, about = loaded.config, llm.info.description
    facts = [
        f"{name} {', '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"
        for name in FACTS
        if (value := about.get(name)) is not None
    ]
    yield Finding("ok", "; ".join([f"{config.model} on {config.runner.type}, loaded in {seconds:.2f} s", *facts]))
    if "fallback" in about:
        yield Finding(
            "warning", f"it runs on {about['device']}, and not where it should: {about['fallback']}",
            "remove runner.fallback, to have an error instead",
        )  # fmt: skip


def _pool(llm: LLM, free: int | None) -> Iterator[Finding]:
    info, about = llm.info, llm.info.description
    if not isinstance(info.kv, Paged):
        return
    num_tokens = info.kv.num_blocks * info.kv.block_size
    text = f"KV pool of {info.kv.num_blocks} blocks, {num_tokens} tokens: {num_tokens / llm.engine.max_len:.1f} "
    text += f"sequences of the full length {llm.engine.max_len}"
    takes = about.get("weight_bytes", 0) + about.get("kv_bytes", 0)  # bytes
    if takes:
        text += f"; with the weights {takes / 1e6:,.1f} MB"
    if free is not None and takes > free and _is_on_cpu(about):
        yield Finding(
            "warning", f"{text}, but only {free / 1e6:,.1f} MB were free",
            "--set cache.memory=SIZE (such as 256MiB), --set scheduler.max_model_len=N, or smaller weights",
        )  # fmt: skip
    elif num_tokens < 2 * llm.engine.max_len and num_tokens < info.max_num_seqs * llm.engine.max_len:
        yield Finding(
            "note", f"{text}: long requests run one after another",
            "--set cache.memory=SIZE for more blocks, or --set scheduler.max_model_len=N for shorter sequences",
        )  # fmt: skip
    else:
        yield Finding("ok", text)


def _tokenizer(llm: LLM, tokenizer: Tokenizer) -> Iterator[Finding]:
    ids = tokenizer.encode(TEXT)
    back = tokenizer.decode(ids)
    entries = f"tokenizer of {tokenizer.vocab_size} entries"
    if llm.info.vocab_size is not None:  # of a tokenizer with more of them than the model, the engine is not made
        entries += f" for the model's {llm.info.vocab_size}"
    if back == TEXT:
        yield Finding("ok", f"{entries}: {len(TEXT)} characters come back from {len(ids)} tokens")
    else:
        yield Finding("note", f"{entries}: it cannot say all of {TEXT!r}, which comes back as {back!r}")


def _threads(llm: LLM, loaded: Loaded) -> Iterator[Finding]:
    """Those that compute a prompt; where it is computed elsewhere, they say nothing."""
    about, ids = llm.info.description, _ids(llm)
    if isinstance(llm.info.kv, Remote) or not _is_on_cpu(about) or not ids:
        return
    prompt = (ids * PROMPT_TOKENS)[: max(1, min(PROMPT_TOKENS, _room(llm)))]
    params = SamplingParams(max_tokens=1, **_greedy(llm))
    salts = count()  # each run has its own, or the next one would find the prompt in the cache

    def compute_prompt() -> None:
        llm.generate(Request(prompt=prompt, params=params, cache_salt=f"run {next(salts)}"), show_progress=False)

    may_use = available_threads()
    wanted = int(about.get("threads") or may_use)
    yield tell_threads(f"prompts of {len(prompt)} tokens", keep_busy(compute_prompt), wanted)
    if wanted < may_use and loaded.config.runner.threads is None:
        yield Finding(
            "warning", f"the runner takes {wanted} of the {may_use} threads that it may use",
            f"--set runner.threads={may_use}",
        )  # fmt: skip


def _speed(llm: LLM) -> Iterator[Finding]:
    ids, room = _ids(llm), _room(llm)
    params = SamplingParams(max_tokens=max(2, min(ANSWER_TOKENS, room)), **_greedy(llm))
    rates = []
    for _ in range(2):  # libraries make things when they are used first
        [output] = llm.generate(ids[: max(1, room)] or TEXT, params, show_progress=False)
        [completion] = output.completions
        rates += [completion.stats.decode_tokens_per_second or 0.0]
        if completion.stats.total_time > QUICK:
            break
    if not (rate := max(rates)):
        yield Finding("note", f"an answer of {len(completion.token_ids)} tokens, too short to tell a speed")
    elif rate < SLOW:
        yield Finding("warning", f"{rate:.1f} tokens/s of one answer, which is slower than {SLOW:g}", FASTER)
    else:
        yield Finding("ok", f"{rate:.0f} tokens/s of one answer")


def _ids(llm: LLM) -> list[int]:
    return [] if llm.tokenizer is None else llm.tokenizer.encode(TEXT)


def _room(llm: LLM) -> int:
    """Tokens of a prompt that leaves room for an answer; may be negative."""
    return llm.engine.max_len - ANSWER_TOKENS


def _greedy(llm: LLM) -> dict[str, Any]:
    wishes: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
    return {name: value for name, value in wishes.items() if name in llm.info.supports}


def _is_on_cpu(about: Mapping[str, Any]) -> bool:
    return str(about.get("device", "cpu")).startswith("cpu")
