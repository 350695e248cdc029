"""Driver: hand-made batches for a runner that returns logits, and what came of each row.

It owns lanes and blocks, and remembers every row of logits with the tokens that it follows, as float64, whatever
array type the runner has and wherever it keeps them. Knows no engine, no scheduler and no reference: whether the rows
are right is the caller's matter.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..batch import Batch, Lanes, Paged, Sampled, SampleRow, Sampling, ScheduledSeq, TokenLogprob
from ..request import SamplingParams
from ..runner import LogitsRunner

Doubles = NDArray[np.float64]

_GREEDY = Sampling(SamplingParams(temperature=0), (), frozenset(), 0, 0, True)


class Row(NamedTuple):
    """One row of logits."""

    tokens: tuple[int, ...]  # all that come before the token that it scores
    logits: Doubles  # (vocab,)


@dataclass(slots=True, eq=False)
class Text:
    """A sequence that holds a lane."""

    tokens: tuple[int, ...]
    seq_id: int
    lane: int
    done: int = 0  # [0, done) is in the KV cache
    blocks: list[int] = field(default_factory=list)  # that cover [0, done)

    @property
    def left(self) -> int:
        return len(self.tokens) - self.done


class Recorder:
    """A sampler that keeps what it is given and takes the most likely token."""

    def __init__(self) -> None:
        self.logits: Any = None  # (R, vocab) of the last step, as the runner gave them; None if it gave none
        self.rows: Doubles = np.empty((0, 0))  # the same in float64

    def sample(self, logits: Any, rows: Sequence[SampleRow]) -> Sampled:
        self.logits, self.rows = logits, as_float64(logits)
        best = self.rows.argmax(axis=1).tolist()
        ids = [token if row.target is None else row.target for token, row in zip(best, rows, strict=True)]
        return Sampled(ids, [TokenLogprob(token, 0.0, 1, ()) for token in ids], {})


class Driver:
    def __init__(self, runner: LogitsRunner, *, shuffle: int | None = None, num_blocks: int | None = None) -> None:
        """Blocks are handed out in order, or in the order that the seed `shuffle` gives.

        `num_blocks`: of the pool, so that a few change hands often; None = all of them.
        """
        kv = runner.info.kv
        self.runner = runner
        self.recorder = Recorder()
        self.rows: list[Row] = []  # of all steps so far
        self.block_size = kv.block_size if isinstance(kv, Paged) else 0
        self.num_lanes = min(runner.info.max_num_seqs, kv.num_lanes if isinstance(kv, Lanes) else 2**31)
        self._free = list(reversed(range(kv.num_blocks if isinstance(kv, Paged) else 0)))
        if shuffle is not None:
            random.Random(shuffle).shuffle(self._free)
        del self._free[: 0 if num_blocks is None else -num_blocks]  # the last one is taken next
        self._owners: Counter[int] = Counter()  # block -> texts that hold it
        self._live: dict[int, Text] = {}  # lane -> its owner
        self._seq_ids = itertools.count(1)

    def begin(self, tokens: Sequence[int], lane: int | None = None, on: Text | None = None) -> Text:
        """A text on a free lane, the lowest unless one is given; `on`: with the whole blocks that `on` has computed
        of the same beginning."""
        lane = next(i for i in range(self.num_lanes) if i not in self._live) if lane is None else lane
        assert lane not in self._live, f"lane {lane} is not free"
        text = self._live[lane] = Text(tuple(tokens), next(self._seq_ids), lane)
        if on is not None:
            same = sum(
                1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(tokens, on.tokens, strict=False))
            )
            shared = min(same, on.done, len(tokens) - 1) // self.block_size
            text.blocks, text.done = on.blocks[:shared], shared * self.block_size
            self._owners.update(text.blocks)
        return text

    def end(self, text: Text) -> None:
        del self._live[text.lane]
        self._owners.subtract(text.blocks)
        self._free += [block for block in reversed(text.blocks) if not self._owners[block]]
        self.runner.release(text.seq_id, text.lane)

    def end_all(self) -> None:
        for text in list(self._live.values()):
            self.end(text)

    def step(self, *work: tuple[Text, int, int]) -> list[Doubles]:
        """Compute each (text, tokens of it, rows of logits): of each its rows, (rows, vocab).

        Several rows, and rows of a text that is not at its end, are for runners that support prompt_logprobs.
        """
        # 1. A batch as the engine would make it: one block table, whose rows are the lanes.
        for text, num_tokens, _ in work:
            while self.block_size and len(text.blocks) * self.block_size < text.done + num_tokens:
                text.blocks.append(self._free.pop())
                self._owners[text.blocks[-1]] = 1
        table = np.full((self.num_lanes, max(len(text.blocks) for text, _, _ in work)), -1, np.int32)
        for text, _, _ in work:
            table[text.lane, : len(text.blocks)] = text.blocks
        table.flags.writeable = False
        seqs = []
        for text, num_tokens, num_rows in work:
            stop = text.done + num_tokens
            # One row only: as if the text ended there and a token were drawn.
            context = np.array(text.tokens[:stop] if num_rows == 1 else text.tokens, np.int32)
            context.flags.writeable = False
            blocks = table[text.lane, : len(text.blocks)]
            seqs.append(
                ScheduledSeq(
                    text.seq_id, text.lane, context, len(context), text.done, stop, num_rows, blocks, _GREEDY, None
                )
            )
            text.done = stop
        batch = Batch(tuple(seqs), table, self.block_size) if self.block_size else Batch(tuple(seqs))
        # 2. The step, and whose the rows are.
        self.runner.sampler, self.recorder.logits = self.recorder, None
        outputs = self.runner.execute(batch)
        assert len(outputs) == len(seqs), f"execute returned {len(outputs)} outputs for {len(seqs)} sequences"
        errors = [out.error for out in outputs if out.error is not None]
        assert not errors, f"execute failed a sequence: {errors[0]}" if errors else ""
        ends = np.cumsum([num_rows for _, _, num_rows in work])
        rows = self.recorder.rows if ends[-1] else np.empty((0, self.recorder.rows.shape[1]))
        assert ends[-1] == 0 or self.recorder.logits is not None, "execute drew tokens without its sampler"
        found = np.split(rows, ends[:-1])
        for seq, own in zip(seqs, found, strict=True):
            first = seq.stop - len(own) + 1
            self.rows += [Row(tuple(seq.context[: first + i].tolist()), row) for i, row in enumerate(own)]
        return found

    def alone(self, tokens: Sequence[int]) -> Doubles:
        """The logits (vocab,) behind these tokens, computed in one step of their own; not among `rows`."""
        text, before = self.begin(tokens), len(self.rows)
        row: Doubles = self.step((text, len(tokens), 1))[0][0]
        self.end(text)
        del self.rows[before:]
        return row


def as_float64(array: Any) -> Doubles:
    """A copy in this process' own memory, of any library's array on any device."""
    try:
        return np.asarray(array).astype(np.float64)
    except (TypeError, ValueError, RuntimeError, BufferError):  # bfloat16, another device, or part of a graph
        return np.array(array.tolist(), np.float64)
