"""Graphs of other exporters: whatever a step is composed of, the logits are the NumPy runner's of one row alone."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

import numpy_support
import onnx_support
from foreign_graphs import CONFIG, STYLES, write, write_all
from lanes_support import run_random_program, step
from models_support import file_tensors, write_checkpoint
from nanovllm.batch import ALL_PARAMETERS, Lanes
from nanovllm.errors import ConfigError, RunnerError
from nanovllm.hookspecs import CacheOptions
from nanovllm_models.lanes import Work
from nanovllm_models.lanes import runner as lanes_runner
from nanovllm_runner_onnx.foreign.runner import ForeignRunner
from nanovllm_runner_onnx.options import OnnxOptions

ort = pytest.importorskip("onnxruntime", reason="the runtime: pip install 'nanovllm[onnx]'")

ROUNDING = {"rtol": 0, "atol": 1e-4}
VOCAB = CONFIG["vocab_size"]
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, head size, float32


def make_runner(path: Path, **overrides) -> ForeignRunner:
    return onnx_support.make_runner(path, **({"num_blocks": None, "block_size": 16} | overrides))


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def spy(runner: ForeignRunner, monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the token ids of every run from now on."""
    shapes = []
    keeper = runner._keeper
    bind = keeper._decoder.bind

    def noting(tokens, seen, **more):
        shapes.append(tokens.ids.shape)
        return bind(tokens, seen, **more)

    monkeypatch.setattr(keeper._decoder, "bind", noting)
    return shapes


@pytest.fixture(scope="module")
def graphs(tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    return write_all(tmp_path_factory.mktemp("foreign"))


@pytest.fixture(scope="module")
def numpy_runner(graphs):
    return numpy_support.make_runner(graphs[0], num_blocks=200)


@pytest.fixture(scope="module")
def alone(numpy_runner):
    """tokens -> (length, vocab): the oracle."""
    return lambda tokens: numpy_support.Driver(numpy_runner).logits(tokens)


@pytest.fixture(scope="module", params=STYLES)
def runner(request, graphs) -> ForeignRunner:
    return make_runner(graphs[1][request.param])


@pytest.mark.parametrize("seed", range(5))
def test_random_programs_equal_each_sequence_alone(seed, runner, alone):
    rng = random.Random(seed)
    texts = [prompt(rng.randint(1, 60), i) for i in range(rng.randint(2, 11))]
    run_random_program(runner, texts, [alone(text) for text in texts], rng, ROUNDING)


def test_a_step_that_is_done_again_after_an_interrupt_gives_the_same(runner, alone):
    a, b = prompt(20, 1), prompt(31, 2)
    step(runner, (0, a, 0, 19, 1), (1, b, 0, 25, 1))
    again = [(0, a, 19, 20, 1), (1, b, 25, 31, 1)]
    first = step(runner, *again)
    np.testing.assert_allclose(step(runner, *again), first, **ROUNDING)
    np.testing.assert_allclose(first, [alone(a)[-1], alone(b)[-1]], **ROUNDING)


def test_lanes_hold_as_many_tokens_as_they_say(runner, alone):
    length = runner.info.kv.max_len
    assert length == runner.info.max_model_len == CONFIG["max_position_embeddings"]
    texts = [prompt(length, i) for i in range(3)]
    step(runner, *((lane, text, 0, length - 1 - lane, 0) for lane, text in enumerate(texts)))
    got = step(runner, *((lane, text, length - 1 - lane, length, 1) for lane, text in enumerate(texts)))
    np.testing.assert_allclose(got, [alone(text)[-1] for text in texts], **ROUNDING)
    # A full lane between two that decode.
    step(runner, (0, texts[0], 0, 9, 0), (2, texts[2], 0, 50, 0))
    got = step(runner, (0, texts[0], 9, 10, 1), (2, texts[2], 50, 51, 1))
    np.testing.assert_allclose(got, [alone(texts[0])[9], alone(texts[2])[50]], **ROUNDING)


def test_nan_of_one_sequence_reaches_no_other(runner, alone, tmp_path, monkeypatch):
    """One token's embedding is NaN. Its sequence shares runs with others; then another one takes over its lane."""
    bad_token = VOCAB - 1
    tensors = file_tensors(CONFIG)
    [embedding] = [name for name in tensors if "embed" in name]
    tensors[embedding][bad_token] = np.nan
    tensors["lm_head.weight"][bad_token] = 0
    bad = write_checkpoint(tmp_path / "bad", CONFIG, tensors)
    graph = write(tmp_path / "graph", bad, **STYLES[runner.info.description["model"]]) / "model.onnx"
    # What was proven of the sound graph counts here: the probe's own texts may hold the token.
    monkeypatch.setattr(runner._keeper._decoder, "_session", ort.InferenceSession(str(graph)))
    texts = [[t % bad_token for t in prompt(n, n)] for n in (30, 12, 21)]
    texts[1][3] = bad_token
    rows = [step(runner, *((lane, t, 0, len(t) - 2, 1) for lane, t in enumerate(texts)))]
    for i in (2, 1):
        rows.append(step(runner, *((lane, t, len(t) - i, len(t) - i + 1, 1) for lane, t in enumerate(texts))))
    runner.release(1, 1)
    successor = [t % bad_token for t in prompt(9, 5)]
    step(runner, (1, successor, 0, 7, 1))
    later = step(runner, (0, texts[0], 29, 30, 1), (1, successor, 7, 8, 1), (2, texts[2], 20, 21, 1))
    for i, got in zip((3, 2, 1), rows, strict=True):
        assert np.isnan(got[1]).any()
        for lane in (0, 2):
            np.testing.assert_allclose(got[lane][:bad_token], alone(texts[lane])[-i][:bad_token], **ROUNDING)
    np.testing.assert_allclose(later[1][:bad_token], alone(successor)[7][:bad_token], **ROUNDING)
    np.testing.assert_allclose(later[0][:bad_token], rows[-1][0][:bad_token], **ROUNDING)


def test_a_failing_run_fails_the_step_and_the_runner_lives_on(runner, alone, monkeypatch):
    a, b, c = prompt(8, 1), prompt(9, 2), prompt(10, 3)
    step(runner, (0, a, 0, 7, 0), (1, b, 0, 8, 0), (2, c, 0, 9, 0))
    with monkeypatch.context() as patch:
        patch.setattr(type(runner._keeper._decoder), "compute", failing)
        with pytest.raises(RunnerError, match="on purpose"):
            step(runner, (0, a, 7, 8, 1), (1, b, 8, 9, 1))
    for lane in (0, 1):
        runner.release(lane, lane)
    got = step(runner, (0, b, 0, 9, 1), (1, a, 0, 8, 1), (2, c, 9, 10, 1))
    np.testing.assert_allclose(got, [alone(b)[-1], alone(a)[-1], alone(c)[-1]], **ROUNDING)


def failing(self, binding, tokens):
    raise RunnerError("on purpose")


@pytest.mark.parametrize("name", [name for name in STYLES if not name.startswith("no-past")])
def test_decode_computes_one_token_of_each_sequence(name, graphs, monkeypatch):
    """S2-03: the past is used, and sequences of different lengths share a run where the graph can do it."""
    runner = make_runner(graphs[1][name])
    texts = [prompt(n, n) for n in (5, 30, 17)]
    step(runner, *((lane, t, 0, len(t) - 3, 0) for lane, t in enumerate(texts)))
    shapes = spy(runner, monkeypatch)
    for i in (3, 2, 1):
        step(runner, *((lane, t, len(t) - i, len(t) - i + 1, 1) for lane, t in enumerate(texts)))
    assert shapes == ([(1, 1)] * 9 if name == "ids-only" else [(3, 1)] * 3)


def test_while_the_same_sequences_go_on_nothing_is_moved(graphs, monkeypatch):
    runner = make_runner(graphs[1]["optimum"])
    texts = [prompt(n, n) for n in (5, 30, 17)]
    step(runner, *((lane, t, 0, len(t) - 4, 0) for lane, t in enumerate(texts)))
    moved = []
    value = runner._keeper._decoder.value
    monkeypatch.setattr(runner._keeper._decoder, "value", lambda array: moved.append(array.shape) or value(array))
    step(runner, *((lane, t, len(t) - 4, len(t) - 3, 1) for lane, t in enumerate(texts)))
    assert len(moved) == 4  # keys and values of two layers, packed once after the prompts
    for i in (3, 2):
        step(runner, *((lane, t, len(t) - i, len(t) - i + 1, 1) for lane, t in enumerate(texts)))
    assert len(moved) == 4
    step(runner, *((lane, t, len(t) - 1, len(t), 1) for lane, t in list(enumerate(texts))[:2]))
    assert len(moved) == 8


def test_another_sequence_of_the_same_length_is_another(graphs, alone):
    runner = make_runner(graphs[1]["optimum"])
    texts = [prompt(9, i) for i in range(3)]
    step(runner, *((lane, text, 0, 7, 0) for lane, text in enumerate(texts)))
    for lanes in ((0, 1), (0, 2), (2, 1)):
        stops = [8, 9, 9] if lanes == (2, 1) else [8, 8, 8]
        got = step(runner, *((lane, texts[lane], stops[lane] - 1, stops[lane], 1) for lane in lanes))
        np.testing.assert_allclose(got, [alone(texts[lane])[stops[lane] - 1] for lane in lanes], **ROUNDING)


def test_padding_does_not_make_more_columns_than_the_model_has_positions(graphs, alone, tmp_path):
    """Some graphs look up their causal mask in a table of as many."""
    runner = make_runner(write(tmp_path / "graph", graphs[0], fault="table of columns"))
    assert runner.info.description["batches"][-1] == "mixed"
    long, short = prompt(96), prompt(10)
    step(runner, (0, long, 0, 94, 0))
    for stop in (95, 96):
        got = step(runner, (0, long, stop - 1, stop, 1), (1, short, 0, 10, 1))
        np.testing.assert_allclose(got, [alone(long)[stop - 1], alone(short)[-1]], **ROUNDING)


def test_a_lane_that_was_released_holds_nothing(runner):
    step(runner, *((lane, prompt(9), 0, 9, 1) for lane in (0, 1, 2)))
    step(runner, *((lane, prompt(10), 9, 10, 1) for lane in (0, 1, 2)))
    for lane in range(runner.info.max_num_seqs):
        runner.release(lane, lane)
    held = [vars(runner._keeper).get(name) for name in ("_homes", "_tokens", "_lens")]
    assert not any(np.any(list(h)) for h in held if h is not None)


def test_a_chunk_that_is_recomputed_later_is_not_computed_now(graphs, monkeypatch):
    runner = make_runner(graphs[1]["no-past"])
    shapes = spy(runner, monkeypatch)
    step(runner, (0, prompt(30), 0, 20, 0), (1, prompt(5), 0, 5, 1))
    assert shapes == [(1, 5)]
    step(runner, (0, prompt(30), 20, 29, 0))
    assert shapes == [(1, 5)]
    step(runner, (0, prompt(30), 29, 30, 1))
    assert shapes == [(1, 5), (1, 30)]


def test_a_long_prompt_does_not_pad_the_others(graphs, monkeypatch):
    runner = make_runner(graphs[1]["optimum"])
    texts = [prompt(20, i) for i in range(4)]
    step(runner, *((lane, t, 0, 19, 0) for lane, t in enumerate(texts)))
    shapes = spy(runner, monkeypatch)
    step(runner, *((lane, t, 19, 20, 1) for lane, t in enumerate(texts)), (4, prompt(70), 0, 70, 1))
    assert shapes == [(4, 1), (1, 70)]
    step(runner, *((lane, prompt(22, lane), 20, 21, 1) for lane in range(4)), (5, prompt(3), 0, 3, 1))
    assert shapes[2:] == [(5, 3)]


def test_shared_rows_with_few_holes_are_one_run_and_with_many_are_two(graphs, monkeypatch, alone):
    runner = make_runner(graphs[1]["gqa"], max_num_seqs=16)
    texts = {lane: prompt(6 + lane, lane) for lane in (0, 2, 5, 13)}
    for lane, text in texts.items():
        step(runner, (lane, text, 0, len(text) - 2, 0))
    shapes = spy(runner, monkeypatch)
    got = step(runner, *((lane, t, len(t) - 2, len(t) - 1, 1) for lane, t in texts.items()))
    assert shapes == [(6, 1), (1, 1)]
    np.testing.assert_allclose(got, [alone(t)[-2] for t in texts.values()], **ROUNDING)
    step(runner, (3, texts[5], 0, 4, 0))  # a prompt that is only begun, in a hole
    del shapes[:]
    got = step(runner, *((lane, t, len(t) - 1, len(t), 1) for lane, t in texts.items()), (3, texts[5], 4, 6, 2))
    assert shapes == [(1, 2), (6, 1), (1, 1)]
    np.testing.assert_allclose(got[:4], [alone(t)[-1] for t in texts.values()], **ROUNDING)
    np.testing.assert_allclose(got[4:], alone(texts[5])[4:6], **ROUNDING)


def test_padding_of_a_chunk_is_not_written_into_the_next_row(graphs):
    """Where a provider takes several chunks in one run (the CPU's does not), they must end within their rows."""
    rows = make_runner(graphs[1]["gqa"])._keeper
    nothing = np.empty((0, VOCAB), np.float32)
    late, long, short = (
        Work(lane, np.zeros(n, np.int32), start, nothing) for lane, n, start in ((0, 2, 92), (1, 9, 10), (1, 4, 10))
    )
    assert not rows.can_join([late], long)
    assert rows.can_join([late], short)


def test_logits_of_all_positions_stay_bounded(graphs, monkeypatch, alone, tmp_path):
    """A graph that gives logits of every token is run in pieces, if it can do that."""
    monkeypatch.setattr(lanes_runner, "MAX_LOGITS_BYTES", 20 * VOCAB * 4)
    for name in ("optimum", "gqa", "merged", "no-past"):
        runner = make_runner(graphs[1][name])
        shapes = spy(runner, monkeypatch)
        texts = [prompt(n, n) for n in (50, 18, 9, 6)]
        got = step(runner, *((lane, t, 0, len(t), 45 if lane == 0 else 1) for lane, t in enumerate(texts)))
        wanted = [*alone(texts[0])[-45:], *(alone(t)[-1] for t in texts[1:])]
        np.testing.assert_allclose(got, wanted, **ROUNDING)
        if name == "no-past":  # there a sequence is computed whole
            assert shapes == [(2, 9), (1, 18), (1, 50)]
        else:
            assert all(rows * columns <= 20 for rows, columns in shapes), (name, shapes)
            assert sum(rows * columns for rows, columns in shapes) < 100
    whole = make_runner(write(tmp_path / "graph", graphs[0], fault="past ignored by chunks"))
    np.testing.assert_allclose(step(whole, (0, texts[0], 0, 50, 1)), alone(texts[0])[-1:], **ROUNDING)


# ------------------------------------------------------------------------------------------- the border


def test_info(graphs):
    info = make_runner(graphs[1]["optimum"], max_num_seqs=3).info
    assert (info.vocab_size, info.max_model_len, info.max_num_seqs, info.eos_ids) == (VOCAB, 96, 3, (3,))
    assert info.kv == Lanes(3, 96)
    assert (info.can_chunk, info.can_resume_prefix, info.supports) == (True, False, ALL_PARAMETERS)
    facts = info.description
    assert (facts["model"], facts["graph"], facts["past"]) == ("optimum", "model.onnx", "grown")
    assert facts["batches"] == ["decodes", "prompts", "chunks", "mixed"]
    assert facts["kv_bytes"] == 3 * 96 * TOKEN_BYTES * 3  # at most three copies
    assert facts["providers"] == ["CPUExecutionProvider"]


def test_prompt_logprobs_are_not_offered_where_only_the_last_token_has_logits(graphs):
    assert make_runner(graphs[1]["gqa-last-logits"]).info.supports == ALL_PARAMETERS - {"prompt_logprobs"}


@pytest.mark.parametrize(
    ("name", "cache", "max_model_len", "length"),
    [
        ("gqa", CacheOptions(), None, 96),
        ("gqa", CacheOptions(), 50, 50),
        ("gqa", CacheOptions(memory=8 * 40 * TOKEN_BYTES, block_size=1), None, 40),
        ("gqa", CacheOptions(memory=8 * 40 * TOKEN_BYTES, block_size=1), 40, 40),
        ("gqa", CacheOptions(num_blocks=20, block_size=16), None, 40),
        # Three copies: past, present, and what is packed anew.
        ("optimum", CacheOptions(memory=3 * 8 * 40 * TOKEN_BYTES, block_size=1), None, 40),
        ("no-past", CacheOptions(memory=1), None, 96),
    ],
)
def test_length_of_the_lanes(name, cache, max_model_len, length, graphs):
    info = make_runner(graphs[1][name], cache=cache, max_model_len=max_model_len).info
    assert info.kv == Lanes(8, length)
    assert info.max_model_len == (max_model_len or 96)


def test_impossible_sizes_are_refused_with_the_numbers(graphs, tmp_path):
    graph = graphs[1]["gqa"]
    with pytest.raises(ConfigError, match="max_model_len is 97, but gqa has 96 positions"):
        make_runner(graph, max_model_len=97)
    small = CacheOptions(memory=8 * 40 * TOKEN_BYTES, block_size=1)
    numbers = rf"8 lanes of 41 tokens take {8 * 41 * TOKEN_BYTES:,} bytes.*has {8 * 40 * TOKEN_BYTES:,}"
    with pytest.raises(ConfigError, match=numbers):
        make_runner(graph, max_model_len=41, cache=small)
    with pytest.raises(ConfigError, match="8 lanes of 96 tokens"):
        make_runner(graph, cache=CacheOptions(num_blocks=1, block_size=4))
    with pytest.raises(ConfigError, match=r"do not fit in memory.*lower"):
        make_runner(graph, max_num_seqs=2**50, cache=CacheOptions(num_blocks=2**60))
    with pytest.raises(ConfigError, match=r"runner.weights is int4, but model\.onnx brings its own"):
        make_runner(graph, options=OnnxOptions(weights="int4"))
    lengthless = write(tmp_path / "lengthless", graphs[0])
    (lengthless / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no file of lengthless says how long.*set max_model_len"):
        make_runner(lengthless)
    assert make_runner(lengthless, max_model_len=33).info.max_model_len == 33
