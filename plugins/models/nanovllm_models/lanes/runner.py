"""`LanesRunner`: a graph that somebody else exported, what was proven of it, and the engine's border around both.

The engine sees lanes: each holds one sequence's past, however it is kept. Knows no runtime, no scheduler and no
sampler; logits come back as NumPy's.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nanovllm.batch import ALL_PARAMETERS, FloatArray, Lanes, Packed, RunnerInfo
from nanovllm.errors import ConfigError, RunnerError
from nanovllm.hookspecs import Context
from nanovllm.runner import LogitsRunner

from ..facts import ModelFacts
from ..sizing import model_len, num_kv_blocks
from .compose import compose
from .decoder import Decoder
from .keeper import Way
from .past import NUMBER_TYPES
from .probe import probe
from .work import Square, Work

MAX_LOGITS_BYTES = 2**28  # of a run, where the graph gives logits of every token


class LanesRunner(LogitsRunner):
    """Raises ModelError for a graph that cannot be used, ConfigError for what cannot be met."""

    def __init__(
        self,
        ctx: Context,
        decoder: Decoder,
        ways: Mapping[str, Way],
        facts: ModelFacts,
        description: Mapping[str, object],
    ) -> None:
        """`ways` in the order in which they are preferred; `description` comes before what is found out here."""
        max_model_len = sequence_len(facts, ctx.max_model_len)
        self._proven = proven = probe(decoder, ways)
        way = ways[proven.past]
        slot_bytes = sum(p.token_bytes for p in decoder.past) * way.copies
        lane_len = _lane_len(ctx, slot_bytes, max_model_len) if slot_bytes else max_model_len
        if decoder.takes_positions:
            _check_last_position(decoder, max_model_len)
        try:
            self._keeper = way.make(ctx.max_num_seqs, lane_len)
        except (MemoryError, ValueError) as e:  # ValueError: more than an address can say
            raise ConfigError(
                f"{ctx.max_num_seqs} lanes of {lane_len} tokens do not fit in memory: {e}",
                hint="lower cache.memory, max_model_len or scheduler.max_num_seqs",
            ) from e
        row_bytes = proven.vocab_size * max(NUMBER_TYPES[dtype].num_bytes for dtype in decoder.dtypes)
        self._max_tokens = max(1, MAX_LOGITS_BYTES // row_bytes) if proven.all_positions else None
        # In pieces, what is recomputed would be computed several times.
        self._cut_at = self._max_tokens if proven.chunk and slot_bytes else None
        self._info = RunnerInfo(
            vocab_size=proven.vocab_size,
            max_model_len=max_model_len,
            max_num_seqs=ctx.max_num_seqs,
            kv=Lanes(ctx.max_num_seqs, lane_len),
            can_chunk=proven.chunk,
            can_resume_prefix=False,  # a lane's past is nobody else's
            supports=ALL_PARAMETERS if proven.all_positions else ALL_PARAMETERS - {"prompt_logprobs"},
            eos_ids=facts.eos_ids,
            description={
                "model": facts.name,
                **description,
                **proven.facts,
                "lanes": ctx.max_num_seqs,
                "lane_tokens": lane_len,
                "kv_bytes": ctx.max_num_seqs * lane_len * slot_bytes,
                "generation_defaults": {name: d._asdict() for name, d in facts.sampling_defaults.items()},
            },
        )

    @property
    def info(self) -> RunnerInfo:
        return self._info

    def forward(self, packed: Packed) -> FloatArray:
        """Logits (R, vocab) float32 for `packed.rows`; the past of the lanes grows by the step's tokens.

        Raises RunnerError; the engine then releases the step's lanes, some of which may have gone on.
        """
        logits = np.empty((len(packed.rows), self._proven.vocab_size), np.float32)
        works = _works(packed, logits)
        while works:
            now, works = self._cut(works)
            for group in compose(now, self._keeper, self._proven, self._max_tokens):
                self._keeper.run(group, self._proven.side)
        return logits

    def release(self, seq_id: int, lane: int) -> None:
        self._keeper.drop(lane)

    def close(self) -> None:
        vars(self).pop("_keeper", None)

    def _cut(self, works: list[Work]) -> tuple[list[Work], list[Work]]:
        """What is computed now, and what follows of the works that are too long for one run."""
        now, later = [], []
        for work in works:
            first = work
            if self._cut_at is not None and len(work.ids) > self._cut_at:
                first, rest = work.cut(self._cut_at)
                later.append(rest)
            now.append(first)
        return now, later


def sequence_len(facts: ModelFacts, wanted: int | None) -> int:
    """Tokens of a sequence at most: the user's wish, or what the model's files say. Raises ConfigError."""
    positions = wanted if facts.context_length is None else facts.context_length
    if positions is None:
        raise ConfigError(f"no file of {facts.name} says how long a sequence may be", hint="set max_model_len")
    return model_len(facts.name, positions, wanted)


def _works(packed: Packed, logits: FloatArray) -> list[Work]:
    """`logits`: (R, vocab), of which each work gets the rows that are wanted of it."""
    bounds = packed.q_start.tolist()
    firsts = np.searchsorted(packed.rows, packed.q_start).tolist()  # of each sequence's rows
    return [
        Work(lane, packed.input_ids[bounds[s] : bounds[s + 1]], int(packed.positions[bounds[s]]), logits[a:b])
        for s, (lane, a, b) in enumerate(zip(packed.lanes.tolist(), firsts, firsts[1:], strict=False))
    ]


def _lane_len(ctx: Context, slot_bytes: int, max_model_len: int) -> int:
    """Tokens per lane: as long as the model, or what the cache's size leaves to each lane."""
    lanes = ctx.max_num_seqs
    room = num_kv_blocks(slot_bytes, ctx.cache, lanes, max_model_len) * ctx.cache.block_size
    if (ctx.max_model_len is not None and room < lanes * max_model_len) or room < lanes:
        raise ConfigError(
            f"{lanes} lanes of {max_model_len} tokens take {lanes * max_model_len * slot_bytes:,} bytes, "
            f"but the KV cache has {room * slot_bytes:,}",
            hint="raise cache.memory, or lower max_model_len or scheduler.max_num_seqs",
        )
    return min(max_model_len, room // lanes)


def _check_last_position(decoder: Decoder, max_model_len: int) -> None:
    """Raises ConfigError if the graph, which takes positions, has tables of fewer."""
    position = np.full((1, 1), max_model_len - 1, np.int32)
    try:
        decoder.run_fresh(Square(np.zeros_like(position), position, position >= 0))
    except RunnerError as e:
        raise ConfigError(
            f"the graph does not reach the last of {max_model_len} positions: {e.message}", hint="lower max_model_len"
        ) from e
