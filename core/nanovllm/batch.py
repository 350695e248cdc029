"""What crosses the border between the engine and a runner, and between a runner and a sampler.

Every type here is frozen and complete: a batch says all there is to know about a step, never a
difference from an earlier one. This file knows no scheduler, no model and no tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .request import Finish, SamplingParams

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]

# Every name of SamplingParams that changes the tokens or what comes back with them. A runner that
# returns logits supports them all, because the core samples for it.
ALL_PARAMETERS: frozenset[str] = frozenset(
    ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
     "logit_bias", "seed", "max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "logprobs",
     "prompt_logprobs"]
)  # fmt: skip


# ------------------------------------------------------------------ what a runner says about itself


@dataclass(frozen=True, slots=True)
class Paged:
    """KV lives in blocks that the engine hands out: slot = block id * block_size + offset."""

    block_size: int  # tokens per block, >= 1
    num_blocks: int  # blocks in the pool, >= 1


@dataclass(frozen=True, slots=True)
class Lanes:
    """KV lives in one contiguous row per lane; position p of lane i is row i, column p."""

    num_lanes: int  # rows, >= 1
    max_len: int  # tokens per row


@dataclass(frozen=True, slots=True)
class Remote:
    """KV lives elsewhere: no blocks, no chunks, no preemption; `execute` returns what has arrived."""


KVLayout = Paged | Lanes | Remote


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerInfo:
    """The facts of a loaded runner, the only way they reach the engine."""

    vocab_size: int | None  # width of the logits; None where the runner cannot know (text-only servers)
    max_model_len: int  # positions: prompt + generated
    max_num_seqs: int  # sequences in one batch
    kv: KVLayout  # Paged, Lanes or Remote: where keys and values are kept
    can_chunk: bool = True  # may a prompt be computed in several steps?
    can_resume_prefix: bool = True  # may a sequence start on KV that another one computed?
    batch_invariant: bool = False  # are logits bit-identical for every composition of the batch?
    sampler: str = "numpy"  # the native sampler kind, chosen by `sampler: auto`
    tokenizes: bool = False  # does it take text prompts and return text itself?
    supports: frozenset[str] = ALL_PARAMETERS  # names of SamplingParams that it honours
    eos_ids: tuple[int, ...] = ()  # end-of-sequence ids the model's own files name
    description: Mapping[str, Any] = field(default_factory=dict)  # for people: model, dtype, device, bytes, ...


# ------------------------------------------------------------------------------------- one step in


class Sampling(NamedTuple):
    """SamplingParams resolved for one sequence."""

    params: SamplingParams
    eos_ids: tuple[int, ...]  # empty when ignore_eos
    stop_ids: frozenset[int]  # eos_ids and stop_token_ids: any of them ends the sequence
    seed: int  # 0 <= seed < 2**64; given or drawn at admission
    completion_index: int  # which completion of the request, 0 <= completion_index < n
    is_greedy: bool  # argmax of the raw logits and nothing else: the fast path
    mask: NDArray[np.bool_] | None = None  # (vocab,) True = allowed


class ScheduledSeq(NamedTuple):
    """One sequence of a step. Computes KV for context[start:stop]."""

    seq_id: int  # the same in every step
    lane: int  # 0 <= lane < max_num_seqs, held from admission to release or preemption
    context: IntArray  # (len,) int32, prompt + generated so far; read-only
    num_prompt: int  # context[:num_prompt] is the prompt
    start: int  # first position computed in this step; 0 = fresh state
    stop: int  # one past the last; start < stop <= len(context)
    num_logits: int  # rows wanted, the last of [start, stop): 0 = a chunk, 1 = sample, more = prompt logprobs
    blocks: IntArray  # (n,) int32 block ids covering [0, stop); read-only; empty unless kv is Paged
    sampling: Sampling
    prompt: str | Sequence[Mapping[str, str]] | None  # only for a runner that tokenizes by itself
    cache_salt: str | None = None  # the request's, for a runner whose cache is elsewhere: others may not share it

    @property
    def samples(self) -> bool:
        """Does this step reach the end of the context, so that a new token is drawn?"""
        return self.num_logits > 0 and self.stop == len(self.context)


class Packed(NamedTuple):
    """The batch as flat int32 arrays. T tokens, S sequences, R rows of logits wanted.

    `tables` is as wide as the longest sequence of the step needs; unused entries are -1.
    Sequence s owns tokens [q_start[s], q_start[s+1]) and attends to positions [0, kv_lens[s]).
    """

    input_ids: IntArray  # (T,)
    positions: IntArray  # (T,) where each token stands in its own sequence, from 0
    slots: IntArray  # (T,) where this token's KV goes: block * block_size + offset; empty unless Paged
    q_start: IntArray  # (S+1,) where each sequence's tokens begin among the T; the last entry is T
    kv_lens: IntArray  # (S,) positions that each sequence sees, those of this step included: its `stop`
    lanes: IntArray  # (S,) the lane that each sequence holds
    tables: IntArray  # (S, max_blocks) block ids, -1 padded; (S, 0) unless Paged
    rows: IntArray  # (R,) indices into [0, T), ascending: the tokens whose logits are wanted

    def entered_blocks(self, block_size: int) -> tuple[IntArray, IntArray]:
        """The blocks that a sequence enters in this step and does not fill, (n,), and the slots it uses of each, (n,).

        What lies behind these slots is a former owner's; an earlier step in the block has seen to it already.
        """
        starts, used = self.positions[self.q_start[:-1]], self.kv_lens % block_size  # used 0: all of its last block
        entered = np.flatnonzero((used > 0) & (starts <= self.kv_lens - used))
        return self.tables[entered, self.kv_lens[entered] // block_size], used[entered]


class Batch:
    """One step's work: the sequences, and the same thing packed (built at first use)."""

    __slots__ = ("__dict__", "block_size", "block_table", "seqs")

    def __init__(self, seqs: tuple[ScheduledSeq, ...], block_table: IntArray | None = None, block_size: int = 0):
        self.seqs = seqs
        self.block_table = block_table  # (max_num_seqs, max_blocks) int32, row = lane; None unless Paged
        self.block_size = block_size  # 0 unless Paged

    def __len__(self) -> int:
        return len(self.seqs)

    @property
    def num_tokens(self) -> int:
        """T: the tokens computed in this step, over all sequences."""
        return sum(s.stop - s.start for s in self.seqs)

    @cached_property
    def packed(self) -> Packed:
        """The batch as flat arrays."""
        seqs = self.seqs
        lanes = np.array([s.lane for s in seqs], np.int32)  # (S,)
        start = np.array([s.start for s in seqs], np.int32)  # (S,)
        stop = np.array([s.stop for s in seqs], np.int32)  # (S,)
        wanted = np.array([s.num_logits for s in seqs], np.int32)  # (S,)
        lens = stop - start
        q_start = np.zeros(len(seqs) + 1, np.int32)
        np.cumsum(lens, out=q_start[1:])
        if len(seqs) == q_start[-1]:  # one token each: pure decode
            positions = start
            input_ids = np.array([s.context[s.start] for s in seqs], np.int32)
            owner = np.arange(len(seqs), dtype=np.int32)
        else:
            owner = np.repeat(np.arange(len(seqs), dtype=np.int32), lens)  # (T,)
            positions = np.arange(q_start[-1], dtype=np.int32) - (q_start[:-1] - start)[owner]
            input_ids = np.concatenate([s.context[s.start : s.stop] for s in seqs])
        # The last `wanted[s]` tokens of each sequence, flattened in order.
        first = q_start[1:] - wanted
        rows = np.arange(wanted.sum(), dtype=np.int32) + np.repeat(first - (np.cumsum(wanted) - wanted), wanted)
        if self.block_table is None:
            slots, tables = np.empty(0, np.int32), np.empty((len(seqs), 0), np.int32)
        else:
            used = -(-stop // self.block_size)  # (S,) blocks covering [0, stop)
            width = int(used.max(initial=0))
            tables = self.block_table[lanes, :width]  # (S, width), a copy
            tables[np.arange(width, dtype=np.int32) >= used[:, None]] = -1
            slots = tables[owner, positions // self.block_size] * self.block_size + positions % self.block_size
        return Packed(
            input_ids, positions, slots.astype(np.int32, copy=False), q_start, stop, lanes, tables,
            rows.astype(np.int32, copy=False),
        )  # fmt: skip


# ------------------------------------------------------------------------------------ one step out


class TokenLogprob(NamedTuple):
    """Log-probability of one token under the raw logits (before penalties, bias and temperature)."""

    token_id: int
    logprob: float  # natural log
    rank: int  # 1 = the most likely
    top: tuple[tuple[int, float], ...]  # the asked-for most likely (id, logprob), best first


class SeqOutput(NamedTuple):
    """What a step gave one sequence. Nothing at all means that nothing arrived."""

    tokens: tuple[int, ...] = ()  # drawn in this step; of a Remote runner, what arrived
    finish: Finish | None = None  # only a Remote runner decides an end by itself
    error: str | None = None  # ends this sequence only
    logprobs: tuple[TokenLogprob, ...] | None = None  # one per token, where asked for
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None  # the prompt tokens scored in this step, in order
    text: str | None = None  # only from a runner that tokenizes by itself


class SampleRow(NamedTuple):
    """One row of logits and all that a sampler may know about it."""

    sampling: Sampling
    context: IntArray  # (len,) int32 prompt + generated; read-only
    num_prompt: int
    uniform: float  # the row's one random number, in [0, 1)
    target: int | None = None  # set: score this prompt token, sample nothing


class Sampled(NamedTuple):
    """A sampler's answer for R rows."""

    ids: Sequence[int]  # (R,) the drawn token, or the target of a scoring row
    logprobs: Sequence[TokenLogprob | None] | None  # (R,) where asked for; None if no row asked
    errors: Mapping[int, str]  # row -> why it has no token (NaN logits, nothing allowed)
