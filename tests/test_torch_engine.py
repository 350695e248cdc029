"""Through the engine: the torch runner's tokens are the NumPy runner's, however the requests were scheduled."""

from __future__ import annotations

import json

import numpy as np
import pytest

import numpy_support
from engine_support import Answers, ask, drive, greedy, make_engine
from models_support import LLAMA, file_tensors, write_checkpoint
from nanovllm.request import SamplingParams
from support import DATA, needs_data
from torch_support import Driver, fill, make_runner, sampler, torch

MODEL = DATA / "checkpoints" / "stories260k"
LENGTHS = (1, 3, 8, 17, 30, 44)  # of the prompts, the beginnings of one text

# Engines that schedule the same requests in very different ways.
ENGINES = {
    "alone": {"max_num_seqs": 1, "prefix_caching": False},
    "batched": {"prefix_caching": False},
    "chunked": {"max_num_batched_tokens": 8, "prefix_caching": False},
    "prefix-cached": {},
    "everything": {"max_num_seqs": 4, "max_num_batched_tokens": 8},
}
POOLS = {"roomy": 256, "tight": 20}  # blocks of 4 tokens; of the tight one, two sequences preempt each other


@pytest.fixture(scope="module")
def text() -> list[int]:
    """A story of the model's own."""
    [case, *_] = json.loads((MODEL / "reference.json").read_text(encoding="utf-8"))["cases"]
    return numpy_support.Driver(numpy_support.make_runner(MODEL)).greedy(case["input_ids"], 50)


def answers(runner, text: list[int], params: list[SamplingParams], **options) -> tuple[list[list[int]], Answers]:
    own = sampler.TorchSampler() if runner.info.sampler == "torch" else None
    engine = make_engine(runner, sampler=own, **options)
    tickets = [ask(engine, text[:n], p) for n, p in zip(LENGTHS, params, strict=True)]
    found = drive(engine)
    if runner.info.kv.num_blocks == POOLS["tight"] and options.get("max_num_seqs") != 1:
        assert engine.stats().num_preemptions > 0
    if options.get("prefix_caching", True) and runner.info.kv.num_blocks == POOLS["roomy"]:
        again = ask(engine, text[: LENGTHS[-1]], params[-1])
        done = drive(engine).of(again)
        assert done.stats.num_cached_tokens > 0
        assert list(done.token_ids) == found.ids(tickets[-1])
    return [found.ids(t) for t in tickets], found


@needs_data
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("how", ENGINES)
def test_greedy_tokens_are_numpys(how, pool, text):
    params = [greedy(25)] * len(LENGTHS)
    driver = numpy_support.Driver(numpy_support.make_runner(MODEL, num_blocks=256))
    wanted = [driver.greedy(text[:n], 25, lane) for lane, n in enumerate(LENGTHS)]
    runner = make_runner(MODEL, num_blocks=POOLS[pool])
    assert answers(runner, text, params, **ENGINES[how])[0] == wanted


@needs_data
@pytest.mark.parametrize("how", ENGINES)
def test_seeded_samples_are_numpys(how, text):
    params = [SamplingParams(temperature=0.8, top_p=0.95, seed=i, max_tokens=20, ignore_eos=True) for i in range(6)]
    wanted = answers(numpy_support.make_runner(MODEL, num_blocks=256), text, params, **ENGINES["alone"])[0]
    got = answers(make_runner(MODEL, num_blocks=256), text, params, **ENGINES[how])[0]
    assert got == wanted
    assert len({tuple(tokens) for tokens in got}) == len(got)


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
