"""Scheduler: decides what each step computes. The only writer of num_computed, lanes and blocks.

There is no prefill phase and no decode phase: in every step, each sequence's num_computed catches up
with its num_tokens as far as the step's token budget allows. Order is (priority, arrival): decodes of
running sequences first, then their unfinished prompts, then admissions. When a running sequence needs
a block and none is free, the last sequence in order gives up its KV and waits to be recomputed.

Bounds that the tests hold it to: a sequence gets the blocks for its whole context when it is admitted
and cannot be preempted before it has gained a token, so every preemption is paid for by at least one
token; and any admitted sequence fits the pool alone, so the first in order always moves.

A paced sequence that has generated all that was granted rests. It is in nobody's way: it keeps its lane and
blocks only until another sequence wants them, the one that has rested longest gives up first, and none is
preempted while one that rests holds anything.

Knows no runner, no tokenizer and no text.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable

import numpy as np

from .batch import Batch, IntArray, Lanes, Paged, Remote, RunnerInfo, ScheduledSeq
from .blocks import BlockManager, HashBlock, sha256_chain
from .request import Finish
from .sequence import Sequence

MIN_ROWS = 64  # rows of logits that a step may always ask for; prompt logprobs come in pieces of this size


class Scheduler:
    def __init__(
        self,
        info: RunnerInfo,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        prefix_caching: bool = True,
        on_release: Callable[[int, int], None] = lambda seq_id, lane: None,
        hash_block: HashBlock = sha256_chain,
    ) -> None:
        kv = info.kv
        self.max_num_seqs = min(
            max_num_seqs, info.max_num_seqs, kv.num_lanes if isinstance(kv, Lanes) else max_num_seqs
        )
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_rows = max(MIN_ROWS, self.max_num_seqs)
        self.is_remote = isinstance(kv, Remote)
        self.can_chunk = info.can_chunk
        self.manager: BlockManager | None = None
        self.block_size = 0
        self._table: IntArray | None = None  # (max_num_seqs, max_blocks): row = lane
        self._rows: IntArray | None = None  # the same memory, read-only
        self.max_len = info.max_model_len  # tokens that any one sequence can ever hold
        if isinstance(kv, Paged):
            self.manager = BlockManager(kv.num_blocks, kv.block_size, hash_block=hash_block)
            self.block_size = kv.block_size
            # The last token's KV is never needed, so a full pool still leaves room for one token more.
            self.max_len = min(self.max_len, kv.num_blocks * kv.block_size + 1)
            self._table = np.full((self.max_num_seqs, self.manager.blocks_for(self.max_len)), -1, np.int32)
            self._rows = self._table.view()
            self._rows.flags.writeable = False
        elif isinstance(kv, Lanes):
            self.max_len = min(self.max_len, kv.max_len + 1)
        self.can_share = prefix_caching and info.can_resume_prefix and self.manager is not None
        self.waiting: list[Sequence] = []  # by order
        self.running: list[Sequence] = []  # by order; each holds a lane
        self.resting: dict[int, Sequence] = {}  # by seq_id, longest first; some still hold a lane
        self.num_preemptions = 0
        self.num_cached_tokens = 0  # prompt tokens taken from the prefix cache
        self._lanes = list(range(self.max_num_seqs))  # heap of free ones
        self._picked: list[tuple[Sequence, int]] = []  # this step's sequences, and where each one stops
        self._known: list[int] = []  # num_tokens of each at that time
        self._on_release = on_release

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, seq: Sequence) -> None:
        if seq.rests:
            self.resting[seq.seq_id] = seq
        else:
            insort(self.waiting, seq, key=_order)

    def grant(self, seq: Sequence, num_output: int) -> None:
        """Let a paced sequence go on until it has generated `num_output` tokens in all."""
        assert seq.granted is not None, "only a paced sequence is granted tokens"
        seq.granted = max(seq.granted, num_output)
        if not seq.rests and self.resting.pop(seq.seq_id, None) is not None:
            insort(self.waiting if seq.lane is None else self.running, seq, key=_order)

    def remove(self, seq: Sequence, *, suspect: bool = False) -> None:
        """Forget a sequence, wherever it is. `suspect`: its KV may be wrong, so nobody may share it."""
        if seq.lane is None:
            if self.resting.pop(seq.seq_id, None) is None and seq in self.waiting:
                self.waiting.remove(seq)
            return
        if suspect and self.manager is not None:
            self.manager.unseal(seq.blocks)
        if self.resting.pop(seq.seq_id, None) is None:
            self.running.remove(seq)
        self._release(seq)

    # ------------------------------------------------------------------------------------ a step

    def schedule(self, now: float = 0.0) -> Batch | None:
        """Choose this step's work, or None if there is none. `commit` must follow before the next call."""
        assert not self._picked, "schedule() called twice without commit()"
        if self.is_remote:
            self._admit_remote(now)
        else:
            self._choose(now)
        if not self._picked:
            return None
        self._known = [seq.num_tokens for seq, _ in self._picked]
        return Batch(tuple([self._scheduled(seq, stop) for seq, stop in self._picked]), self._rows, self.block_size)

    def commit(self) -> None:
        """Account for the step after the engine appended its tokens: progress, sealing, and who is done."""
        picked, self._picked = self._picked, []
        for (seq, stop), known in zip(picked, self._known, strict=True):
            seq.num_computed = stop if seq.num_tokens == known else seq.num_tokens - 1
            if seq.seal_at <= seq.num_computed:
                self._seal(seq)
            if seq.finish is not None:
                self.remove(seq, suspect=seq.finish is Finish.ERROR)
            elif seq.rests:
                self.running.remove(seq)
                self.resting[seq.seq_id] = seq

    def rollback(self) -> list[Sequence]:
        """The step failed: nothing was computed. Returns the sequences it was for."""
        picked, self._picked = self._picked, []
        return [seq for seq, _ in picked]

    # ---------------------------------------------------------------------------------- choosing

    def _choose(self, now: float) -> None:
        budget, rows = self.max_num_batched_tokens, self.max_rows
        # 1. Decodes: one token each. max_num_batched_tokens >= max_num_seqs, so all of them fit.
        prompts: list[Sequence] = []
        for seq in list(self.running):
            if seq.lane is None:  # preempted by an earlier one in this very loop
                continue
            if seq.num_tokens - seq.num_computed > 1 or seq.num_unscored > 0:
                prompts.append(seq)
            elif self._grow(seq):
                self._picked.append((seq, seq.num_tokens))
                budget -= 1
                rows -= 1
        # 2. Prompts that are only partly computed.
        for seq in prompts:
            stop, wanted = self._chunk(seq, budget, rows)
            if stop > seq.num_computed:
                self._picked.append((seq, stop))
                budget -= stop - seq.num_computed
                rows -= wanted
        # 3. Admissions, strictly in order: a large request at the head is not overtaken for ever.
        admitted: list[Sequence] = []
        for seq in self.waiting:
            if budget <= 0 or rows <= 0:
                break
            if seq.awaits_leader:
                continue
            if not self._admit(seq, budget):
                break
            admitted.append(seq)
            if seq.first_scheduled is None:
                seq.first_scheduled = now
            stop, wanted = self._chunk(seq, budget, rows)
            assert stop > seq.num_computed, "an admitted sequence computes at least one token"
            self._picked.append((seq, stop))
            budget -= stop - seq.num_computed
            rows -= wanted
        for seq in admitted:
            self.waiting.remove(seq)

    def _chunk(self, seq: Sequence, budget: int, rows: int) -> tuple[int, int]:
        """How far this sequence gets in this step, and how many rows of logits that takes."""
        start, end = seq.num_computed, seq.num_tokens
        if rows <= 0 or budget <= 0:
            return start, 0
        stop = min(end, start + budget)
        if stop < end and not self.can_chunk:
            return start, 0
        if seq.num_unscored > 0 and self.can_chunk:
            # Rows for positions [first unscored, stop), which must fit what is left of the step.
            stop = min(stop, max(start, seq.num_prompt - 1 - seq.num_unscored) + rows)
        return stop, self._rows_wanted(seq, start, stop)

    def _rows_wanted(self, seq: Sequence, start: int, stop: int) -> int:
        if seq.num_unscored > 0:
            return max(0, stop - max(start, seq.num_prompt - 1 - seq.num_unscored))
        return 1 if stop == seq.num_tokens else 0

    def _scheduled(self, seq: Sequence, stop: int) -> ScheduledSeq:
        lane, start = seq.lane, seq.num_computed
        assert lane is not None, "only running sequences are scheduled"
        return ScheduledSeq(
            seq.seq_id,
            lane,
            seq.view[: seq.num_tokens],
            seq.num_prompt,
            0 if self.is_remote else start,
            stop,
            1 if self.is_remote else self._rows_wanted(seq, start, stop),
            _NO_BLOCKS if self._rows is None else self._rows[lane, : -(-stop // self.block_size)],
            seq.sampling,
            seq.prompt,  # type: ignore[arg-type]
            seq.salt,
        )

    # ------------------------------------------------------------------------- lanes and blocks

    def _admit(self, seq: Sequence, budget: int) -> bool:
        """Give a waiting sequence its lane and the blocks for its whole context, or change nothing."""
        if not self._lanes and not self._displace():
            return False
        cached: list[int] = []
        if self.manager is not None:
            if seq.cache_salt is not None and seq.num_unscored <= 0:
                # One token is always computed, so a prompt that is cached to its end gives up its last block.
                limit = (seq.num_tokens - 1) // self.block_size
                cached, seq.seal = self.manager.match(seq.context, seq.cache_salt, limit)
            if not self.can_chunk and seq.num_tokens - len(cached) * self.block_size > budget:
                return False
            need = self.manager.blocks_for(seq.num_tokens) - len(cached)
            # One that was preempted comes back only when the others could all grow once more.
            spare = len(self.running) if seq.num_preemptions else 0
            blocks = None
            while blocks is None:
                if not spare or need + len(cached) + spare <= self.manager.num_free:
                    blocks = self.manager.take(cached, need)
                if blocks is None and not self._displace():
                    return False
            seq.blocks = blocks
        elif not self.can_chunk and seq.num_tokens > budget:
            return False
        lane = heapq.heappop(self._lanes)
        if self._table is not None:
            self._table[lane, : len(seq.blocks)] = seq.blocks
        seq.lane = lane
        seq.num_computed = len(cached) * self.block_size
        seq.seal_at = seq.num_computed + self.block_size if seq.cache_salt is not None else _NEVER
        if seq.num_preemptions == 0:
            seq.num_cached = seq.num_computed
            self.num_cached_tokens += seq.num_computed
        seq.admitted_at = seq.num_tokens
        insort(self.running, seq, key=_order)
        return True

    def _admit_remote(self, now: float) -> None:
        while self.waiting and (self._lanes or self._displace()):
            seq = self.waiting.pop(0)
            seq.lane = heapq.heappop(self._lanes)
            seq.seal_at = _NEVER
            seq.admitted_at = seq.num_tokens
            if seq.first_scheduled is None:
                seq.first_scheduled = now
            insort(self.running, seq, key=_order)
        self._picked = [(seq, seq.num_tokens) for seq in self.running]

    def _grow(self, seq: Sequence) -> bool:
        """Make room for one token's KV; False if `seq` itself had to give way."""
        if self.manager is None or seq.num_tokens <= len(seq.blocks) * self.block_size:
            return True
        while (block := self.manager.take((), 1)) is None:
            if self._displace():
                continue
            # A protected one holds all it needs, so `seq`, which needs more, is itself a candidate.
            victim = next(s for s in reversed(self.running) if not s.is_protected)
            self._preempt(victim)
            if victim is seq:
                return False
        assert self._table is not None and seq.lane is not None, "a running paged sequence has a table row"  # noqa: PT018
        self._table[seq.lane, len(seq.blocks)] = block[0]
        seq.blocks += block
        return True

    def _displace(self) -> bool:
        """Free what the sequence holds that has rested longest; False if none that rests holds anything."""
        seq = next((s for s in self.resting.values() if s.lane is not None), None)
        if seq is None:
            return False
        self._release(seq)
        self._count_preemption(seq)
        return True

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._release(seq)
        self._count_preemption(seq)
        insort(self.waiting, seq, key=_order)

    def _count_preemption(self, seq: Sequence) -> None:
        seq.num_preemptions += 1
        self.num_preemptions += 1

    def _release(self, seq: Sequence) -> None:
        lane = seq.lane
        assert lane is not None, "a sequence without a lane holds nothing"
        if self.manager is not None:
            self.manager.release(seq.blocks)
            assert self._table is not None, "paged KV has a table"
            self._table[lane, : len(seq.blocks)] = -1
        seq.blocks = []
        seq.lane = None
        seq.num_computed = 0
        seq.seal = None
        heapq.heappush(self._lanes, lane)
        self._on_release(seq.seq_id, lane)

    def _seal(self, seq: Sequence) -> None:
        """Offer every block that became full to later sequences."""
        assert self.manager is not None and seq.cache_salt is not None, "only shared paged KV is sealed"  # noqa: PT018
        size = self.block_size
        while seq.seal_at <= seq.num_computed:
            first = seq.seal_at - size
            block = seq.blocks[first // size]
            seq.seal = self.manager.seal(block, seq.context[first : seq.seal_at], seq.seal, seq.cache_salt)
            seq.seal_at += size

    def check(self) -> None:
        """Raise AssertionError unless lanes, blocks and tables are exactly accounted for."""
        holders = [*self.running, *(s for s in self.resting.values() if s.lane is not None)]
        held = [s.lane for s in holders if s.lane is not None]
        assert len(held) == len(holders), "a running sequence has no lane"
        assert sorted(held + self._lanes) == list(range(self.max_num_seqs)), "lanes lost or held twice"
        assert all(s.lane is None and not s.blocks for s in self.waiting), "a waiting sequence holds resources"
        assert all(s.rests for s in self.resting.values()), "a sequence rests that has more to do"
        assert not any(s.rests for s in (*self.running, *self.waiting)), "a sequence goes beyond what was granted"
        for queue in (self.running, self.waiting):
            assert [s.order for s in queue] == sorted(s.order for s in queue), "a queue is out of order"
        if self.manager is None:
            return
        self.manager.check([s.blocks for s in holders])
        assert self._table is not None, "paged KV has a table"
        for s in holders:
            row = self._table[s.lane]
            assert row[: len(s.blocks)].tolist() == s.blocks, f"table row of lane {s.lane} is not its blocks"
            assert (row[len(s.blocks) :] == -1).all(), f"table row of lane {s.lane} has a stale block"
            assert s.num_computed <= len(s.blocks) * self.block_size, f"lane {s.lane} computed past its blocks"


_NEVER = 2**62  # a num_computed that no sequence reaches
_NO_BLOCKS: IntArray = np.empty(0, np.int32)
_NO_BLOCKS.flags.writeable = False


def _order(seq: Sequence) -> tuple[int, int, int]:
    return seq.order
