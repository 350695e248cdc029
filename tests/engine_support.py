"""What the engine's tests share: tiny tokenizers, a spying mock runner, a scripted remote one, and a collector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanovllm.batch import Batch, Remote, RunnerInfo, SeqOutput
from nanovllm.builtin.mock import MockRunner, expected
from nanovllm.builtin.simple_bpe import SimpleBPETokenizer
from nanovllm.engine import Engine
from nanovllm.intake import Ticket
from nanovllm.request import Completion, Delta, Finish, Request, SamplingParams
from nanovllm.runner import ModelRunner

EOS = 2  # SimpleBPETokenizer's


def greedy(max_tokens: int | None = 8, **more: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **more})


def wanted(prompt: Sequence[int], params: SamplingParams, max_len: int = 4096) -> list[int]:
    """The tokens of a greedy answer, by the mock's definition and the rules for an end, with no engine."""
    num = max_len - len(prompt) if params.max_tokens is None else min(params.max_tokens, max_len - len(prompt))
    ids = expected(prompt, num)
    stops = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
    ends = [i for i, token in enumerate(ids) if token in stops]
    return ids[: ends[0] + 1] if ends else ids


class ByteTokenizer:
    """Token i is byte i: every character outside of ASCII takes several tokens."""

    vocab_size = 256
    eos_ids: tuple[int, ...] = ()

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])

    def chat(self, messages: Any) -> list[int]:
        return self.encode("".join(m["content"] for m in messages))


class SpyRunner(MockRunner):
    """Remembers what each step was asked to compute, and which sequences were released."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.steps: list[dict[int, tuple[int, int]]] = []  # seq_id -> (start, stop)
        self.released: list[int] = []  # seq ids
        self.num_closed = 0

    def execute(self, batch: Batch) -> list[SeqOutput]:
        self.steps.append({s.seq_id: (s.start, s.stop) for s in batch.seqs})
        return super().execute(batch)

    def release(self, seq_id: int, lane: int) -> None:
        self.released.append(seq_id)

    def close(self) -> None:
        self.num_closed += 1
        super().close()


class RemoteRunner(ModelRunner):
    """Answers the i-th sequence that it sees with the i-th list of outputs, one a step."""

    def __init__(self, *plans: Sequence[SeqOutput], tokenizes: bool = False, vocab_size: int | None = 256) -> None:
        self._info = RunnerInfo(
            vocab_size=vocab_size, max_model_len=4096, max_num_seqs=64, kv=Remote(), tokenizes=tokenizes
        )
        self._waiting = [list(plan) for plan in plans]
        self._open: dict[int, list[SeqOutput]] = {}

    @property
    def info(self) -> RunnerInfo:
        return self._info

    def execute(self, batch: Batch) -> list[SeqOutput]:
        out = []
        for s in batch.seqs:
            assert s.start == 0, "a remote sequence is whole in every step"
            plan = self._open.setdefault(s.seq_id, self._waiting.pop(0) if s.seq_id not in self._open else [])
            out.append(plan.pop(0) if plan else SeqOutput())
        return out

    def release(self, seq_id: int, lane: int) -> None:
        self._open.pop(seq_id, None)


class Answers:
    """Collects deltas and holds them to what is promised of every stream."""

    def __init__(self) -> None:
        self.deltas: dict[tuple[int, int], list[Delta]] = {}  # (request_id, completion_index) -> its deltas

    def take(self, deltas: Sequence[Delta]) -> None:
        for delta in deltas:
            past = self.deltas.setdefault((delta.request_id, delta.completion_index), [])
            assert not past or past[-1].finish is None, "a delta after the last one"
            past.append(delta)
            if delta.finish is not None:
                self._check(past)

    @staticmethod
    def _check(deltas: list[Delta]) -> None:
        done = deltas[-1].output
        assert done is not None
        assert done.finish is deltas[-1].finish
        assert (done.error is not None) == (done.finish is Finish.ERROR)
        if done.finish is not Finish.ERROR:
            assert "".join(d.text for d in deltas) == done.text
            assert [t for d in deltas for t in d.token_ids] == list(done.token_ids)
            if done.logprobs is not None:
                assert tuple(lp for d in deltas for lp in d.logprobs or ()) == done.logprobs

    def of(self, ticket: Ticket, index: int = 0) -> Completion:
        last = self.deltas[ticket.request_id, index][-1].output
        assert last is not None, "the request has not ended"
        return last

    def ids(self, ticket: Ticket, index: int = 0) -> list[int]:
        done = self.of(ticket, index)
        assert done.error is None, done.error
        return list(done.token_ids)

    def has_ended(self, ticket: Ticket) -> bool:
        """Did every completion get its last delta?"""
        ends = (self.deltas.get((ticket.request_id, s.index)) for s in ticket.sequences)
        return all(deltas is not None and deltas[-1].finish is not None for deltas in ends)


def make_engine(runner: ModelRunner | None = None, tokenizer: Any = None, **options: Any) -> Engine:
    return Engine(runner or MockRunner(), tokenizer or SimpleBPETokenizer(), **options)


def drive(engine: Engine, answers: Answers | None = None, max_steps: int = 5000) -> Answers:
    """Step until nothing is left, with every block and lane accounted for after each step."""
    answers = answers or Answers()
    for _ in range(max_steps):
        if not engine.has_work:
            assert_idle(engine)
            return answers
        answers.take(engine.step())
        engine.scheduler.check()
    raise AssertionError(f"still at work after {max_steps} steps")


def assert_idle(engine: Engine) -> None:
    """Nothing lives, and the whole pool is free."""
    scheduler = engine.scheduler
    scheduler.check()
    assert not scheduler.running, "a sequence holds a lane"
    assert not scheduler.waiting, "a sequence waits"
    assert scheduler.manager is None or scheduler.manager.num_used == 0, "blocks outlive their request"


def ask(engine: Engine, prompt: Any, params: SamplingParams | None = None, **options: Any) -> Ticket:
    return engine.add(Request(prompt=prompt, params=params or greedy(), **options))
