"""Bit for bit: a sequence's logits do not depend on company, chunks, blocks or a cached prefix, in any precision.

It is what `RunnerInfo.batch_invariant` promises, and it rests on ONNX Runtime's kernels, so it is tried for every
kind of model that takes other operators, with sizes at which kernels change: single rows, odd rows, long contexts.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models_support import GPT2, LLAMA, QWEN3, write_checkpoint
from nanovllm.request import SamplingParams
from nanovllm_runner_onnx.options import OnnxOptions
from numpy_support import Driver
from onnx_support import fill, make_runner, precision
from support import needs_data
from test_numpy_batching import MODELS as VARIANTS
from test_numpy_batching import prompt
from test_onnx_engine import ENGINES, LENGTHS, MODEL, POOLS, answers

pytest.importorskip("onnxruntime", reason="the runtime: pip install 'nanovllm[onnx]'")

LONG = {"max_position_embeddings": 512}
MODELS = {
    "gpt2": GPT2 | {"n_positions": 512},  # a kv head for every head
    "llama": LLAMA | LONG | {"hidden_size": 96, "intermediate_size": 200},  # inputs that no block divides
    "qwen3": QWEN3 | LONG,
    "mixtral": LLAMA | LONG | {"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2},
} | {
    name: VARIANTS[name] | LONG
    for name in ("falcon-rw-alibi", "gemma2", "granitemoe-32-experts-top-8-tied", "qwen2_moe-window")
}
KINDS = ("fp32", "int8", "int4", "int4-128")
CASES = [(name, kind) for name in MODELS for kind in KINDS if kind != "int4-128" or "experts" not in str(MODELS[name])]
NUM_BLOCKS = 800  # of 4 tokens


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def runner(request, tmp_path_factory):
    name, kind = request.param
    path = write_checkpoint(tmp_path_factory.mktemp(name), MODELS[name])
    runner = make_runner(path, num_blocks=NUM_BLOCKS, max_num_seqs=40, options=precision(kind), threads=2)
    if not runner.info.batch_invariant:
        pytest.skip("not promised on this kind of processor")
    return runner


equal = np.testing.assert_array_equal


def test_chunks_and_blocks(runner):
    tokens = prompt(300)
    whole = Driver(runner).logits(tokens)
    for chunk in (1, 7, 64):
        equal(Driver(runner).logits(tokens, chunk=chunk), whole)
    shuffled = np.random.default_rng(0).permutation(NUM_BLOCKS).tolist()
    equal(Driver(runner, shuffled).logits(tokens, chunk=100), whole)


@pytest.mark.parametrize("company", [1, 2, 7, 31])
def test_company(runner, company):
    """A decode and a prefill of one sequence beside others, which are shorter and longer than it."""
    rng = np.random.default_rng(company)
    tokens = prompt(70)
    whole = Driver(runner).logits(tokens)
    others = [prompt(int(n), seed=i) for i, n in enumerate(rng.integers(2, 2400 // company, company) % 400 + 2)]
    driver = Driver(runner)
    prefills = [(i + 1, text, 0, len(text) - 1, 0) for i, text in enumerate(others)]
    equal(driver.step((0, tokens, 0, 69, 69), *prefills), whole[:69])
    decodes = [(i + 1, text, len(text) - 1, len(text), 1) for i, text in enumerate(others)]
    equal(driver.step(*decodes, (0, tokens, 69, 70, 1))[-1], whole[69])


@given(data=st.data())
@settings(max_examples=5, deadline=None)
def test_random_programs(runner, data):
    """Sequences advance by random chunks in random company, some on a cached prefix, over blocks that hold NaN."""
    common = prompt(32)  # 8 whole blocks
    lengths = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=6))
    texts = [(common if data.draw(st.booleans()) else []) + prompt(n, seed=i) for i, n in enumerate(lengths)]
    fill(runner, np.nan)
    alone = [Driver(runner).logits(text) for text in texts]
    driver = Driver(runner, np.random.default_rng(data.draw(st.integers(0, 99))).permutation(NUM_BLOCKS).tolist())
    driver.step((39, common, 0, 32, 0))
    done = [0] * len(texts)
    for lane, text in enumerate(texts):
        if text[:32] == common and data.draw(st.booleans()):
            driver.tables[lane], done[lane] = driver.tables[39][:8], 32
    while any(d < len(t) for d, t in zip(done, texts, strict=True)):
        work, wanted = [], []
        for lane, text in enumerate(texts):
            left = len(text) - done[lane]
            take = min(data.draw(st.sampled_from([left, 1, 1, 5, 0])) if left else 0, left)
            if take:
                work.append((lane, text, done[lane], done[lane] + take, take))
                wanted.append(alone[lane][done[lane] : done[lane] + take])
                done[lane] += take
        if work:
            equal(driver.step(*work), np.concatenate(wanted))


def test_where_it_is_not_promised(tmp_path):
    """How many tokens an expert is given is not known, and of an odd number the last is rounded otherwise."""
    for kind in KINDS:
        runner = make_runner(write_checkpoint(tmp_path, MODELS["mixtral"]), options=precision(kind))
        assert not runner.info.batch_invariant or kind != "int4-128"


def test_options_of_the_session_end_the_promise(tmp_path):
    """This one has kernels chosen by the number of rows."""
    options = OnnxOptions(session_options={"session.disable_prepacking": True})
    assert not make_runner(write_checkpoint(tmp_path, MODELS["llama"]), options=options).info.batch_invariant


# ----------------------------------------------------------------------------------------- the engine


@pytest.fixture(scope="module")
def text() -> list[int]:
    [case, *_] = json.loads((MODEL / "reference.json").read_text(encoding="utf-8"))["cases"]
    return (case["input_ids"] + case["greedy_new_ids"])[:50]


@needs_data
@pytest.mark.parametrize("kind", ["int8", "int4", "int4-128"])
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_tokens_are_the_same_however_they_were_scheduled(kind, temperature, text):
    """Alone, batched, chunked, prefix-cached, preempted: greedy and seeded."""
    params = [
        SamplingParams(temperature=temperature, seed=i, max_tokens=20, ignore_eos=True) for i in range(len(LENGTHS))
    ]
    found = {}
    for pool, num_blocks in POOLS.items():
        runner = make_runner(MODEL, num_blocks=num_blocks, options=precision(kind))
        for how, options in ENGINES.items():
            found[pool, how] = answers(runner, text, params, **options)[0]
    assert all(tokens == found["roomy", "alone"] for tokens in found.values())
    assert len({tuple(tokens) for tokens in found["roomy", "alone"]}) > 1
