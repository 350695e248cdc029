"""NumpyRunner: a checkpoint, a KV pool and the engine's border around `Model`.

Knows no scheduler and no sampler. Logits agree with any other composition of the batch to float32
rounding, not to the bit: BLAS chooses its kernels by the shape of the operands.
"""

from __future__ import annotations

import numpy as np

from nanovllm.batch import Packed, Paged, RunnerInfo
from nanovllm.errors import ConfigError
from nanovllm.hookspecs import Context
from nanovllm.runner import LogitsRunner
from nanovllm_models import Checkpoint, load_checkpoint, model_len, num_kv_blocks

from .attention import KVPool
from .blas import Blas
from .model import Model
from .ops import FloatArray

# A step of fewer multiplications (about a millisecond of one core) runs on one BLAS thread: a second one saves
# little, and spins waiting for its partner where the cores have other work, which makes such steps many times slower.
SMALL_STEP = 50_000_000


class NumpyRunner(LogitsRunner):
    """Raises ModelError for a model that cannot be used, ConfigError for sizes that cannot be met."""

    def __init__(self, ctx: Context) -> None:
        checkpoint = load_checkpoint(ctx.path or ctx.model)
        spec, block_size = checkpoint.spec, ctx.cache.block_size
        max_model_len = model_len(checkpoint.name, spec.max_positions, ctx.max_model_len)
        num_blocks = num_kv_blocks(4 * spec.kv_size, ctx.cache, ctx.max_num_seqs, max_model_len)
        self._blas, self._threads = Blas(), ctx.threads
        self._num_parameters = checkpoint.num_parameters
        self._model = Model(spec, checkpoint.weights, max_model_len, self._blas)
        shape = (num_blocks, block_size, spec.attention.num_kv_heads, spec.attention.head_size)
        # zeros: the system hands out such pages when they are first written, so an unused pool costs nothing.
        try:
            self._pools = [
                KVPool(np.zeros(shape, np.float32), np.zeros(shape, np.float32)) for _ in range(spec.num_layers)
            ]
        except (MemoryError, ValueError) as e:  # ValueError: more than an address can say
            raise ConfigError(
                f"the KV pool of {num_blocks} blocks does not fit in memory: {e}",
                hint="lower cache.num_blocks or cache.memory",
            ) from e
        self._info = RunnerInfo(
            vocab_size=spec.vocab_size,
            max_model_len=max_model_len,
            max_num_seqs=ctx.max_num_seqs,
            kv=Paged(block_size, num_blocks),
            eos_ids=checkpoint.eos_ids,
            description=self._describe(checkpoint, num_blocks),
        )

    @property
    def info(self) -> RunnerInfo:
        return self._info

    def forward(self, packed: Packed) -> FloatArray:
        """Logits (R, vocab) float32 for `packed.rows`; K and V of all T tokens go into the pool."""
        is_small = len(packed.input_ids) * self._num_parameters < SMALL_STEP
        # inf and NaN travel to the logits, where the sampler names the row that has them.
        with self._blas.limit(1 if is_small else self._threads), np.errstate(all="ignore"):
            return self._model.forward(packed, self._pools)

    def close(self) -> None:
        self._pools = []

    def _describe(self, checkpoint: Checkpoint, num_blocks: int) -> dict[str, object]:
        return {
            **checkpoint.facts,
            "dtype": f"{checkpoint.dtype} in the file, float32 in memory",
            "weight_bytes": checkpoint.num_parameters * 4,  # each once, float32
            "kv_bytes": sum(pool.k.nbytes + pool.v.nbytes for pool in self._pools),
            "blocks": num_blocks,
            "device": "cpu",
            "blas": self._blas.name,
            "threads": self._threads or self._blas.threads,
        }
