"""What each device needs of a runner: where the pool is, what a step is as inputs, and the bounds of both.

The graphs' side of it is `decoder.ATTENTIONS`. Of the three only the CPU has been run; see docs/runners/onnx.md.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from nanovllm.batch import Packed
from nanovllm.errors import ConfigError

from .cuda_attention import MAX_SEQS, cuda_inputs
from .device_pool import DevicePool
from .exported import Facts
from .kv_pool import KVPool
from .pieces import Cutter, Piece
from .precision import Precision, float_type
from .session import SessionSettings
from .step import step_inputs

Pool = KVPool | DevicePool


def slot_bytes(facts: Facts) -> int:
    """Of K and V of one token in all layers; DirectML has the pool twice."""
    copies = 2 if facts.device == "directml" else 1
    return copies * facts.kv_size * np.dtype(float_type(Precision(facts.weights), facts.device)).itemsize


def make_pool(facts: Facts, num_blocks: int, settings: SessionSettings) -> Pool:
    """Raises ConfigError if there is not so much memory."""
    sizes = (facts.num_layers, num_blocks, facts.num_kv_heads, facts.block_size, facts.head_size)
    try:
        if facts.device == "cpu":
            return KVPool(*sizes)
        device_id = int(settings.provider_options.get("device_id", 0))
        return DevicePool(facts.device, device_id, float_type(Precision(facts.weights), facts.device), *sizes)
    except Exception as e:  # MemoryError; ValueError: more than an address can say; of a device, ONNX Runtime's own
        raise ConfigError(
            f"the KV pool of {num_blocks} blocks does not fit in memory: {e}",
            hint="lower cache.num_blocks or cache.memory",
        ) from e


def check_max_num_seqs(facts: Facts, max_num_seqs: int) -> None:
    if facts.device == "cuda" and max_num_seqs > MAX_SEQS:
        raise ConfigError(
            f"scheduler.max_num_seqs is {max_num_seqs}, but paged attention on cuda takes {MAX_SEQS} sequences a step",
            hint=f"set scheduler.max_num_seqs to {MAX_SEQS} or less",
        )


def pieces_of(facts: Facts, weight_bytes: int, packed: Packed) -> list[Piece]:
    """The step in as many runs as it needs; CUDA's paged attention neither pads nor holds all scores at once."""
    if facts.device == "cuda":
        return [Piece(packed, np.arange(len(packed.rows), dtype=np.int32))]
    kv_numbers = 2 * facts.num_kv_heads * facts.head_size
    return Cutter(facts.num_heads, kv_numbers, weight_bytes // facts.num_layers, facts.windows)(packed)


def inputs_of(facts: Facts, packed: Packed, pool: Pool) -> Mapping[str, NDArray[np.int32]]:
    if facts.device == "cuda":
        return cuda_inputs(packed, pool.spare_block)
    # Of an odd number of rows, int4's product on the CPU rounds the last otherwise than all others.
    even = facts.device == "cpu" and facts.int4_block == 128
    return step_inputs(packed, facts.windows, pool.block_size, pool.spare_block, even)


def is_batch_invariant(facts: Facts, settings: SessionSettings) -> bool:
    """Are logits the same to the bit however the batch is composed, chunked and laid out?

    It holds by what ONNX Runtime's kernels for x86 do (tests/test_onnx_invariance.py); those for other processors
    have not been tried, and the user's options of the session may choose others (session.disable_prepacking does).
    How many tokens an expert is given, and so whether its last row is odd, is anyone's guess.
    """
    is_tried = facts.device == "cpu" and platform.machine().lower() in ("x86_64", "amd64")
    return is_tried and not settings.session_options and not (facts.has_experts and facts.int4_block == 128)
