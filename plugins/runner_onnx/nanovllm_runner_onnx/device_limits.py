"""What CUDA and DirectML cannot run of what a spec can say. Refused by name, before any weight is read."""

from __future__ import annotations

from nanovllm.errors import ConfigError, UnsupportedModelError
from nanovllm_models import DecoderSpec, Experts

MAX_HEAD_SIZE = 256  # of CUDA's PagedAttention; a multiple of 8
MIN_BLOCK = 16  # tokens; a power of two
INSTEAD = "choose device: cpu"


def check_limits(spec: DecoderSpec, device: str, block_size: int) -> None:
    """Raises UnsupportedModelError for the model, ConfigError for what a setting can cure."""
    if device == "cpu":
        return
    if any(isinstance(mlp, Experts) for mlp in spec.mlps):
        # An expert that no token chose is a product without rows, of which the providers promise nothing.
        raise UnsupportedModelError(f"device: {device} has no mixture of experts", hint=INSTEAD)
    if device != "cuda":
        return
    if spec.attention.alibi is not None:
        raise UnsupportedModelError("device: cuda has no attention with ALiBi", hint=INSTEAD)
    size = spec.attention.head_size
    if size % 8 or size > MAX_HEAD_SIZE:
        raise UnsupportedModelError(
            f"device: cuda takes heads of a multiple of 8 up to {MAX_HEAD_SIZE}, and these have {size}", hint=INSTEAD
        )
    if block_size < MIN_BLOCK or block_size & (block_size - 1):
        raise ConfigError(
            f"block_size is {block_size}, but device: cuda needs a power of two from {MIN_BLOCK} on",
            hint=f"choose block_size: {MIN_BLOCK}",
        )
