"""What the tests of models that others exported share, whatever runs them: steps of lanes, and random programs."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np

from nanovllm.batch import Batch, ScheduledSeq
from nanovllm.runner import LogitsRunner
from numpy_support import GREEDY


def step(runner: LogitsRunner, *work: tuple[int, Sequence[int], int, int, int]) -> np.ndarray:
    """Each (lane, tokens, start, stop, num_logits) -> logits (R, vocab)."""
    nothing = np.empty(0, np.int32)
    seqs = [
        ScheduledSeq(lane, lane, np.array(tokens, np.int32), len(tokens), start, stop, rows, nothing, GREEDY, None)
        for lane, tokens, start, stop, rows in work
    ]
    return runner.forward(Batch(tuple(seqs)).packed)


def run_random_program(
    runner: LogitsRunner,
    texts: Sequence[Sequence[int]],
    wanted_of: Sequence[np.ndarray],
    rng: random.Random,
    rounding: Mapping[str, float],
) -> None:
    """Texts advance by random chunks in random company; lanes change hands, sometimes in the middle.

    `wanted_of`: of each text the logits (tokens, vocab) that it has alone, which every step must give to `rounding`.
    """
    scores = "prompt_logprobs" in runner.info.supports
    owner: dict[int, int] = {}  # lane -> text
    done = [0] * len(texts)
    waiting = list(range(len(texts)))
    while waiting or owner:
        for lane in range(runner.info.kv.num_lanes):
            if lane not in owner and waiting and rng.random() < 0.5:
                owner[lane] = waiting.pop()
        work, wanted = [], []
        for lane in rng.sample(sorted(owner), len(owner)):
            text, start = owner[lane], done[owner[lane]]
            left = len(texts[text]) - start
            take = min(left, rng.choice([left, 1, 1, 1, 1, 5, 0]))
            if not take:
                continue
            rows = rng.randint(0, take if scores else 1)
            work.append((lane, texts[text], start, start + take, rows))
            wanted += list(wanted_of[text][start + take - rows : start + take])
            done[text] += take
        if not work:
            continue
        got = step(runner, *work)
        np.testing.assert_allclose(got, np.array(wanted).reshape(got.shape), **rounding)
        for lane, text in list(owner.items()):
            is_done = done[text] == len(texts[text])
            if is_done or rng.random() < 0.05:
                runner.release(0, lane)
                del owner[lane]
                if not is_done:
                    done[text] = 0
                    waiting.append(text)
    assert done == [len(text) for text in texts]
