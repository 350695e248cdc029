"""ChainRunner: a runner that notices whatever an engine does wrong with its KV cache.

It is the mock runner, whose every token is a hash chained through the KV cache, and it also checks each
batch against the border's rules. `alone` computes what a request must give, without engine and cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..batch import Batch, Paged, SampleRow, Sampling, SeqOutput
from ..builtin.mock import MockRunner, chain_logits, chain_states
from ..request import SamplingParams
from ..rng import uniforms
from ..sampler import NumpySampler


class ChainRunner(MockRunner):
    """A MockRunner that raises AssertionError for a batch that breaks the rules of the border."""

    num_executed = 0  # batches
    num_computed = 0  # tokens

    def execute(self, batch: Batch) -> list[SeqOutput]:
        self.check(batch)
        self.num_executed += 1
        self.num_computed += batch.num_tokens
        return super().execute(batch)

    def check(self, batch: Batch) -> None:
        info = self.info
        lanes = [s.lane for s in batch.seqs]
        assert batch.seqs, "an empty batch was executed"
        assert len(set(lanes)) == len(lanes), "two sequences share a lane"
        assert len({s.seq_id for s in batch.seqs}) == len(batch.seqs), "a sequence is scheduled twice"
        for s in batch.seqs:
            assert 0 <= s.lane < info.max_num_seqs, f"lane {s.lane} does not exist"
            assert 0 <= s.start < s.stop <= len(s.context) <= info.max_model_len, f"bad interval [{s.start}, {s.stop})"
            assert 0 <= s.num_logits <= s.stop - s.start, f"{s.num_logits} rows of {s.stop - s.start} tokens"
            assert s.samples == (s.num_logits > 0 and s.stop == len(s.context)), "a chunk samples"
            assert not s.context.flags.writeable, "a runner could write into the context"
            assert not s.blocks.flags.writeable, "a runner could write into the block table"
        positions = np.concatenate([np.arange(s.start, s.stop) for s in batch.seqs])
        assert np.array_equal(batch.packed.positions, positions), "positions are not those of the sequences"
        kv = info.kv
        if not isinstance(kv, Paged):
            return
        written: dict[int, int] = {}  # block -> the sequence that writes into it
        for s in batch.seqs:
            assert len(s.blocks) == -(-s.stop // kv.block_size), "blocks do not cover [0, stop)"
            assert ((s.blocks >= 0) & (s.blocks < kv.num_blocks)).all(), "a block that does not exist"
            assert len(set(s.blocks.tolist())) == len(s.blocks), "a block appears twice in a sequence"
            for block in s.blocks[s.start // kv.block_size :].tolist():
                assert block not in written, f"two sequences write into block {block}"
                written[block] = s.seq_id
        for s in batch.seqs:
            for block in s.blocks.tolist():
                assert written.get(block, s.seq_id) == s.seq_id, f"block {block} is read while another writes it"


def alone(
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    completion_index: int = 0,
    vocab_size: int = 125,
    model_seed: int = 0,
    eos_ids: tuple[int, ...] = (),
    max_len: int = 4096,
) -> list[int]:
    """The tokens that this request must give, one at a time from the whole prefix, stop strings aside."""
    eos_ids = () if params.ignore_eos else eos_ids
    stop_ids = frozenset(eos_ids) | frozenset(params.stop_token_ids)
    sampling = Sampling(params, eos_ids, stop_ids, params.seed or 0, completion_index, False)
    context = list(prompt)
    sampler = NumpySampler()
    while True:
        logits = chain_logits(chain_states(context, model_seed)[-1:], vocab_size)  # (1, vocab)
        uniform = float(uniforms([sampling.seed], [completion_index], [len(context)])[0])
        row = SampleRow(sampling, np.array(context, np.int32), len(prompt), uniform)
        context.append(int(sampler.sample(logits, [row]).ids[0]))
        num_output = len(context) - len(prompt)
        if context[-1] in stop_ids and num_output > params.min_tokens:
            break
        if num_output == params.max_tokens or len(context) >= max_len:
            break
    return context[len(prompt) :]
