"""MockRunner: a model with no weights whose every token depends on the whole prefix, through the KV cache.

KV slot p holds a 64-bit hash of tokens[:p+1], computed from the hash in slot p-1, which is read through
the block table like a real runner's keys and values. A wrong slot, table, position, prefix hit or stale
block therefore changes the text. Logits are a hash of (state, token id): deterministic, spread over the
vocabulary, and equal for every composition of the batch. `Script` makes it misbehave on purpose.

Knows no scheduler. `expected` says what it generates, without any cache.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..batch import Batch, FloatArray, Lanes, Packed, Paged, RunnerInfo, SeqOutput
from ..errors import RunnerDead, RunnerError
from ..runner import LogitsRunner

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: the increment of SplitMix64
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)  # the finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHIFTS = tuple(np.uint64(n) for n in (30, 27, 31, 40))
_SCALE = np.float32(16 / 2**24)  # logits in [0, 16)

States = NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What goes wrong, and when. Steps are counted from 1."""

    tokens: Sequence[int] = ()  # the first generated tokens of every sequence; after them, the hash decides
    nan_token: int | None = None  # a sequence with this token in its context gets NaN, in its KV too
    nan_steps: Iterable[int] = ()  # all logits of these steps are NaN
    fail_steps: Iterable[int] = ()  # raise RunnerError
    dead_step: int | None = None  # raise RunnerDead from this step on
    short_steps: Iterable[int] = ()  # return one row of logits too few
    hang_step: int | None = None  # block in this step until close()
    delay: float = 0.0  # seconds that each step takes


class MockRunner(LogitsRunner):
    def __init__(
        self,
        vocab_size: int = 125,
        *,
        max_model_len: int = 4096,  # tokens
        max_num_seqs: int = 256,
        block_size: int = 16,  # tokens
        num_blocks: int = 4096,
        layout: str = "paged",  # or "lanes"
        can_chunk: bool = True,
        can_resume_prefix: bool = True,
        seed: int = 0,
        eos_ids: tuple[int, ...] = (),
        script: Script | None = None,
    ) -> None:
        is_paged = layout == "paged"
        kv: Paged | Lanes = Paged(block_size, num_blocks) if is_paged else Lanes(max_num_seqs, max_model_len)
        self._info = RunnerInfo(
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            kv=kv,
            can_chunk=can_chunk,
            can_resume_prefix=can_resume_prefix and is_paged,
            batch_invariant=True,
            eos_ids=eos_ids,
            description={"model": "mock", "architecture": "hash of the prefix", "dtype": "uint64"},
        )
        num_slots = num_blocks * block_size if is_paged else max_num_seqs * max_model_len
        self.kv: States = np.zeros(num_slots, np.uint64)  # (slots,) the "keys and values"
        self._is_nan = np.zeros(num_slots, np.bool_)  # (slots,) hashes have no NaN of their own
        self._seed = np.uint64(seed)
        self._script = script or Script()
        self._nan_steps = frozenset(self._script.nan_steps)
        self._fail_steps = frozenset(self._script.fail_steps)
        self._short_steps = frozenset(self._script.short_steps)
        self._step = 0
        self._closed = threading.Event()
        self._forced: list[int | None] = []  # per row: the token the script wants

    @property
    def info(self) -> RunnerInfo:
        return self._info

    def execute(self, batch: Batch) -> list[SeqOutput]:
        self._step += 1
        script = self._script
        if script.delay:
            time.sleep(script.delay)
        if script.hang_step == self._step:
            self._closed.wait()
        if script.dead_step is not None and self._step >= script.dead_step:
            raise RunnerDead(f"the script ends the mock runner at step {script.dead_step}")
        if self._step in self._fail_steps:
            raise RunnerError(f"the script fails step {self._step}")
        if script.tokens:
            self._forced = []
            for s in batch.seqs:
                done = len(s.context) - s.num_prompt
                wanted = script.tokens[done] if s.samples and done < len(script.tokens) else None
                self._forced += [None] * (s.num_logits - 1) + [wanted] * (s.num_logits > 0)
        return super().execute(batch)

    def forward(self, packed: Packed) -> FloatArray:
        q_start, lens = packed.q_start, np.diff(packed.q_start)  # (S+1,), (S,)
        start = packed.kv_lens - lens  # (S,) first position of each
        # The state before the first token, read through the table.
        state = np.full(len(lens), self._seed, np.uint64)
        is_nan = np.zeros(len(lens), np.bool_)
        resumed = np.flatnonzero(start > 0)
        before = self._slot(packed, resumed, start[resumed] - 1)
        state[resumed], is_nan[resumed] = self.kv[before], self._is_nan[before]
        states = np.empty(len(packed.input_ids), np.uint64)  # (T,)
        nans = np.empty(len(packed.input_ids), np.bool_)
        for k in range(int(lens.max(initial=0))):  # the k-th token of every sequence that has one
            live = np.flatnonzero(lens > k)
            at = q_start[live] + k
            token = packed.input_ids[at]
            state[live] = _next(state[live], token)
            if self._script.nan_token is not None:
                is_nan[live] |= token == self._script.nan_token
            states[at], nans[at] = state[live], is_nan[live]
            slots = packed.slots[at] if len(packed.slots) else self._slot(packed, live, start[live] + k)
            self.kv[slots], self._is_nan[slots] = state[live], is_nan[live]
        logits = chain_logits(states[packed.rows], self._info.vocab_size or 0)  # (R, vocab)
        for row, wanted in enumerate(self._forced if len(self._forced) == len(logits) else ()):
            if wanted is not None:
                logits[row, wanted] = 100.0
        logits[nans[packed.rows]] = np.nan
        if self._step in self._nan_steps:
            logits[:] = np.nan
        return logits[:-1] if self._step in self._short_steps else logits

    def _slot(self, packed: Packed, seqs: NDArray[Any], positions: NDArray[Any]) -> NDArray[Any]:
        """Where the KV of these positions is, one per sequence."""
        kv = self._info.kv
        if isinstance(kv, Paged):
            row, size = packed.tables[seqs, positions // kv.block_size], kv.block_size
        else:
            row, size = packed.lanes[seqs], self._info.max_model_len
        slots: NDArray[np.int64] = row.astype(np.int64) * size + positions % size
        return slots

    def close(self) -> None:
        self._closed.set()


def NewMockModelRunner(vocab_size: int = 125) -> MockRunner:
    """The seed documents' name for a mock runner with defaults."""
    return MockRunner(vocab_size)


def expected(prompt: Sequence[int], num_tokens: int, *, vocab_size: int = 125, seed: int = 0) -> list[int]:
    """The greedy continuation of `prompt`, computed without any cache."""
    state = chain_states(prompt, seed)[-1:]
    out: list[int] = []
    for _ in range(num_tokens):
        out.append(int(chain_logits(state, vocab_size)[0].argmax()))
        state = _next(state, np.array(out[-1:]))
    return out


def chain_states(tokens: Sequence[int], seed: int = 0) -> States:
    """(len(tokens),) the state after each token."""
    states = [np.full(1, seed, np.uint64)]
    for token in tokens:
        states.append(_next(states[-1], np.array([token])))
    return np.concatenate(states[1:])


def chain_logits(states: States, vocab_size: int) -> FloatArray:
    """(R,) states -> (R, vocab_size) logits in [0, 16)."""
    ids = np.arange(vocab_size, dtype=np.uint64)
    noise = _mix(states[:, None] ^ (ids * _MULTIPLIER))
    return (noise >> _SHIFTS[3]).astype(np.float32) * _SCALE


def _next(states: States, tokens: NDArray[Any]) -> States:
    return _mix(states + _MULTIPLIER * (tokens.astype(np.uint64) + np.uint64(1)))


def _mix(x: States) -> States:
    x = (x ^ (x >> _SHIFTS[0])) * _MIX_1
    x = (x ^ (x >> _SHIFTS[1])) * _MIX_2
    return x ^ (x >> _SHIFTS[2])
