"""How long a sequence may be, and how many KV blocks there are: the same rules for every local runner.

Knows numbers of a model and of the configuration, and no runtime.
"""

from __future__ import annotations

from nanovllm.errors import ConfigError
from nanovllm.hookspecs import CacheOptions

DEFAULT_KV_BYTES = 2**30  # at most, where the configuration names neither a number of blocks nor bytes


def model_len(name: str, positions: int, max_model_len: int | None) -> int:
    """Tokens, prompt and answer: the user's limit, or the model's. Raises ConfigError for more than the model has."""
    if max_model_len is not None and max_model_len > positions:
        raise ConfigError(
            f"max_model_len is {max_model_len}, but {name} has {positions} positions",
            hint=f"set max_model_len to {positions} or less",
        )
    return max_model_len or positions


def num_kv_blocks(slot_bytes: int, cache: CacheOptions, max_num_seqs: int, max_model_len: int) -> int:
    """The pool's size: as configured, else for max_num_seqs full sequences but at most DEFAULT_KV_BYTES.

    `slot_bytes`: of K and V of one token in all layers. Raises ConfigError if not even one block fits `cache.memory`.
    """
    if cache.num_blocks is not None:
        return cache.num_blocks
    block_bytes = slot_bytes * cache.block_size
    if cache.memory is not None:
        if cache.memory < block_bytes:
            raise ConfigError(
                f"cache.memory is {cache.memory:,} bytes, but one block of {cache.block_size} tokens takes "
                f"{block_bytes:,} in this model",
                hint=f"set cache.memory to at least {block_bytes:,} or lower cache.block_size",
            )
        return cache.memory // block_bytes
    blocks_per_seq = -(-max_model_len // cache.block_size)
    return max(1, min(max_num_seqs * blocks_per_seq, DEFAULT_KV_BYTES // block_bytes))
