"""OnnxRunner: a checkpoint as an ONNX graph, a KV pool bound to it, and the engine's border around both.

Knows no scheduler and no sampler. Logits agree with any other composition of the batch to float32
rounding, not to the bit: the kernels are chosen by the shape of the operands.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nanovllm.batch import Packed, Paged, RunnerInfo
from nanovllm.errors import ConfigError, RunnerError
from nanovllm.hookspecs import Context
from nanovllm.runner import LogitsRunner
from nanovllm_models import Checkpoint, load_checkpoint, model_len, num_kv_blocks

from .kv_pool import KVPool
from .pieces import Cutter
from .session import available_threads, check_providers, import_onnxruntime, open_session
from .step import step_inputs


class OnnxRunner(LogitsRunner):
    """Raises ModelError for a model that cannot be used, ConfigError for what cannot be met."""

    def __init__(self, ctx: Context) -> None:
        providers = check_providers(ctx.options.providers)
        checkpoint = load_checkpoint(ctx.path or ctx.model)
        spec, block_size = checkpoint.spec, ctx.cache.block_size
        max_model_len = model_len(checkpoint, ctx.max_model_len)
        num_blocks = num_kv_blocks(spec, ctx.cache, ctx.max_num_seqs, max_model_len)
        heads, head_size = spec.attention.num_kv_heads, spec.attention.head_size
        try:
            self._pool = KVPool(spec.num_layers, num_blocks, heads, block_size, head_size)
        except (MemoryError, ValueError) as e:  # ValueError: more than an address can say
            raise ConfigError(
                f"the KV pool of {num_blocks} blocks does not fit in memory: {e}",
                hint="lower cache.num_blocks or cache.memory",
            ) from e
        from .decoder import build_decoder  # imports onnx

        self._threads = ctx.threads or available_threads()
        graph = build_decoder(spec, checkpoint.weights, max_model_len, block_size)
        self._session = open_session(graph, providers, self._threads)
        self._windows = tuple(dict.fromkeys(spec.attention.windows))
        self._vocab_size = spec.vocab_size
        self._cut = Cutter(spec.attention.num_heads, 2 * heads * head_size)
        self._binding = self._session.io_binding()
        value_of = import_onnxruntime().OrtValue.ortvalue_from_numpy
        for i in range(spec.num_layers):
            for kind, array in zip("kv", self._pool.layer(i), strict=True):
                value = value_of(array)
                self._binding.bind_ortvalue_input(f"{kind}.{i}", value)
                self._binding.bind_ortvalue_output(f"{kind}.{i}.after", value)  # in place
        self._info = RunnerInfo(
            vocab_size=spec.vocab_size,
            max_model_len=max_model_len,
            max_num_seqs=ctx.max_num_seqs,
            kv=Paged(block_size, num_blocks),
            eos_ids=checkpoint.eos_ids,
            description=self._describe(checkpoint),
        )

    @property
    def info(self) -> RunnerInfo:
        return self._info

    def forward(self, packed: Packed) -> NDArray[np.float32]:
        """Logits (R, vocab) float32 for `packed.rows`; K and V of all T tokens go into the pool."""
        logits = [self._run(piece) for piece in self._cut(packed)]
        return logits[0] if len(logits) == 1 else np.concatenate(logits)

    def _run(self, packed: Packed) -> NDArray[np.float32]:
        self._pool.clear_ahead(packed)
        inputs = step_inputs(packed, self._windows, self._pool.block_size, self._pool.spare_block)
        for name, array in inputs.items():
            self._binding.bind_cpu_input(name, array)
        logits = np.empty((len(inputs["rows"]), self._vocab_size), np.float32)
        self._binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as e:  # ONNX Runtime's exceptions share no base class of their own
            raise RunnerError(f"ONNX Runtime failed in a step of {len(packed.input_ids)} tokens: {e}") from e
        return logits[: len(packed.rows)]

    def close(self) -> None:
        del self._binding, self._session, self._pool

    def _describe(self, checkpoint: Checkpoint) -> dict[str, object]:
        return {
            **checkpoint.facts,
            "dtype": f"{checkpoint.dtype} in the file, float32 in memory",
            "weight_bytes": checkpoint.num_parameters * 4,  # each once, float32
            "kv_bytes": self._pool.array.nbytes,
            "blocks": self._pool.num_blocks,
            "onnxruntime": import_onnxruntime().__version__,
            "providers": self._session.get_providers(),
            "threads": self._threads,
        }
