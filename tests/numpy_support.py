"""A tiny engine for runner tests: hand-made block tables, one `step` at a time, no scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nanovllm.batch import Batch, Sampling, ScheduledSeq
from nanovllm.hookspecs import CacheOptions, Context
from nanovllm.request import SamplingParams
from nanovllm_runner_numpy import plugin
from nanovllm_runner_numpy.runner import NumpyRunner

GREEDY = Sampling(SamplingParams(temperature=0), (), frozenset(), 0, 0, True)


def make_runner(path: Path, *, block_size: int = 4, num_blocks: int | None = 64, **overrides) -> NumpyRunner:
    ctx = {
        "options": None,
        "model": str(path),
        "path": path if path.exists() else None,
        "cache": CacheOptions(block_size=block_size, num_blocks=num_blocks),
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "max_model_len": None,
        "threads": None,
    }
    return plugin.create_runner(Context(**(ctx | overrides)))


class Driver:
    """Owns block tables. Blocks are handed out in the order of `free`, which a test may shuffle."""

    def __init__(self, runner: NumpyRunner, free: Sequence[int] | None = None) -> None:
        self.runner = runner
        self.block_size = runner.info.kv.block_size
        self.free = list(range(runner.info.kv.num_blocks) if free is None else free)
        self.tables: dict[int, list[int]] = {}  # lane -> blocks

    def step(self, *work: tuple[int, Sequence[int], int, int, int]) -> np.ndarray:
        """Each (lane, tokens, start, stop, num_logits) -> logits (R, vocab)."""
        width = max(-(-stop // self.block_size) for *_, stop, _ in work)
        table = np.full((max(lane for lane, *_ in work) + 1, width), -1, np.int32)
        seqs = []
        for lane, tokens, start, stop, num_logits in work:
            blocks = self.tables.setdefault(lane, [])
            while len(blocks) * self.block_size < stop:
                blocks.append(self.free.pop(0))
            table[lane, : len(blocks)] = blocks[:width]
            context = np.array(tokens, np.int32)
            seqs.append(
                ScheduledSeq(lane, lane, context, len(tokens), start, stop, num_logits, table[lane], GREEDY, None)
            )
        return self.runner.forward(Batch(tuple(seqs), table, self.block_size).packed)

    def logits(self, tokens: Sequence[int], lane: int = 0, chunk: int | None = None) -> np.ndarray:
        """All rows (len(tokens), vocab) of one sequence, computed `chunk` tokens a step."""
        chunk = chunk or len(tokens)
        rows = [
            self.step((lane, tokens, i, min(i + chunk, len(tokens)), min(chunk, len(tokens) - i)))
            for i in range(0, len(tokens), chunk)
        ]
        return np.concatenate(rows)

    def greedy(self, prompt: Sequence[int], num_tokens: int, lane: int = 0) -> list[int]:
        tokens = list(prompt)
        start = 0
        for _ in range(num_tokens):
            row = self.step((lane, tokens, start, len(tokens), 1))
            start = len(tokens)
            tokens.append(int(row[0].argmax()))
        return tokens[len(prompt) :]
