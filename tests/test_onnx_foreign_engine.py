"""Through the engine: other people's graphs give the recorded tokens, and those of the NumPy runner, however
the requests are scheduled; and a directory of onnxruntime-genai needs nothing but onnxruntime."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest

import numpy_support
import onnx_support
from engine_support import Answers, ask, drive, greedy, make_engine
from foreign_graphs import STYLES, write
from nanovllm.request import SamplingParams
from support import DATA, needs_data

pytest.importorskip("onnxruntime", reason="the runtime: pip install 'nanovllm[onnx]'")
pytestmark = needs_data

CHECKPOINT = DATA / "checkpoints" / "stories260k"
RECORDED = ("stories260k-optimum", "tiny-random-gpt2-fp32")
STORIES = ("optimum", "optimum-last-logits", "ids-only", "merged", "gpt2", "gqa-positions", "no-past")
LENGTHS = (1, 3, 8, 17, 30, 44)  # of the prompts, the beginnings of one text

# Engines that schedule the same requests in very different ways.
ENGINES = {
    "alone": {"max_num_seqs": 1},
    "batched": {},
    "chunked": {"max_num_seqs": 4, "max_num_batched_tokens": 8},
}


def make_runner(path, **overrides):
    return onnx_support.make_runner(path, num_blocks=None, block_size=16, **overrides)


def answers(
    runner, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], **options
) -> tuple[list[list[int]], Answers]:
    engine = make_engine(runner, **options)
    tickets = [ask(engine, p, q) for p, q in zip(prompts, params, strict=True)]
    found = drive(engine)
    return [found.ids(t) for t in tickets], found


@pytest.fixture(scope="module")
def text() -> list[int]:
    """A story of the model's own."""
    [case, *_] = json.loads((CHECKPOINT / "reference.json").read_text(encoding="utf-8"))["cases"]
    return numpy_support.Driver(numpy_support.make_runner(CHECKPOINT)).greedy(case["input_ids"], 50)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    root = tmp_path_factory.mktemp("stories")
    return {name: write(root / name, CHECKPOINT, **STYLES[name]) for name in STORIES}


@pytest.mark.parametrize("how", ENGINES)
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_directories_give_the_recorded_tokens(name, how):
    path = DATA / "onnx" / name
    cases = json.loads((path / "reference.json").read_text(encoding="utf-8"))["cases"]
    params = [greedy(len(case["greedy_new_ids"])) for case in cases]
    got, _ = answers(make_runner(path), [case["input_ids"] for case in cases], params, **ENGINES[how])
    assert got == [case["greedy_new_ids"] for case in cases]


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_logits(name):
    """Of the last prompt position of each case, all cases in one step."""
    from test_onnx_foreign import step

    path = DATA / "onnx" / name
    cases = json.loads((path / "reference.json").read_text(encoding="utf-8"))["cases"]
    ids = [case["input_ids"] for case in cases]
    logits = step(make_runner(path), *((lane, i, 0, len(i), 1) for lane, i in enumerate(ids)))
    for row, case in zip(logits, cases, strict=True):
        top = case["last_logits_top5"]
        np.testing.assert_allclose(row[top["ids"]], top["values"], rtol=0, atol=1e-4)
        if "last_logits_first8" in case:
            np.testing.assert_allclose(row[:8], case["last_logits_first8"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("how", ENGINES)
@pytest.mark.parametrize(
    "name", ["optimum", "merged", "gpt2", "gqa-positions", "no-past", "ids-only", "optimum-last-logits"]
)
def test_greedy_tokens_are_numpys(name, how, graphs, text):
    driver = numpy_support.Driver(numpy_support.make_runner(CHECKPOINT, num_blocks=256))
    wanted = [driver.greedy(text[:n], 20, lane) for lane, n in enumerate(LENGTHS)]
    got, _ = answers(make_runner(graphs[name]), [text[:n] for n in LENGTHS], [greedy(20)] * 6, **ENGINES[how])
    assert got == wanted


@pytest.mark.parametrize("name", ["optimum", "gqa-positions"])
def test_seeded_samples_and_logprobs_are_numpys(name, graphs, text):
    params = [
        SamplingParams(temperature=0.8, top_p=0.95, seed=i, max_tokens=12, ignore_eos=True, logprobs=2)
        for i in range(6)
    ]
    params[3] = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, prompt_logprobs=1)
    prompts = [text[:n] for n in LENGTHS]
    numpy_runner = numpy_support.make_runner(CHECKPOINT, num_blocks=256)
    wanted, wanted_answers = answers(numpy_runner, prompts, params, max_num_seqs=1)
    got, got_answers = answers(make_runner(graphs[name]), prompts, params, max_num_seqs=4, max_num_batched_tokens=20)
    assert got == wanted
    assert len({tuple(tokens) for tokens in got}) == len(got)
    for key, deltas in wanted_answers.deltas.items():
        ours, theirs = got_answers.deltas[key][-1].output, deltas[-1].output
        for a, b in zip(ours.logprobs or (), theirs.logprobs or (), strict=True):
            assert (a.token_id, a.rank) == (b.token_id, b.rank)
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


def test_a_prompt_of_a_graph_that_cannot_chunk_is_whole_or_refused(text, tmp_path):
    runner = make_runner(write(tmp_path / "graph", CHECKPOINT, fault="past ignored by chunks"))
    assert not runner.info.can_chunk
    driver = numpy_support.Driver(numpy_support.make_runner(CHECKPOINT, num_blocks=256))
    engine = make_engine(runner, max_num_seqs=4, max_num_batched_tokens=40)
    tickets = [ask(engine, text[:n], greedy(9)) for n in (30, 17, 39, 3)]
    found = drive(engine)
    assert [found.ids(t) for t in tickets] == [driver.greedy(text[:n], 9, n) for n in (30, 17, 39, 3)]
    with pytest.raises(ValueError, match="computes a prompt in one step, and 41 tokens do not fit"):
        ask(engine, text[:41], greedy(9))


def test_a_genai_directory_needs_nothing_but_onnxruntime():
    """S2-06: no torch, no transformers, no onnxruntime_genai."""
    code = f"""
import sys
sys.modules |= dict.fromkeys(("torch", "transformers", "onnxruntime_genai", "optimum"))  # importing them fails
from nanovllm import LLM, SamplingParams
runner, params = {{"type": "onnx", "threads": 1}}, SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
with LLM({str(DATA / "onnx" / RECORDED[1])!r}, runner=runner, tokenizer="simple") as llm:
    print(*(list(o.token_ids[:4]) for o in llm.generate([[0, 0, 0, 52], [0, 0, 195, 731]], params)))
with LLM({str(DATA / "onnx" / RECORDED[0])!r}, runner=runner) as llm:
    print(llm.generate("Once upon a time", params)[0].text)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["[204, 204, 204, 204] [731, 114, 114, 114]", ", there was a little girl named"]
