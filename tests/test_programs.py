"""Random programs against the engine, and planted bugs that the programs must catch.

Every mutation below is a bug that a system like this one has had, or had while it was written.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import nanovllm.runner
from nanovllm.batch import Batch
from nanovllm.blocks import BlockManager, Seal
from nanovllm.engine import Engine
from nanovllm.request import Finish
from nanovllm.scheduler import Scheduler
from nanovllm.sequence import Sequence
from programs import run

NUM_PROGRAMS = 2400
CHUNK = 400


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    logging.disable(logging.CRITICAL)  # scripted faults are logged, as they should be
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("first", range(0, NUM_PROGRAMS, CHUNK))
def test_random_programs_give_what_each_request_gives_alone(first: int) -> None:
    counts: Counter[str] = Counter()
    for seed in range(first, first + CHUNK):
        counts += run(seed).counts
    # The programs reach what they are meant to reach.
    assert counts["cached"] > 1000
    assert counts["preempted"] > 50
    assert counts["scored"] > 100
    assert counts["refused"] > 50
    assert all(counts[finish] > 20 for finish in Finish)


@pytest.mark.slow
def test_many_more_random_programs() -> None:
    for seed in range(100_000, 130_000):
        run(seed)


# ----------------------------------------------------------------------------------- planted bugs

Patch = Callable[[pytest.MonkeyPatch], None]
MUTATIONS: dict[str, Patch] = {}


def mutation(patch: Patch) -> Patch:
    MUTATIONS[patch.__name__] = patch
    return patch


@mutation
def reused_block_keeps_its_seal(mp: pytest.MonkeyPatch) -> None:
    """The ancestor's stale index entry: a block handed out again still answers for its old content."""

    def forget(self: BlockManager, block: int) -> None:
        """Only the block's own record is dropped, not the index entry."""
        self._seals[block] = None

    def find(self: BlockManager, key: bytes, parent: Any, raw: bytes, salt: bytes) -> Any:
        block = self._index.get(key)
        return None if block is None else Seal(0, None, key, raw, salt, block)

    mp.setattr(BlockManager, "_forget", forget)
    mp.setattr(BlockManager, "_find", find)
    mp.setattr(BlockManager, "check", lambda self, owners: None)


@mutation
def hit_compares_only_the_blocks_own_tokens(mp: pytest.MonkeyPatch) -> None:
    """The ancestor's false hit: the same tokens under another prefix count as a hit."""
    mp.setattr(BlockManager, "_key", lambda self, parent, raw, salt: raw)

    def find(self: BlockManager, key: bytes, parent: Any, raw: bytes, salt: bytes) -> Any:
        block = self._index.get(key)
        return None if block is None else self._seals[block]

    mp.setattr(BlockManager, "_find", find)


@mutation
def full_hit_leaves_nothing_to_compute(mp: pytest.MonkeyPatch) -> None:
    """A prompt of whole, cached blocks: no token is left to run."""
    original = BlockManager.match
    mp.setattr(
        BlockManager,
        "match",
        lambda self, tokens, salt, limit: original(self, tokens, salt, len(tokens) // self.block_size),
    )


@mutation
def salt_is_ignored(mp: pytest.MonkeyPatch) -> None:
    match, seal = BlockManager.match, BlockManager.seal
    mp.setattr(BlockManager, "match", lambda self, tokens, salt, limit: match(self, tokens, b"", limit))
    mp.setattr(BlockManager, "seal", lambda self, block, tokens, parent, salt: seal(self, block, tokens, parent, b""))


@mutation
def chunk_counts_as_the_whole_prompt(mp: pytest.MonkeyPatch) -> None:
    """A real one of this engine's first hour: after a chunk, all but the last token count as computed."""
    original = Scheduler.commit

    def commit(self: Scheduler) -> None:
        picked = list(self._picked)
        original(self)
        for seq, _ in picked:
            if seq.lane is not None:
                seq.num_computed = max(seq.num_computed, seq.num_tokens - 1)

    mp.setattr(Scheduler, "commit", commit)


@mutation
def preempted_sequence_keeps_its_progress(mp: pytest.MonkeyPatch) -> None:
    original = Scheduler._admit

    def admit(self: Scheduler, seq: Sequence, budget: int) -> bool:
        ok = original(self, seq, budget)
        if ok and seq.num_preemptions:
            seq.num_computed = seq.num_tokens - 1
        return ok

    mp.setattr(Scheduler, "_admit", admit)


@mutation
def preemption_does_not_wait_for_a_token(mp: pytest.MonkeyPatch) -> None:
    """Without protection a sequence can be thrown out again before it gained anything."""
    mp.setattr(Sequence, "is_protected", property(lambda self: False))

    def grow(self: Scheduler, seq: Sequence) -> bool:
        if self.manager is not None and seq.num_tokens > len(seq.blocks) * self.block_size:
            for victim in [s for s in self.running if s.num_tokens == s.admitted_at]:
                self._preempt(victim)
        return original(self, seq)

    original = Scheduler._grow
    mp.setattr(Scheduler, "_grow", grow)


@mutation
def blocks_are_sealed_before_they_are_computed(mp: pytest.MonkeyPatch) -> None:
    original = Scheduler._admit

    def admit(self: Scheduler, seq: Sequence, budget: int) -> bool:
        ok = original(self, seq, budget)
        if ok and self.manager is not None and seq.cache_salt is not None:
            computed, seq.num_computed = seq.num_computed, seq.num_tokens
            if seq.seal_at <= seq.num_computed:
                self._seal(seq)
            seq.num_computed = computed
        return ok

    mp.setattr(Scheduler, "_admit", admit)


@mutation
def grown_block_is_not_in_the_table(mp: pytest.MonkeyPatch) -> None:
    original = Scheduler._grow

    def grow(self: Scheduler, seq: Sequence) -> bool:
        before = len(seq.blocks)
        ok = original(self, seq)
        if ok and len(seq.blocks) > before and before:
            assert self._table is not None
            self._table[seq.lane, before] = seq.blocks[0]
        return ok

    mp.setattr(Scheduler, "_grow", grow)
    mp.setattr(Scheduler, "check", lambda self: None)


@mutation
def released_blocks_are_released_twice(mp: pytest.MonkeyPatch) -> None:
    original = BlockManager.release

    def release(self: BlockManager, blocks: Any) -> None:
        original(self, blocks)
        for b in blocks:
            if self._refs[b] > 0:
                self._refs[b] -= 1

    mp.setattr(BlockManager, "release", release)


@mutation
def finished_sequence_keeps_its_blocks(mp: pytest.MonkeyPatch) -> None:
    """The ancestor never freed a runner's per-sequence state."""
    mp.setattr(BlockManager, "release", lambda self, blocks: None)


@mutation
def slots_run_on_across_sequences(mp: pytest.MonkeyPatch) -> None:
    original = Batch.packed.func  # type: ignore[attr-defined]

    def packed(self: Batch) -> Any:
        p = original(self)
        start = p.slots[:1] if len(p.slots) else p.slots
        return p._replace(slots=(start + np.arange(len(p.slots))).astype(np.int32))

    mp.setattr(Batch, "packed", property(packed))


@mutation
def positions_start_at_zero_in_every_chunk(mp: pytest.MonkeyPatch) -> None:
    original = Batch.packed.func  # type: ignore[attr-defined]

    def packed(self: Batch) -> Any:
        p = original(self)
        return p._replace(positions=p.positions - np.repeat(p.positions[p.q_start[:-1]], np.diff(p.q_start)))

    mp.setattr(Batch, "packed", property(packed))


@mutation
def table_rows_are_not_by_lane(mp: pytest.MonkeyPatch) -> None:
    original = Batch.packed.func  # type: ignore[attr-defined]

    def packed(self: Batch) -> Any:
        p = original(self)
        return p._replace(tables=p.tables[::-1].copy()) if len(p.tables) > 1 else p

    mp.setattr(Batch, "packed", property(packed))


@mutation
def logits_come_from_the_first_row_of_a_chunk(mp: pytest.MonkeyPatch) -> None:
    original = Batch.packed.func  # type: ignore[attr-defined]

    def packed(self: Batch) -> Any:
        p = original(self)
        return p._replace(rows=np.maximum(p.rows - 1, 0))

    mp.setattr(Batch, "packed", property(packed))


@mutation
def random_numbers_depend_on_the_batch(mp: pytest.MonkeyPatch) -> None:
    original = nanovllm.runner.rng.uniforms
    mp.setattr(
        nanovllm.runner.rng, "uniforms", lambda seeds, indices, at: original(seeds, indices, [p + len(at) for p in at])
    )


@mutation
def siblings_share_one_random_stream(mp: pytest.MonkeyPatch) -> None:
    original = nanovllm.runner.rng.uniforms
    mp.setattr(nanovllm.runner.rng, "uniforms", lambda seeds, indices, at: original(seeds, [0] * len(seeds), at))


@mutation
def token_after_the_stop_is_computed(mp: pytest.MonkeyPatch) -> None:
    original = Engine._accept

    def accept(self: Engine, seq: Sequence, out: Any, now: float) -> Any:
        text, count, finish = original(self, seq, out, now)
        return text, count, None if finish is Finish.STOP and seq.num_output < 3 else finish

    mp.setattr(Engine, "_accept", accept)


@mutation
def deltas_go_to_the_next_sequence(mp: pytest.MonkeyPatch) -> None:
    """The ancestor gave outputs in completion order."""
    original = Engine._execute
    mp.setattr(Engine, "_execute", lambda self, batch: original(self, batch)[::-1])


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_planted_bug_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTATIONS[name](monkeypatch)
    caught = None
    for seed in range(400):
        try:
            run(seed)
        except Exception as e:  # an assertion of the programs, of the engine, or a crash: all of them show it
            caught = e
            break
    assert caught is not None, f"400 programs did not notice {name}"
