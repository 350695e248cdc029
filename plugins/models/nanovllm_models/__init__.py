"""Models as data: a checkpoint directory -> what the decoder is, and its weights under one set of names.

No runtime here: see `nanovllm-runner-numpy` for one that interprets the result.
"""

from .checkpoint import Checkpoint, load_checkpoint
from .config import Config
from .model_info import ModelInfo
from .registry import Family, known_architectures
from .rope import rotary_frequencies
from .spec import (
    ACTIVATIONS,
    Attention,
    DecoderSpec,
    DynamicNTK,
    FeedForward,
    Learned,
    Linear,
    Llama3,
    LongRope,
    Norm,
    Rotary,
    Yarn,
)
from .weights_file import Tensor, open_weights

__all__ = [
    "ACTIVATIONS",
    "Attention",
    "Checkpoint",
    "Config",
    "DecoderSpec",
    "DynamicNTK",
    "Family",
    "FeedForward",
    "Learned",
    "Linear",
    "Llama3",
    "LongRope",
    "ModelInfo",
    "Norm",
    "Rotary",
    "Tensor",
    "Yarn",
    "known_architectures",
    "load_checkpoint",
    "open_weights",
    "rotary_frequencies",
]
