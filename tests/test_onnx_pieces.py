"""Cutting a step: nothing is lost or reordered, and it is cut by context exactly where that costs least."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from models_support import GPT2, LLAMA, write_checkpoint
from nanovllm.batch import Packed
from nanovllm_runner_onnx import pieces, runner
from nanovllm_runner_onnx.pieces import KV_BYTES, RUN_BYTES, SCORE_BYTES, Cutter, Piece
from numpy_support import Driver
from onnx_support import fill, make_runner
from test_numpy_batching import MODELS as VARIANTS
from test_numpy_batching import prompt

pytest.importorskip("onnxruntime", reason="the runtime: pip install 'nanovllm[onnx]'")

equal = np.testing.assert_array_equal

MODELS = {
    "gpt2": GPT2 | {"n_positions": 512},
    "llama": LLAMA | {"max_position_embeddings": 512},
    "gemma2": VARIANTS["gemma2"] | {"max_position_embeddings": 512},  # every other layer has a window
}
SIZES = st.integers(1, 3000) | st.sampled_from([1, 2, 16, 6000])
SEQS = st.tuples(st.just(1) | st.integers(1, 300), SIZES).map(lambda s: (min(s), s[1]))  # new tokens, context
CUTTERS = st.builds(
    Cutter,
    num_heads=st.integers(1, 8),
    kv_numbers=st.sampled_from([8, 64, 256]),
    layer_bytes=st.sampled_from([0, 10**5, 10**7, 10**9]),
    windows=st.sampled_from([(None,), (100,), (None, 16), (1, 512)]),
)


def pack(seqs: list[tuple[int, int]], wanted: list[int] | None = None) -> Packed:
    """A token's slot is its number in the step; `wanted` rows of each sequence, by default one."""
    counts, contexts = np.array(seqs, np.int32).T
    q_start = np.append(0, np.cumsum(counts)).astype(np.int32)
    wanted = [1] * len(seqs) if wanted is None else wanted
    rows = [np.arange(stop - n, stop) for stop, n in zip(q_start[1:], wanted, strict=True)]
    tokens, lanes = np.arange(q_start[-1], dtype=np.int32), np.arange(len(seqs), dtype=np.int32)
    positions = tokens - np.repeat(q_start[1:] - contexts, counts)
    return Packed(
        tokens * 3, positions, tokens, q_start, contexts,
        lanes + 5, 7 * lanes[:, None], np.concatenate(rows).astype(np.int32),
    )  # fmt: skip


@given(CUTTERS, st.lists(SEQS, min_size=1, max_size=12), st.sampled_from([1, 5000, 200_000, 2**26]), st.data())
@settings(deadline=None)
def test_every_token_is_computed_once_and_in_order(cutter, seqs, scratch, data):
    wanted = [data.draw(st.integers(0, count)) for count, _ in seqs]
    packed = pack(seqs, wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "SCRATCH", scratch)
        cut = cutter(packed)
    done = {s: context - count for s, (count, context) in enumerate(seqs)}  # the next position of each sequence
    found = np.full(len(packed.rows), -1)
    for piece, rows in cut:
        assert all(array.dtype == np.int32 for array in (*piece, rows))
        equal(piece.input_ids, packed.input_ids[piece.slots])
        equal(piece.positions, packed.positions[piece.slots])
        assert piece.q_start[0] == 0
        assert piece.q_start[-1] == len(piece.slots)
        for i, (a, b) in enumerate(pairwise(piece.q_start.tolist())):
            s = int(piece.lanes[i]) - 5
            assert piece.tables[i] == 7 * s
            equal(piece.slots[a:b], packed.q_start[s] + np.arange(done[s], done[s] + b - a) + seqs[s][0] - seqs[s][1])
            done[s] += b - a
            assert piece.kv_lens[i] == done[s]
        found[rows] = piece.slots[piece.rows]
        assert (np.diff(piece.rows) > 0).all()  # as a Packed promises
        members = [(b - a, c) for (a, b), c in zip(pairwise(piece.q_start.tolist()), piece.kv_lens, strict=True)]
        assert len(piece.slots) == 1 or padded(cutter, members, 1, 1) <= scratch
    assert done == {s: context for s, (_, context) in enumerate(seqs)}
    equal(found, packed.rows)
    assert sum(len(piece.slots) for piece, _ in cut) == len(packed.slots)


def padded(cutter, members, score, kv) -> int:
    """Scores and numbers of K and V in one run, each group of it padded to its longest."""
    total = 0
    for group in ([m for m in members if m[0] == 1], [m for m in members if m[0] > 1]):
        for _ in group:
            rows, slots = max(count for count, _ in group), max(context for _, context in group)
            total += int(slots) * (score * cutter.num_heads * int(rows) + kv * cutter.kv_numbers)
    return total


def seen(cutter, count, context) -> int:
    return sum(context if w is None else min(context, w - 1 + count) for w in cutter.windows) // len(cutter.windows)


def price(cutter, groups) -> int:
    runs = [[(count, seen(cutter, count, context)) for count, context in group] for group in groups]
    return sum(cutter.layer_bytes + RUN_BYTES + padded(cutter, run, SCORE_BYTES, KV_BYTES) for run in runs)


@given(CUTTERS, st.lists(SEQS, min_size=1, max_size=7))
@example(Cutter(14, 256, 26_000_000, (None,)), [(1, 200)] * 5 + [(1, 60_000)])
@example(Cutter(4, 64, 0, (None,)), [(200, 3000), (1, 3000), (2, 10), (300, 300), (1, 20), (1, 2900), (1, 10)])
@settings(deadline=None)
def test_sequences_of_similar_context_run_together_where_it_costs_least(cutter, seqs):
    """Of all ways to cut the sequences in the order of what they see, uncut among them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "SCRATCH", 2**60)
        cut = cutter(pack(seqs))
    groups = [[seqs[lane - 5] for lane in piece.lanes] for piece, _ in cut]
    ordered = sorted(seqs, key=lambda s: (seen(cutter, *s), s[0]))
    borders = [b for n in range(len(seqs)) for b in combinations(range(1, len(seqs)), n)]
    ways = [[ordered[a:b] for a, b in pairwise((0, *inner, len(seqs)))] for inner in borders]
    assert price(cutter, groups) == min(price(cutter, way) for way in ways)


@given(CUTTERS, SEQS, SIZES, st.integers(0, 20), st.integers(1, 20))
@settings(deadline=None)
def test_nothing_is_cut_where_nothing_is_padded(cutter, prefill, context, num_prefills, num_decodes):
    packed = pack([prefill] * num_prefills * (prefill[0] > 1) + [(1, context)] * num_decodes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "SCRATCH", 2**60)
        [(piece, rows)] = cutter(packed)
    assert piece is packed
    equal(rows, np.arange(len(packed.rows)))


@pytest.mark.parametrize(("context", "num_runs"), [(200, 1), (400, 1), (6000, 2)])
def test_half_a_billion_parameters_are_read_twice_for_a_long_context_only(context, num_runs):
    """Qwen2-0.5B in int8; what is known of it is measured, and this is its sense."""
    cutter = Cutter(num_heads=14, kv_numbers=256, layer_bytes=26_000_000, windows=(None,))
    assert len(cutter(pack([(1, 200)] * 31 + [(1, context)]))) == num_runs


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_uncut_step(name, tmp_path, monkeypatch):
    """Bit for bit, in the batch's order: decodes and prefills, long ones in between."""
    onnx_runner = make_runner(write_checkpoint(tmp_path, MODELS[name]), num_blocks=600, max_num_seqs=40)
    if not onnx_runner.info.batch_invariant:
        pytest.skip("not promised on this kind of processor")
    texts = [prompt(n, seed=i) for i, n in enumerate([9, 12] * 7 + [450] + [5, 14] * 7 + [400, 430, 7, 8])]
    fill_step = [(i, t, 0, len(t) - 20, 1) for i, t in enumerate(texts) if len(t) > 20]
    short_step = [(i, t, 0, len(t) - 1, i % 3) for i, t in enumerate(texts) if len(t) < 20]
    late = [(i, t, len(t) - 20, len(t) - 1, 5) for i, t in enumerate(texts) if len(t) > 20]
    steps = [
        fill_step,
        short_step[:9] + late + short_step[9:],
        [(i, t, len(t) - 1, len(t), 1) for i, t in enumerate(texts)],
    ]

    def logits() -> list[np.ndarray]:
        fill(onnx_runner, np.nan)
        driver = Driver(onnx_runner)
        return [driver.step(*step) for step in steps]

    num_runs = []
    pieces_of = runner.pieces_of
    monkeypatch.setattr(runner, "pieces_of", lambda *a: num_runs.append(len(cut := pieces_of(*a))) or cut)
    cut = logits()
    monkeypatch.setattr(runner, "pieces_of", lambda *a: [Piece(a[-1], np.arange(len(a[-1].rows), dtype=np.int32))])
    for ours, uncut in zip(cut, logits(), strict=True):
        equal(ours, uncut)
    assert num_runs[1] > 1
    assert num_runs[2] > 1
