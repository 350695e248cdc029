"""TorchRunner: a checkpoint on a device, a KV pool beside it, and the engine's border around both.

Knows no scheduler and no sampler. Logits agree with any other composition of the batch to the rounding of
the number type, not to the bit: the kernels are chosen by the shape of the operands.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from nanovllm.batch import Packed, Paged, RunnerInfo
from nanovllm.errors import ConfigError, RunnerDead, RunnerError
from nanovllm.hookspecs import CacheOptions, Context
from nanovllm.runner import LogitsRunner
from nanovllm.threads import available_threads
from nanovllm_models import Checkpoint, load_checkpoint, model_len, num_kv_blocks

from .device import DTYPES, check_int8, find_device, find_dtype, memory_for, use_threads
from .kv_pool import KVPool
from .model import Model
from .weights import Weights


class TorchRunner(LogitsRunner):
    """Raises ModelError for a model that cannot be used, ConfigError for what cannot be met."""

    def __init__(self, ctx: Context) -> None:
        options = ctx.options
        self._device = find_device(options.device)
        dtype = find_dtype(options.dtype, self._device)
        is_int8 = options.weights == "int8"
        if is_int8:
            check_int8(self._device)
        self._threads = ctx.threads or available_threads()
        use_threads(self._threads)

        checkpoint = load_checkpoint(ctx.path or ctx.model)
        spec = checkpoint.spec
        max_model_len = model_len(checkpoint.name, spec.max_positions, ctx.max_model_len)
        self._dtype_name = next(name for name, known in DTYPES.items() if known == dtype)
        weights = Weights(checkpoint.weights, dtype, self._device, is_int8)
        size = f"{spec.num_parameters:,} parameters in {'int8' if is_int8 else self._dtype_name}"
        hint = "free memory, or choose smaller numbers (runner.dtype, runner.weights: int8)"
        with memory_for(f"the model of {size} on {self._device}", hint):
            self._model = Model(spec, weights, max_model_len)

        cache, slot_bytes = ctx.cache, spec.kv_size * dtype.itemsize
        if self._device.type == "cuda" and cache.memory is None and cache.num_blocks is None:
            num_tokens = min(ctx.max_num_batched_tokens, max_model_len)
            cache = replace(cache, memory=self._memory_after_warm_up(num_tokens, cache, slot_bytes, dtype))
        num_blocks = num_kv_blocks(slot_bytes, cache, ctx.max_num_seqs, max_model_len)
        size = f"{num_blocks} blocks, {num_blocks * cache.block_size * slot_bytes:,} bytes,"
        with memory_for(f"the KV pool of {size}", "lower cache.num_blocks or cache.memory"):
            self._pool = self._make_pool(num_blocks, cache.block_size, dtype)
        self._model.open(self._pool)
        self._info = RunnerInfo(
            vocab_size=spec.vocab_size,
            max_model_len=max_model_len,
            max_num_seqs=ctx.max_num_seqs,
            kv=Paged(cache.block_size, num_blocks),
            sampler="torch",
            eos_ids=checkpoint.eos_ids,
            description=self._describe(checkpoint, weights),
        )

    @property
    def info(self) -> RunnerInfo:
        return self._info

    def forward(self, packed: Packed) -> torch.Tensor:
        """Logits (R, vocab) float32 on the device for `packed.rows`; K and V of all T tokens go into the pool."""
        use_threads(self._threads)
        hint = "lower cache.memory or scheduler.max_num_batched_tokens"
        try:
            with memory_for(f"a step of {len(packed.input_ids)} tokens on {self._device}", hint, RunnerError):
                return self._model.forward(packed)
        except torch.AcceleratorError as e:  # the context of a GPU that failed once computes nothing any more
            raise RunnerDead(f"{self._device} failed: {str(e).splitlines()[0]}", hint="start again") from e

    def close(self) -> None:
        for name in ("_model", "_pool"):
            vars(self).pop(name, None)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _make_pool(self, num_blocks: int, block_size: int, dtype: torch.dtype) -> KVPool:
        spec = self._model.spec
        heads, size = spec.attention.num_kv_heads, spec.attention.head_size
        return KVPool(spec.num_layers, num_blocks, heads, block_size, size, dtype, self._device)

    def _memory_after_warm_up(self, num_tokens: int, cache: CacheOptions, slot_bytes: int, dtype: torch.dtype) -> int:
        """Bytes for the KV pool: a share of what is free, less what a step of so many tokens needs besides.

        Raises ConfigError if that is not a block.
        """
        packed = first_step(num_tokens, cache.block_size)
        with memory_for(f"a first step of {num_tokens} tokens", "lower scheduler.max_num_batched_tokens"):
            self._model.open(self._make_pool(packed.tables.size, cache.block_size, dtype))
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
            self._model.forward(packed)
        needed = torch.cuda.max_memory_allocated(self._device) - before
        self._model.close()
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self._device)
        left = int(free * cache.gpu_share) - needed
        if left < slot_bytes * cache.block_size:
            raise ConfigError(
                f"of the {free:,} bytes that are free on {self._device} beside the model, cache.gpu_share of "
                f"{cache.gpu_share} less {needed:,} for a step of {num_tokens} tokens does not hold one KV block of "
                f"{slot_bytes * cache.block_size:,}",
                hint="raise cache.gpu_share, lower scheduler.max_num_batched_tokens, or free memory of the GPU",
            )
        return left

    def _describe(self, checkpoint: Checkpoint, weights: Weights) -> dict[str, object]:
        return {
            **checkpoint.facts,
            "dtype": f"{checkpoint.dtype} in the file, {self._dtype_name} in memory",
            "weights": "int8" if weights.is_int8 else self._dtype_name,
            "weight_bytes": weights.nbytes,
            "kv_bytes": self._pool.nbytes,
            "blocks": self._pool.num_blocks,
            "torch": torch.__version__,
            "device": str(self._device),
            "threads": self._threads,
        }


def first_step(num_tokens: int, block_size: int) -> Packed:
    """One sequence of so many tokens in the first blocks, one row of logits wanted."""
    numbers = np.arange(num_tokens, dtype=np.int32)
    ends = np.array([0, num_tokens], np.int32)
    tables = np.arange(-(-num_tokens // block_size), dtype=np.int32)[None]
    return Packed(np.zeros_like(numbers), numbers, numbers, ends, ends[1:], ends[:1], tables, numbers[-1:])
