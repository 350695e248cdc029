"""OnnxRunner: a paged graph, a KV pool bound to it, and the engine's border around both.

Knows no scheduler, no sampler, and not whether its graph was built or read.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nanovllm.batch import Packed, Paged, RunnerInfo
from nanovllm.errors import RunnerError
from nanovllm.hookspecs import Context
from nanovllm.runner import LogitsRunner
from nanovllm_models import num_kv_blocks

from .devices import check_max_num_seqs, inputs_of, is_batch_invariant, make_pool, pieces_of, slot_bytes
from .paged_model import PagedModel
from .session import SessionSettings
from .session import facts as session_facts


class OnnxRunner(LogitsRunner):
    """Raises ModelError for a model that cannot be used, ConfigError for what cannot be met."""

    def __init__(self, ctx: Context, model: PagedModel, settings: SessionSettings) -> None:
        self._facts = facts = model.facts
        check_max_num_seqs(facts, ctx.max_num_seqs)
        num_blocks = num_kv_blocks(slot_bytes(facts), ctx.cache, ctx.max_num_seqs, model.max_model_len)
        self._pool = make_pool(facts, num_blocks, settings)
        self._session, self._weight_bytes = model.open()
        self._bindings = self._pool.bind(self._session)
        self._info = RunnerInfo(
            vocab_size=facts.vocab_size,
            max_model_len=model.max_model_len,
            max_num_seqs=ctx.max_num_seqs,
            kv=Paged(facts.block_size, num_blocks),
            batch_invariant=is_batch_invariant(facts, settings),
            eos_ids=model.eos_ids,
            description={
                **model.about,
                "weights": facts.weights,
                "weight_bytes": self._weight_bytes,
                "kv_bytes": self._pool.nbytes,
                "blocks": num_blocks,
                **session_facts(settings, self._session),
            },
        )

    @property
    def info(self) -> RunnerInfo:
        return self._info

    def forward(self, packed: Packed) -> NDArray[np.float32]:
        """Logits (R, vocab) float32 for `packed.rows`; K and V of all T tokens go into the pool."""
        pieces = pieces_of(self._facts, self._weight_bytes, packed)
        if len(pieces) == 1:
            return self._run(packed)
        logits = np.empty((len(packed.rows), self._facts.vocab_size), np.float32)
        for piece, rows in pieces:
            logits[rows] = self._run(piece)
        return logits

    def _run(self, packed: Packed) -> NDArray[np.float32]:
        self._pool.clear_ahead(packed)
        inputs, binding = inputs_of(self._facts, packed, self._pool), self._bindings[0]
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        logits = np.empty((len(inputs["rows"]), self._facts.vocab_size), np.float32)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as e:  # ONNX Runtime's exceptions share no base class of their own
            raise RunnerError(f"ONNX Runtime failed in a step of {len(packed.input_ids)} tokens: {e}") from e
        self._bindings.append(self._bindings.pop(0))
        return logits[: len(packed.rows)]

    def close(self) -> None:
        for name in ("_bindings", "_session", "_pool"):
            vars(self).pop(name, None)
