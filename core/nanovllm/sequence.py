"""Sequence: one running generation. Lives only inside the core.

Two integers carry its state: `num_tokens` (known tokens) and `num_computed` (how many of them have
valid KV); scheduling is the second catching up with the first. The scheduler writes num_computed,
lane and blocks; the engine appends tokens and decides the end. Knows no runner and no tokenizer.
"""

from __future__ import annotations

import numpy as np

from .batch import IntArray, Sampling, TokenLogprob
from .blocks import Seal
from .request import Finish, RequestStats
from .tokenizer import StopMatcher, TokenStream


class Sequence:
    __slots__ = (
        "admitted_at", "arrival", "blocks", "buffer", "cache_salt", "finish", "first_scheduled", "first_token",
        "granted", "index", "lane", "last_token", "leader", "logprobs", "matcher", "max_len", "num_cached",
        "num_computed", "num_preemptions", "num_prompt", "num_tokens", "order", "prompt", "prompt_logprobs",
        "request_id", "salt", "sampling", "scores_prompt", "seal", "seal_at", "seq_id", "stop_reason", "stream",
        "text", "view",
    )  # fmt: skip

    def __init__(
        self,
        seq_id: int,
        request_id: int,
        prompt_ids: IntArray,
        sampling: Sampling,
        stream: TokenStream,
        *,
        order: tuple[int, int, int],
        max_len: int,
        num_prompt: int | None = None,
        granted: int | None = None,
        cache_salt: bytes | None,
        arrival: float,
        leader: Sequence | None = None,
        prompt: object = None,
        salt: str | None = None,
    ) -> None:
        self.seq_id = seq_id
        self.request_id = request_id
        self.index = sampling.completion_index  # which completion of the request
        self.sampling = sampling
        self.order = order  # (priority, arrival number, index): lower runs first and is preempted last
        self.max_len = max_len  # tokens: prompt + generated, this sequence's own limit
        self.cache_salt = cache_salt  # root of the prefix chain; None = share nothing
        self.leader = leader  # the sibling whose prompt this one waits for
        self.prompt = prompt  # as given, for runners that tokenize
        self.salt = salt  # as given, for runners whose cache is elsewhere

        # Tokens: buffer[:num_tokens]; `view` is the same memory, read-only.
        self.num_tokens = len(prompt_ids)
        self.num_prompt = self.num_tokens if num_prompt is None else num_prompt  # fewer: it goes on with an answer
        self.buffer = np.empty(self.num_tokens + 64, np.int32)
        self.buffer[: self.num_tokens] = prompt_ids
        self.view = _read_only(self.buffer)

        # Output tokens that its caller has granted so far; None = it runs freely. Only `Scheduler.grant` writes it.
        self.granted = granted

        # KV state: [0, num_computed) is valid; only the scheduler writes these.
        self.num_computed = 0
        self.lane: int | None = None
        self.blocks: list[int] = []
        self.seal: Seal | None = None  # of the last full block that is sealed or matched
        self.seal_at = 0  # num_computed at which the next block can be sealed
        self.admitted_at = 0  # num_tokens at the last admission

        # What came out; only the engine writes these.
        self.stream = stream
        self.matcher = StopMatcher(tuple(sampling.params.stop)) if sampling.params.stop else None
        self.text: list[str] = []
        self.logprobs: list[TokenLogprob] | None = None if sampling.params.logprobs is None else []
        self.scores_prompt = (
            sampling.params.prompt_logprobs is not None
            and sampling.completion_index == 0
            and self.num_tokens == self.num_prompt
        )
        self.prompt_logprobs: list[TokenLogprob] = []  # of prompt tokens 1, 2, ...
        self.finish: Finish | None = None
        self.stop_reason: str | int | None = None

        # Times in seconds by the engine's clock.
        self.arrival = arrival
        self.first_scheduled: float | None = None
        self.first_token: float | None = None
        self.last_token: float | None = None
        self.num_cached = 0  # prompt tokens from the prefix cache at first admission
        self.num_preemptions = 0

    @property
    def context(self) -> IntArray:
        return self.view[: self.num_tokens]  # (num_tokens,) int32

    @property
    def num_output(self) -> int:
        return self.num_tokens - self.num_prompt

    @property
    def output_ids(self) -> tuple[int, ...]:
        return tuple(self.buffer[self.num_prompt : self.num_tokens].tolist())

    @property
    def is_protected(self) -> bool:
        """Since its last admission it has gained no token: preempting it now would be work for nothing."""
        return self.num_tokens == self.admitted_at

    @property
    def rests(self) -> bool:
        """Has it generated all that its caller granted?"""
        return self.granted is not None and self.num_output >= self.granted

    @property
    def awaits_leader(self) -> bool:
        """Is the leader still computing the prompt that this sibling will share?"""
        leader = self.leader
        return leader is not None and leader.finish is None and leader.num_tokens == leader.num_prompt

    @property
    def num_unscored(self) -> int:
        """Prompt positions whose logits are still wanted for prompt log-probabilities."""
        return self.num_prompt - 1 - len(self.prompt_logprobs) if self.scores_prompt else 0

    def append(self, token: int) -> None:
        if self.num_tokens == len(self.buffer):
            grown = np.empty(2 * len(self.buffer), np.int32)
            grown[: self.num_tokens] = self.buffer
            self.buffer = grown
            self.view = _read_only(grown)
        self.buffer[self.num_tokens] = token
        self.num_tokens += 1

    def stats(self, now: float) -> RequestStats:
        def since(moment: float | None) -> float | None:
            return None if moment is None else moment - self.arrival

        steps = self.num_output - 1
        first, last = self.first_token, self.last_token
        return RequestStats(
            num_prompt_tokens=self.num_prompt,
            num_cached_tokens=self.num_cached,
            num_output_tokens=self.num_output,
            num_preemptions=self.num_preemptions,
            queue_time=since(self.first_scheduled),
            ttft=since(first),
            tpot=(last - first) / steps if first is not None and last is not None and steps > 0 else None,
            total_time=now - self.arrival,
        )


def _read_only(array: IntArray) -> IntArray:
    view = array.view()
    view.flags.writeable = False
    return view
