"""Random programs: requests, aborts and faults against a small engine, every result checked.

`run(seed)` builds one program from its seed, runs it on a ChainRunner and raises AssertionError if
anything is not as it must be: a token, a block, a lane, an ending, or that there is no end.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from nanovllm.builtin.mock import Script
from nanovllm.engine import Engine
from nanovllm.errors import RequestError
from nanovllm.intake import Ticket
from nanovllm.request import Completion, Delta, Finish, Request, SamplingParams
from nanovllm.testing import ChainRunner, alone

VOCAB = 11
EOS = 3


class Digits:
    """A tokenizer whose token i is the letter of i."""

    vocab_size = VOCAB
    eos_ids = (EOS,)

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        return [ord(c) - ord("a") for c in text]

    def decode(self, ids: Any) -> str:
        return "".join(chr(ord("a") + i) for i in ids)

    def token_bytes(self, token_id: int) -> bytes:
        return b"" if token_id == EOS else bytes([ord("a") + token_id])

    def chat(self, messages: Any) -> list[int]:
        return self.encode(messages[-1]["content"])


@dataclass
class Outcome:
    """What a program did, so that tests can check that the programs reach what they are meant to reach."""

    counts: Counter[str] = field(default_factory=Counter)


def constant_hash(parent: bytes, tokens: bytes) -> bytes:
    return b"same"


@lru_cache(maxsize=200_000)
def _alone(prompt: tuple[int, ...], key: tuple[Any, ...], index: int, max_len: int) -> list[int]:
    return alone(prompt, _params(key), completion_index=index, vocab_size=VOCAB, eos_ids=(EOS,), max_len=max_len)


def _params(key: tuple[Any, ...]) -> SamplingParams:
    names = ("temperature", "seed", "max_tokens", "min_tokens", "ignore_eos", "stop_token_ids", "repetition_penalty",
             "top_k", "logprobs", "prompt_logprobs")  # fmt: skip
    return SamplingParams(**dict(zip(names, key, strict=True)))


def run(seed: int) -> Outcome:
    rng = random.Random(seed)
    outcome = Outcome()
    paged = rng.random() < 0.9
    block_size = rng.choice([1, 2, 3, 4, 8])
    max_model_len = rng.randint(12, 60)
    max_num_seqs = rng.randint(1, 6)
    can_chunk = rng.random() < 0.85
    budget = max(max_num_seqs, rng.choice([1, 2, 3, 5, 8, 16, 40, 80]))
    num_blocks = rng.randint(2, max(3, 3 * max_model_len // block_size))
    fail_steps = [rng.randint(1, 40)] if rng.random() < 0.15 else []
    runner = ChainRunner(
        VOCAB,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        block_size=block_size,
        num_blocks=num_blocks,
        layout="paged" if paged else "lanes",
        can_chunk=can_chunk,
        can_resume_prefix=rng.random() < 0.9,
        script=Script(fail_steps=fail_steps),
    )
    engine = Engine(
        runner,
        Digits(),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        prefix_caching=rng.random() < 0.8,
        **({"hash_block": constant_hash} if rng.random() < 0.2 else {}),
    )

    # 1. Requests that share beginnings, often to the letter.
    stems = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 4 * block_size + 2))] for _ in range(3)]
    todo: list[tuple[Request, tuple[Any, ...]]] = []
    for _ in range(rng.randint(1, 9)):
        prompt = list(rng.choice(stems))
        if rng.random() < 0.5:
            prompt += [rng.randrange(VOCAB) for _ in range(rng.randint(1, 2 * block_size))]
        key = (
            rng.choice([0, 0, 1.0, 1.7]),
            rng.randrange(5),
            rng.choice([1, 2, 5, 12, 25]),
            rng.choice([0, 0, 0, 1]),
            rng.random() < 0.5,
            rng.choice([(), (), (5,)]),
            rng.choice([1.0, 1.0, 1.3]),
            rng.choice([0, 0, 4]),
            rng.choice([None, None, 2]),
            rng.choice([None, None, None, 1]),
        )
        request = Request(
            prompt=prompt,
            params=_params(key),
            n=rng.choice([1, 1, 1, 2, 3]),
            priority=rng.choice([0, 0, 0, 1, -1]),
            cache_salt=rng.choice([None, None, None, "a", f"own-{len(todo)}"]),
        )
        todo.append((request, key))

    # 2. Add, abort and step in random order; check everything after each step.
    tickets: dict[int, tuple[Ticket, tuple[Any, ...]]] = {}
    pieces: dict[tuple[int, int], list[Delta]] = {}
    ended: dict[tuple[int, int], Completion] = {}
    aborted: set[int] = set()
    steps_left = 3000
    while todo or engine.has_work:
        while todo and (not engine.has_work or rng.random() < 0.4):
            request, key = todo.pop(0)
            length = len(request.prompt)
            try:
                ticket = engine.add(request)
            except RequestError:
                outcome.counts["refused"] += 1
                is_too_long = length >= max_model_len or (paged and length > num_blocks * block_size)
                is_unchunkable = not can_chunk and length + (request.params.max_tokens or 0) > budget
                assert is_too_long or is_unchunkable, "a possible request was refused"
                continue
            tickets[ticket.request_id] = (ticket, key)
        if tickets and rng.random() < 0.03:
            victim = rng.choice(list(tickets))
            engine.abort(victim)
            aborted.add(victim)
            engine.scheduler.check()
        for delta in engine.step():
            where = (delta.request_id, delta.completion_index)
            assert where not in ended, "something came after the end"
            pieces.setdefault(where, []).append(delta)
            if delta.output is not None:
                ended[where] = delta.output
        engine.scheduler.check()
        steps_left -= 1
        assert steps_left > 0, "no end in sight: the engine does not make progress"

    # 3. Everybody got one answer, and the right one.
    for request_id, (ticket, key) in tickets.items():
        for index in range(ticket.request.n):
            done = ended.pop((request_id, index))
            deltas = pieces[(request_id, index)]
            tokens = list(done.token_ids)
            assert tokens == [t for d in deltas for t in d.token_ids], "the stream is not the answer"
            assert done.text == "".join(d.text for d in deltas), "the streamed text is not the answer's"
            want = _alone(ticket.prompt_ids, key, index, engine.max_len)
            outcome.counts[done.finish] += 1
            if done.finish is Finish.ABORT:
                assert request_id in aborted, "aborted by nobody"
            if done.finish is Finish.ERROR:
                assert fail_steps, f"failed without a fault: {done.error}"
            if done.finish in (Finish.ABORT, Finish.ERROR):
                want = want[: len(tokens)]
            assert tokens == want, f"request {request_id}.{index}: {tokens} instead of {want}"
            stats = done.stats
            # A sequence that was preempted had gained a token since it was last admitted.
            assert stats.num_preemptions <= stats.num_output_tokens, "a resume gained no token"
            if done.logprobs is not None:
                assert [lp.token_id for lp in done.logprobs] == tokens, "logprobs of other tokens"
            if ticket.request.cache_salt not in (None, "a") and ticket.request.n == 1:
                assert stats.num_cached_tokens == 0, "a prefix crossed salts"
            outcome.counts["cached"] += stats.num_cached_tokens
            outcome.counts["preempted"] += stats.num_preemptions
        leader = ticket.sequences[0]
        if leader.scores_prompt and leader.finish in (Finish.STOP, Finish.LENGTH):
            scored = [lp.token_id for lp in leader.prompt_logprobs]
            assert scored == list(ticket.prompt_ids[1:]), "prompt logprobs of other tokens"
            outcome.counts["scored"] += 1
    assert not ended, "an answer that nobody asked for"
    scheduler = engine.scheduler
    assert not scheduler.running, "a lane is held after the end"
    assert scheduler.manager is None or scheduler.manager.num_used == 0, "blocks outlive their requests"
    outcome.counts["chunks"] += runner.num_executed
    engine.close()
    return outcome
