"""`attend` alone against the formula: windows, soft caps and biases in every combination, in chunks and decodes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.batch import Packed
from nanovllm_runner_numpy.attention import KVPool, Scoring, attend, plan_attention
from nanovllm_runner_numpy.blas import Blas

KV_HEADS, GROUP, SIZE, BLOCK_SIZE, NUM_BLOCKS, MAX_LEN = 2, 3, 4, 4, 40, 32
BLAS = Blas()


def packed_of(spans: list[tuple[int, int]], rng: np.random.Generator) -> Packed:
    """Sequences that compute positions [start, stop), over blocks in random order."""
    free = rng.permutation(NUM_BLOCKS).astype(np.int32)
    width = max(-(-stop // BLOCK_SIZE) for _, stop in spans)
    tables = np.full((len(spans), width), -1, np.int32)
    for table, (_, stop) in zip(tables, spans, strict=True):
        count = -(-stop // BLOCK_SIZE)
        table[:count], free = free[:count], free[count:]
    positions = np.concatenate([np.arange(*span, dtype=np.int32) for span in spans])
    counts = [stop - start for start, stop in spans]
    owner = np.repeat(np.arange(len(spans)), counts)
    slots = tables[owner, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    nothing = np.empty(0, np.int32)
    q_start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    kv_lens = np.array([stop for _, stop in spans], np.int32)
    return Packed(nothing, positions, slots, q_start, kv_lens, nothing, tables, nothing)


@given(
    spans=st.lists(
        st.tuples(st.integers(0, MAX_LEN - 1), st.sampled_from([1, 1, 2, 9])).map(
            lambda s: (s[0], min(sum(s), MAX_LEN))
        ),
        min_size=1,
        max_size=5,
    ),
    window=st.sampled_from([None, 1, 5]),
    soft_cap=st.sampled_from([None, 1.5]),
    has_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_combination_equals_the_formula(spans, window, soft_cap, has_bias, seed):
    rng = np.random.default_rng(seed)
    packed = packed_of(spans, rng)
    pool = KVPool(*rng.standard_normal((2, NUM_BLOCKS, BLOCK_SIZE, KV_HEADS, SIZE), dtype=np.float32))
    bias = rng.standard_normal((KV_HEADS, GROUP, MAX_LEN), dtype=np.float32) if has_bias else None
    q = rng.standard_normal((len(packed.positions), KV_HEADS * GROUP, SIZE), dtype=np.float32)
    out = np.empty_like(q)
    before = pool.k.copy(), pool.v.copy()
    attend(plan_attention(packed, window, pool, Scoring(soft_cap, bias)), q, pool, out, BLAS)

    np.testing.assert_array_equal(pool.k, before[0])
    keys, values = (x.reshape(-1, KV_HEADS, SIZE).astype(np.float64) for x in before)
    for s, (start, stop) in enumerate(spans):
        for p in range(start, stop):
            t = packed.q_start[s] + p - start
            seen = np.arange(0 if window is None else max(0, p - window + 1), p + 1)
            slots = packed.tables[s, seen // BLOCK_SIZE] * BLOCK_SIZE + seen % BLOCK_SIZE
            for head in range(KV_HEADS * GROUP):
                kv, member = divmod(head, GROUP)
                scores = keys[slots, kv] @ q[t, head]
                if bias is not None:
                    scores = scores + bias[kv, member, seen]
                if soft_cap is not None:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                weights = np.exp(scores - scores.max())
                wanted = weights / weights.sum() @ values[slots, kv]
                np.testing.assert_allclose(out[t, head], wanted, rtol=0, atol=2e-5)
