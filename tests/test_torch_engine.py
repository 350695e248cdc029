"""Through the engine: the torch runner's answers are the NumPy runner's, however the requests were scheduled."""

from __future__ import annotations

import numpy as np
import pytest

from engine_support import ask, drive, greedy, make_engine
from models_support import LLAMA, file_tensors, write_checkpoint
from nanovllm.testing.runner_engine import EngineTests
from support import DATA, needs_data
from torch_support import Driver, fill, make_runner, sampler, torch

MODEL = DATA / "checkpoints" / "stories260k"


@needs_data
class TestStories(EngineTests):
    """Alone, in a crowd, in chunks, on cached prefixes, preempted, beside errors and aborts, with seeds."""

    @pytest.fixture(scope="class")
    @classmethod
    def config(cls):
        return {"model": str(MODEL), "runner": {"type": "torch", "threads": 1, "device": "cpu", "dtype": "fp32"}}


def test_every_slot_holds_what_its_own_token_computes(tmp_path, monkeypatch):
    """The K and V of every sequence, read through its blocks after each step, are those of its context alone."""
    path = write_checkpoint(tmp_path, LLAMA | {"vocab_size": 125})  # as the engine's tokenizer has
    runner, alone = make_runner(path, num_blocks=24), make_runner(path)
    fill(runner, float("nan"))
    owners: dict[int, set[int]] = {}  # block -> sequences
    is_permuted = False

    def kv(of, blocks: list[int], num_tokens: int):
        """(layers, tokens, 2 * kv_heads, head_size)"""
        return of._pool.array[:, blocks].transpose(2, 3).flatten(1, 2)[:, :num_tokens]

    execute = runner.execute

    def execute_and_check(batch):
        nonlocal is_permuted
        outputs = execute(batch)
        for seq in batch.seqs:
            driver, context = Driver(alone), seq.context[: seq.stop].tolist()
            driver.step((0, context, 0, seq.stop, 0))
            torch.testing.assert_close(
                kv(runner, seq.blocks.tolist(), seq.stop), kv(alone, driver.tables[0], seq.stop), rtol=0, atol=1e-5
            )
            is_permuted |= bool((np.diff(seq.blocks) < 0).any())
            for block in seq.blocks.tolist():
                owners.setdefault(block, set()).add(seq.seq_id)
        return outputs

    monkeypatch.setattr(runner, "execute", execute_and_check)
    engine = make_engine(runner, sampler=sampler.TorchSampler(), max_num_seqs=4, max_num_batched_tokens=16)
    prompts = [[5 + i % 7 for i in range(n)] for n in (20, 20, 3, 37, 20, 9, 37)]  # beginnings of each other
    tickets = [ask(engine, prompt, greedy(15)) for prompt in prompts]
    found = drive(engine)
    assert found.ids(tickets[0]) == found.ids(tickets[1]) == found.ids(tickets[4])
    assert engine.stats().num_preemptions > 0
    assert is_permuted
    assert sum(len(sequences) > 1 for sequences in owners.values()) > 12  # most blocks, one after another or at once


def test_a_request_with_nan_logits_fails_alone_and_the_engine_goes_on(tmp_path):
    config = LLAMA | {"vocab_size": 125}  # as the engine's tokenizer has
    tensors = file_tensors(config)
    tensors["model.embed_tokens.weight"][60] = float("nan")
    runner = make_runner(write_checkpoint(tmp_path, config, tensors), num_blocks=12)
    engine = make_engine(runner, sampler=sampler.TorchSampler(), max_num_seqs=3)
    first, bad, second = (ask(engine, ids, greedy(6)) for ids in ([5, 6, 7], [5, 60, 7], [9, 8]))
    found = drive(engine)  # which also counts the blocks
    assert "NaN logits" in found.of(bad).error
    again = [ask(engine, ids, greedy(6)) for ids in ([5, 6, 7], [9, 8])]
    later = drive(engine)
    assert [later.ids(t) for t in again] == [found.ids(first), found.ids(second)]
